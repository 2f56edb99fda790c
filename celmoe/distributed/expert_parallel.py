"""Expert parallelism: each rank of a mesh dimension holds some of a level's experts, and gets all of their samples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from celmoe.config import HierarchyLevelConfig, require_finite
from celmoe.errors import (
    ConfigError,
    ProcessGroupError,
    StackedError,
    UnknownExpertError,
    UnknownLevelError,
    listed,
    nearest,
)
from celmoe.explain import parameter_bytes
from celmoe.hierarchy import HierarchicalCELMoE
from celmoe.level import Level
from celmoe.names import ELSEWHERE, FROZEN, STACKED, NamedModules
from celmoe.stacked.assembly import key_of, stack_members
from celmoe.stacked.freezing import trained_paths
from celmoe.stacked.stack import stacks_of
from celmoe.stacking import require_no_optimizer, unstack_experts

from .data_parallel import refuse_collectives, require_hierarchy
from .gradients import buckets, reduce_over
from .groups import groups_of, require_dimension, require_mesh, require_process_group, require_whole_world
from .meeting import Table
from .placement import balanced
from .remote import GradientNorms, Place, RemoteExpert, stand_in_of, stand_ins
from .sharded_level import Passage, ShardedLevel


class ExpertSharding:
    """A model's experts on the ranks of a mesh, and the gradient calls of a training step; `shard_experts` makes one.

    Attributes:
        model: The model; it holds this rank's experts only.
        mesh: The ranks.
        dimension: The name of the mesh's dimension over which experts are spread.
        owners: By level and expert, the expert's rank in that dimension.
    """

    def __init__(
        self,
        model: HierarchicalCELMoE,
        mesh: DeviceMesh,
        dimension: str,
        owners: Mapping[str, Mapping[str, int]],
        norms: GradientNorms,
    ) -> None:
        self.model = model
        self.mesh = mesh
        self.dimension = dimension
        self.owners = owners
        self._norms = norms

    def expert_parameters(self) -> list[nn.Parameter]:
        """The parameters of this rank's experts: ranks at another place in the dimension do not hold them."""
        elsewhere = set(stand_ins(self.model))
        return [each for each in self._spread_parameters() if each not in elsewhere]

    def _spread_parameters(self) -> list[nn.Parameter]:
        return [each for level in self.owners for each in self.model.level_modules[level].parameters()]

    def reduce_gradients(self, module: nn.Module | None = None) -> None:
        """Average gradients over ranks, after the last backward pass of a step; see `gradients.reduce_gradients`.

        An expert's gradients already come from the samples of all ranks of the dimension. They are summed over the
        other dimensions, all other gradients over all dimensions. Both sums are divided by the number of ranks in the
        mesh.

        The stand-ins of a `RemoteExpert` get the norms of the expert's gradients: infinity or NaN for a gradient that
        is not finite, ``None`` for ``None``. Then ``torch.amp.GradScaler``, ``clip_grad_norm_`` with the 2-norm, and
        checks for infinity and NaN decide alike on all ranks, if given all of ``parameters()``. Call `reduce_gradients`
        before ``GradScaler.unscale_``. Other norms see the 2-norms of remote experts, and differ from rank to rank.

        Args:
            module: The network that contains the model; the model by default.

        Raises:
            ProcessGroupError: An expert gained trained parameters after `shard_experts`; every rank raises.
        """
        elsewhere = set(stand_ins(self.model))
        experts = [each for each in self._spread_parameters() if each not in elsewhere]
        not_replicated = {*experts, *elsewhere}
        replicated = [each for each in self._network(module).parameters() if each not in not_replicated]
        reduce_over(experts, groups_of(self.mesh, without=self.dimension), self.mesh.size())
        self._norms.exchange({level: cast(NamedModules, self.model.level_modules[level]) for level in self.owners})
        reduce_over(replicated, groups_of(self.mesh), self.mesh.size())

    def clip_gradients(self, max_norm: float, module: nn.Module | None = None) -> torch.Tensor:
        """Clip reduced gradients by their common norm over all ranks.

        The call equals ``torch.nn.utils.clip_grad_norm_(module.parameters(), max_norm)``: after `reduce_gradients` the
        stand-ins bring the norms of remote experts.

        Args:
            max_norm: The largest norm.
            module: See `reduce_gradients`.

        Returns:
            The norm before clipping, the same on all ranks.
        """
        return nn.utils.clip_grad_norm_(self._network(module).parameters(), max_norm)

    def _network(self, module: nn.Module | None) -> nn.Module:
        return self.model if module is None else module


def shard_experts(
    model: HierarchicalCELMoE,
    mesh: DeviceMesh,
    *,
    dimension: str = "expert",
    levels: Iterable[str] | None = None,
    loads: Mapping[str, Mapping[str, float]] | None = None,
) -> ExpertSharding:
    """Spread a model's experts over ranks, in place. A rank keeps its own, and a `RemoteExpert` for every other.

    Every rank calls the model as before, with its own samples. Samples travel to their experts and back, once each way
    for a level. An expert runs once, as in one process: over the samples of all ranks of the dimension, in rank order.
    No sample is dropped, however many come. Levels that are not spread stay data-parallel, and so does everything along
    the mesh's other dimensions. All ranks get the first rank's parameters and buffers.

    Stacked experts stay stacked: each rank has a stack of those that it holds. Stack experts before, and make the
    optimizer afterwards.

    After the backward pass, call `ExpertSharding.reduce_gradients`. Every rank makes the same number of calls and
    backward passes; a rank without samples passes an empty batch. The objective must reach ``fused_hidden`` on every
    rank; or else the same levels' hidden states, and no expert's losses. Context that an expert sees whole (see
    `Shared`) comes from the rank that holds the expert.

    Args:
        model: The model, built alike on every rank.
        mesh: A mesh of all processes with named dimensions, at most one of them for experts.
        dimension: The name of the experts' dimension.
        levels: The levels to spread; by default all levels with several experts.
        loads: By level and expert, the load to balance, such as the expert's expected samples. By default the bytes of
            the expert's parameters; an expert that is left out has the load 0.

    Raises:
        ProcessGroupError: No process group is initialised, or the ranks' models or arguments differ.
        MeshError: The mesh leaves processes out, or has no such dimension.
        UnknownLevelError, UnknownExpertError: The model has no such level or expert.
        ConfigError, ConfigTypeError: There is no level to spread; a load is negative or no number; the model is already
            sharded; an expert has a collective of its own; or experts on several ranks share a tensor.
        StackedError: An optimizer holds stacked parameters.
    """
    require_process_group("shard_experts")
    require_mesh(mesh)
    require_hierarchy(model)
    position = require_dimension(mesh, dimension, "dimension")
    require_whole_world(mesh)
    refuse_collectives(model)
    chosen = _chosen(model, levels)
    _require_loads(model, loads or {})
    num_ranks = mesh.size(position)
    owners = {
        level.name: dict(zip(level.experts, balanced(_costs(model, level, loads), num_ranks), strict=True))
        for level in chosen
    }
    _refuse_shared(model, owners)
    registries = {level: cast(NamedModules, model.level_modules[level]) for level in owners}
    stacks = {level: stacks_of(registry) for level, registry in registries.items()}
    wholes = [
        cast(nn.Parameter, stack.whole(path)) for some in stacks.values() for stack in some for path in stack.keys
    ]
    _require_alike(model, owners, wholes)
    _broadcast(model, mesh)
    # The members of each stack, as long as they are alike.
    members = {
        level: [[stack.names[place] for place in sorted(stack.intact)] for stack in some]
        for level, some in stacks.items()
    }
    if wholes:
        unstack_experts(model, owners)

    group = mesh.get_group(position)
    passage = Passage(group, Table(group, {level.name: tuple(level.experts) for level in chosen}), chosen[0].name)
    rank = mesh.get_local_rank(position)
    places: list[list[Place]] = [[] for _ in range(num_ranks)]
    placed: set[nn.Parameter] = set()  # experts may share some
    for index, config in enumerate(model.levels):
        if config.name not in owners:
            continue
        modules = registries[config.name]
        own_members = members[config.name]
        _stack_anew(config.name, modules, own_members, owners[config.name], places, rank)
        stacked = {name for names in own_members for name in names}
        for name, owner in owners[config.name].items():
            ordinary = {} if name in stacked else dict(modules[name].named_parameters())
            parameters = {each: it for each, it in ordinary.items() if it not in placed}
            placed.update(parameters.values())
            places[owner] += [(config.name, name, each) for each in parameters]
            if owner != rank:
                frozen = modules[name].__dict__.get(FROZEN, ())
                modules[name] = remote = RemoteExpert(config.name, name, owner, parameters)
                # Frozen there, too, until all ranks let it be trained.
                remote.__dict__[FROZEN] = tuple(f"elsewhere.{path}" for path in frozen)
        model._levels[index] = ShardedLevel(config, modules, tuple(owners[config.name].values()), passage)
    # What ranks told each other is no part of a graph.
    model.register_forward_hook(torch.compiler.disable(passage.leave))
    return ExpertSharding(model, mesh, dimension, owners, GradientNorms(group, places))


def _stack_anew(
    level: str,
    modules: NamedModules,
    members: Sequence[Sequence[str]],
    owners: Mapping[str, int],
    places: Sequence[list[Place]],
    rank: int,
) -> None:
    """Stack the members of former stacks that stay on this rank; stand-ins take the places of other ranks' stacks.

    Stacks and stand-ins stand in one order on all ranks. See [Note: Gradients elsewhere].

    Args:
        level: The level's name.
        modules: The level's experts, all of them ordinary ones.
        members: The names of each former stack's members.
        owners: The rank of each expert.
        places: By rank, the parameters there; added to.
        rank: This rank.
    """
    number = 0
    for names in members:
        for owner, there in enumerate(places):
            own = [name for name in names if owners[name] == owner]
            if not own:
                continue
            tensors = dict(modules[own[0]].named_parameters())
            keys = {path: key_of(number, path) for path in tensors}
            there += [(level, "", key) for key in keys.values()]
            if owner == rank:
                stack_members(modules, own, number)
            else:
                trained = trained_paths(modules[own[0]])
                for path, key in keys.items():
                    stand_in = stand_in_of(tensors[path])
                    stand_in.requires_grad_(path in trained)
                    modules._parameters[key.replace(STACKED, ELSEWHERE, 1)] = stand_in
            number += 1


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


def _require_loads(model: HierarchicalCELMoE, loads: Mapping[str, Mapping[str, float]]) -> None:
    """Refuse unknown names and bad loads, also of levels that are not spread."""
    experts = {level.name: level.experts for level in model.levels}
    if unknown := [name for name in loads if name not in experts]:
        raise UnknownLevelError(
            f"'loads' must have levels of the model for keys (got {listed(unknown)}; {nearest(unknown, experts)})"
        )
    for level, given in loads.items():
        if unknown := [name for name in given if name not in experts[level]]:
            raise UnknownExpertError(
                f'"loads[{level!r}]" must have experts of the level for keys (got {listed(unknown)}; '
                f"{nearest(unknown, experts[level])})"
            )
        for name, load in given.items():
            where = f"loads[{level!r}][{name!r}]"
            require_finite(where, load)
            if load < 0:
                raise ConfigError(f"{where!r} must be at least 0 (got {load!r})")


def _costs(
    model: HierarchicalCELMoE, level: HierarchyLevelConfig, loads: Mapping[str, Mapping[str, float]] | None
) -> list[float]:
    if loads is None or level.name not in loads:
        modules = cast(NamedModules, model.level_modules[level.name])
        return [float(parameter_bytes([modules[name]])) for name in level.experts]
    return [float(loads[level.name].get(name, 0.0)) for name in level.experts]


def _refuse_shared(model: HierarchicalCELMoE, owners: Mapping[str, Mapping[str, int]]) -> None:
    """Refuse shared tensors that would land on several ranks, and diverge there."""
    places: dict[int, tuple[object, str, torch.Tensor]] = {}
    for level in model.levels:
        for expert in level.experts:
            rank = owners[level.name][expert] if level.name in owners else None
            _place(model.level_modules[level.name][expert], rank, f"{level.name}.{expert}", places)  # type: ignore[index]
    _place(model.fusion, None, "fusion", places)


def _place(
    module: nn.Module, rank: int | None, owner: str, places: dict[int, tuple[object, str, torch.Tensor]]
) -> None:
    for name, tensor in [*module.named_parameters(owner), *module.named_buffers(owner)]:
        # Another tensor may take the number of one that is gone.
        other_rank, other, _ = places.setdefault(id(tensor), (rank, name, tensor))
        if other_rank != rank:
            raise ConfigError(
                f"'model' must share no tensor between experts on different ranks, or with what every rank holds (got "
                f"{other!r} and {name!r})"
            )


def _require_alike(
    model: HierarchicalCELMoE, owners: Mapping[str, Mapping[str, int]], stacks: Sequence[nn.Parameter]
) -> None:
    """Refuse models that differ from rank to rank, or of whose stacks a rank has an optimizer; every rank raises."""
    said = ""
    try:
        require_no_optimizer(stacks, "spread over ranks")
    except StackedError as error:
        said = str(error)
    tensors = [
        (name, tuple(tensor.shape), tensor.dtype)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    ]
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, ((owners, tensors), said))
    if said := next((text for _, text in everyones if text), ""):
        raise StackedError(said)
    everyones = [each for each, _ in everyones]
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
    """Give all ranks the first rank's parameters and buffers."""
    tensors = [tensor.detach() for tensor in (*model.parameters(), *model.buffers()) if not tensor.is_meta]
    for bucket in buckets(tensors):
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        for group in groups_of(mesh):
            dist.broadcast(flat, dist.get_global_rank(group, 0), group)
        for tensor, part in zip(bucket, flat.split([each.numel() for each in bucket]), strict=True):
            tensor.copy_(part.view_as(tensor))
