"""The words of a run, ready for batches: cached or made now, then encoded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.harness.peers import cache_folder
from benchmarks.multilingual.console import Reporter
from benchmarks.multilingual.words.corpus import (
    FORMS_PER_LANGUAGE,
    TEST,
    TRAIN,
    VALIDATION,
    Content,
    LanguageSample,
    build_samples,
    cache_path,
    cached,
    fewer,
    in_builders,
    load_sample,
)
from benchmarks.multilingual.words.evidence import (
    FORMAT,
    PROPOSALS,
    Evidence,
    gather_evidence,
    load_evidence,
    save_evidence,
)
from benchmarks.multilingual.words.vocabulary import Vocabulary, WordTable, build_table, build_vocabulary, grown

EVIDENCE = f"evidence-{FORMAT}-{PROPOSALS}"


@dataclass(frozen=True, kw_only=True)
class Data:
    """Samples by language, the network's vocabulary, and a table for each side of the split.

    ``table_rules`` are by language the baseline's rules: see `Evidence`.
    """

    samples: list[LanguageSample]
    table_rules: list[npt.NDArray[np.int32]]
    vocabulary: Vocabulary
    tables: dict[int, WordTable]


def read_samples(languages: Sequence[str], reporter: Reporter, cap: int = FORMS_PER_LANGUAGE) -> list[LanguageSample]:
    """Cached samples of these languages; a sample that is missing or can't be read is drawn now."""
    folder = cache_folder() / "multilingual"

    def load(language: str) -> LanguageSample:
        return load_sample(language, cache_path(folder, language, cap))

    def build(missing: Sequence[str], on_built: Callable[[str], None]) -> None:
        build_samples(missing, cap, folder, on_built)

    return _read(languages, load, build, reporter, "reading dictionaries")


def read_evidence(languages: Sequence[str], reporter: Reporter, cap: int = FORMS_PER_LANGUAGE) -> list[Evidence]:
    """Cached evidence for the samples of these languages; evidence that is missing or can't be read is gathered now."""
    folder = cache_folder() / "multilingual"

    def load(language: str) -> Evidence:
        return load_evidence(cache_path(folder, language, cap, EVIDENCE))

    def build(missing: Sequence[str], on_built: Callable[[str], None]) -> None:
        in_builders(partial(_gather, cap, folder), missing, on_built)

    return _read(languages, load, build, reporter, "counting affixes")


def _gather(cap: int, folder: Path, language: str) -> str:
    evidence = gather_evidence(load_sample(language, cache_path(folder, language, cap)))
    save_evidence(evidence, cache_path(folder, language, cap, EVIDENCE))
    return language


def _read(
    languages: Sequence[str],
    load: Callable[[str], Content],
    build: Callable[[Sequence[str], Callable[[str], None]], None],
    reporter: Reporter,
    title: str,
) -> list[Content]:
    found = {language: cached(partial(load, language)) for language in languages}
    missing = [language for language, content in found.items() if content is None]
    if missing:
        with reporter.bar(title, len(missing)) as bar:
            build(missing, bar.advance)
    return [load(language) if content is None else content for language, content in found.items()]


def read_words(
    languages: Sequence[str], reporter: Reporter, cap: int, added: Sequence[tuple[str, int | None]] = ()
) -> tuple[list[LanguageSample], list[Evidence]]:
    """Samples of these languages, with so many training words of those ``added``, and evidence from these words."""
    samples = read_samples(languages, reporter, cap)
    few = {sample.language: fewer(sample, dict(added).get(sample.language)) for sample in samples}
    # Counting few words takes less time than a file of them is worth.
    whole = [sample.language for sample in samples if few[sample.language] is sample]
    told = dict(zip(whole, read_evidence(whole, reporter, cap), strict=True))
    evidence = [told.get(each) or gather_evidence(few[each]) for each in languages]
    return [few[each] for each in languages], evidence


def prepare_data(
    languages: Sequence[str],
    reporter: Reporter,
    cap: int = FORMS_PER_LANGUAGE,
    added: Sequence[tuple[str, int | None]] = (),
) -> Data:
    """The words of these languages, encoded; the last of them may have been ``added``: see `RunIdentity`."""
    samples, evidence = read_words(languages, reporter, cap, added)
    first = len(languages) - len(added)
    vocabulary = build_vocabulary(samples[:first], evidence[:first])
    for sample, told in zip(samples[first:], evidence[first:], strict=True):
        vocabulary = grown(vocabulary, sample, told)
    tables = {split: build_table(samples, evidence, vocabulary, split) for split in (TRAIN, VALIDATION, TEST)}
    return Data(
        samples=samples,
        table_rules=[each.table_rules for each in evidence],
        vocabulary=vocabulary,
        tables=tables,
    )
