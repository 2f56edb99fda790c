"""The words: read from the installed package simplemma, sampled, split by lemma and cached.

simplemma ships one dictionary a language, form -> lemma (54 languages, 37.9 million pairs). We draw at most
`FORMS_PER_LANGUAGE` pairs of each, uniformly and with a fixed seed, and keep them as the dictionary gives them: pairs
whose lemma equals the form included, case untouched. The cap balances the languages: all but the smallest few give
equally many pairs, and the smallest give all they have. A longer run draws more pairs, for training alone: its
validation and test words are those of any run.

The split is by lemma: a stable hash of the case-folded lemma decides, so that no lemma is on two sides, neither
within a language nor between two languages that share the word.

Cached samples derive from data under licences of their own (see ``notes/data.md``): they stay in the user's cache.
"""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import compress
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any, TypeVar
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
from simplemma.strategies.dictionaries.dictionary_factory import SUPPORTED_LANGUAGES, DefaultDictionaryFactory

from benchmarks.harness.interrupts import interrupts_held
from benchmarks.multilingual.words.rules import FIELD_SEPARATOR, EditRule, find_rule

FORMAT = 1
FORMS_PER_LANGUAGE = 40_000
TRAIN, VALIDATION, TEST = 0, 1, 2
# Percent of the lemmas; the rest trains.
VALIDATION_SHARE = 4
TEST_SHARE = 8
BUILDERS = 2

LINE = "\n"

Content = TypeVar("Content")


@dataclass(frozen=True, kw_only=True)
class LanguageSample:
    """The sampled pairs of one language. N pairs, U distinct edit rules.

    ``forms`` and ``lemmas`` are aligned [N]; ``rules`` [U] are distinct; ``rule_ids`` int32 [N] points into them;
    ``split`` uint8 [N] is TRAIN, VALIDATION or TEST. ``dictionary_size`` counts the pairs that were drawn from.
    """

    language: str
    forms: list[str]
    lemmas: list[str]
    rules: list[EditRule]
    rule_ids: npt.NDArray[np.int32]
    split: npt.NDArray[np.uint8]
    dictionary_size: int


def split_of(lemma: str) -> int:
    """On which side every form of this lemma is."""
    share = zlib.crc32(lemma.casefold().encode()) % 100
    if share < TEST_SHARE:
        return TEST
    return VALIDATION if share < TEST_SHARE + VALIDATION_SHARE else TRAIN


def known_languages() -> list[str]:
    """The languages that the installed simplemma has dictionaries for, sorted."""
    return sorted(SUPPORTED_LANGUAGES)


def cache_path(folder: Path, language: str, cap: int, kind: str = f"format-{FORMAT}") -> Path:
    """The file of one language's sample, or of data made from the sample.

    The name holds everything that the content depends on.
    """
    return folder / f"{language}-simplemma-{version('simplemma')}-cap-{cap}-{kind}.npz"


def draw_sample(language: str, cap: int) -> LanguageSample:
    """At most ``cap`` pairs of this language's dictionary, in its own order.

    Beyond the first `FORMS_PER_LANGUAGE` drawn, pairs of training lemmas alone are kept.
    """
    dictionary = DefaultDictionaryFactory(1).get_dictionary(language)
    size = len(dictionary)
    # The place of each pair in the order of the draw.
    drawn = np.empty(size, dtype=np.int64)
    drawn[np.random.default_rng(zlib.crc32(language.encode())).permutation(size)] = np.arange(size)
    chosen = drawn < cap
    forms: list[str] = []
    lemmas: list[str] = []
    # Looking up only the chosen forms spares decoding the millions of others.
    for form, place in zip(compress(dictionary, chosen.tolist()), drawn[chosen].tolist(), strict=True):
        lemma = dictionary[form]
        if place >= FORMS_PER_LANGUAGE and split_of(lemma) != TRAIN:
            continue
        if not any(mark in text for mark in (LINE, FIELD_SEPARATOR) for text in (form, lemma)):
            forms.append(form)
            lemmas.append(lemma)
    ids: dict[EditRule, int] = {}
    rule_ids = [ids.setdefault(find_rule(form, lemma), len(ids)) for form, lemma in zip(forms, lemmas, strict=True)]
    return LanguageSample(
        language=language,
        forms=forms,
        lemmas=lemmas,
        rules=list(ids),
        rule_ids=np.array(rule_ids, dtype=np.int32),
        split=np.array([split_of(lemma) for lemma in lemmas], dtype=np.uint8),
        dictionary_size=size,
    )


def fewer(sample: LanguageSample, words: int | None) -> LanguageSample:
    """The sample with so many of its training words, drawn by the language's name; all words of the other sides stay.

    Fewer words are among more words. ``None``, and more than there are, means all.
    """
    trained = np.flatnonzero(sample.split == TRAIN)
    if words is None or words >= len(trained):
        return sample
    drawn = np.random.default_rng(zlib.crc32(sample.language.encode())).permutation(trained)[:words]
    kept = np.sort(np.concatenate((drawn, np.flatnonzero(sample.split != TRAIN))))
    return replace(
        sample,
        forms=[sample.forms[each] for each in kept.tolist()],
        lemmas=[sample.lemmas[each] for each in kept.tolist()],
        rule_ids=sample.rule_ids[kept],
        split=sample.split[kept],
    )


def _pack(texts: Sequence[str]) -> npt.NDArray[np.uint8]:
    return np.frombuffer(LINE.join(texts).encode(), dtype=np.uint8)


def _unpack(blob: npt.NDArray[np.uint8]) -> list[str]:
    return blob.tobytes().decode().split(LINE)


def save_arrays(path: Path, **arrays: npt.NDArray[Any]) -> None:
    """Write the file in one step, so that an interrupted or a second run never meets half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.stem, suffix=".part", delete=False) as part:
        try:
            np.savez(part, allow_pickle=False, **arrays)
            part.close()
            Path(part.name).replace(path)
        except BaseException:
            part.close()
            Path(part.name).unlink(missing_ok=True)
            raise


def save_sample(sample: LanguageSample, path: Path) -> None:
    """Write the sample's file, whole or not at all."""
    save_arrays(
        path,
        forms=_pack(sample.forms),
        lemmas=_pack(sample.lemmas),
        rules=_pack([rule.to_text() for rule in sample.rules]),
        rule_ids=sample.rule_ids,
        split=sample.split,
        dictionary_size=np.array(sample.dictionary_size),
    )


def load_sample(language: str, path: Path) -> LanguageSample:
    """What `save_sample` wrote."""
    # Opened here, since NumPy leaves a file that is no archive open.
    with path.open("rb") as file, np.load(file) as arrays:
        return LanguageSample(
            language=language,
            forms=_unpack(arrays["forms"]),
            lemmas=_unpack(arrays["lemmas"]),
            rules=[EditRule.from_text(text) for text in _unpack(arrays["rules"])],
            rule_ids=arrays["rule_ids"],
            split=arrays["split"],
            dictionary_size=int(arrays["dictionary_size"]),
        )


def cached(load: Callable[[], Content]) -> Content | None:
    """The file's content, or None if the file is missing or damaged."""
    try:
        return load()
    except (OSError, EOFError, ValueError, KeyError, TypeError, NotImplementedError, BadZipFile, zlib.error):
        return None


def cached_sample(language: str, path: Path) -> LanguageSample | None:
    """The sample that `save_sample` wrote, or None if the file is missing or damaged."""
    return cached(partial(load_sample, language, path))


def _draw(cap: int, folder: Path, language: str) -> str:
    save_sample(draw_sample(language, cap), cache_path(folder, language, cap))
    return language


def build_samples(
    languages: Sequence[str], cap: int, folder: Path, on_built: Callable[[str], None], builders: int = BUILDERS
) -> None:
    """Draw and cache the samples of these languages, several at a time."""
    in_builders(partial(_draw, cap, folder), languages, on_built, builders)


def in_builders(
    build: Callable[[str], str], languages: Sequence[str], on_built: Callable[[str], None], builders: int = BUILDERS
) -> None:
    """Call ``build`` for each language, in several processes at a time.

    A dictionary is only ever in the memory of the process that draws from it. Processes are spawned: forking one that
    already runs torch's threads is not safe. The largest files go first, so that none is left over at the end.
    """
    if len(languages) <= 1 or builders <= 1:
        for language in languages:
            on_built(build(language))
        return
    # Known to be the largest dictionaries by far; the order is a matter of speed alone.
    ordered = sorted(languages, key=lambda language: (language not in {"sw", "pl", "fi", "et", "hu"}, language))
    others = active_children()
    with ProcessPoolExecutor(builders, mp_context=get_context("spawn")) as pool:
        try:
            with interrupts_held():
                jobs = [pool.submit(build, language) for language in ordered]
            for job in as_completed(jobs):
                on_built(job.result())
        except BaseException:
            # Nobody who has pressed Ctrl-C wants to wait for the five million words of Swahili.
            pool.shutdown(wait=False, cancel_futures=True)
            for child in active_children():
                if child not in others:
                    child.terminate()
            raise
