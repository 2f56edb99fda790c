"""The worth of a warm start for a new language: ``python -m benchmarks.multilingual newcomers``.

A network of all languages but some is trained first. Each of those then comes to it with few words or many,
warm-started from a neighbour or not, with the others frozen or not. Beside it the same network learns the language from
scratch, on the same words, steps and schedule. All are measured on test words, whose lemmas no training has seen.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from rich.table import Table

import celmoe
from benchmarks.harness.arguments import OptionError, make_parser, read_arguments, whole_number
from benchmarks.harness.setting import prepare_folder
from benchmarks.harness.tables import write_rows
from benchmarks.multilingual.cli import command
from benchmarks.multilingual.console import Reporter
from benchmarks.multilingual.job import validation_batches
from benchmarks.multilingual.learning.batches import Collator, TrainingSteps
from benchmarks.multilingual.learning.hierarchy import NetworkSettings
from benchmarks.multilingual.learning.losses import Losses, LossWeights
from benchmarks.multilingual.learning.network import Lemmatizer
from benchmarks.multilingual.learning.newcomer import (
    SCRATCH,
    Learner,
    Newcomer,
    learn,
    learner_from_scratch,
    learner_in_network,
)
from benchmarks.multilingual.learning.serving import EXPERTS
from benchmarks.multilingual.learning.training import Contender, make_contender, take_steps
from benchmarks.multilingual.options import DEFAULT_BATCH_SIZE, language_code, language_codes
from benchmarks.multilingual.results.evaluation import rule_accuracy
from benchmarks.multilingual.results.figures import draw_newcomers
from benchmarks.multilingual.words.corpus import FORMS_PER_LANGUAGE, TRAIN, known_languages
from benchmarks.multilingual.words.data import Data, prepare_data, read_words
from celmoe.optim import load_state_by_name, state_by_name

CPU = torch.device("cpu")
DEFAULT_PAIRS = "ast:es,gl:pt,nn:nb,sk:cs,uk:ru"
DEFAULT_WORDS = "300,1000,3000,10000,all"
DEFAULT_REPORT = Path("celmoe-report") / "newcomers"


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to add a language."""

    warm: bool
    frozen: bool


WAYS: Mapping[str, Way] = MappingProxyType(
    {
        "warm": Way(warm=True, frozen=False),
        "warm, others frozen": Way(warm=True, frozen=True),
        "not warm": Way(warm=False, frozen=False),
        "not warm, others frozen": Way(warm=False, frozen=True),
    }
)


class Base:
    """A network of the languages that are there, to take copies of."""

    def __init__(self, data: Data, steps: int, batch_size: int, seed: int) -> None:
        self.data = data
        contender = self._new(seed)
        rows = TrainingSteps(len(data.tables[TRAIN]), batch_size, seed)
        take_steps(contender, rows, Collator(data.tables[TRAIN], data.vocabulary), steps)
        self._network = contender.network.state_dict()
        self._optimizer: dict[str, Any] = state_by_name(contender.network, contender.optimizer)
        self.accuracy = rule_accuracy(contender.network, iter(validation_batches(data, CPU)))

    def copy(self) -> Contender:
        """A contender of its own, as the training left it."""
        contender = self._new(0)
        contender.network.load_state_dict(self._network)
        load_state_by_name(contender.network, contender.optimizer, self._optimizer)
        return contender

    def _new(self, seed: int) -> Contender:
        torch.manual_seed(seed)
        network = Lemmatizer(self.data.vocabulary, NetworkSettings())
        celmoe.stack_experts(network.hierarchy)
        return make_contender(EXPERTS, network, Losses(network, LossWeights()))


def measure(
    base: Base, newcomer: Newcomer, neighbour: str, steps: int, batch_size: int, seed: int
) -> list[dict[str, Any]]:
    """A row for each way and each step at which it was validated."""
    data, rows = base.data, TrainingSteps(len(newcomer.tables[TRAIN]), batch_size, seed)

    def learner(system: str) -> Learner:
        if system == SCRATCH:
            return learner_from_scratch(newcomer, rows, seed, "auto", CPU)
        way = WAYS[system]
        return learner_in_network(
            base.copy(),
            data.vocabulary,
            newcomer,
            rows,
            others=None if way.frozen else data.tables[TRAIN],
            warm_start=neighbour if way.warm else None,
            seed=seed,
            device=CPU,
        )

    found: list[dict[str, Any]] = []
    for system in (*WAYS, SCRATCH):
        each = learner(system)
        curve = learn([each], steps)
        assert curve is not None
        network = each.contender.network
        owner = newcomer.alone() if system == SCRATCH else newcomer
        found += [
            {"step": point.step, "system": system, "validation_accuracy": point.accuracy}
            | {"test_accuracy": None, "others_after": None}
            for point in curve
        ]
        found[-1]["test_accuracy"] = owner.test_accuracy(network, CPU)
        if system != SCRATCH:
            checks = validation_batches(data, CPU, newcomer.vocabulary)
            found[-1]["others_after"] = rule_accuracy(network, iter(checks))
    return found


def _pairs(text: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for each in text.split(","):
        language, colon, neighbour = each.strip().partition(":")
        if not colon:
            raise OptionError(f"'--pairs' must be language:neighbour, separated by commas (got {each!r})")
        pairs[language_code("--pairs", language)] = language_code("--pairs", neighbour)
    if held_back := [neighbour for neighbour in pairs.values() if neighbour in pairs]:
        raise OptionError(f"'--pairs' must have neighbours that are not held back (got {held_back[0]!r})")
    return pairs


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("benchmarks.multilingual newcomers", __doc__)
    add = parser.add_argument
    add("--pairs", default=DEFAULT_PAIRS, help=f"held-back languages with their neighbours (default {DEFAULT_PAIRS})")
    add("--words", default=DEFAULT_WORDS, help=f"training words of a held-back language (default {DEFAULT_WORDS})")
    add("--languages", help="what is trained first: codes separated by commas (default: all that are not held back)")
    add("--base-steps", default="300", help="steps of the network of all others (default 300)")
    add(
        "--base-batch-size",
        default=str(DEFAULT_BATCH_SIZE),
        help=f"words of such a step (default {DEFAULT_BATCH_SIZE})",
    )
    add("--steps", default="80", help="steps of a held-back language (default 80)")
    add("--batch-size", default="512", help="words of the language in such a step (default 512)")
    add("--seed", default="0", help="decides initial parameters and the order of the words (default 0)")
    add("--report", default=str(DEFAULT_REPORT), help=f"folder to write newcomers.csv to (default {DEFAULT_REPORT})")
    return parser


def run(arguments: Sequence[str], reporter: Reporter) -> int:
    """Train and measure; returns the exit code.

    Raises:
        OptionError: An argument is unknown or out of its range.
    """
    given = read_arguments(_parser(), arguments)
    pairs = _pairs(given.pairs)
    words = [None if each == "all" else whole_number("--words", each, 1) for each in given.words.split(",")]
    base_steps, steps = whole_number("--base-steps", given.base_steps, 1), whole_number("--steps", given.steps, 1)
    base_batch_size = whole_number("--base-batch-size", given.base_batch_size, 1)
    batch_size, seed = whole_number("--batch-size", given.batch_size, 1), whole_number("--seed", given.seed, 0)
    begun, folder = time.monotonic(), Path(given.report)
    languages = language_codes(given.languages) if given.languages else known_languages()
    languages = [each for each in languages if each not in pairs]
    if missing := [each for each in pairs.values() if each not in languages]:
        raise OptionError(f"'--languages' must have the neighbours in '--pairs' (got none of {missing[0]!r})")
    prepare_folder(folder)
    data = prepare_data(languages, reporter)
    base = Base(data, base_steps, base_batch_size, seed)
    reporter.say(
        f"{len(data.samples)} languages in {base_steps} steps of {base_batch_size:,} words: {base.accuracy:.2%} of "
        f"their validation words by the right rule, after {time.monotonic() - begun:.0f} s"
    )
    rows: list[dict[str, Any]] = []
    table = Table(title=f"Test words right after {steps} steps of {batch_size} words of the language")
    for heading in ("language", "from", "words", *WAYS, SCRATCH):
        table.add_column(heading, justify="left" if heading in {"language", "from"} else "right")
    for number in words:
        for language, neighbour in pairs.items():
            (sample,), (evidence,) = read_words([language], reporter, FORMS_PER_LANGUAGE, [(language, number)])
            newcomer = Newcomer.join(data.vocabulary, sample, evidence)
            size = len(newcomer.tables[TRAIN])
            found = measure(base, newcomer, neighbour, steps, batch_size, seed)
            names = {"language": language, "neighbour": neighbour, "asked": number or "all", "words": size}
            rows += [names | each for each in found]
            ends = [f"{each['test_accuracy']:.1%}" for each in found if each["step"] == steps]
            table.add_row(language, neighbour, f"{size:,}", *ends)
            reporter.say(f"{language} from {neighbour}, {size:,} words: {', '.join(ends)}")
            write_rows(folder / "newcomers.csv", rows)
    draw_newcomers(rows, steps).save(folder)
    reporter.say(table)
    reporter.say(f"{folder / 'newcomers.csv'} has it by step; {time.monotonic() - begun:.0f} s in all")
    return 0


main = command(run)
