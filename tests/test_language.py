"""Prose keeps to a budget of vague words, and of sentences that open with one.

A sentence whose subject is a clause ("what is tried in vain") costs a reader a second look. The count takes every
docstring and comment of a package, and every Markdown file without its code.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent
VAGUE = re.compile(r"\b(?:what|whatever|where)\b", re.IGNORECASE)
OPENING = re.compile(r"(?:What|Where|Whether|Which|Whatever|Whom?|Of|How|That|Those|As|So|To) ")
SENTENCE_END = re.compile(r"(?<=[.!?:;])\s+")
# Shorter sentences and comments are labels.
FEWEST_WORDS = 4
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
# Code blocks, and comments, which are for programs: a quoted figure's source has a condition after its column.
NOT_PROSE = re.compile(r"^ *```.*?^ *```|<!--.*?-->", re.MULTILINE | re.DOTALL)
NAMED_FILES = 5


class Budget(NamedTuple):
    """The most vague words in 1,000 words, and the largest share of vague openings in percent."""

    vague: float = 6.0
    openings: float = 5.0


class Count(NamedTuple):
    words: int = 0
    vague: int = 0
    sentences: int = 0
    openings: int = 0

    def rates(self) -> Budget:
        return Budget(1000 * self.vague / self.words, 100 * self.openings / self.sentences)


def texts_of_code(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DOCUMENTED) and (text := ast.get_docstring(node)):
            yield text
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        # A comment's first word is its sign.
        if token.type == tokenize.COMMENT and len(token.string.split()) > FEWEST_WORDS:
            yield token.string.lstrip("# ")


def texts_of(file: Path) -> Iterator[str]:
    source = file.read_text(encoding="utf-8")
    if file.suffix == ".py":
        yield from texts_of_code(source)
    else:
        yield NOT_PROSE.sub("", source)


def count(file: Path) -> Count:
    sentences = [each for text in texts_of(file) for each in SENTENCE_END.split(text.replace("\n", " "))]
    sentences = [each for each in sentences if len(each.split()) >= FEWEST_WORDS]
    return Count(
        words=sum(len(each.split()) for each in sentences),
        vague=sum(len(VAGUE.findall(each)) for each in sentences),
        sentences=len(sentences),
        openings=sum(OPENING.match(each) is not None for each in sentences),
    )


def files_of(place: Path) -> list[Path]:
    return [place] if place.is_file() else sorted(each for each in place.rglob("*") if each.suffix in {".py", ".md"})


def require_plain_words(place: Path, budget: Budget) -> None:
    """Fail if a file or a folder is beyond the budget, and name its worst files."""
    counts = {file: count(file) for file in files_of(place)}
    total = Count(*map(sum, zip(*counts.values(), strict=True)))
    assert total.words, f"{place} must have docstrings, comments or text"
    found = total.rates()
    if found.vague <= budget.vague and found.openings <= budget.openings:
        return
    worst = sorted(counts, key=lambda file: counts[file].vague + counts[file].openings, reverse=True)[:NAMED_FILES]
    lines = (f"{file}: {counts[file].vague} words, {counts[file].openings} openings" for file in worst)
    pytest.fail(
        f"{place.name}: 'what' and 'where' {found.vague:.1f} times in 1,000 words (at most {budget.vague:g}), "
        f"{found.openings:.1f} % of sentences open with such a word (at most {budget.openings:g}); most in\n"
        + "\n".join(lines),
        pytrace=False,
    )


@pytest.mark.parametrize("name", ["celmoe", "benchmarks", "tests", "README.md", "notes"])
def test_prose_keeps_to_the_budget(name):
    require_plain_words(ROOT / name, Budget())


# --- the check can fail ----------------------------------------------------------------------------------------------

PLAIN = "Each checkpoint repeats this call, so a failed attempt is repeated identically."
VAGUE_WORDS = "A checkpoint repeats what it ran, and it begins where the call began."
OPENINGS = "Of such a call a checkpoint repeats each part. Whether the call failed is all the same."


def write(place: Path, text: str) -> Path:
    match place.suffix:
        case ".py":
            place.write_text(f'class Call:\n    """Repeats.\n\n    {text}\n    """\n\n    # {text}\n    parts = 1\n')
        case _:
            place.write_text(text)
    return place


@pytest.mark.parametrize("name", ["call.py", "call.md"])
def test_plain_prose_passes(tmp_path, name):
    write(tmp_path / name, PLAIN)
    require_plain_words(tmp_path, Budget())


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("call.py", VAGUE_WORDS, "153.8 times in 1,000 words (at most 6), 0.0 %"),
        ("call.md", VAGUE_WORDS, "153.8 times in 1,000 words (at most 6), 0.0 %"),
        ("call.py", OPENINGS, "0.0 times in 1,000 words (at most 6), 100.0 %"),
        ("call.md", OPENINGS, "0.0 times in 1,000 words (at most 6), 100.0 %"),
    ],
)
def test_vague_prose_is_refused(tmp_path, name, text, expected):
    with pytest.raises(pytest.fail.Exception) as caught:
        require_plain_words(write(tmp_path / name, text), Budget())
    assert f"{name}: 'what' and 'where' {expected} of sentences open with such a word (at most 5)" in str(caught.value)


def test_the_worst_files_are_named_first(tmp_path):
    for place, times in enumerate((1, 3, 2)):
        write(tmp_path / f"{place}.md", " ".join([VAGUE_WORDS] * times))
    with pytest.raises(pytest.fail.Exception) as caught:
        require_plain_words(tmp_path, Budget())
    assert [line.split(": ") for line in str(caught.value).splitlines()[1:]] == [
        [f"{tmp_path / '1.md'}", "6 words, 0 openings"],
        [f"{tmp_path / '2.md'}", "4 words, 0 openings"],
        [f"{tmp_path / '0.md'}", "2 words, 0 openings"],
    ]


def test_code_in_markdown_is_no_prose(tmp_path):
    code = f"```python\n# {VAGUE_WORDS}\n```\n\n  ```\n{OPENINGS}\n  ```\n<!-- steps.csv: 2 = rows where\nE=4 -->\n"
    require_plain_words(write(tmp_path / "call.md", f"{PLAIN}\n\n{code}"), Budget(0.0, 0.0))
    assert count(tmp_path / "call.md") == count(write(tmp_path / "plain.md", PLAIN))


def test_code_is_no_prose(tmp_path):
    file = tmp_path / "call.py"
    file.write_text(f'"""{PLAIN}"""\nwhere = "{VAGUE_WORDS}"  # what it is\n')
    assert count(file) == count(write(tmp_path / "plain.md", PLAIN))


@pytest.mark.parametrize("name", ["empty.py", "empty.md"])
def test_nothing_to_read_is_a_fault(tmp_path, name):
    (tmp_path / name).write_text("")
    with pytest.raises(AssertionError, match="must have docstrings, comments or text"):
        require_plain_words(tmp_path, Budget())
