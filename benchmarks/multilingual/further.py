"""A finished run that goes on: its refusals, and the number of steps that it plans."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.multilingual.console import Reporter
from benchmarks.multilingual.learning.batches import TrainingSteps
from benchmarks.multilingual.learning.checkpoint import CheckpointError, RunIdentity
from benchmarks.multilingual.learning.schedule import MOST_EPOCHS, plan_pairs, plan_steps
from benchmarks.multilingual.learning.training import Progress
from benchmarks.multilingual.options import Options


def check_steps(progress: Progress, options: Options) -> None:
    """Refuse other steps than those that an unfinished run has planned.

    Raises:
        CheckpointError: The run is not finished, and ``--steps`` was given.
    """
    if options.steps is not None and not progress.finished:
        raise CheckpointError(
            f"'--steps' must stand without '--resume' until the run is finished (got a run at step {progress.step} of "
            f"{progress.total_steps}, which knows its steps)"
        )


def reading_more(identity: RunIdentity, options: Options) -> RunIdentity:
    """The sources of a run that goes on: as many pairs as a run of its minutes reads, and no fewer than it has.

    Raises:
        CheckpointError: ``--pairs`` are fewer than the run has.
    """
    if options.pairs is not None and options.pairs < identity.pairs:
        raise CheckpointError(
            f"'--pairs' must be no fewer than the checkpoint was trained with, {identity.pairs} (got {options.pairs})"
        )
    planned = identity.pairs if options.steps is not None else plan_pairs(options.minutes)
    return replace(identity, pairs=max(identity.pairs, options.pairs or planned))


def plan_further(progress: Progress, options: Options, steps: TrainingSteps) -> int:
    """Plan the steps that a finished run takes for the options' minutes or steps.

    Minutes plan no steps beyond `MOST_EPOCHS` times each word, counted from the run's first step; steps that were asked
    for are taken.
    """
    if options.steps is not None:
        return options.steps
    left = steps.steps_per_epoch * MOST_EPOCHS - progress.step
    return max(0, min(left, plan_steps(options.minutes, steps.batch_size, steps.steps_per_epoch)))


def go_on(progress: Progress, options: Options, steps: TrainingSteps, reporter: Reporter) -> bool:
    """Plan more steps for a finished run; False if its words have been met as often as is worthwhile."""
    more = plan_further(progress, options, steps)
    met = f"{progress.step / steps.steps_per_epoch:.1f} times"
    if more:
        progress.go_on(more, clocked=options.steps is None)
        reporter.say(
            f"the run goes on from step {progress.begun} with a schedule of its own; its steps so far have met its "
            f"words {met}"
        )
    else:
        reporter.say(
            f"its steps have met its words {met}, and more rounds make unseen words worse: give more --pairs, or "
            "--steps"
        )
    return more > 0


def nothing_left(options: Options, reporter: Reporter) -> int:
    """Say that a run is finished; returns the exit code."""
    reporter.say(f"the run in {options.report} is finished and its report is written: nothing is left to train")
    return 0
