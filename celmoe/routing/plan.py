"""Compiled routes: the experts present at each level, their numbers of samples, and the samples' order.

Everything that the host needs to drive a forward pass is plain Python in the plan, so a pass never asks the device.
Everything that the device needs lies in ONE int64 buffer, so a plan travels in one transfer.

Axes: B samples in batch order, R rows in expert order, P experts present, E experts of a level. R = B, unless some
samples have several experts, or none: then a level has a `Mixture`.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from numbers import Integral
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from celmoe.errors import PlanError, RouteTypeError, UnknownLevelError, nearest
from celmoe.torch_internals import is_symbolic_tensor, register_container

from .layout import Layout
from .load import LevelLoad
from .memberships import CodeArray, Memberships, joined
from .planner import SEVERAL_EXPERTS, HostLevel, HostMixture, sort_samples
from .routes import Route, RouteTable, SampleCodes

# A level's order, its inverse and the expert ids, ``[B]`` int64 each.
LevelIndices: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Mixture(NamedTuple):
    """The part of a level's plan that tells which samples have several experts, or none.

    Axes: N samples without an expert; M samples with several experts or a weight other than 1, each with at most W; K
    rows of these M samples.

    Attributes:
        num_passed: N. Their rows stand behind all experts' rows.
        most: W; 0 if M is 0.
        places: ``[K]`` int64: the rows of the M samples, sample by sample.
        slots: ``[M · W]`` int64: for each of the M samples W positions in `places`, K for an empty one.
        packed: ``[R + N, 2]`` int64: the weight of each row, as four floats of 32 bits whose sum it is.
    """

    num_passed: int
    most: int
    places: torch.Tensor
    slots: torch.Tensor
    packed: torch.Tensor

    def row_weights(self, like: torch.Tensor, places: torch.Tensor | None = None) -> torch.Tensor:
        """``[R + N, 1, ...]``: the weight of each row, to multiply rows like these; or of the rows at some places."""
        packed = self.packed if places is None else self.packed.index_select(0, places)
        weights = packed.view(torch.float32).to(like.dtype.to_real()).sum(-1)
        return weights.view(-1, *(1 for _ in range(like.dim() - 1)))


class LevelPlan(NamedTuple):
    """The experts of one level's samples. `RoutingPlan.routes` gives each sample's expert by name, `expert_ids` by id.

    Attributes:
        name: The level's name.
        present: The names of the P experts present, in sorted order, without repeats. `expert_ids` do not index them.
        counts: Rows of each expert present, aligned with `present`; never zero.
        is_sorted: True if the batch already stands in expert order, so that `order` is the identity.
        follows_previous: True if `order` is the order of the level above.
        order: ``[R]`` int64: ``order[r]`` is the batch position of sorted row r; within an expert, positions ascend.
            With a mixture ``[R + N]``: behind the experts' rows come the positions of samples without an expert.
        inverse: ``[B]`` int64: ``inverse[b]`` is the sorted row of batch position b. With a mixture, the rows from
            R + N on are the sums of the M samples with several experts.
        expert_ids: ``[B]`` int64: the position of each sample's expert in the config's order; -1 for a sample without
            an expert, and -2 for one with several, or with a weight.
        ends: ``[P]`` int64: the row after the last one of each expert.
        mixture: The samples with several experts, or with none; ``None`` if every sample has one.
        weights: The sum of the weights of each present expert's rows; ``None`` if all weights are 1.
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
    mixture: Mixture | None = None
    weights: tuple[float, ...] | None = None

    @property
    def block_counts(self) -> tuple[int, ...]:
        """Rows of each expert present; and, behind them, of samples without an expert, if there are some."""
        passed = self.mixture.num_passed if self.mixture is not None else 0
        return (*self.counts, passed) if passed else self.counts

    def rearranged(self, source: npt.NDArray[np.int64], counts: Sequence[int]) -> LevelPlan:
        """The plan with the experts' rows in another order.

        Args:
            source: ``[R]``, the present row for each new one.
            counts: The rows of each block from then on.
        """
        num_rows = len(source)
        rest = np.arange(num_rows, self.order.shape[0], dtype=np.int64)
        source = np.concatenate([source, rest])
        place = np.empty_like(source)
        place[source] = np.arange(len(source))
        behind = 0 if self.mixture is None or not self.mixture.most else len(self.mixture.slots) // self.mixture.most
        sums = np.arange(len(source), len(source) + behind, dtype=np.int64)
        both = torch.from_numpy(np.concatenate([source, place, sums])).to(self.order.device, non_blocking=True)
        new_of, place_of = both[: len(source)], both[len(source) :]
        mixture = self.mixture
        if mixture is not None:
            places, packed = place_of.index_select(0, mixture.places), mixture.packed.index_select(0, new_of)
            mixture = mixture._replace(places=places, packed=packed)
        return self._replace(
            order=self.order.index_select(0, new_of),
            inverse=place_of.index_select(0, self.inverse),
            counts=tuple(counts),
            is_sorted=False,
            follows_previous=False,
            mixture=mixture,
        )

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


# A NamedTuple's constructor names a module that does not exist. Tools that resolve its annotations, such as pdoc, look
# there in vain.
LevelPlan.__new__.__module__ = __name__


class RoutingPlan:
    """The compiled routing of one batch: picklable, and independent of any model.

    A plan belongs to the config that it was compiled for. A model takes a plan as long as the model's enabled levels,
    their experts, order, parents and fallbacks are the same.

    Attributes:
        batch_size: Samples B.
        indices: By level the order, its inverse and the expert ids, int64; see `LevelPlan`.
        layout: The levels, experts, parents and fallbacks that the plan was compiled for.
        is_mixed: True if a sample has several experts at a level, or none.
        levels: One `LevelPlan` a level, in order.
    """

    __slots__ = (
        *("__weakref__", "_host_levels", "_packed", "_sizes"),
        *("batch_size", "indices", "is_mixed", "layout", "levels"),
    )

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
        self.is_mixed = False
        levels = {}
        for host, (order, inverse, ids, ends), mixture in host_levels:
            found = LevelPlan(*host, parts[order], parts[inverse], parts[ids], parts[ends])
            if mixture is not None:
                self.is_mixed = True
                found = found._replace(mixture=_mixture(mixture, parts), weights=mixture.weights)
            levels[host[0]] = found
        self.levels: Mapping[str, LevelPlan] = MappingProxyType(levels)
        self.indices = _indices(parts, [places for _, places, _ in host_levels])

    @classmethod
    def of_indices(
        cls,
        layout: Layout,
        indices: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
        *,
        is_mixed: bool = False,
    ) -> RoutingPlan:
        """A plan of these `indices`, as the same samples' plan has them.

        The host reads the ids, and sorts the samples again, when it is first asked for more. The `indices` of a mixed
        plan don't tell it whole: it can be asked for nothing.
        """
        plan = cls.__new__(cls)
        plan.layout, plan.indices, plan.is_mixed = layout, tuple(indices), is_mixed
        plan.batch_size = indices[0][2].shape[0] if indices and isinstance(indices[0][2], torch.Tensor) else 0
        return plan

    def __getattr__(self, name: str) -> Any:
        # Python calls this for slots without a value: those of `of_indices`.
        if name not in ("_host_levels", "_packed", "_sizes", "levels"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        _require_readable(self, "plan")
        if self.is_mixed:
            raise PlanError("'plan' must have one expert a sample (got the tensors of one with several, or none)")
        found = [ids.cpu().numpy() for _, _, ids in self.indices]
        tables = _tables(self.layout)
        codes = [table.codes_by_id[ids] for table, ids in zip(tables, found, strict=True)]
        made = _planned_again(self, codes, self.batch_size)
        for each in ("_host_levels", "_packed", "_sizes", "levels", "indices"):
            setattr(self, each, getattr(made, each))
        return getattr(self, name)

    def __reduce__(self) -> tuple[type[RoutingPlan], tuple[Any, ...]]:
        return type(self), (self.layout, self.batch_size, self._host_levels, self._packed, self._sizes)

    def __repr__(self) -> str:
        levels = ", ".join(f"{level.name}: {len(level.present)}" for level in self.levels.values())
        return f"RoutingPlan(batch_size={self.batch_size}, experts present: {{{levels}}}, device='{self.device}')"

    @property
    def device(self) -> torch.device:
        """The device of the index tensors."""
        return self.indices[0][0].device if self.indices else self._packed.device

    @property
    def nbytes(self) -> int:
        """Bytes of all index tensors together."""
        return self._packed.nbytes

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> RoutingPlan:
        """The same plan with its index tensors on ``device``, moved in one transfer.

        Raises:
            PlanError: The plan is on meta, which has shapes only, and ``device`` is not meta.
        """
        if self._packed.is_meta and torch.device(device).type != "meta":
            _require_readable(self, "plan")
        packed = self._packed.to(device, non_blocking=non_blocking)
        return self if packed is self._packed else self._with(packed)

    def pin_memory(self) -> RoutingPlan:
        """The same plan in page-locked memory; ``DataLoader(pin_memory=True)`` calls this."""
        with torch.inference_mode(False):
            return self._with(self._packed.pin_memory())

    def is_pinned(self) -> bool:
        """True if the index tensors lie in page-locked memory."""
        return self._packed.is_pinned()

    def routes(self, level: str) -> list[Any]:
        """The route of each sample: the expert's name, several names with their weights, or ``None``.

        Raises:
            UnknownLevelError: The plan has no such level.
            PlanError: The plan is on meta.
        """
        if level not in self.levels:
            raise UnknownLevelError(
                f"'level' must be a level of the plan (got {level!r}; {nearest(level, self.levels)})"
            )
        plan = self.levels[level]
        if len(plan.present) == 1 and plan.mixture is None:
            return list(plan.present) * self.batch_size
        _require_readable(self, "plan")
        experts = next(each.experts for each in self.layout.levels if each.name == level)
        ids = plan.expert_ids.tolist()
        if plan.mixture is None:
            return [experts[each] for each in ids]
        found: list[Route] = [experts[each] if each >= 0 else None for each in ids]
        codes, samples, weights, _ = _memberships(self.to("cpu").levels[level])
        for code, sample, weight in zip(codes.tolist(), samples.tolist(), weights.tolist(), strict=True):
            if ids[sample] == SEVERAL_EXPERTS:
                route = found[sample] = found[sample] or {}
                route[plan.present[code]] = weight
        return found

    def load(self) -> dict[str, LevelLoad]:
        """The samples of each expert, by level; asks no device. A sample with several experts counts for each.

        Raises:
            PlanError: The plan is one of tensors alone, and on meta or traced.
        """
        found = {}
        for level in self.layout.levels:
            plan = self.levels[level.name]
            counts = dict(zip(plan.present, plan.counts, strict=True))
            found[level.name] = LevelLoad(level.name, {name: counts.get(name, 0) for name in level.experts})
        return found

    def slice(self, start: int, stop: int) -> RoutingPlan:
        """The plan of the samples from ``start`` up to, but not including, ``stop``.

        The result equals the compiled plan of these samples' routes, and lies on this plan's device. The host sorts the
        samples again, O(B). Reading the ids of a plan on a device waits for that device, so cut plans before moving
        them.

        Args:
            start: From 0 to ``stop``.
            stop: Up to `batch_size`.

        Raises:
            PlanError: A position is out of range, or the plan is on meta.
            RouteTypeError: A position is no integer.
        """
        for name, position in (("start", start), ("stop", stop)):
            if isinstance(position, bool) or not isinstance(position, Integral):
                raise RouteTypeError(f"{name!r} must be an integer (got {position!r})")
        if not 0 <= start <= stop <= self.batch_size:
            raise PlanError(
                f"'start' and 'stop' must be in order, from 0 to the plan's {self.batch_size} samples (got {start} and "
                f"{stop})"
            )
        whole = _host_codes(self)
        cut = [each.cut(start, stop).settled() if isinstance(each, Memberships) else each[start:stop] for each in whole]
        return _planned_again(self, cut, stop - start)

    def repeat_interleave(self, repeats: int) -> RoutingPlan:
        """The plan of a batch that has each sample several times, one after another: the beams of generation.

        The result equals the compiled plan of the repeated routes, and lies on this plan's device. The host sorts the
        samples again, O(B · repeats). Reading the ids of a plan on a device waits for that device.

        Args:
            repeats: Rows of each sample, from 1 on.

        Raises:
            PlanError: ``repeats`` is below 1, or the plan is on meta.
            RouteTypeError: ``repeats`` is no integer.
        """
        if isinstance(repeats, bool) or not isinstance(repeats, Integral):
            raise RouteTypeError(f"'repeats' must be an integer (got {repeats!r})")
        if repeats < 1:
            raise PlanError(f"'repeats' must be at least 1 (got {repeats})")
        number = int(repeats)
        codes = [
            each.repeated(number) if isinstance(each, Memberships) else np.repeat(each, number)
            for each in _host_codes(self)
        ]
        return _planned_again(self, codes, self.batch_size * number)

    @staticmethod
    def join(plans: Iterable[RoutingPlan]) -> RoutingPlan:
        """The plan of several batches' samples, one batch after another.

        The result equals the compiled plan of the routes, end to end, and lies on the plans' device. The host sorts the
        samples again, O(B). Reading the ids of plans on a device waits for that device.

        Args:
            plans: At least one plan; all of one config, on one device.

        Raises:
            PlanError: There are no plans, plans of several configs or devices, or plans on meta.
            RouteTypeError: An item is no plan.
        """
        given = list(plans)
        if not given:
            raise PlanError("'plans' must hold at least one plan (got none)")
        for position, plan in enumerate(given):
            name = f"plans[{position}]"
            if not isinstance(plan, RoutingPlan):
                raise RouteTypeError(f"{name!r} must be a RoutingPlan (got {type(plan).__name__})")
            plan.require_layout(given[0].layout, name)
            _require_readable(plan, name)
            if plan.device != given[0].device:
                raise PlanError(f"{name!r} must be on {given[0].device}, where the first plan is (got {plan.device})")
        codes = map(_host_codes, given)
        size = sum(plan.batch_size for plan in given)
        return _planned_again(given[0], [joined(each) for each in zip(*codes, strict=True)], size)

    def require_layout(self, layout: Layout, name: str = "routing") -> None:
        """Check that the plan was compiled for a config of this layout.

        Args:
            layout: The layout wanted.
            name: The plan's name in errors.

        Raises:
            PlanError: The layouts differ; the message names the first difference.
        """
        if self.layout.packed == layout.packed:
            return
        found = self.layout.difference(layout)
        assert found is not None
        wanted, got = found
        raise PlanError(
            f"{name!r} must be a plan of a config with {wanted} (got one with {got}); compile the routing again"
        )

    def _with(self, packed: torch.Tensor) -> RoutingPlan:
        return RoutingPlan(self.layout, self.batch_size, self._host_levels, packed, self._sizes)


def _cut(packed: torch.Tensor, sizes: Sequence[int]) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
    """The buffer, and its parts in one call; `unsafe` only says that autograd does not track the parts as views."""
    if torch.is_inference_mode_enabled():
        # A plan that was made, moved or unpickled in inference mode must still be usable in training.
        with torch.inference_mode(False):
            return _cut(packed.clone() if packed.is_inference() else packed, sizes)
    return packed, torch.unsafe_split_with_sizes(packed, sizes)


def make_plan(
    layout: Layout, tables: Sequence[RouteTable], codes: Sequence[SampleCodes], batch_size: int
) -> RoutingPlan:
    """Plan one batch.

    Args:
        layout: The layout of the tables' levels and experts.
        tables: One table a level.
        codes: The codes of each level's B samples.
        batch_size: Samples B.

    Returns:
        The plan, on the CPU.
    """
    make = _make_plan
    if torch.compiler.is_compiling():
        # Nothing here belongs in a graph, and torch 2.4 ends in an error when it traces NumPy's counts.
        make = torch.compiler.disable(make)
    return make(layout, tables, codes, batch_size)


def _make_plan(
    layout: Layout, tables: Sequence[RouteTable], codes: Sequence[SampleCodes], batch_size: int
) -> RoutingPlan:
    if torch.is_inference_mode_enabled():
        # Tensors that are made outside of it need no copy: see `_cut`.
        with torch.inference_mode(False):
            return _make_plan(layout, tables, codes, batch_size)
    return RoutingPlan(layout, batch_size, *sort_samples(tables, codes, batch_size))


def _mixture(host: HostMixture, parts: Sequence[torch.Tensor]) -> Mixture:
    places, slots, packed = parts[host.first : host.first + 3]
    return Mixture(host.num_passed, host.most, places, slots, packed.view(-1, 2))


def _planned_again(plan: RoutingPlan, codes: Sequence[SampleCodes], size: int) -> RoutingPlan:
    """A plan of the same config and device, for these codes of each level."""
    return make_plan(plan.layout, _tables(plan.layout), codes, size).to(plan.device, non_blocking=True)


@lru_cache(maxsize=16)
def _tables(layout: Layout) -> list[RouteTable]:
    return [RouteTable(level.name, level.experts) for level in layout.levels]


def _host_codes(plan: RoutingPlan) -> list[CodeArray | Memberships]:
    """The codes of each level's samples, read from the device in one transfer."""
    found: list[CodeArray | Memberships] = []
    for table, level in zip(_tables(plan.layout), plan.to("cpu").levels.values(), strict=True):
        if level.mixture is None:
            found.append(table.codes_by_id[level.expert_ids.numpy()])
        else:
            own = _memberships(level)
            of_present = np.array([table.code_by_name[name] for name in level.present], dtype=table.dtype)
            found.append(own._replace(codes=of_present[own.codes]))
    return found


def _memberships(level: LevelPlan) -> Memberships:
    """The memberships of a level with a mixture, on the CPU, with positions in `LevelPlan.present` for codes."""
    assert level.mixture is not None
    num_rows = sum(level.counts)
    codes = np.repeat(np.arange(len(level.counts)), level.counts)
    samples = level.order.numpy()[:num_rows]
    weights = level.mixture.row_weights(torch.empty(0, dtype=torch.float64)).numpy()[:num_rows]
    by_sample = np.argsort(samples, kind="stable")
    size = len(level.inverse)
    return Memberships(codes[by_sample], samples[by_sample], weights[by_sample], size)


def _require_readable(plan: RoutingPlan, name: str) -> None:
    if plan.device.type == "meta":
        raise PlanError(f"{name!r} must lie where its ids can be read (got a plan on meta)")
    if plan.indices and is_symbolic_tensor(plan.indices[0][0]):
        raise PlanError(f"{name!r} must lie where its ids can be read (got a plan that is traced)")


def _indices(parts: Sequence[torch.Tensor], places: Sequence[Sequence[int]]) -> tuple[LevelIndices, ...]:
    """The `RoutingPlan.indices`: a tensor for each use, since a graph made for one tensor is none for two."""
    seen: set[int] = set()
    found: list[LevelIndices] = []
    for order, inverse, ids, _ in places:
        own = []
        for place in (order, inverse, ids):
            own.append(parts[place].detach() if place in seen else parts[place])
            seen.add(place)
        found.append((own[0], own[1], own[2]))
    return tuple(found)


class _Tree:
    """A plan without its `indices`: what it has in common with the plans of other batches.

    A plan of samples with several experts, or none, has nothing in common with others: `indices` don't tell it whole.
    """

    def __init__(self, layout: Layout, plan: RoutingPlan | None) -> None:
        self.layout = layout
        self.plan = None if plan is None else weakref.ref(plan)
        self.is_mixed = plan is not None and plan.is_mixed

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Tree) or self.is_mixed != other.is_mixed or self.layout != other.layout:
            return False
        return not self.is_mixed or self.plan == other.plan

    def __hash__(self) -> int:
        return hash(self.layout)


def _flatten(plan: RoutingPlan) -> tuple[list[Any], _Tree]:
    return [each for level in plan.indices for each in level], _Tree(plan.layout, plan)


def _unflatten(leaves: Iterable[Any], tree: _Tree) -> RoutingPlan:
    found = list(leaves)
    known = None if tree.plan is None else tree.plan()
    if known is not None and all(map(operator.is_, found, _flatten(known)[0])):
        # Nothing has to be sorted again.
        return known
    indices = list(zip(found[::3], found[1::3], found[2::3], strict=True))
    return RoutingPlan.of_indices(tree.layout, indices, is_mixed=tree.is_mixed)


register_container(
    RoutingPlan,
    _flatten,
    _unflatten,
    lambda tree: tree.layout.packed.decode("utf-8", "surrogatepass"),
    lambda text: _Tree(Layout.of_packed(text.encode("utf-8", "surrogatepass")), None),
)
# Exported programs hold their example, which is read as data only.
torch.serialization.add_safe_globals([RoutingPlan, Layout])
