"""A finished run that goes on: what is refused, and how many more steps it plans."""

from __future__ import annotations

from benchmarks.multilingual.batches import TrainingSteps
from benchmarks.multilingual.checkpoint import CheckpointError
from benchmarks.multilingual.options import Options
from benchmarks.multilingual.schedule import MOST_EPOCHS, plan_steps
from benchmarks.multilingual.training import Progress


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


def plan_further(progress: Progress, options: Options, steps: TrainingSteps) -> int:
    """How many more steps a finished run takes for the options' minutes or steps.

    It reads the words that it has. Minutes plan no steps beyond `MOST_EPOCHS` times each word, counted from the run's
    first step; steps that were asked for are taken.
    """
    if options.steps is not None:
        return options.steps
    left = steps.steps_per_epoch * MOST_EPOCHS - progress.step
    return max(0, min(left, plan_steps(options.minutes, steps.batch_size, steps.steps_per_epoch)))
