"""Counting the ATen operations of a forward and a backward pass that launch work.

The count stands for accelerators: the launches of kernels bound a loop over experts there. The count needs no such
machine: products are counted in an accelerator's arrangement, though they run on the CPU. The CPU's own arrangement is
counted beside it. It makes a call for every number of rows that experts have, which costs a CPU less than moving rows.

Axes: B samples, H hidden size, E experts of the last level.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast
from unittest import mock

import torch
from rich.console import Console
from rich.progress import track
from torch.utils._python_dispatch import TorchDispatchMode

import celmoe
import celmoe.engines.arrangement
import celmoe.grouped.kernels.product
from benchmarks.harness.steps import Passes, string_routed
from benchmarks.workloads.bodies import GROUPED_EXPERTS
from benchmarks.workloads.points import ROUTES
from benchmarks.workloads.workload import Workload
from celmoe.engines.registry import GROUPED

COUNTED_BATCH, COUNTED_WIDTH = 4096, 64
FEW_EXPERTS, MANY_EXPERTS = 4, 256
ARRANGEMENTS = ACCELERATOR, CPU = "accelerator", "cpu"

_aten = torch.ops.aten
# Views by another name, whose schema doesn't say so, and memory that is taken and not written.
_LAUNCH_NOTHING = {
    _aten._unsafe_view,
    _aten.unsafe_chunk,
    _aten.unsafe_split,
    _aten.unsafe_split_with_sizes,
    _aten.empty,
    _aten.empty_like,
    _aten.empty_strided,
    _aten.new_empty,
    _aten.new_empty_strided,
}


@dataclass(frozen=True)
class OperationCount:
    """Operations in both passes with `FEW_EXPERTS` and with `MANY_EXPERTS`, in one of the `ARRANGEMENTS` of products.

    The operations that have grown come with how many more there are, the largest first.
    """

    expert: str
    routes: str
    arrangement: str
    few: int
    many: int
    grown: Sequence[tuple[str, int]]

    @property
    def ratio(self) -> float:
        """Many by few."""
        return self.many / self.few


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch annotates it not
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, _types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if not func.is_view and func.overloadpacket not in _LAUNCH_NOTHING:
            self.counts[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


def count_operations(step: Callable[[], object]) -> Counter[str]:
    """The work-launching operations of one step by name; views are not counted."""
    counting = _Counting()
    with counting:
        step()
    return counting.counts


@contextlib.contextmanager
def arranged_for(arrangement: str) -> Iterator[None]:
    """Products as the grouped engine arranges them for an accelerator, or for a CPU."""
    if arrangement == CPU:
        yield
        return
    right = celmoe.grouped.kernels.product.backend_for
    with (
        mock.patch.object(
            celmoe.grouped.kernels.product, "backend_for", lambda _, *rest: right("an accelerator", *rest)
        ),
        mock.patch.object(celmoe.engines.arrangement, "FEW_ROWS_PER_EXPERT", float("inf")),
    ):
        yield


def count_all(console: Console) -> list[OperationCount]:
    """By kind of expert, routes and arrangement; with a bar."""
    points = [*itertools.product(GROUPED_EXPERTS, ROUTES, ARRANGEMENTS)]
    return [count_growth(*point) for point in track(points, "operations", console=console)]


def count_growth(expert: str, routes: str, arrangement: str, engine: str = GROUPED) -> OperationCount:
    """Count both passes with few experts and with many. Operations of a first call alone are not counted."""
    counts = []
    for experts in (FEW_EXPERTS, MANY_EXPERTS):
        workload = Workload(expert, COUNTED_WIDTH, COUNTED_BATCH, experts, routes)
        model = cast(celmoe.HierarchicalCELMoE, workload.build(celmoe, engine=engine))
        step = Passes(string_routed(model, workload), model.parameters(), workload)
        with arranged_for(arrangement):
            step()
            counts.append(count_operations(step))
    few, many = counts
    return OperationCount(expert, routes, arrangement, few.total(), many.total(), (many - few).most_common())
