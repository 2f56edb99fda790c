"""``--add``: a finished run's checkpoint gets a language that it has not seen, beside training it from scratch.

Nothing is written before the end, so a refused or stopped call leaves the checkpoint and the report as they were.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.harness.arguments import OptionError, nearest
from benchmarks.harness.interrupts import InterruptGuard
from benchmarks.multilingual.console import Reporter
from benchmarks.multilingual.job import INTERRUPTED, make_contenders, report_seconds, validation_batches
from benchmarks.multilingual.learning.batches import TrainingSteps
from benchmarks.multilingual.learning.checkpoint import (
    CheckpointError,
    RunIdentity,
    identity_of,
    read_checkpoint,
    restore,
    save_checkpoint,
)
from benchmarks.multilingual.learning.growth import grow
from benchmarks.multilingual.learning.hierarchy import NetworkSettings
from benchmarks.multilingual.learning.losses import LossWeights
from benchmarks.multilingual.learning.newcomer import (
    ADDED,
    SCRATCH,
    Learner,
    Newcomer,
    Point,
    learn,
    learner_from_scratch,
    learner_in_network,
)
from benchmarks.multilingual.learning.schedule import Deadline
from benchmarks.multilingual.learning.training import Progress
from benchmarks.multilingual.options import ADDED_BATCH_SIZE, ADDED_STEPS, Options
from benchmarks.multilingual.results import newcomer_report
from benchmarks.multilingual.results.evaluation import rule_accuracy
from benchmarks.multilingual.results.facts import measurement_facts
from benchmarks.multilingual.results.newcomer_report import NewcomerResult
from benchmarks.multilingual.words.corpus import TEST, TRAIN
from benchmarks.multilingual.words.data import prepare_data, read_words
from benchmarks.multilingual.words.vocabulary import Vocabulary
from benchmarks.workloads.languages import FAMILY_OF, NAME_OF


def check(options: Options, identity: RunIdentity, progress: Progress) -> str:
    """The language, if the checkpoint can take it.

    Raises:
        CheckpointError: The checkpoint has the language, or not the one to start from, or is of an unfinished run.
    """
    language, known = options.add, sorted(identity.languages)
    assert language is not None
    if not progress.finished:
        raise CheckpointError(
            f"'--add' must find a finished run (got one at step {progress.step} of {progress.total_steps}; finish it "
            "by --resume)"
        )
    if language in known:
        raise CheckpointError(
            f"'--add' must be a language that the checkpoint does not have (got {language!r}, and it has "
            f"{', '.join(known)})"
        )
    if options.warm_start is not None and options.warm_start not in known:
        raise CheckpointError(
            f"'--warm-start' must be a language of the checkpoint (got {options.warm_start!r}; "
            f"{nearest(options.warm_start, known)})"
        )
    return language


def _described(options: Options, old: Vocabulary, newcomer: Newcomer) -> str:
    """Describe the new language and its training in one line."""
    language, new = newcomer.name, newcomer.vocabulary
    family = FAMILY_OF[language]
    start = f"warm-started from {options.warm_start}" if options.warm_start else "without a warm start"
    return (
        f"{NAME_OF[language]} ({language}) comes to {len(old.languages)} languages, {start}, "
        f"{'all others frozen' if options.freeze else 'with as many words of the others in each step'}; "
        f"its family {family} is {'there' if family in old.families else 'new'}; "
        f"{len(new.rules) - len(old.rules)} of its {len(new.candidates[-1])} rules and "
        f"{new.character_count - old.character_count} of its characters are new"
    )


def _trained(
    learners: Sequence[Learner],
    newcomer: Newcomer,
    rows: TrainingSteps,
    options: Options,
    reporter: Reporter,
    begun: float,
) -> list[Point] | None:
    """The learners' curves; ``None`` if somebody asked to stop."""
    steps, deadline = options.steps or ADDED_STEPS, None
    if options.steps is None:
        deadline = Deadline(begun + options.minutes * 60 - report_seconds(1))

    def say(point: Point) -> None:
        reporter.say(
            f"step {point.step:>5}, {point.system:<7}: {point.accuracy:.1%} on unseen lemmas of {newcomer.name}, "
            f"{point.step * rows.batch_size:,} words seen"
        )

    with InterruptGuard() as guard, reporter.bar("learning", steps) as bar:
        reporter.say(f"training {steps:,} steps of {rows.batch_size:,} words of {len(newcomer.tables[TRAIN]):,}")
        return learn(
            learners,
            steps,
            deadline=deadline,
            on_step=bar.move_to,
            on_point=say,
            stop_requested=guard.requested,
        )


def add(options: Options, reporter: Reporter) -> int:
    """Add a language to the checkpoint; returns the exit code.

    Raises:
        CheckpointError: There is no checkpoint that can be read, or it can't take the language.
        OptionError: The language has too few words for a rule.
    """
    begun = time.monotonic()
    state = read_checkpoint(options.report, "--add")
    identity = identity_of(state)
    language = check(options, identity, Progress.from_state(state["progress"]))
    (sample,), (evidence,) = read_words([language], reporter, identity.pairs, [(language, options.words)])
    if not len(evidence.candidates):
        raise OptionError(
            f"'--words' must leave a rule that the words have twice (got {options.words or 'all of them'})"
        )
    data = prepare_data(identity.languages, reporter, identity.pairs, identity.added)
    old, newcomer = data.vocabulary, Newcomer.join(data.vocabulary, sample, evidence)
    contenders = make_contenders(data, options, identity.seed)
    progress = restore(state, old, contenders)
    experts, *others = contenders
    seed = identity.seed if options.seed is None else options.seed
    rows = TrainingSteps(len(newcomer.tables[TRAIN]), options.batch_size or ADDED_BATCH_SIZE, seed)
    others_before = rule_accuracy(experts.network, iter(validation_batches(data, options.device)))
    scratch = learner_from_scratch(newcomer, rows, seed, options.engine, options.device)
    added = learner_in_network(
        experts,
        old,
        newcomer,
        rows,
        others=None if options.freeze else data.tables[TRAIN],
        warm_start=options.warm_start,
        seed=seed,
        device=options.device,
    )
    reporter.say(_described(options, old, newcomer))
    curve = _trained([added, scratch], newcomer, rows, options, reporter, begun)
    if curve is None:
        reporter.say("stopped; the checkpoint is as it was")
        return INTERRUPTED
    for each in others:
        grow(each, old, newcomer.vocabulary, options.warm_start)
    result = NewcomerResult(
        language=language,
        family=FAMILY_OF[language],
        warm_start=options.warm_start,
        frozen=options.freeze,
        train_words=len(newcomer.tables[TRAIN]),
        test_words=len(newcomer.tables[TEST]),
        batch_size=rows.batch_size,
        seed=seed,
        curve=curve,
        accuracy={
            ADDED: newcomer.test_accuracy(experts.network, options.device),
            SCRATCH: newcomer.alone().test_accuracy(scratch.contender.network, options.device),
            **newcomer.baselines(),
        },
        others_before=others_before,
        others_after=rule_accuracy(
            experts.network, iter(validation_batches(data, options.device, newcomer.vocabulary))
        ),
        facts=measurement_facts(options, NetworkSettings(), LossWeights()),
    )
    words = options.words if options.words is not None and options.words == len(newcomer.tables[TRAIN]) else None
    identity = replace(identity, languages=(*identity.languages, language), added=(*identity.added, (language, words)))
    save_checkpoint(options.report, identity, newcomer.vocabulary, contenders, progress)
    newcomer_report.write(options.report, result, [each for each, _ in identity.added])
    reporter.say(newcomer_report.table(result))
    reporter.say(
        f"the checkpoint has {NAME_OF[language]} now: python -m benchmarks.multilingual lemmatize --language "
        f"{language} --report {options.report} WORD...; {time.monotonic() - begun:.0f} s in all"
    )
    return 0
