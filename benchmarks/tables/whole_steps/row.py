"""One workload: a whole step of each contender, compared and timed.

A step is all that a user does: clear gradients, forward with names for routes, a loss, backward, clip the gradients'
norm, AdamW. *Plain* has one parameter for each tensor of each expert, *stacked* is after `celmoe.stack_experts`,
*compiled* is a stacked model under ``torch.compile`` that is given plans, and *by hand* is the stack that an expert of
the field would write for these very experts. All have PyTorch's fused AdamW, celmoe-vp too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch

from benchmarks.contenders import contender, models
from benchmarks.contenders.contender import AbsentError, Maker, Terms
from benchmarks.harness.devices import finish, open_device
from benchmarks.harness.equality import Evidence, UnequalError, require_equal, training_evidence
from benchmarks.harness.interleaved import Timings, interleave
from benchmarks.harness.steps import ROUTINGS, TrainingStep
from benchmarks.workloads.workload import Workload

PEER, PLAIN, STACKED, BY_HAND, COMPILED = "celmoe-vp", "plain", "stacked", "by hand", "compiled"
# Plain comes first, which the others must equal.
MAKERS: Mapping[str, Maker] = MappingProxyType(
    {
        PLAIN: models.MODELS[contender.AUTO],
        PEER: models.MODELS["celmoe-vp 1.1.4"],
        STACKED: models.MODELS[contender.STACKED],
        BY_HAND: models.MODELS[contender.STACK],
        COMPILED: models.make_compiled,
    }
)
# The optimizer moves the weights, so that nothing that was computed from them can be kept.
RATE = 1e-3
# The shares of the time that is left, for rounds without the compiled model and then with it.
FIRST_SHARE, SECOND_SHARE = 0.3, 0.7
# Fewer rounds have no useful quartiles. In seconds: the time between two reports of the timings so far.
FEWEST_TOLD, SECONDS_BETWEEN = 3, 1.0


@dataclass(frozen=True)
class Row:
    """The results of a workload.

    Attributes:
        workload: The workload that was run.
        timings: Seconds of each contender's steps.
        first_seconds: By contender, the seconds of its first steps: compiling, capturing, verifying.
        absent: By contender, the reason why it was not timed.
        is_unequal: True if a contender computes something else.
    """

    workload: Workload
    timings: Timings = field(default_factory=lambda: Timings({}))
    first_seconds: Mapping[str, float] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)
    is_unequal: bool = False

    def without(self, name: str, why: str) -> Row:
        """The same, and why a contender was not timed."""
        return replace(self, absent={**self.absent, name: why})


def run_row(workload: Workload, device: str, threads: int, deadline: float, tell: Callable[[Row], None]) -> None:
    """`measure` in a process of its own, which knows nothing of the command's."""
    torch.set_num_threads(threads)
    measure(workload, open_device(device), deadline, tell)


def measure(workload: Workload, device: torch.device, deadline: float, tell: Callable[[Row], None]) -> None:
    """Time the contenders in turn: first those that need no compiling, then all.

    Args:
        workload: The workload to run.
        device: The device to run it on.
        deadline: The end of all work, by ``time.time()``.
        tell: Takes the results so far, after rounds and in the end.
    """
    # Contenders are compared in float32.
    torch.backends.cudnn.allow_tf32 = False
    contest = _Contest(Terms(workload, device), tell)
    for name in MAKERS:
        if name == COMPILED:
            contest.run(FIRST_SHARE * (deadline - time.time()))
        contest.add(name)
    if COMPILED not in contest.row.absent:
        contest.run(SECOND_SHARE * (deadline - time.time()))
    tell(contest.row)


class _Contest:
    def __init__(self, terms: Terms, tell: Callable[[Row], None]) -> None:
        self._terms = terms
        self._tell = tell
        self._told_at = 0.0
        self._steps: dict[str, Callable[[], None]] = {}
        self._wanted: Evidence = {}
        self.row = Row(terms.workload)

    def add(self, name: str) -> None:
        """Make a contender, compare it with the plain one, and take its first steps; or note why there is none."""
        workload, device = self._terms.workload, self._terms.device
        try:
            made = MAKERS[name](self._terms)
            started = time.perf_counter()
            evidence = training_evidence(made.forward, made.weights, workload, device)
            self._wanted = self._wanted or evidence
            require_equal(self._wanted, evidence)
            training = TrainingStep(made.forward, made.module.parameters(), workload, device, RATE)

            def step() -> None:
                training()
                finish(device)

            # A compiler may meet something new in each routing.
            for _ in range(ROUTINGS if name == COMPILED else 1):
                step()
        except AbsentError as error:
            self.row = self.row.without(name, str(error))
        except UnequalError as error:
            self.row = replace(self.row.without(name, f"it computes something else: {error}"), is_unequal=True)
        except Exception as error:  # noqa: BLE001  # compilers and devices raise anything, and the others go on
            why = (str(error).strip().splitlines() or [""])[0]
            self.row = self.row.without(name, f"it fails: {type(error).__name__}: {why}")
        else:
            first_seconds = {**self.row.first_seconds, name: time.perf_counter() - started}
            self.row = replace(self.row, first_seconds=first_seconds)
            self._steps[name] = step

    def run(self, seconds: float) -> None:
        """Time all that are there, in turn, for about so many seconds."""
        if self._steps:
            self.row = replace(self.row, timings=interleave(self._steps, seconds, after_round=self._tell_round))
            self._tell(self.row)

    def _tell_round(self, timings: Timings) -> None:
        # A result that was sent survives when a clock ends the process.
        if timings.rounds >= FEWEST_TOLD and time.monotonic() - self._told_at > SECONDS_BETWEEN:
            self._tell(replace(self.row, timings=timings))
            self._told_at = time.monotonic()
