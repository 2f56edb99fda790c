"""The sizes of a hierarchy's parameters, which decide the cost of sending them.

Axes: E experts of a level.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

import celmoe
from benchmarks.workloads.hierarchies import UNIFORM
from benchmarks.workloads.workload import Workload


class Parameter(NamedTuple):
    """One trained tensor: its shape, and the bytes of a number."""

    shape: tuple[int, ...]
    itemsize: int

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * self.itemsize

    def padded_bytes(self, num_parts: int) -> int:
        """Bytes with as many rows of the first axis on every rank: ``fully_shard`` pads the last rank's part."""
        return -(-self.shape[0] // num_parts) * num_parts * math.prod(self.shape[1:]) * self.itemsize


@dataclass(frozen=True)
class LevelSizes:
    """A level: ``[E]``, the parameters of each expert, in the config's order."""

    name: str
    experts: tuple[tuple[Parameter, ...], ...]

    @cached_property
    def parameters(self) -> list[Parameter]:
        """The parameters of all experts."""
        return [parameter for expert in self.experts for parameter in expert]

    @cached_property
    def expert_bytes(self) -> npt.NDArray[np.float64]:
        """``[E]``, the bytes of each expert."""
        return np.array([bytes_of(expert) for expert in self.experts], dtype=np.float64)

    @cached_property
    def expert_tensors(self) -> npt.NDArray[np.int64]:
        """``[E]``, how many parameters each expert has."""
        return np.array([len(expert) for expert in self.experts], dtype=np.int64)


class ModelSizes(NamedTuple):
    """A model: its levels, and the parameters of no expert, which are the fusion's."""

    levels: tuple[LevelSizes, ...]
    others: tuple[Parameter, ...]

    @property
    def parameters(self) -> list[Parameter]:
        """All of them."""
        return [*(parameter for level in self.levels for parameter in level.parameters), *self.others]


def bytes_of(parameters: Iterable[Parameter]) -> int:
    """The bytes of all parameters."""
    return sum(parameter.nbytes for parameter in parameters)


def sizes_of_workload(workload: Workload) -> ModelSizes:
    """The sizes of a workload's model, found on ``meta`` without memory."""
    return _sizes(replace(workload, batch_size=1, routes=UNIFORM))


@cache
def _sizes(workload: Workload) -> ModelSizes:
    with torch.device("meta"):
        model: Any = workload.build(celmoe)
    levels = [
        LevelSizes(level.name, tuple(_trained(model.level_modules[level.name][name]) for name in level.experts))
        for level in model.levels
    ]
    return ModelSizes(tuple(levels), _trained(model.fusion))


def _trained(module: nn.Module) -> tuple[Parameter, ...]:
    return tuple(
        Parameter(tuple(each.shape), each.element_size()) for each in module.parameters() if each.requires_grad
    )
