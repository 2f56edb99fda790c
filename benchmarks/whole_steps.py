"""Whole training steps, the optimizer's part included: ``python -m benchmarks.whole_steps``.

A step is: clear gradients, forward with names for routes, a loss, backward, clip the gradients' norm, AdamW. *Plain* is
one parameter for each tensor of each expert, *stacked* is after `celmoe.stack_experts`, *by hand* the stack that an
expert of the field would write for these very experts. The other is celmoe-vp, with the same optimizer.
"""

from __future__ import annotations

import sys

from benchmarks.extras import missing_extra

if __name__ == "__main__" and (missing := missing_extra("bench")):
    sys.exit(missing)

import argparse
import csv
import statistics
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType

import torch
from rich.console import Console
from rich.progress import track
from torch import nn

import celmoe
from benchmarks.contenders.stack import STACKED, fastest_stack
from benchmarks.devices import finish
from benchmarks.equality import TOLERANCE, Evidence, UnequalError
from benchmarks.interleaved import interleave
from benchmarks.peers import load_peer
from benchmarks.steps import HOST, Forward, routings_of, string_routed
from benchmarks.workloads import Workload

PEER, PLAIN, STACK, BY_HAND = "celmoe-vp", "plain", "stacked", "by hand"
WORKLOADS = (
    Workload("linear", 64, 64, 256),
    Workload("linear", 64, 512, 256, "zipf"),
    Workload("linear", 64, 4096, 256),
    Workload("linear", 64, 65536, 256),
    Workload("mlp", 64, 4096, 256),
    Workload("mlp", 128, 512, 128),
    Workload("mlp", 128, 4096, 128),
    Workload("block", 64, 64, 32),
    Workload("gru", 64, 64, 32),
)


class WholeStep:
    """All that a user does for a step.

    Args:
        forward: The forward pass.
        parameters: The model's parameters.
        workload: Gives the hidden states.
        device: Where they are.
        optimizer: Makes the optimizer.
    """

    def __init__(
        self,
        forward: Forward,
        parameters: Iterable[nn.Parameter],
        workload: Workload,
        device: torch.device = HOST,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    ) -> None:
        self._forward = forward
        self._hidden = workload.hidden().to(device).requires_grad_()
        self._parameters = list(parameters)
        self._optimizer = optimizer(self._parameters, lr=1e-3, fused=True)
        self._device = device

    def evidence(self) -> Evidence:
        """What all must compute alike before they are timed."""
        fused = self._forward(self._hidden)
        # The loss of a step hardly depends on what comes before the fusion's norm.
        weights = torch.randn(fused.shape, generator=torch.Generator().manual_seed(1)).to(self._device)
        (grad,) = torch.autograd.grad(fused, self._hidden, weights)
        return {"output": fused.detach(), "gradient of the input": grad}

    def __call__(self) -> None:
        """One step."""
        self._optimizer.zero_grad()
        self._hidden.grad = None
        self._forward(self._hidden).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        finish(self._device)


def contenders(workload: Workload, peer: ModuleType) -> dict[str, WholeStep]:
    """A step of each, on models of equal parameters."""
    found = {}
    for name, package in ((PEER, peer), (PLAIN, celmoe), (STACK, celmoe)):
        model = workload.build(package)
        if name == STACK:
            celmoe.stack_experts(model)  # type: ignore[arg-type]  # a model of ours
        found[name] = WholeStep(string_routed(model, workload), model.parameters(), workload)
    if workload.expert in STACKED:
        stack = fastest_stack(workload.build(celmoe), workload)  # type: ignore[arg-type]  # a model of ours
        found[BY_HAND] = WholeStep(stack.routed(routings_of(workload)), stack.parameters(), workload)
    return found


def _distance(value: torch.Tensor | None, wanted: torch.Tensor | None) -> float:
    """Relative to the largest value."""
    assert value is not None
    assert wanted is not None
    return float((value - wanted).abs().max() / wanted.abs().max())


def measure(workload: Workload, peer: ModuleType, seconds: float) -> dict[str, float | str]:
    """The milliseconds of each, and how many times as fast as celmoe-vp, and as the stack by hand, stacked is.

    Raises:
        UnequalError: A contender computes something else.
    """
    steps = contenders(workload, peer)
    found = {name: step.evidence() for name, step in steps.items()}
    for name, evidence in found.items():
        for what, value in evidence.items():
            if (distance := _distance(value, found[PLAIN][what])) > TOLERANCE:
                raise UnequalError(f"{name} and {PLAIN} differ in the {what} by {distance:.1e} on {workload}")
    for step in steps.values():
        step()
    timings = interleave(steps, seconds)
    row: dict[str, float | str] = {"workload": str(workload)}
    row |= {name: round(1e3 * timings.median(name), 3) for name in steps}
    row |= {f"{name} by {PEER}": round(timings.ratio(PEER, name), 3) for name in steps if name != PEER}
    low, high = timings.quartiles(PEER, STACK)
    row |= {"low": round(low, 3), "high": round(high, 3), "rounds": timings.rounds}
    if BY_HAND in steps:
        row[f"{STACK} by {BY_HAND}"] = round(timings.ratio(BY_HAND, STACK), 3)
    return row


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all workloads, and print a table as CSV."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.whole_steps", description=__doc__)
    parser.add_argument("--seconds", type=float, default=6.0, help="about how long each workload takes")
    parser.add_argument("--experts", nargs="*", default=None, help="only workloads of these kinds of experts")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    told = Console(stderr=True)
    peer = load_peer("1.1.4")
    wanted = [each for each in WORKLOADS if options.experts is None or each.expert in options.experts]
    rows = [measure(each, peer, options.seconds) for each in track(wanted, "timing", console=told)]
    columns = dict.fromkeys(column for row in rows for column in row)
    writer = csv.DictWriter(sys.stdout, list(columns))
    writer.writeheader()
    writer.writerows(rows)
    compared = [float(row[f"{STACK} by {BY_HAND}"]) for row in rows if f"{STACK} by {BY_HAND}" in row]
    if compared:
        told.print(f"stacked by the stack by hand, geometric mean: {statistics.geometric_mean(compared):.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
