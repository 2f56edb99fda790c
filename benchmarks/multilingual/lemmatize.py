"""Lemmatize words with a run's checkpoint: ``python -m benchmarks.multilingual lemmatize --language de Häuser``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness.arguments import OptionError, make_parser, one_of, read_arguments
from benchmarks.multilingual.cli import command
from benchmarks.multilingual.console import Reporter
from benchmarks.multilingual.learning.batches import Collator, all_batches
from benchmarks.multilingual.learning.checkpoint import identity_of, read_checkpoint
from benchmarks.multilingual.learning.serving import network_of
from benchmarks.multilingual.options import DEFAULT_REPORT
from benchmarks.multilingual.results.evaluation import predict
from benchmarks.multilingual.words.corpus import TEST, LanguageSample, fewer
from benchmarks.multilingual.words.data import read_samples
from benchmarks.multilingual.words.evidence import gather_evidence
from benchmarks.multilingual.words.rules import decode
from benchmarks.multilingual.words.vocabulary import NO_RULE, WordTable, encode_forms

CPU = torch.device("cpu")


def lemmatize(state: Mapping[str, Any], sample: LanguageSample, forms: Sequence[str]) -> list[str]:
    """The lemmas of these forms, by the experts of a checkpoint and the training words of their language's sample."""
    network, vocabulary = network_of(state, sample.language)
    size = len(forms)
    # New words stand behind the sample's, on a side that nothing is counted of.
    asked = replace(
        sample,
        forms=[*sample.forms, *forms],
        lemmas=[*sample.lemmas, *forms],
        rule_ids=np.append(sample.rule_ids, np.zeros(size, dtype=np.int32)),
        split=np.append(sample.split, np.full(size, TEST, dtype=np.uint8)),
    )
    evidence = gather_evidence(asked)
    table = WordTable(
        characters=torch.from_numpy(encode_forms(forms, vocabulary)),
        language_ids=torch.zeros(size, dtype=torch.int16),
        targets=torch.full((size,), NO_RULE, dtype=torch.int32),
        positions=torch.arange(size, dtype=torch.int32),
        proposals=torch.from_numpy(evidence.proposals[-size:]),
        counts=torch.from_numpy(evidence.counts[-size:]),
        totals=torch.from_numpy(evidence.totals[-size:]),
    )
    collator = Collator(table, vocabulary)
    found = predict(network, all_batches(table, collator, size, CPU))
    rules = vocabulary.rules
    return [decode(form, None if best == NO_RULE else rules[best]) for form, best in zip(forms, found, strict=True)]


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("benchmarks.multilingual lemmatize", __doc__)
    parser.add_argument("--language", help="code of a language that the checkpoint was trained on")
    parser.add_argument("--report", default=str(DEFAULT_REPORT), help=f"folder of the run (default {DEFAULT_REPORT})")
    parser.add_argument("words", nargs="*", help="word forms")
    return parser


def run(arguments: Sequence[str], reporter: Reporter) -> int:
    """Print a line for each word; returns the exit code.

    Raises:
        OptionError: The language is none of the checkpoint's, or there is no word.
        CheckpointError: There is no checkpoint that can be read.
    """
    given = read_arguments(_parser(), arguments)
    if not given.words:
        raise OptionError("'words' must be word forms (got none)")
    state = read_checkpoint(Path(given.report), mapped=True)
    identity = identity_of(state)
    known = identity.languages
    if given.language is None:
        raise OptionError(f"'--language' must be given, as one of {', '.join(known)} (got none)")
    language = one_of("--language", given.language, known)
    (sample,) = read_samples([language], reporter, identity.pairs)
    sample = fewer(sample, dict(identity.added).get(language))
    for form, lemma in zip(given.words, lemmatize(state, sample, given.words), strict=True):
        reporter.say(f"{form} -> {lemma}")
    return 0


main = command(run)
