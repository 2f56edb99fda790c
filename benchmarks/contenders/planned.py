"""Hand-written hierarchies: planned by our own compiler, with the experts of a level run in some other way."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

import celmoe
from benchmarks.contenders.contender import AbsentError
from benchmarks.harness.equality import Part, Weights
from benchmarks.harness.steps import Forward, Routes, cycled
from benchmarks.workloads.workload import Workload


class Stacked(NamedTuple):
    """A parameter ``[E, ...]`` of all experts of a level; each one's two axes may be swapped there."""

    whole: nn.Parameter
    is_transposed: bool = False


class Planned(nn.Module):
    """The hierarchy of a model, without its experts.

    Args:
        model: Gives the hierarchy and the fusion. Its experts stand in sorted order, so that an expert's place in the
            config is also the place of its rows.

    Attributes:
        sizes: Experts of each level.
    """

    def __init__(self, model: celmoe.HierarchicalCELMoE) -> None:
        super().__init__()
        assert all(list(level.experts) == sorted(level.experts) for level in model.levels)
        self.compiler = celmoe.RoutingCompiler(model.config)
        self.sizes = [len(level.experts) for level in model.levels]
        self.fusion = copy.deepcopy(model.fusion)

    def run_level(self, index: int, hidden: torch.Tensor, plan: celmoe.LevelPlan) -> torch.Tensor:
        """Run one level's experts on ``[B, ...]`` in batch order; the result has the same shape and order."""
        raise NotImplementedError

    def forward(self, hidden: torch.Tensor, routing: Routes) -> torch.Tensor:
        """``[B, ...]`` to the fused ``[B, ...]``."""
        plan = self.compiler(routing).to(hidden.device)
        level_hiddens = []
        for index, level in enumerate(plan.levels.values()):
            hidden = self.run_level(index, hidden, level)
            level_hiddens.append(hidden)
        fused: torch.Tensor = self.fusion(level_hiddens)
        return fused

    def stacks(self, index: int) -> Mapping[str, Stacked]:
        """The level's parameters that hold all its experts, by the parameter's name in an expert's body."""
        raise NotImplementedError

    def weights_of(self, model: celmoe.HierarchicalCELMoE) -> Weights:
        """By the names of the model that this one was made from: the fusion's parameters, and each expert's parts."""
        names = {parameter: name for name, parameter in model.named_parameters()}
        found: dict[str, nn.Parameter | Part] = dict(self.fusion.named_parameters("fusion"))
        for index, bodies in enumerate(bodies_of(model)):
            for name, (whole, is_transposed) in self.stacks(index).items():
                for place, body in enumerate(bodies):
                    found[names[body.get_parameter(name)]] = Part(whole, place, is_transposed)
        return found

    def routed(self, routings: Sequence[Routes]) -> Forward:
        """The forward pass over the routings in turn."""
        return cycled(self, routings)


def bodies_of(model: celmoe.HierarchicalCELMoE) -> list[list[nn.Module]]:
    """The bodies of each level's experts."""
    modules = model.level_modules
    return [[modules[level.name][name].body for name in level.experts] for level in model.levels]  # type: ignore[index]  # nested mappings


# Padding to more than so many times the rows is no choice that anyone would make.
MOST_PADDING = 4


def padding(workload: Workload, plan: celmoe.RoutingPlan) -> float:
    """The ratio of padded rows to rows, in the worst level, if every expert gets as many as the largest."""
    sizes = [len(names) for names in workload.levels().values()]
    largest = [max(level.counts) for level in plan.levels.values()]
    return max(size * most for size, most in zip(sizes, largest, strict=True)) / workload.batch_size


def require_little_padding(workload: Workload, plans: Iterable[celmoe.RoutingPlan]) -> None:
    """Refuse rows padded in the worst plan to more than `MOST_PADDING` times as many.

    Raises:
        AbsentError: They would be.
    """
    most = max(padding(workload, plan) for plan in plans)
    if most > MOST_PADDING:
        raise AbsentError(f"it would pad the rows to {most:.0f} times as many")
