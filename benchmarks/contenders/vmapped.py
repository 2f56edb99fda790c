"""*vmap*: the experts' own module under ``torch.func.vmap``, over stacked parameters and padded rows.

Axes: B samples, E experts of a level, M rows of the largest expert.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import nn

import celmoe
from benchmarks.contenders.layouts import Padded
from benchmarks.contenders.planned import Planned, Stacked, bodies_of


class Vmapped(Planned):
    """The hierarchy with each level's experts as one mapped module, and the parameters of the model it is made from.

    Args:
        model: A model of a workload whose experts are all alike and ignore masks.
    """

    def __init__(self, model: celmoe.HierarchicalCELMoE) -> None:
        super().__init__(model)
        self.levels = nn.ModuleList(_MappedExperts(bodies) for bodies in bodies_of(model))

    def run_level(self, index: int, hidden: torch.Tensor, plan: celmoe.LevelPlan) -> torch.Tensor:
        """``[B, ...]`` to the same shape."""
        layout = Padded(plan, self.sizes[index])
        return layout.restore(self.levels[index](layout.arrange(hidden)))

    def stacks(self, index: int) -> Mapping[str, Stacked]:
        """All as the bodies have them."""
        level = cast(_MappedExperts, self.levels[index])
        return {name: Stacked(stack) for name, stack in zip(level.names, level.stacks, strict=True)}


class _MappedExperts(nn.Module):
    def __init__(self, bodies: Sequence[nn.Module]) -> None:
        super().__init__()
        # A tuple hides the module from ``parameters()``.
        self._likeness = (copy.deepcopy(bodies[0]).to("meta"),)
        self.names = [name for name, _ in bodies[0].named_parameters()]
        self.stacks = nn.ParameterList(
            nn.Parameter(torch.stack([body.get_parameter(name).detach() for body in bodies])) for name in self.names
        )

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """``[E, M, ...]`` to the same shape."""
        (likeness,) = self._likeness

        def run(parameters: dict[str, torch.Tensor], own: torch.Tensor) -> torch.Tensor:
            return cast(torch.Tensor, torch.func.functional_call(likeness, parameters, (own,)))

        parameters = dict(zip(self.names, self.stacks, strict=True))
        return torch.func.vmap(run)(parameters, rows)
