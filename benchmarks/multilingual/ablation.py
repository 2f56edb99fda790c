"""What each loss and each isolated level brings: ``python -m benchmarks.multilingual.ablation``.

Every variant trains the full hierarchy from the same seed on the same batches, for the same steps, and is measured on
the validation words; the test words have no part in it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType

import torch
from rich.table import Table

from benchmarks.multilingual.batches import Collator, TrainingSteps, all_batches
from benchmarks.multilingual.console import Reporter
from benchmarks.multilingual.corpus import TRAIN, VALIDATION, known_languages
from benchmarks.multilingual.evaluation import rule_accuracy
from benchmarks.multilingual.job import EVALUATION_BATCH, Data, make_compiler, prepare_data
from benchmarks.multilingual.losses import Losses, LossWeights
from benchmarks.multilingual.network import FAMILY, LANGUAGE, LEVELS, UNIVERSAL, Lemmatizer, NetworkSettings
from benchmarks.multilingual.training import learning_rate, make_contender, train_step

CPU = torch.device("cpu")
NO_EXTRAS = LossWeights(cut=0, family=0, language=0, agreement=0, distance=0)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to train."""

    weights: LossWeights = NO_EXTRAS
    isolated_levels: tuple[str, ...] = ()
    levels: tuple[str, ...] = LEVELS


VARIANTS: Mapping[str, Variant] = MappingProxyType(
    {
        "as the job does": Variant(weights=LossWeights(), isolated_levels=NetworkSettings().isolated_levels),
        "fused rule loss alone": Variant(),
        "universal expert alone": Variant(levels=(UNIVERSAL,)),
        "cut 0.1": Variant(weights=replace(NO_EXTRAS, cut=0.1)),
        "family 0.1": Variant(weights=replace(NO_EXTRAS, family=0.1)),
        "family 0.3": Variant(weights=replace(NO_EXTRAS, family=0.3)),
        "language 0.3": Variant(weights=replace(NO_EXTRAS, language=0.3)),
        "agreement 0.1": Variant(weights=replace(NO_EXTRAS, agreement=0.1)),
        "distance 0.1": Variant(weights=replace(NO_EXTRAS, distance=0.1)),
        "family isolated": Variant(isolated_levels=(FAMILY,)),
        "language isolated": Variant(isolated_levels=(LANGUAGE,)),
    }
)


def validation_accuracy(data: Data, variant: Variant, steps: int, batch_size: int, seed: int) -> float:
    """Share of all validation words whose rule is right after training this variant."""
    torch.manual_seed(seed)
    settings = NetworkSettings(isolated_levels=variant.isolated_levels)
    network = Lemmatizer(data.vocabulary, settings, levels=variant.levels)
    contender = make_contender("variant", network, Losses(network, variant.weights))
    rows = TrainingSteps(len(data.tables[TRAIN]), batch_size, seed)
    collator = Collator(data.tables[TRAIN], data.vocabulary.languages, make_compiler(data))
    network.train()
    for step in range(steps):
        train_step(contender, collator(rows[step]), learning_rate(step, steps), read=False)
    table = data.tables[VALIDATION]
    checker = Collator(table, data.vocabulary.languages, make_compiler(data))
    return rule_accuracy(network, all_batches(table, checker, EVALUATION_BATCH, CPU))


def main() -> int:
    """Train and measure the variants that were asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.multilingual.ablation", description=__doc__)
    parser.add_argument("--languages", default=",".join(known_languages()))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=4_096)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("variants", nargs="*", help=f"by default all: {', '.join(VARIANTS)}")
    given = parser.parse_args()
    if unknown := [name for name in given.variants if name not in VARIANTS]:
        parser.error(f"'variants' must be among {', '.join(VARIANTS)} (got {unknown[0]!r})")
    reporter = Reporter()
    data = prepare_data(sorted(given.languages.split(",")), reporter)
    table = Table(title=f"{given.steps} steps of {given.batch_size:,} words, {len(data.samples)} languages")
    for heading in ("variant", *(f"seed {seed}" for seed in range(given.seeds)), "mean", "s a run"):
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    for name in given.variants or VARIANTS:
        begun = time.monotonic()
        run = partial(validation_accuracy, data, VARIANTS[name], given.steps, given.batch_size)
        found = [run(seed) for seed in range(given.seeds)]
        seconds = (time.monotonic() - begun) / given.seeds
        mean = sum(found) / len(found)
        table.add_row(name, *(f"{each:.2%}" for each in found), f"{mean:.2%}", f"{seconds:.0f}")
        reporter.say(f"{name}: {mean:.2%}")
    reporter.say(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
