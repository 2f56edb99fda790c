"""*Stack*: a model of equal experts as a specialist would write it by hand. Linear and MLP only.

The stack takes strings and plans by our own compiler at every call, so that only the run of the experts differs:
every tensor of a level's experts is one parameter, and their products are one call.

Axes: B samples, E experts of a level, H hidden size, F inner width.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias, cast

import torch
from torch import nn
from torch.nn import functional

import celmoe
from benchmarks.contenders.layouts import Alone, Layout, Padded, Ragged
from benchmarks.contenders.planned import MOST_PADDING, Planned, Stacked, bodies_of
from benchmarks.harness.devices import finish
from benchmarks.harness.interleaved import interleave
from benchmarks.harness.steps import HOST, Passes, routings_of
from benchmarks.workloads.bodies import MLP
from benchmarks.workloads.workload import Workload

LayoutKind: TypeAlias = type[Ragged] | type[Padded]

# The kinds of experts that it is written for.
HAND_STACKED = ("linear", "mlp")


class StackedLinear(nn.Module):
    """The linear layers of a level's experts."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        # [E, H, F], so that the gradient of a product is made as it is kept.
        self.weight = nn.Parameter(torch.stack([layer.weight.detach().T for layer in layers]))
        self.bias = _stacked([layer.bias for layer in layers])

    def forward(self, rows: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Rows of the layout with H columns to such with F."""
        return layout.affine(rows, self.weight, self.bias)

    def stacks(self) -> Mapping[str, Stacked]:
        """By the names of a linear layer."""
        return {"weight": Stacked(self.weight, is_transposed=True), "bias": Stacked(self.bias)}


class StackedMLP(nn.Module):
    """The `MLP` bodies of a level's experts."""

    def __init__(self, bodies: Sequence[MLP]) -> None:
        super().__init__()
        self.scale = _stacked([body.norm.weight for body in bodies])
        self.shift = _stacked([body.norm.bias for body in bodies])
        self.up = StackedLinear([body.up for body in bodies])
        self.down = StackedLinear([body.down for body in bodies])

    def forward(self, rows: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Rows of the layout to such of the same shape."""
        normed = functional.layer_norm(rows, rows.shape[-1:])
        scaled = torch.addcmul(layout.spread(self.shift), normed, layout.spread(self.scale))
        result: torch.Tensor = rows + self.down(functional.gelu(self.up(scaled, layout)), layout)
        return result

    def stacks(self) -> Mapping[str, Stacked]:
        """By the names of an `MLP`."""
        products = {
            f"{part}.{name}": stack
            for part, layers in (("up", self.up), ("down", self.down))
            for name, stack in layers.stacks().items()
        }
        return {"norm.weight": Stacked(self.scale), "norm.bias": Stacked(self.shift), **products}


class Stack(Planned):
    """The hierarchy with stacked experts, and with the parameters of the model that it is made from.

    Args:
        model: A model of a workload of one of the kinds `HAND_STACKED`.

    Attributes:
        kinds: The layout of rows, for each level with more than one expert.
    """

    def __init__(self, model: celmoe.HierarchicalCELMoE) -> None:
        super().__init__(model)
        self.levels = nn.ModuleList()
        for bodies in bodies_of(model):
            stacked = StackedLinear if isinstance(bodies[0], nn.Linear) else StackedMLP
            self.levels.append(stacked(bodies))  # type: ignore[arg-type]  # all of one kind
        self.kinds: tuple[LayoutKind, ...] = (Ragged,) * sum(size > 1 for size in self.sizes)

    def run_level(self, index: int, hidden: torch.Tensor, plan: celmoe.LevelPlan) -> torch.Tensor:
        """``[B, H]`` to the same shape."""
        place = sum(size > 1 for size in self.sizes[:index])
        size = self.sizes[index]
        layout: Layout = Alone() if size == 1 else self.kinds[place](plan, size)
        return layout.restore(self.levels[index](layout.arrange(hidden), layout))

    def stacks(self, index: int) -> Mapping[str, Stacked]:
        """Weights of products stand the other way round."""
        return cast(StackedLinear | StackedMLP, self.levels[index]).stacks()


def takes_grouped_mm(device: torch.device) -> bool:
    """True if PyTorch's grouped product takes float32 on the device; on others it takes half precision only."""
    return device.type == "cpu" and hasattr(functional, "grouped_mm")


def fastest_stack(model: celmoe.HierarchicalCELMoE, workload: Workload, device: torch.device = HOST) -> Stack:
    """The stack with those layouts whose passes are fastest on the workload, as tried out now on the model's device."""
    stack = Stack(model)
    plan = stack.compiler(workload.routing())
    choices: list[list[LayoutKind]] = [
        [
            *([Ragged] if takes_grouped_mm(device) else []),
            *([Padded] if size * max(level.counts) <= MOST_PADDING * workload.batch_size else []),
        ]
        for size, level in zip(stack.sizes, plan.levels.values(), strict=True)
        if size > 1
    ]
    step = Passes(stack.routed(routings_of(workload)), stack.parameters(), workload, device)

    def step_with(kinds: tuple[LayoutKind, ...]) -> Callable[[], None]:
        def run() -> None:
            stack.kinds = kinds
            step()
            finish(device)

        return run

    trials = {str(number): kinds for number, kinds in enumerate(itertools.product(*choices))}
    timings = interleave({name: step_with(kinds) for name, kinds in trials.items()}, seconds=0.0)
    stack.kinds = trials[min(trials, key=timings.median)]
    return stack


def _stacked(tensors: Sequence[torch.Tensor]) -> nn.Parameter:
    return nn.Parameter(torch.stack([tensor.detach() for tensor in tensors]))
