"""Compiled routes: per level, which experts are present, with how many samples, and in which order those stand.

Everything that the host needs to drive a forward pass is plain Python and known once a plan exists, so a pass never
asks the device. Everything that the device needs lies in ONE int64 buffer, so that a plan travels in one transfer.

Axes: B samples in batch order, R the same rows in expert order (R = B), P experts present, E experts of a level.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import torch

from .errors import PlanError, UnknownLevelError, listed, nearest

# What a plan must share with a model to fit it: the levels in order, each with its experts in order.
Layout: TypeAlias = tuple[tuple[str, tuple[str, ...]], ...]


class LevelPlan(NamedTuple):
    """Where one level's samples go.

    Attributes:
        name: The level's name.
        present: The names of the P experts present, in sorted order. No `expert_ids` index this list.
        counts: Samples of each expert present, aligned with `present`; never zero.
        is_sorted: Whether the batch already stands in expert order, so that `order` is the identity.
        follows_previous: Whether `order` is the order of the level above.
        order: ``[R]`` int64: ``order[r]`` is the batch position of sorted row r; within an expert, positions ascend.
        inverse: ``[B]`` int64: ``inverse[b]`` is the sorted row of batch position b.
        expert_ids: ``[B]`` int64: the position of each sample's expert in the config's order.
        ends: ``[P]`` int64: the row after the last one of each expert.
    """

    name: str
    present: tuple[str, ...]
    counts: tuple[int, ...]
    is_sorted: bool
    follows_previous: bool
    order: torch.Tensor
    inverse: torch.Tensor
    expert_ids: torch.Tensor
    ends: torch.Tensor

    @property
    def offsets(self) -> torch.Tensor:
        """`ends` in int32, which grouped matrix products want."""
        return self.ends.to(torch.int32)

    def __eq__(self, other: object) -> bool:
        return self is other

    def __ne__(self, other: object) -> bool:
        return self is not other

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        groups = ", ".join(f"{name}: {count}" for name, count in zip(self.present, self.counts, strict=True))
        return f"LevelPlan({self.name!r}, {{{groups}}})"


# What the host knows of one level, in the order of LevelPlan's first fields: name, present, counts, is_sorted,
# follows_previous; and where its four index tensors lie among the parts of the packed buffer.
HostLevel: TypeAlias = tuple[tuple[str, tuple[str, ...], tuple[int, ...], bool, bool], tuple[int, int, int, int]]


class RoutingPlan:
    """The compiled routing of one batch: picklable, and independent of any model.

    Attributes:
        batch_size: Samples B.
        layout: The levels and experts that it was compiled for.
        levels: One `LevelPlan` a level, in order.
    """

    __slots__ = ("_host_levels", "_packed", "_sizes", "batch_size", "layout", "levels")

    def __init__(
        self,
        layout: Layout,
        batch_size: int,
        host_levels: Sequence[HostLevel],
        packed: torch.Tensor,
        sizes: Sequence[int],
    ) -> None:
        self.layout = layout
        self.batch_size = batch_size
        self._host_levels = host_levels
        self._packed, parts = _cut(packed, sizes)
        self._sizes = sizes
        levels = {}
        for host, (order, inverse, ids, ends) in host_levels:
            levels[host[0]] = LevelPlan(*host, parts[order], parts[inverse], parts[ids], parts[ends])
        self.levels: Mapping[str, LevelPlan] = MappingProxyType(levels)

    def __reduce__(self) -> tuple[type[RoutingPlan], tuple[Any, ...]]:
        return type(self), (self.layout, self.batch_size, self._host_levels, self._packed, self._sizes)

    def __repr__(self) -> str:
        levels = ", ".join(f"{level.name}: {len(level.present)}" for level in self.levels.values())
        return f"RoutingPlan(batch_size={self.batch_size}, experts present: {{{levels}}}, device='{self.device}')"

    @property
    def device(self) -> torch.device:
        """Where the index tensors lie."""
        return self._packed.device

    @property
    def nbytes(self) -> int:
        """Bytes of all index tensors together."""
        return self._packed.nbytes

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> RoutingPlan:
        """The same plan with its index tensors on ``device``, moved in one transfer."""
        packed = self._packed.to(device, non_blocking=non_blocking)
        return self if packed is self._packed else self._with(packed)

    def pin_memory(self) -> RoutingPlan:
        """The same plan in page-locked memory; ``DataLoader(pin_memory=True)`` calls this."""
        with torch.inference_mode(False):
            return self._with(self._packed.pin_memory())

    def is_pinned(self) -> bool:
        """Whether the index tensors lie in page-locked memory."""
        return self._packed.is_pinned()

    def routes(self, level: str) -> list[str]:
        """The expert's name for each sample.

        Raises:
            UnknownLevelError: The plan has no such level.
        """
        if level not in self.levels:
            raise UnknownLevelError(
                f"'level' must be a level of the plan (got {level!r}; {nearest(level, self.levels)})"
            )
        experts = dict(self.layout)[level]
        plan = self.levels[level]
        if len(plan.present) == 1:
            return list(plan.present) * self.batch_size
        return [experts[each] for each in plan.expert_ids.tolist()]

    def require_layout(self, layout: Layout) -> None:
        """Check that the plan was compiled for these levels and experts.

        Raises:
            PlanError: It was not; the message names the first difference.
        """
        if self.layout == layout:
            return
        ours, theirs = [name for name, _ in self.layout], [name for name, _ in layout]
        if ours != theirs:
            raise PlanError(f"'routing' must be a plan for levels {listed(theirs)} (got one for {listed(ours)})")
        for (level, planned), (_, wanted) in zip(self.layout, layout, strict=True):
            if planned != wanted:
                only_planned = [name for name in planned if name not in wanted]
                only_wanted = [name for name in wanted if name not in planned]
                if not only_planned and not only_wanted:
                    raise PlanError(
                        f"'routing' must be a plan for the experts of level {level!r} in the config's order (got "
                        f"one for the same experts in another order)"
                    )
                raise PlanError(
                    f"'routing' must be a plan for the {len(wanted)} experts of level {level!r} (got one "
                    f"for {len(planned)}; only in the plan: {listed(only_planned)}; only in the model: "
                    f"{listed(only_wanted)})"
                )

    def _with(self, packed: torch.Tensor) -> RoutingPlan:
        return RoutingPlan(self.layout, self.batch_size, self._host_levels, packed, self._sizes)


def _cut(packed: torch.Tensor, sizes: Sequence[int]) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
    """The buffer, and its parts in one call; `unsafe` says only that autograd does not track them as views."""
    if torch.is_inference_mode_enabled():
        # A plan that was made, moved or unpickled in inference mode must still be usable in training.
        with torch.inference_mode(False):
            return _cut(packed.clone() if packed.is_inference() else packed, sizes)
    return packed, torch.unsafe_split_with_sizes(packed, sizes)
