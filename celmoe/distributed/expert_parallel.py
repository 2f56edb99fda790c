"""Expert parallelism: each rank of a mesh dimension holds some of a level's experts, and gets all samples of those."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from celmoe.config import HierarchyLevelConfig, require_finite
from celmoe.errors import ConfigError, ProcessGroupError, UnknownExpertError, UnknownLevelError, listed, nearest
from celmoe.explain import parameter_bytes
from celmoe.hierarchy import HierarchicalCELMoE
from celmoe.level import Level
from celmoe.names import NamedModules

from .data_parallel import refuse_collectives, require_hierarchy
from .gradients import buckets, reduce_over
from .groups import groups_of, require_dimension, require_mesh, require_process_group, require_whole_world
from .meeting import Table
from .placement import balanced
from .sharded_level import Passage, RemoteExpert, ShardedLevel


class ExpertSharding:
    """A model's experts on the ranks of a mesh, and what a training step needs beside; `shard_experts` makes it.

    Attributes:
        model: The model; it holds this rank's experts only.
        mesh: The ranks.
        dimension: The name of the mesh's dimension that experts are spread over.
        owners: By level and expert, the rank in that dimension.
    """

    def __init__(
        self, model: HierarchicalCELMoE, mesh: DeviceMesh, dimension: str, owners: Mapping[str, Mapping[str, int]]
    ) -> None:
        self.model = model
        self.mesh = mesh
        self.dimension = dimension
        self.owners = owners

    def expert_parameters(self) -> list[nn.Parameter]:
        """The parameters that only this rank, and its like along the other dimensions, holds."""
        return [parameter for level in self.owners for parameter in self.model.level_modules[level].parameters()]

    def reduce_gradients(self, module: nn.Module | None = None) -> None:
        """Average gradients over ranks, after the last backward pass of a step; see `gradients.reduce_gradients`.

        An expert's gradients come from the samples of all ranks of its dimension as it is; they are averaged over the
        other dimensions, all other parameters' over all.

        Args:
            module: The network that the model is part of; the model by default.
        """
        experts, others = self._parts(module)
        reduce_over(others, groups_of(self.mesh), self.mesh.size())
        reduce_over(experts, groups_of(self.mesh, without=self.dimension), self.mesh.size())

    def clip_gradients(self, max_norm: float, module: nn.Module | None = None) -> torch.Tensor:
        """Clip reduced gradients by the norm of them all, wherever they are; as `torch.nn.utils.clip_grad_norm_`.

        Args:
            max_norm: The largest norm.
            module: As for `reduce_gradients`.

        Returns:
            The norm before, the same on all ranks.
        """
        experts, others = (
            [parameter.grad for parameter in part if parameter.grad is not None] for part in self._parts(module)
        )
        device = next((each.device for each in [*experts, *others]), torch.device(self.mesh.device_type))
        squares = [nn.utils.get_total_norm(part).to(device).double().square() for part in (experts, others)]
        if self.mesh.size(self._position) > 1:
            dist.all_reduce(squares[0], group=self.mesh.get_group(self.dimension))
        norm = (squares[0] + squares[1]).sqrt()
        network = self.model if module is None else module
        nn.utils.clip_grads_with_norm_(network.parameters(), max_norm, norm)
        return norm

    @property
    def _position(self) -> int:
        return cast(tuple[str, ...], self.mesh.mesh_dim_names).index(self.dimension)

    def _parts(self, module: nn.Module | None) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        experts = self.expert_parameters()
        ours = {id(parameter) for parameter in experts}
        network = self.model if module is None else module
        return experts, [parameter for parameter in network.parameters() if id(parameter) not in ours]


def shard_experts(
    model: HierarchicalCELMoE,
    mesh: DeviceMesh,
    *,
    dimension: str = "expert",
    levels: Iterable[str] | None = None,
    loads: Mapping[str, Mapping[str, float]] | None = None,
) -> ExpertSharding:
    """Spread a model's experts over ranks, in place: each keeps its own, and a `RemoteExpert` for every other.

    The model is called as before, by every rank with its own samples. They travel to their experts and back, once each
    way for a level; an expert runs once, over the samples of all ranks of the dimension in the order of the ranks, as
    it would in one process. None is dropped, however many come. Levels that are not spread stay data-parallel, and so
    does everything along the mesh's other dimensions. The first rank's parameters and buffers are everyone's.

    After the backward pass, call `ExpertSharding.reduce_gradients`. Every rank makes the same number of calls and
    backward passes, one without samples with an empty batch. The objective must reach ``fused_hidden`` on every rank;
    or else the same levels' hidden states, and no expert's losses. What experts see whole of a context (see `Shared`)
    is that of the rank that holds them.

    Args:
        model: Built alike on every rank.
        mesh: All processes, its dimensions named; at most one of them is for experts.
        dimension: That dimension.
        levels: The levels to spread; by default all that have several experts.
        loads: By level and expert, what to balance: the samples expected of it, say. By default the bytes of its
            parameters; an expert that is left out has the load 0.

    Raises:
        ProcessGroupError: No process group is initialised, or the ranks' models or arguments differ.
        MeshError: The mesh leaves processes out, or has no such dimension.
        UnknownLevelError, UnknownExpertError: The model has no such level or expert.
        ConfigError, ConfigTypeError: No level to spread, a load that is negative or no number, a model that is sharded
            already, an expert with a collective of its own, or experts on several ranks that share a tensor.
    """
    require_process_group("shard_experts")
    require_mesh(mesh)
    require_hierarchy(model)
    position = require_dimension(mesh, dimension, "dimension")
    require_whole_world(mesh)
    refuse_collectives(model)
    chosen = _chosen(model, levels)
    num_ranks = mesh.size(position)
    owners = {
        level.name: dict(zip(level.experts, balanced(_costs(model, level, loads), num_ranks), strict=True))
        for level in chosen
    }
    _refuse_shared(model, owners)
    _require_alike(model, owners)
    _broadcast(model, mesh)

    group = mesh.get_group(position)
    passage = Passage(group, Table(group, {level.name: tuple(level.experts) for level in chosen}), chosen[0].name)
    rank = mesh.get_local_rank(position)
    for index, config in enumerate(model.levels):
        if config.name not in owners:
            continue
        modules = cast(NamedModules, model.level_modules[config.name])
        for name, owner in owners[config.name].items():
            if owner != rank:
                modules[name] = RemoteExpert(config.name, name, owner)
        model._levels[index] = ShardedLevel(config, modules, tuple(owners[config.name].values()), passage)
    model.register_forward_hook(passage.leave)
    return ExpertSharding(model, mesh, dimension, owners)


def _chosen(model: HierarchicalCELMoE, levels: Iterable[str] | None) -> list[HierarchyLevelConfig]:
    if any(type(level) is not Level for level in model._levels):
        raise ConfigError("'model' must not be sharded yet (got one that is)")
    by_name = {level.name: level for level in model.levels}
    if levels is None:
        names = {level.name for level in model.levels if len(level.experts) > 1}
    else:
        names = {levels} if isinstance(levels, str) else set(levels)
    if unknown := sorted(names - by_name.keys()):
        raise UnknownLevelError(
            f"'levels' must be levels of the model (got {listed(unknown)}; {nearest(unknown, by_name)})"
        )
    chosen = [level for level in model.levels if level.name in names]
    if not chosen:
        raise ConfigError("'levels' must hold at least one level (got none; no level has several experts)")
    return chosen


def _costs(
    model: HierarchicalCELMoE, level: HierarchyLevelConfig, loads: Mapping[str, Mapping[str, float]] | None
) -> list[float]:
    modules = cast(NamedModules, model.level_modules[level.name])
    if loads is None or level.name not in loads:
        if unknown := [name for name in loads or () if name not in model.level_modules]:
            raise UnknownLevelError(
                f"'loads' must have levels of the model for keys (got {listed(unknown)}; "
                f"{nearest(unknown, model.level_modules)})"
            )
        return [float(parameter_bytes([modules[name]])) for name in level.experts]
    given = loads[level.name]
    if unknown := [name for name in given if name not in level.experts]:
        raise UnknownExpertError(
            f'"loads[{level.name!r}]" must have experts of the level for keys (got {listed(unknown)}; '
            f"{nearest(unknown, level.experts)})"
        )
    for name, load in given.items():
        where = f"loads[{level.name!r}][{name!r}]"
        require_finite(where, load)
        if load < 0:
            raise ConfigError(f"{where!r} must be at least 0 (got {load!r})")
    return [float(given.get(name, 0.0)) for name in level.experts]


def _refuse_shared(model: HierarchicalCELMoE, owners: Mapping[str, Mapping[str, int]]) -> None:
    """Refuse tensors that would come to be on several ranks, and go different ways there."""
    places: dict[int, tuple[object, str]] = {}
    for level in model.levels:
        for expert in level.experts:
            rank = owners[level.name][expert] if level.name in owners else None
            _place(model.level_modules[level.name][expert], rank, f"{level.name}.{expert}", places)  # type: ignore[index]
    _place(model.fusion, None, "fusion", places)


def _place(module: nn.Module, rank: int | None, owner: str, places: dict[int, tuple[object, str]]) -> None:
    for name, tensor in [*module.named_parameters(owner), *module.named_buffers(owner)]:
        other_rank, other = places.setdefault(id(tensor), (rank, name))
        if other_rank != rank:
            raise ConfigError(
                f"'model' must share no tensor between experts on different ranks, or with what every rank holds (got "
                f"{other!r} and {name!r})"
            )


def _require_alike(model: HierarchicalCELMoE, owners: Mapping[str, Mapping[str, int]]) -> None:
    """Refuse models that differ from rank to rank."""
    tensors = [
        (name, tuple(tensor.shape), tensor.dtype)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    ]
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, (owners, tensors))
    differing = [rank for rank, each in enumerate(everyones) if each != everyones[0]]
    if differing:
        theirs, ours = everyones[differing[0]], everyones[0]
        what = "levels or loads" if theirs[0] != ours[0] else "parameters"
        named = [name for name, *_ in set(theirs[1]) ^ set(ours[1])]
        raise ProcessGroupError(
            f"'model' must be the same on all ranks (got other {what} on ranks {differing} than on rank 0: "
            f"{listed(sorted(set(named))) if named else 'in another order, or placed elsewhere'})"
        )


def _broadcast(model: nn.Module, mesh: DeviceMesh) -> None:
    """Give all ranks the first one's parameters and buffers."""
    tensors = [tensor.detach() for tensor in (*model.parameters(), *model.buffers()) if not tensor.is_meta]
    for bucket in buckets(tensors):
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        for group in groups_of(mesh):
            dist.broadcast(flat, dist.get_global_rank(group, 0), group)
        for tensor, part in zip(bucket, flat.split([each.numel() for each in bucket]), strict=True):
            tensor.copy_(part.view_as(tensor))
