"""The words of a run, ready for batches: cached or drawn now, then encoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import celmoe
from benchmarks.multilingual.console import Reporter
from benchmarks.multilingual.corpus import (
    FORMS_PER_LANGUAGE,
    TEST,
    TRAIN,
    VALIDATION,
    LanguageSample,
    build_samples,
    cache_path,
    cached_sample,
    load_sample,
)
from benchmarks.multilingual.network import LEVELS, NetworkSettings, hierarchy_config
from benchmarks.multilingual.words import Vocabulary, WordTable, build_table, build_vocabulary
from benchmarks.peers import cache_folder


@dataclass(frozen=True, kw_only=True)
class Data:
    """Samples by language, what the network knows of them, and a table for each side of the split."""

    samples: list[LanguageSample]
    vocabulary: Vocabulary
    tables: dict[int, WordTable]


def read_samples(languages: Sequence[str], reporter: Reporter, cap: int = FORMS_PER_LANGUAGE) -> list[LanguageSample]:
    """Cached samples of these languages, drawn now where there is none that can be read."""
    folder = cache_folder() / "multilingual"
    paths = {language: cache_path(folder, language, cap) for language in languages}
    cached = {language: cached_sample(language, path) for language, path in paths.items()}
    missing = [language for language, sample in cached.items() if sample is None]
    if missing:
        with reporter.bar("reading dictionaries", len(missing)) as bar:
            build_samples(missing, cap, folder, bar.advance)
    return [sample or load_sample(language, paths[language]) for language, sample in cached.items()]


def prepare_data(languages: Sequence[str], reporter: Reporter) -> Data:
    """The words of these languages, encoded."""
    samples = read_samples(languages, reporter)
    vocabulary = build_vocabulary(samples)
    tables = {split: build_table(samples, vocabulary, split) for split in (TRAIN, VALIDATION, TEST)}
    return Data(samples=samples, vocabulary=vocabulary, tables=tables)


def make_compiler(data: Data) -> celmoe.RoutingCompiler:
    """Routes of a language's name to plans of all levels."""
    return celmoe.RoutingCompiler(hierarchy_config(celmoe, data.vocabulary.languages, LEVELS, NetworkSettings()))
