"""The worth of each level and each loss: ``python -m benchmarks.multilingual ablation``.

The job's own training stands beside variants of it: without a level, with families that are drawn by lot, with the
universal level alone at equal compute, with losses left out, and with a level that keeps its gradient from the level
above. All train from the same seed on the same batches, for the same steps,
and are measured on the validation words; the test words have no part in it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import numpy as np
import torch
from rich.table import Table

import celmoe
from benchmarks.harness.arguments import OptionError, make_parser, read_arguments, whole_number
from benchmarks.multilingual.cli import command
from benchmarks.multilingual.console import Reporter
from benchmarks.multilingual.job import EVALUATION_BATCH
from benchmarks.multilingual.learning.batches import Collator, TrainingSteps, all_batches
from benchmarks.multilingual.learning.hierarchy import FAMILY, LANGUAGE, LEVELS, UNIVERSAL, NetworkSettings
from benchmarks.multilingual.learning.losses import Losses, LossWeights
from benchmarks.multilingual.learning.network import Lemmatizer
from benchmarks.multilingual.learning.training import make_contender, take_steps
from benchmarks.multilingual.options import DEFAULT_BATCH_SIZE, language_codes
from benchmarks.multilingual.results.evaluation import rule_accuracy
from benchmarks.multilingual.words.corpus import FORMS_PER_LANGUAGE, TRAIN, VALIDATION, known_languages
from benchmarks.multilingual.words.data import Data, prepare_data
from benchmarks.workloads.languages import FAMILY_OF

CPU = torch.device("cpu")
JOB_WEIGHTS = LossWeights()


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to train; by default the job's. ``shuffled`` draws each language's family by lot."""

    weights: LossWeights = JOB_WEIGHTS
    isolated_levels: tuple[str, ...] = ()
    levels: tuple[str, ...] = LEVELS
    shuffled: bool = False

    @property
    def settings(self) -> NetworkSettings:
        """The job's sizes; a universal expert alone gets as much compute as all the experts together."""
        settings = NetworkSettings(isolated_levels=self.isolated_levels)
        return settings.universal_alone() if self.levels == (UNIVERSAL,) else settings

    def family_of(self, languages: Sequence[str], seed: int) -> Mapping[str, str]:
        """The family of every language. Families drawn by lot have as many languages as the real ones."""
        if not self.shuffled:
            return FAMILY_OF
        families = [FAMILY_OF[language] for language in languages]
        return dict(zip(languages, np.random.default_rng(seed).permutation(families).tolist(), strict=True))


VARIANTS: Mapping[str, Variant] = MappingProxyType(
    {
        "as the job does": Variant(),
        "without universal": Variant(levels=(FAMILY, LANGUAGE)),
        "without family": Variant(levels=(UNIVERSAL, LANGUAGE)),
        "without language": Variant(levels=(UNIVERSAL, FAMILY)),
        "shuffled families": Variant(shuffled=True),
        "universal expert alone": Variant(levels=(UNIVERSAL,)),
        "without size": Variant(weights=LossWeights(size=0)),
        "without distance": Variant(weights=LossWeights(distance=0)),
        "fused rule loss alone": Variant(weights=LossWeights(size=0, distance=0)),
        "family isolated": Variant(isolated_levels=(FAMILY,)),
        "language isolated": Variant(isolated_levels=(LANGUAGE,)),
    }
)


def validation_accuracy(data: Data, variant: Variant, steps: int, batch_size: int, seed: int) -> float:
    """Share of all validation words whose rule is right after training this variant."""
    torch.manual_seed(seed)
    network = Lemmatizer(
        data.vocabulary,
        variant.settings,
        levels=variant.levels,
        family_of=variant.family_of(data.vocabulary.languages, seed),
    )
    celmoe.stack_experts(network.hierarchy)
    contender = make_contender("variant", network, Losses(network, variant.weights))
    rows = TrainingSteps(len(data.tables[TRAIN]), batch_size, seed)
    take_steps(contender, rows, Collator(data.tables[TRAIN], data.vocabulary), steps)
    table = data.tables[VALIDATION]
    checker = Collator(table, data.vocabulary)
    return rule_accuracy(network, all_batches(table, checker, EVALUATION_BATCH, CPU))


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("benchmarks.multilingual ablation", __doc__)
    parser.add_argument("--languages", help="language codes separated by commas (default: all that simplemma has)")
    parser.add_argument(
        "--pairs",
        default=str(FORMS_PER_LANGUAGE),
        help=f"pairs drawn from each dictionary (default {FORMS_PER_LANGUAGE})",
    )
    parser.add_argument("--steps", default="150", help="training steps (default 150)")
    parser.add_argument("--batch-size", default=str(DEFAULT_BATCH_SIZE), help=f"default {DEFAULT_BATCH_SIZE}")
    parser.add_argument("--seeds", default="1", help="how many seeds, from 0 (default 1)")
    parser.add_argument("variants", nargs="*", help=f"by default all: {', '.join(VARIANTS)}")
    return parser


def ablate(arguments: Sequence[str], reporter: Reporter) -> int:
    """Train and measure the variants that were asked for; returns the exit code.

    Raises:
        OptionError: An argument is unknown or out of its range.
    """
    given = read_arguments(_parser(), arguments)
    if unknown := [name for name in given.variants if name not in VARIANTS]:
        raise OptionError(f"'variants' must be among {', '.join(VARIANTS)} (got {unknown[0]!r})")
    languages = known_languages() if given.languages is None else language_codes(given.languages)
    steps = whole_number("--steps", given.steps, 1)
    batch_size = whole_number("--batch-size", given.batch_size, 1)
    seeds = range(whole_number("--seeds", given.seeds, 1))
    data = prepare_data(languages, reporter, whole_number("--pairs", given.pairs, 1))
    table = Table(title=f"{steps} steps of {batch_size:,} words, {len(data.samples)} languages")
    for heading in ("variant", *(f"seed {seed}" for seed in seeds), "mean", "s a run"):
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    for name in given.variants or VARIANTS:
        begun = time.monotonic()
        run = partial(validation_accuracy, data, VARIANTS[name], steps, batch_size)
        found = [run(seed) for seed in seeds]
        seconds = (time.monotonic() - begun) / len(seeds)
        mean = sum(found) / len(found)
        table.add_row(name, *(f"{each:.2%}" for each in found), f"{mean:.2%}", f"{seconds:.0f}")
        reporter.say(f"{name}: {mean:.2%}")
    reporter.say(table)
    return 0


main = command(ablate)
