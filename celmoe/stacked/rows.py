"""The members that a rank holds of a stack that is sharded over ranks, as a ``DTensor`` is on its first axis.

Axes: M members of a stack.
"""

from __future__ import annotations

from typing import Any, cast

import torch

from celmoe.errors import StackedError


def is_sharded(tensor: torch.Tensor) -> bool:
    """True for a tensor of which each rank has a part: a ``DTensor``."""
    # Not by the class: its module takes a while to import.
    return hasattr(tensor, "to_local")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor, in the same memory."""
    return cast(torch.Tensor, cast(Any, tensor).to_local()) if is_sharded(tensor) else tensor


def members_here(stack: torch.Tensor) -> range:
    """The places of the members that this rank holds.

    Args:
        stack: ``[M, ...]``, sharded or not.

    Raises:
        StackedError: The stack is sharded in another way than by members.
    """
    if not is_sharded(stack):
        return range(len(stack))
    sharded = cast(Any, stack)
    coordinate = sharded.device_mesh.get_coordinate()
    start, size = 0, len(stack)
    for dimension, placement in enumerate(sharded.placements):
        if placement.is_replicate():
            continue
        if not placement.is_shard(0) or coordinate is None:
            raise StackedError(
                f"'stack' must be sharded by experts, on its first axis (got {placement} for a stack of shape "
                f"{tuple(stack.shape)})"
            )
        part = -(-size // sharded.device_mesh.size(dimension))
        first = min(part * coordinate[dimension], size)
        start, size = start + first, min(part, size - first)
    return range(start, start + size)
