"""Real steps of each layout, counted: the processes of a gloo group on loopback, and the steps that they take."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import celmoe
from benchmarks.tables.scaling.collectives import QUANTITIES, Traffic, by_kind
from benchmarks.tables.scaling.counting import Counter, SocketBytes, socket_bytes
from benchmarks.tables.scaling.layouts import DDP, EXPERTS, LAYOUTS, LEVELS, REDUCED
from benchmarks.workloads.hierarchies import EVEN, ZIPF
from benchmarks.workloads.workload import Workload
from celmoe.distributed import joined_mean, prepare_ddp, reduce_gradients, shard_experts, shard_levels

STEPS = 4
_LIMIT = timedelta(seconds=120)


@dataclass(frozen=True)
class Case:
    """One way to train one workload.

    Attributes:
        layout: One of `layouts.LAYOUTS`.
        workload: Its B is a rank's.
        num_copies: Ranks that hold the same parts of parameters, or the same experts.
    """

    layout: str
    workload: Workload
    num_copies: int = 1

    @property
    def layout_words(self) -> str:
        """The layout, and the copies if there are any."""
        return f"{self.layout}, {self.num_copies} copies" if self.num_copies > 1 else self.layout

    def __str__(self) -> str:
        return f"{self.layout_words}, {self.workload}"


def cases_of(num_ranks: int) -> list[Case]:
    """All layouts of experts of both kinds, all of them present or not, routed evenly or not, on so many ranks."""
    workloads = [
        Workload("linear", 64, 256, 64),
        Workload("linear", 64, 256, 256, ZIPF),
        Workload("mlp", 32, 1024, 16),
        Workload("mlp", 32, 1024, 16, ZIPF),
    ]
    cases = [Case(layout, workload) for layout in LAYOUTS for workload in workloads]
    cases.append(Case(EXPERTS, Workload("linear", 64, 256, 32, ZIPF, EVEN)))
    cases.append(Case(EXPERTS, Workload("masked-block", 16, 256, 8)))
    if num_ranks > 2 and num_ranks % 2 == 0:
        cases += [Case(layout, workload, 2) for layout in (LEVELS, EXPERTS) for workload in workloads[1:3]]
    return cases


class Counted(NamedTuple):
    """A rank's mean step.

    Attributes:
        traffic: By kind of collective, the traffic that `Counter` saw.
        sockets: The bytes that went over TCP.
    """

    traffic: dict[str, Traffic]
    sockets: SocketBytes


def count_on_ranks(cases: Sequence[Case], num_ranks: int) -> list[list[Counted]]:
    """The counts of each rank in each case, ``[case][rank]``, by a process for each rank."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(num_ranks, context) as pool:
        tasks = [pool.submit(_rank, cases, rank, num_ranks, f"file://{folder}/meeting") for rank in range(num_ranks)]
        by_rank = [task.result() for task in tasks]
    return [list(each) for each in zip(*by_rank, strict=True)]


def _rank(cases: Sequence[Case], rank: int, num_ranks: int, where: str) -> list[Counted]:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=num_ranks, timeout=_LIMIT)
    try:
        return [count(case) for case in cases]
    finally:
        dist.destroy_process_group()


def count(case: Case) -> Counted:
    """Train some steps, each on other samples, on the group that this rank is in; all its ranks must come.

    An uncounted step comes first, in which ranks exchange all that stays constant.
    """
    step = _step_of(case)
    step(0)
    counter = Counter()
    before = socket_bytes()
    # Between two barriers, so that nothing of a step before or after is in it.
    dist.barrier()
    with counter:
        for number in range(1, STEPS + 1):
            step(number)
    dist.barrier()
    after = socket_bytes()
    dist.barrier()
    traffic = {
        kind: each._replace(**{name: getattr(each, name) / STEPS for name in QUANTITIES})
        for kind, each in by_kind(counter.traffic).items()
    }
    return Counted(traffic, SocketBytes(*((then - now) // STEPS for then, now in zip(after, before, strict=True))))


def seed_of(rank: int, step: int) -> int:
    """The seed of a rank's samples in a step."""
    return 1000 * rank + step


def _step_of(case: Case) -> Callable[[int], None]:
    """The layout's training step, which takes its number."""
    model = cast(celmoe.HierarchicalCELMoE, case.workload.build(celmoe))
    objective: Callable[..., torch.Tensor] = partial(_objective, model)
    after: Callable[[], object] = lambda: None  # noqa: E731  # one of them is a method
    if case.layout == DDP:
        objective = prepare_ddp(model, _objective)
    elif case.layout == REDUCED:
        after = partial(reduce_gradients, list(model.parameters()), _mesh(case))
    elif case.layout == LEVELS:
        shard_levels(model, _mesh(case))
    else:
        after = shard_experts(model, _mesh(case)).reduce_gradients

    def step(number: int) -> None:
        seed = seed_of(dist.get_rank(), number)
        model.zero_grad()
        objective(case.workload.hidden(seed), case.workload.routing(seed), case.workload.mask(seed)).backward()
        after()

    return step


def _objective(
    model: torch.nn.Module, hidden: torch.Tensor, routing: dict[str, list[str]], mask: torch.Tensor | None
) -> torch.Tensor:
    fused = model(hidden, routing, mask=mask).fused_hidden
    return joined_mean(fused.square().flatten(1).mean(1).sum(), len(hidden))


def _mesh(case: Case) -> DeviceMesh:
    num_ranks = dist.get_world_size()
    if case.num_copies == 1:
        return init_device_mesh("cpu", (num_ranks,), mesh_dim_names=("expert",))
    shape = (case.num_copies, num_ranks // case.num_copies)
    return init_device_mesh("cpu", shape, mesh_dim_names=("copy", "expert"))
