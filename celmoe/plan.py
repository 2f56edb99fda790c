"""Compiled routes: per level, which experts are present, with how many samples, and in which order those stand.

Everything that the host needs to drive a forward pass is plain Python and known once a plan exists, so a pass never
asks the device. Everything that the device needs lies in ONE int64 buffer, so that a plan travels in one transfer.

Axes: B samples in batch order, R the same rows in expert order (R = B), P experts present, E experts of a level.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from .errors import PlanError, UnknownLevelError, listed, nearest
from .routing import Codes, RouteTable

# What a plan must share with a model to fit it: the levels in order, each with its experts in order.
Layout: TypeAlias = tuple[tuple[str, tuple[str, ...]], ...]


class LevelPlan(NamedTuple):
    """Where one level's samples go.

    Attributes:
        name: The level's name.
        experts: The P experts present, in sorted order.
        counts: Samples of each, aligned with `experts`; never zero.
        is_sorted: Whether the batch already stands in expert order, so that `order` is the identity.
        follows_previous: Whether `order` is the order of the level above.
        order: ``[R]`` int64: ``order[r]`` is the batch position of sorted row r; within an expert, positions ascend.
        inverse: ``[B]`` int64: ``inverse[b]`` is the sorted row of batch position b.
        expert_ids: ``[B]`` int64: the position of each sample's expert in the config's order.
        ends: ``[P]`` int64: the row after the last one of each expert.
    """

    name: str
    experts: tuple[str, ...]
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

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        groups = ", ".join(f"{name}: {count}" for name, count in zip(self.experts, self.counts, strict=True))
        return f"LevelPlan({self.name!r}, {{{groups}}})"


# What the host knows of one level, in the order of LevelPlan's first fields: name, experts, counts, is_sorted,
# follows_previous; and where its four index tensors lie among the parts of the packed buffer.
_HostLevel: TypeAlias = tuple[tuple[str, tuple[str, ...], tuple[int, ...], bool, bool], tuple[int, int, int, int]]


class RoutingPlan:
    """The compiled routing of one batch. Immutable, picklable, and independent of any model.

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
        host_levels: Sequence[_HostLevel],
        packed: torch.Tensor,
        sizes: Sequence[int],
    ) -> None:
        self.layout = layout
        self.batch_size = batch_size
        self._host_levels = host_levels
        self._packed = packed
        self._sizes = sizes
        # One call cuts the whole buffer; `unsafe` says no more than that autograd does not track the parts as views.
        parts = torch.unsafe_split_with_sizes(packed, sizes)
        levels = {}
        for host, (order, inverse, ids, ends) in host_levels:
            levels[host[0]] = LevelPlan(*host, parts[order], parts[inverse], parts[ids], parts[ends])
        self.levels: Mapping[str, LevelPlan] = MappingProxyType(levels)

    def __reduce__(self) -> tuple[type[RoutingPlan], tuple[Any, ...]]:
        return type(self), (self.layout, self.batch_size, self._host_levels, self._packed, self._sizes)

    def __repr__(self) -> str:
        levels = ", ".join(f"{level.name}: {len(level.experts)}" for level in self.levels.values())
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
        # A plan that is moved in inference mode must still be usable in training.
        with torch.inference_mode(False):
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
        if len(plan.experts) == 1:
            return list(plan.experts) * self.batch_size
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


def make_plan(
    layout: Layout, tables: Sequence[RouteTable], codes: Sequence[Codes | int], batch_size: int
) -> RoutingPlan:
    """Sort every level's samples by expert, stably, at O(B + E) a level.

    Args:
        layout: What the tables' levels and experts are.
        tables: One table a level.
        codes: One array of codes ``[B]`` a level, or one code for the whole batch.
        batch_size: Samples B.
    """
    identity = np.arange(batch_size)
    parts: list[npt.NDArray[np.int64]] = [identity]
    host_levels: list[_HostLevel] = []
    # The order of the level above: as an array where it is not the identity, and as parts.
    previous: npt.NDArray[np.int64] | None = None
    previous_parts = (0, 0)
    for table, code in zip(tables, codes, strict=True):
        experts, counts, order = _grouped(table, code, batch_size)
        follows = _equal(order, previous)
        if not follows:
            previous, previous_parts = order, (0, 0)
            if order is not None:
                inverse = np.empty_like(identity)
                inverse[order] = identity
                previous_parts = (len(parts), len(parts) + 1)
                parts += (order, inverse)
        ids = np.full(batch_size, table.ids_by_code[code]) if isinstance(code, int) else table.ids_by_code.take(code)
        known = (table.level, experts, tuple(counts.tolist()), order is None, follows and bool(host_levels))
        host_levels.append((known, (*previous_parts, len(parts), len(parts) + 1)))
        parts += (ids, np.add.accumulate(counts))
    return RoutingPlan(layout, batch_size, host_levels, _tensor(np.concatenate(parts)), [*map(len, parts)])


def _equal(order: npt.NDArray[np.int64] | None, previous: npt.NDArray[np.int64] | None) -> bool:
    """Whether two orders are one; ``None`` is the identity, which no other order equals."""
    if order is None or previous is None:
        return order is previous
    # Orders that differ mostly do so at an end, and looking at all of a small batch costs as much as sorting it.
    return bool(order[0] == previous[0] and order[-1] == previous[-1] and (order == previous).all())


def _grouped(
    table: RouteTable, code: Codes | int, batch_size: int
) -> tuple[tuple[str, ...], npt.NDArray[np.int64], npt.NDArray[np.int64] | None]:
    """The experts present, the samples of each, and the order that sorts them: ``None`` where it is the identity."""
    if isinstance(code, int) or len(table.experts) == 1:
        only = table.sorted_experts[code if isinstance(code, int) else 0]
        return ((only,) if batch_size else ()), np.full(min(batch_size, 1), batch_size), None
    counts = np.bincount(code, minlength=len(table.experts))
    present = counts.nonzero()[0]
    experts = tuple([table.sorted_experts[each] for each in present.tolist()])
    if len(experts) > 1:
        # NumPy's stable argsort is a radix sort for the codes' 8 and 16 bits.
        order = code.argsort(kind="stable")
        if code.tobytes() != code[order].tobytes():
            return experts, counts[present], order
    return experts, counts[present], None


def _tensor(array: npt.NDArray[np.int64]) -> torch.Tensor:
    if not torch.is_inference_mode_enabled():
        return torch.from_numpy(array)
    # A plan made in inference mode must still be usable in training.
    with torch.inference_mode(False):
        return torch.from_numpy(array)
