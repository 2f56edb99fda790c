"""The options that the job's other commands share, with the same words for refusals."""

from __future__ import annotations

from benchmarks.harness.arguments import OptionError, nearest
from benchmarks.multilingual.corpus import known_languages


def language_code(option: str, text: str) -> str:
    """The value of an option that names one language."""
    known = known_languages()
    if text not in known:
        raise OptionError(
            f"'{option}' must be the code of one of simplemma's {len(known)} languages (got {text!r}; "
            f"{nearest(text, known)})"
        )
    return text


def language_codes(text: str) -> tuple[str, ...]:
    """The value of ``--languages``: codes separated by commas, sorted."""
    known = known_languages()
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise OptionError(
                f"'--languages' must be codes of simplemma's {len(known)} languages, separated by commas "
                f"(got {name!r}; {nearest(name, known)})"
            )
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise OptionError(f"'--languages' must name each language once (got {twice[0]!r} more than once)")
    return tuple(sorted(names))
