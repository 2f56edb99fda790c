"""The meeting of ranks before rows travel: ranks share their samples' numbers by expert, and the form of rows.

One all-gather of some integers serves all levels of a batch; another one tells the weights of samples with several
experts, if a rank has some.

Axes: G ranks of the group, E experts of a level.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from celmoe.errors import InputError
from celmoe.level import LevelInput
from celmoe.routing.plan import RoutingPlan

# The number of kinds of rows to remember; a new kind costs one more exchange.
_MOST_KINDS = 1024
_DTYPES = sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)


# A tensor beside the hidden states: its trailing shape, its dtype, and if gradients flow into it.
_Look: TypeAlias = tuple[tuple[int, ...], torch.dtype, bool]


class Rows(NamedTuple):
    """The form of a rank's rows: all but their number.

    Attributes:
        hidden: The hidden states' trailing shape.
        mask: The mask's trailing shape, its dtype, and if gradients flow into it; or ``None``.
        context: The same for each batch-aligned tensor of the context.
        irregular: The place of a batch-aligned value in the context that is no dense tensor and can't travel; or
            ``None``.
        records: If autograd records, for a backward pass to come.
        autocast: The dtype of autocast, or ``None`` if autocast is off.
    """

    hidden: tuple[int, ...]
    mask: _Look | None
    context: tuple[_Look, ...]
    irregular: str | None
    records: bool
    autocast: torch.dtype | None


class Meeting(NamedTuple):
    """Facts of this batch that all ranks of the group know.

    Attributes:
        num_samples: The samples of all ranks' batches together.
        counts: By level, ``[G, E]``: each rank's number of samples for each expert, in the config's order.
        weights: By level, ``[G, E]``: the sums of the weights of these samples; ``None`` if all weights are 1.
        dtype: The hidden states' dtype, promoted over ranks with samples.
        is_differentiated: If gradients flow into the hidden states of any rank.
        rows: The form of rows.
    """

    num_samples: int
    counts: Mapping[str, npt.NDArray[np.int64]]
    weights: Mapping[str, npt.NDArray[np.float64]] | None
    dtype: torch.dtype
    is_differentiated: bool
    rows: Rows


class Table:
    """Lets the ranks of a group meet.

    Args:
        group: The ranks.
        levels: The levels whose rows travel, each with its experts in the config's order.
    """

    def __init__(self, group: dist.ProcessGroup, levels: Mapping[str, Sequence[str]]) -> None:
        self._group = group
        self._levels = {
            level: {name: position for position, name in enumerate(experts)} for level, experts in levels.items()
        }
        self._kinds: dict[int, Rows] = {}
        # The host has and wants these integers: on the way through a device, the host would wait for the device.
        self._meets_on_cpu = "cpu:" in dist.get_backend_config(group)

    def meet(self, plan: RoutingPlan, given: LevelInput) -> Meeting:
        """Share this rank's facts, and learn all ranks'. Every rank of the group must call `meet`.

        Args:
            plan: This rank's plan.
            given: The input of the first level whose rows travel.

        Raises:
            InputError: Rows differ in form, or can't travel; every rank raises.
        """
        rows = _look(given)
        kind = int.from_bytes(hashlib.blake2b(repr(rows).encode(), digest_size=8).digest(), signed=True)
        counts = [self._counts(level, plan) for level in self._levels]
        dtype_code, has_gradient = coded(given.hidden)
        said = np.concatenate([[kind, plan.batch_size, dtype_code, has_gradient + 2 * plan.is_mixed], *counts])
        heard = self.all_gathered(said, given.hidden.device)
        self._learn(kind, rows, heard[:, 0])
        is_mixed, heard[:, 3] = bool((heard[:, 3] >= 2).any()), heard[:, 3] % 2
        has_some = heard[:, 1] > 0
        agreed = self._agreed(heard[:, 0], has_some, rows)
        dtype, is_differentiated = decoded(heard[:, 2:4], has_some, given.hidden.dtype)
        weights = None
        if is_mixed:
            sums = np.concatenate([self._weights(level, plan) for level in self._levels])
            weights = self._by_level(self.all_gathered(sums.view(np.int64), given.hidden.device).view(np.float64))
        num_samples = int(heard[:, 1].sum())
        return Meeting(num_samples, self._by_level(heard[:, 4:]), weights, dtype, is_differentiated, agreed)

    def all_gathered(self, said: npt.NDArray[np.int64], device: torch.device) -> npt.NDArray[np.int64]:
        """``[G, N]``: the N integers of each rank."""
        tensor = torch.from_numpy(said)
        if not self._meets_on_cpu:
            tensor = tensor.to(device)
        heard = tensor.new_empty(dist.get_world_size(self._group) * len(said))
        dist.all_gather_single(heard, tensor, self._group)
        return cast(npt.NDArray[np.int64], heard.cpu().numpy().reshape(-1, len(said)))

    def _by_level(self, heard: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        ends = np.cumsum([len(positions) for positions in self._levels.values()])
        return dict(zip(self._levels, np.split(heard, ends[:-1], axis=1), strict=True))

    def _weights(self, level: str, plan: RoutingPlan) -> npt.NDArray[np.float64]:
        positions, planned = self._levels[level], plan.levels[level]
        weights = np.zeros(len(positions))
        weights[[positions[name] for name in planned.present]] = planned.weights or planned.counts
        return weights

    def _counts(self, level: str, plan: RoutingPlan) -> npt.NDArray[np.int64]:
        positions, planned = self._levels[level], plan.levels[level]
        counts = np.zeros(len(positions), dtype=np.int64)
        counts[[positions[name] for name in planned.present]] = planned.counts
        return counts

    def _learn(self, kind: int, rows: Rows, kinds: npt.NDArray[np.int64]) -> None:
        """Learn the form of rows of these kinds. All ranks know the same kinds, for all ranks hear the same."""
        if self._kinds.keys() >= set(kinds.tolist()):
            return
        if len(self._kinds) >= _MOST_KINDS:
            self._kinds.clear()
        heard: list[Any] = [None] * len(kinds)
        dist.all_gather_object(heard, (kind, rows), self._group)
        self._kinds.update(heard)

    def _agreed(self, kinds: npt.NDArray[np.int64], has_some: npt.NDArray[np.bool_], own: Rows) -> Rows:
        irregular = {rank: at for rank, kind in enumerate(kinds.tolist()) if (at := self._kinds[kind].irregular)}
        if irregular:
            rank, at = next(iter(irregular.items()))
            raise InputError(
                f"{at} must be a dense tensor where experts are spread over ranks (got another batch-aligned value on "
                f"ranks {list(irregular)}; make a tensor of it, or keep it whole by celmoe.Shared)"
            )
        ranks_by_rows: dict[Rows, list[int]] = {}
        for rank in np.flatnonzero(has_some).tolist():
            ranks_by_rows.setdefault(self._kinds[int(kinds[rank])], []).append(rank)
        if len(ranks_by_rows) > 1:
            first, second, *_ = ranks_by_rows
            field = next(name for name in Rows._fields if getattr(first, name) != getattr(second, name))
            what = {"records": "gradients recorded", "autocast": "autocast"}.get(field, f"rows of {field}")
            got = ", ".join(f"{getattr(rows, field)} on {ranks}" for rows, ranks in ranks_by_rows.items())
            raise InputError(f"'{what}' must be alike on all ranks that share experts (got {got})")
        agreed = next(iter(ranks_by_rows), own)
        for rank, kind in enumerate(kinds.tolist()):
            # A rank without samples builds the others' mask and context for its experts.
            rows = self._kinds[kind]
            if (rows.mask is None, len(rows.context)) != (agreed.mask is None, len(agreed.context)):
                raise InputError(
                    f"'context' and 'mask' must be of one structure on all ranks that share experts, also where there "
                    f"are no samples (got {rows} on {rank}, {agreed} elsewhere)"
                )
        return agreed


def coded(hidden: torch.Tensor) -> tuple[int, int]:
    """Two integers: the dtype of hidden states, and 1 if gradients flow into them."""
    return _DTYPES.index(hidden.dtype), int(hidden.requires_grad)


def decoded(
    codes: npt.NDArray[np.int64], has_some: npt.NDArray[np.bool_], default: torch.dtype
) -> tuple[torch.dtype, bool]:
    """The promoted dtype of the ranks with rows, and if gradients flow on any rank."""
    dtypes = {_DTYPES[code] for code in codes[has_some, 0].tolist()}
    return reduce(torch.promote_types, dtypes) if dtypes else default, bool(codes[:, 1].any())


def _look(given: LevelInput) -> Rows:
    device, mask = given.hidden.device.type, given.mask
    return Rows(
        tuple(given.hidden.shape[1:]),
        None if mask is None else _look_of(mask),
        () if given.context.irregular else tuple(map(_look_of, given.context.aligned)),
        given.context.irregular,
        torch.is_grad_enabled(),
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
    )


def _look_of(tensor: torch.Tensor) -> _Look:
    return tuple(tensor.shape[1:]), tensor.dtype, tensor.requires_grad
