"""Real steps on a process group, counted, and the model of the same steps."""

from __future__ import annotations

import itertools
from collections import Counter as Counts
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import celmoe
from benchmarks.tables.scaling import layouts
from benchmarks.tables.scaling.collectives import KINDS, NOTHING, QUANTITIES, REDUCE_SCATTER, Traffic, by_kind
from benchmarks.tables.scaling.counting import Counter, SocketBytes, socket_bytes
from benchmarks.tables.scaling.layouts import DDP, EXPERTS, LEVELS, REDUCED
from benchmarks.tables.scaling.load import Load, spread
from benchmarks.tables.scaling.sizes import sizes_of_workload
from benchmarks.workloads.hierarchies import EVEN, ZIPF
from benchmarks.workloads.workload import Workload
from celmoe.distributed import joined_mean, prepare_ddp, reduce_gradients, shard_experts, shard_levels

# The model may be off by the first share if it expects batches, and by the second if it is given the batches.
TOLERANCE, ROUNDING = 0.05, 1e-9
_STEPS = 4


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

    def __str__(self) -> str:
        copies = f", {self.num_copies} copies" if self.num_copies > 1 else ""
        return f"{self.layout}{copies}, {self.workload}"


def cases_of(num_ranks: int) -> list[Case]:
    """All layouts of experts of both kinds, all of them present or not, routed evenly or not, on so many ranks."""
    workloads = [
        Workload("linear", 64, 256, 64),
        Workload("linear", 64, 256, 256, ZIPF),
        Workload("mlp", 32, 1024, 16),
        Workload("mlp", 32, 1024, 16, ZIPF),
    ]
    cases = [Case(layout, workload) for layout in layouts.LAYOUTS for workload in workloads]
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


def count(case: Case) -> Counted:
    """Train some steps, each on other samples, on the group that this rank is in; all its ranks must come.

    An uncounted step comes first, in which ranks exchange all that stays constant.
    """
    step = _trainings[case.layout](case)
    step(0)
    counter = Counter()
    before = socket_bytes()
    # Between two barriers, so that nothing of a step before or after is in it.
    dist.barrier()
    with counter:
        for number in range(1, _STEPS + 1):
            step(number)
    dist.barrier()
    after = socket_bytes()
    dist.barrier()
    traffic = {
        kind: each._replace(**{name: getattr(each, name) / _STEPS for name in QUANTITIES})
        for kind, each in by_kind(counter.traffic).items()
    }
    return Counted(traffic, SocketBytes(*((then - now) // _STEPS for then, now in zip(after, before, strict=True))))


def modelled(case: Case, num_ranks: int, rank: int, load: Load) -> dict[str, Traffic]:
    """The model's traffic of such a step, by kind of collective.

    Args:
        case: The case that is trained.
        num_ranks: Ranks N.
        rank: The rank whose traffic is computed.
        load: The shares of samples by expert: `load.expected_load`, or `drawn_load`.
    """
    return by_kind(_traffic(case, num_ranks, rank, load))


def drawn_load(case: Case, num_ranks: int, rank: int) -> Load:
    """The true load of the counted steps: the mean of their samples by expert.

    Shares are of the samples of the ranks that this one exchanges rows with.
    """
    num_parts = num_ranks // case.num_copies
    levels = case.workload.levels()
    counts = {level: np.zeros((_STEPS, num_ranks, len(names))) for level, names in levels.items()}
    for step, each in itertools.product(range(_STEPS), range(num_ranks)):
        for level, names in case.workload.routing(_seed(each, step + 1)).items():
            found = Counts(names)
            counts[level][step, each] = [found[name] for name in levels[level]]
    first = rank - rank % num_parts
    shares = {level: each[:, first : first + num_parts].sum((0, 1)) for level, each in counts.items()}
    return Load(
        {level: each / each.sum() for level, each in shares.items()},
        {level: (each.sum(1) > 0).mean(0) for level, each in counts.items()},
    )


def _traffic(case: Case, num_ranks: int, rank: int, load: Load) -> list[Traffic]:
    workload, num_parts = case.workload, num_ranks // case.num_copies
    sizes = sizes_of_workload(workload)
    if case.layout == DDP:
        return layouts.data_parallel(sizes, num_ranks)
    if case.layout == REDUCED:
        return layouts.reduced(sizes, load, num_ranks)
    if case.layout == LEVELS:
        return layouts.fully_sharded(sizes, num_parts, case.num_copies)
    rows, where = layouts.rows_of(workload), spread(sizes, load, num_parts)
    return layouts.expert_parallel(sizes, load, rows, where, num_parts, case.num_copies, rank % num_parts)


def differences(
    counted: dict[str, Traffic], wanted: dict[str, Traffic], tolerance: float, quantities: Iterable[str] = QUANTITIES
) -> list[str]:
    """Name each kind of collective and quantity that differs by more than `tolerance` of the wanted value."""
    found = []
    for kind, name in itertools.product(KINDS, quantities):
        ours, theirs = (getattr(each.get(kind, NOTHING), name) for each in (counted, wanted))
        if abs(ours - theirs) > tolerance * theirs:
            found.append(f"{kind}: {ours:,.0f} bytes {name}, not {theirs:,.0f}")
    return found


def socket_differences(counted: Counted) -> list[str]:
    """Name the directions whose bytes over TCP differ by more than `TOLERANCE` from the collectives' bytes."""
    found = []
    for name in ("sent", "received"):
        wanted, got = _on_gloo(counted.traffic.values(), name), getattr(counted.sockets, name)
        if abs(got - wanted) > TOLERANCE * wanted:
            found.append(f"TCP: {got:,.0f} bytes {name}, not {wanted:,.0f}")
    return found


def _on_gloo(traffic: Iterable[Traffic], name: str) -> float:
    # Gloo reduces all and keeps a share.
    return sum((2 if each.kind == REDUCE_SCATTER else 1) * float(getattr(each, name)) for each in traffic)


_Step = Callable[[int], None]


_Batch = tuple[torch.Tensor, dict[str, list[str]], torch.Tensor | None]


def _objective(
    model: torch.nn.Module, hidden: torch.Tensor, routing: dict[str, list[str]], mask: torch.Tensor | None
) -> torch.Tensor:
    fused = model(hidden, routing, mask=mask).fused_hidden
    return joined_mean(fused.square().flatten(1).mean(1).sum(), len(hidden))


def _seed(rank: int, step: int) -> int:
    return 1000 * rank + step


def _batch(case: Case, number: int) -> _Batch:
    seed = _seed(dist.get_rank(), number)
    return case.workload.hidden(seed), case.workload.routing(seed), case.workload.mask(seed)


def _model(case: Case) -> celmoe.HierarchicalCELMoE:
    return cast(celmoe.HierarchicalCELMoE, case.workload.build(celmoe))


def _mesh(case: Case) -> DeviceMesh:
    num_ranks = dist.get_world_size()
    if case.num_copies == 1:
        return init_device_mesh("cpu", (num_ranks,), mesh_dim_names=("expert",))
    shape = (case.num_copies, num_ranks // case.num_copies)
    return init_device_mesh("cpu", shape, mesh_dim_names=("copy", "expert"))


def _with_ddp(case: Case) -> _Step:
    model = _model(case)
    parallel = prepare_ddp(model, _objective)

    def step(number: int) -> None:
        model.zero_grad()
        parallel(*_batch(case, number)).backward()

    return step


def _with_reduction(case: Case) -> _Step:
    model, mesh = _model(case), _mesh(case)

    def step(number: int) -> None:
        model.zero_grad()
        _objective(model, *_batch(case, number)).backward()
        reduce_gradients(model.parameters(), mesh)

    return step


def _with_levels_sharded(case: Case) -> _Step:
    model = shard_levels(_model(case), _mesh(case))

    def step(number: int) -> None:
        model.zero_grad()
        _objective(model, *_batch(case, number)).backward()

    return step


def _with_experts_spread(case: Case) -> _Step:
    model = _model(case)
    sharding = shard_experts(model, _mesh(case))

    def step(number: int) -> None:
        model.zero_grad()
        _objective(model, *_batch(case, number)).backward()
        sharding.reduce_gradients()

    return step


_trainings: dict[str, Callable[[Case], _Step]] = {
    DDP: _with_ddp,
    REDUCED: _with_reduction,
    LEVELS: _with_levels_sharded,
    EXPERTS: _with_experts_spread,
}
