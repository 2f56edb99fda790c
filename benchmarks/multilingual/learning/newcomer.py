"""A language new to a trained network: its words, its training, and the accuracy of the other languages meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from benchmarks.multilingual.learning.batches import Batch, Collator, TrainingSteps, all_batches
from benchmarks.multilingual.learning.growth import Held, grow, hold
from benchmarks.multilingual.learning.hierarchy import NetworkSettings, compiler_for
from benchmarks.multilingual.learning.losses import Losses, LossWeights
from benchmarks.multilingual.learning.network import Lemmatizer
from benchmarks.multilingual.learning.schedule import FURTHER_PEAK, LEARNING_RATE, Deadline, learning_rate
from benchmarks.multilingual.learning.training import Contender, make_contender, train_step
from benchmarks.multilingual.results.evaluation import IDENTITY_BASELINE, lemmas_of, predict, rule_accuracy
from benchmarks.multilingual.words.corpus import TEST, TRAIN, VALIDATION, LanguageSample
from benchmarks.multilingual.words.evidence import Evidence
from benchmarks.multilingual.words.rules import decode
from benchmarks.multilingual.words.vocabulary import Vocabulary, WordTable, build_table, build_vocabulary, grown

ADDED, SCRATCH, TABLE = "added", "scratch", "table"
EVALUATION_BATCH = 4_096
# Validated at these steps and at twice as many, again and again.
FIRST_CHECK = 5
# Steps between two looks at the clock.
REVISION_INTERVAL = 10


@dataclass(frozen=True, kw_only=True)
class Newcomer:
    """A language's words for a network that gets it: ``tables`` by side of the split, by the grown ``vocabulary``."""

    sample: LanguageSample
    evidence: Evidence
    vocabulary: Vocabulary
    tables: dict[int, WordTable]

    @property
    def name(self) -> str:
        """The language's code."""
        return self.sample.language

    @classmethod
    def join(cls, vocabulary: Vocabulary, sample: LanguageSample, evidence: Evidence) -> Newcomer:
        """The last language of a vocabulary that grows by it."""
        return cls._with(grown(vocabulary, sample, evidence), sample, evidence)

    def alone(self) -> Newcomer:
        """The same words for a network of this language alone."""
        return self._with(build_vocabulary([self.sample], [self.evidence]), self.sample, self.evidence)

    @classmethod
    def _with(cls, vocabulary: Vocabulary, sample: LanguageSample, evidence: Evidence) -> Newcomer:
        place = len(vocabulary.languages) - 1
        tables = {
            split: replace(table, language_ids=torch.full_like(table.language_ids, place))
            for split in (TRAIN, VALIDATION, TEST)
            for table in [build_table([sample], [evidence], vocabulary, split)]
        }
        return cls(sample=sample, evidence=evidence, vocabulary=vocabulary, tables=tables)

    def baselines(self) -> dict[str, float]:
        """Test words right by the table of affixes, and by the word itself: see `suffix_table`."""
        sample, positions = self.sample, self.tables[TEST].positions.tolist()
        rules = [sample.rules[each] for each in self.evidence.table_rules[positions].tolist()]
        made = {
            TABLE: [decode(sample.forms[each], rule) for each, rule in zip(positions, rules, strict=True)],
            IDENTITY_BASELINE: [sample.forms[each] for each in positions],
        }
        wanted = [sample.lemmas[each] for each in positions]
        return {name: sum(map(str.__eq__, found, wanted)) / max(1, len(wanted)) for name, found in made.items()}

    def batches(self, split: int, device: torch.device) -> list[Batch]:
        """All words of a side."""
        table = self.tables[split]
        collator = Collator(table, self.vocabulary)
        return list(all_batches(table, collator, EVALUATION_BATCH, device))

    def test_accuracy(self, network: Lemmatizer, device: torch.device) -> float:
        """The share of test words whose lemma is right."""
        # The vocabulary has other languages before this one, whose samples nobody asks for.
        samples = [self.sample] * len(self.vocabulary.languages)
        table = self.tables[TEST]
        made = lemmas_of(samples, table, self.vocabulary, predict(network, iter(self.batches(TEST, device))))
        wanted = [self.sample.lemmas[each] for each in table.positions.tolist()]
        return sum(map(str.__eq__, made, wanted)) / max(1, len(wanted))


class Point(NamedTuple):
    """The share of a language's validation words whose rule a system has right after so many steps."""

    step: int
    system: str
    accuracy: float


@dataclass
class Learner:
    """A contender that learns one language.

    ``batch`` gives the words of a step, ``held`` are the rows that it must not change, and ``peak`` its highest rate.
    """

    system: str
    contender: Contender
    batch: Callable[[int], Batch]
    checks: list[Batch]
    held: Held | None = None
    peak: float = LEARNING_RATE

    def step(self, step: int, total: int) -> None:
        """Take this step of so many."""
        # The losses that fade are for networks that begin: both go without.
        self.contender.network.train()
        train_step(self.contender, self.batch(step), learning_rate(step, total, self.peak), done=1.0, read=False)
        if self.held is not None:
            self.held.put_back()

    def point(self, step: int) -> Point:
        """Its accuracy after so many steps."""
        return Point(step, self.system, rule_accuracy(self.contender.network, iter(self.checks)))


def learner_from_scratch(
    newcomer: Newcomer, rows: TrainingSteps, seed: int, engine: str, device: torch.device
) -> Learner:
    """The same network for the language alone."""
    alone = newcomer.alone()
    torch.manual_seed(seed)
    network = Lemmatizer(alone.vocabulary, NetworkSettings(), engine=engine).to(device)
    collator = Collator(alone.tables[TRAIN], alone.vocabulary)
    return Learner(
        SCRATCH,
        make_contender(SCRATCH, network, Losses(network, LossWeights())),
        lambda step: collator(rows[step]).to(device),
        alone.batches(VALIDATION, device),
    )


def learner_in_network(
    contender: Contender,
    old: Vocabulary,
    newcomer: Newcomer,
    rows: TrainingSteps,
    *,
    others: WordTable | None,
    warm_start: str | None,
    seed: int,
    device: torch.device,
) -> Learner:
    """The contender, grown by the language.

    Each step has as many words of the ``others`` as of the language, so that they are not forgotten; without others,
    all that was there is frozen.
    """
    torch.manual_seed(seed)
    grow(contender, old, newcomer.vocabulary, warm_start)
    held = None if others is not None else hold(contender, old)
    table = newcomer.tables[TRAIN]
    compiler = compiler_for(newcomer.vocabulary)
    theirs = None if others is None else TrainingSteps(len(others), rows.batch_size, seed)

    def batch(step: int) -> Batch:
        words = table.take(rows[step])
        if others is not None and theirs is not None:
            words = words.followed_by(others.take(theirs[step]))
        return Collator(words, newcomer.vocabulary, compiler)(torch.arange(len(words))).to(device)

    checks = newcomer.batches(VALIDATION, device)
    return Learner(ADDED, contender, batch, checks, held, LEARNING_RATE * FURTHER_PEAK)


def learn(
    learners: Sequence[Learner],
    steps: int,
    *,
    deadline: Deadline | None = None,
    on_step: Callable[[int, int], object] | None = None,
    on_point: Callable[[Point], object] | None = None,
    stop_requested: Callable[[], bool] | None = None,
) -> list[Point] | None:
    """Train all learners for so many steps, on the same words of the language; fewer if the deadline has it so.

    Returns:
        Their curves, from the step before the first one; ``None`` if somebody asked to stop.
    """
    total, checks, curve = steps, FIRST_CHECK, list[Point]()

    def look(step: int) -> None:
        for learner in learners:
            curve.append(learner.point(step))
            if on_point is not None:
                on_point(curve[-1])

    look(0)
    begun, step = time.monotonic(), 0
    while step < total:
        if stop_requested is not None and stop_requested():
            return None
        for learner in learners:
            learner.step(step, total)
        step += 1
        if deadline is not None and step % REVISION_INTERVAL == 0:
            total = min(steps, step + deadline.steps_that_fit((time.monotonic() - begun) / step))
        if step in {checks, total}:
            checks *= 2 if step == checks else 1
            look(step)
        if on_step is not None:
            on_step(step, total)
    for learner in learners:
        if learner.held is not None:
            learner.held.put_back_moments(learner.contender.optimizer)
    return curve
