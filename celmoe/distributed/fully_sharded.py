"""FSDP2 by level: every rank holds a part of each parameter, and gathers a whole level while the level runs.

``fully_shard`` wraps a level's registry of experts, never an expert: ranks run other experts, but all ranks run all
levels. The hooks that ``fully_shard`` puts on a module's inputs and outputs run on every rank, with any samples. A
token goes in beside the hidden states, and comes out of one autograd node with all outputs of the level.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.autograd import Function
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from celmoe.config import HierarchyLevelConfig
from celmoe.errors import ConfigError, ConfigTypeError, StackedError
from celmoe.hierarchy import HierarchicalCELMoE
from celmoe.level import Level, LevelInput
from celmoe.names import STACKED, NamedModules
from celmoe.outputs import LevelOutput
from celmoe.routing.plan import LevelPlan, RoutingPlan
from celmoe.rows.blocks import Blocks
from celmoe.stacked.parallel import joined_members
from celmoe.stacked.presence import kept, set_reached
from celmoe.stacked.stack import stacks_of
from celmoe.torch_internals import after_backward, current_backward, tree_flatten, tree_unflatten

from .data_parallel import refuse_collectives, refuse_sparse, require_hierarchy
from .groups import groups_of, require_mesh, require_process_group, require_whole_world

# Takes the token, and returns the tensors of a level's output.
_Run = Callable[[torch.Tensor], Sequence[torch.Tensor]]

_NO_CASTS = MixedPrecisionPolicy()


class GatheredExperts(NamedModules):
    """A level's experts, called as a whole."""

    def forward(self, run: _Run, token: torch.Tensor) -> Sequence[torch.Tensor]:
        """Run the level with all of its parameters gathered.

        ``fully_shard`` must not see the hidden states: it would give zeros to hidden states without a gradient.
        """
        return run(token)


class Usage:
    """Records the experts' parameters that had gradients, on any rank, since the last reduction.

    ``fully_shard`` reduces zeros if a rank has no gradient. A parameter without a gradient on any rank gets `None`
    back. Of a stack, the members that had gradients are recorded, too.

    Args:
        mesh: The ranks.
        registries: The levels' registries of experts, in level order, wrapped.
    """

    def __init__(self, mesh: DeviceMesh, registries: Sequence[nn.Module]) -> None:
        self._groups = groups_of(mesh)
        self._device = mesh.device_type
        self._registries = list(registries)
        self._sharded = [list(registry.parameters()) for registry in self._registries]
        are_stacks = [[STACKED in name for name, _ in registry.named_parameters()] for registry in self._registries]
        # By level and parameter: 1 if it had a gradient; of a stack, if each of its members had.
        self._none = [
            [np.zeros(len(each) if is_stack else 1, dtype=np.bool_) for each, is_stack in zip(some, are, strict=True)]
            for some, are in zip(self._sharded, are_stacks, strict=True)
        ]
        self._used = [list(each) for each in self._none]
        # For the backward pass of this number.
        self._had: list[list[bool]] = []
        self._backward = -1
        self._are_stacks = are_stacks

    def leave(self, level: int) -> None:
        """Note a level's gradients after its backward pass: the gathered parameters have them."""
        if self._backward != (backward := current_backward()):
            self._backward = backward
            # Those that the optimizer sees: this pass has not reduced any yet.
            self._had = [[parameter.grad is not None for parameter in some] for some in self._sharded]
            # Runs after the callback of ``fully_shard``, queued when this backward pass reached the first level.
            after_backward(self._settle)
        used = self._used[level]
        for place, parameter in enumerate(self._registries[level].parameters()):
            if parameter.grad is not None:
                members = kept(parameter) if self._are_stacks[level][place] else self._none[level][place]
                # A gradient that came in another way than by members' results is of all members.
                used[place] = used[place] | (members if members.any() else True)

    def _settle(self) -> None:
        flat = [each for used in self._used for each in used]
        anywhere = iter(joined_members(flat, self._groups, torch.device(self._device)))
        for level, parameters in enumerate(self._sharded):
            used = self._used[level] = [next(anywhere) for _ in parameters]
            if all(parameter.grad is None for parameter in parameters):
                continue  # not reduced yet: gradients are being accumulated
            for place, parameter in enumerate(parameters):
                has_more = self._had[level][place]
                if self._are_stacks[level][place]:
                    set_reached(parameter, used[place] | kept(parameter) if has_more else used[place])
                if not has_more and not used[place].any():
                    parameter.grad = None
            self._used[level] = list(self._none[level])


class _Enter(Function):
    """The identity; its backward begins when all gradients of the level's parameters are there."""

    @staticmethod
    def forward(
        ctx: Any, usage: Usage, level: int, hidden: torch.Tensor, token: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.usage, ctx.level = usage, level
        ctx.hidden = hidden.new_empty(()).expand(hidden.shape)
        ctx.set_materialize_grads(False)
        return hidden.detach(), token.detach()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        ctx.usage.leave(ctx.level)
        hidden, token = grads
        if hidden is None and ctx.level == 0:
            # Other ranks' backward passes reach the modules before the model: this one must too, without samples.
            hidden = torch.zeros_like(ctx.hidden, memory_format=torch.contiguous_format)
        return None, None, hidden, token


class _Leave(Function):
    """The identity of all outputs of a level at once: its backward begins when all of their gradients have come."""

    @staticmethod
    def forward(ctx: Any, token: torch.Tensor, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.token = torch.zeros_like(token)
        ctx.mark_non_differentiable(*(each for each in given if not each.is_floating_point()))
        return token.detach(), *(each.detach() for each in given)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return ctx.token, *grads[1:]


class _Thread:
    """Carries the token through the levels of a pass."""

    def __init__(self, num_levels: int) -> None:
        self._last = num_levels - 1
        self._token: torch.Tensor | None = None

    def take(self, position: int, device: torch.device) -> torch.Tensor:
        """The token for a level; a new token for the first level."""
        if position == 0 or self._token is None:
            return torch.zeros((), device=device, requires_grad=torch.is_grad_enabled())
        return self._token

    def give(self, position: int, token: torch.Tensor) -> None:
        """Keep the token after a level. The last level's token is dropped, and the pass's graph with it."""
        self._token = None if position == self._last else token


class _InputCast:
    """Casts rows on entry into a module by the rule of ``fully_shard``, which does not see these rows.

    Args:
        policy: The module's policy.
    """

    def __init__(self, policy: MixedPrecisionPolicy) -> None:
        self._dtype = policy.param_dtype if policy.cast_forward_inputs else None

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows in the parameters' dtype; the same rows if already of that dtype, or not floating-point."""
        return rows if self._dtype is None or not rows.is_floating_point() else rows.to(self._dtype)

    def before(self, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """A forward pre-hook of a fusion: casts the levels' rows."""
        level_hiddens, *rest = args
        return [self(rows) for rows in level_hiddens], *rest


class FullyShardedLevel(Level):
    """One level of a model, with its parameters sharded over all ranks.

    Args:
        config: The level's config.
        position: The level's place among the model's levels.
        modules: The level's experts, wrapped.
        usage: The model's `Usage`.
        thread: The model's thread of the token.
        input_cast: The model's cast of inputs.
    """

    def __init__(
        self,
        config: HierarchyLevelConfig,
        position: int,
        modules: GatheredExperts,
        usage: Usage,
        thread: _Thread,
        input_cast: _InputCast,
    ) -> None:
        super().__init__(config)
        self._position = position
        self._modules = modules
        self._usage = usage
        self._thread = thread
        self._input_cast = input_cast

    def run(
        self,
        experts: Sequence[nn.Module],
        engine: str,
        given: LevelInput,
        plan: LevelPlan,
        host_plan: RoutingPlan,
    ) -> tuple[LevelOutput, Blocks | None]:
        """Run as `Level.run` does, with the level's parameters gathered meanwhile."""
        records = torch.is_grad_enabled()
        token = self._thread.take(self._position, given.hidden.device)
        hidden = self._input_cast(given.hidden)
        if hidden is not given.hidden:
            given = given._replace(blocks=None)  # the blocks are the rows before the cast
        if self.is_detached and not (plan.mixture and plan.mixture.num_passed):
            hidden = hidden.detach()
        found: list[Any] = []

        def run(token: torch.Tensor) -> Sequence[torch.Tensor]:
            entered = hidden
            if records:
                entered, token = _Enter.apply(self._usage, self._position, hidden, token)
            output, blocks = super(FullyShardedLevel, self).run(
                experts, engine, given._replace(hidden=entered), plan, host_plan
            )
            leaves, structure = tree_flatten((output.hidden, output.losses, output.aux))
            tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
            found.extend((output, blocks, leaves, structure))
            return cast(Sequence[torch.Tensor], _Leave.apply(token, *tensors)) if records else [token, *tensors]

        token, *tensors = self._modules(run, token)
        self._thread.give(self._position, token)
        output, blocks, leaves, structure = found
        new = iter(tensors)
        leaves = [next(new) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        output.hidden, output.losses, output.aux = tree_unflatten(leaves, structure)
        return output, blocks


def shard_levels(
    model: HierarchicalCELMoE, mesh: DeviceMesh, *, mp_policy: MixedPrecisionPolicy = _NO_CASTS, **options: Any
) -> HierarchicalCELMoE:
    """Spread every parameter of a model over ranks by ``fully_shard``, level by level, in place.

    Stacks are sharded by experts, on their first axis. Stack experts before.

    Every rank calls the model as before, with its own samples. The backward pass averages gradients, and experts that
    are absent on all ranks keep ``None``. Make the optimizer afterwards. A network around the model may be wrapped by
    ``fully_shard`` next. Every rank makes the same number of calls and backward passes; a rank without samples passes
    an empty batch. The objective must reach the same levels' hidden states, or ``fused_hidden``, on every rank.

    Args:
        model: The model, built alike on every rank.
        mesh: See ``fully_shard``. If the last dimension has more ranks than a parameter has rows, the other ranks hold
            and send padding: give the mesh a first dimension, of copies.
        mp_policy: See ``fully_shard``; applied to each level and the fusion. Inputs are cast on entry into each.
            ``output_dtype`` is the dtype of all floating-point tensors in the model's output, not between levels.
        **options: Options of ``fully_shard``.

    Returns:
        The model.

    Raises:
        ProcessGroupError: No process group is initialised.
        MeshError: The mesh leaves processes out.
        ConfigError, ConfigTypeError: The model is no `HierarchicalCELMoE`, is already sharded, or has an expert with a
            collective of its own or sparse gradients; or the policy is no `MixedPrecisionPolicy`.
        StackedError: ``shard_placement_fn`` would shard a stack on another axis than the first.
    """
    require_process_group("shard_levels")
    require_mesh(mesh)
    require_hierarchy(model)
    require_whole_world(mesh)
    refuse_collectives(model)
    refuse_sparse(model, "shard_levels")
    if any(type(level) is not Level for level in model._levels) or isinstance(model, FSDPModule):
        raise ConfigError("'model' must not be sharded yet (got one that is)")
    _require_rows(model, options.get("shard_placement_fn"))
    if not isinstance(mp_policy, MixedPrecisionPolicy):
        raise ConfigTypeError(f"'mp_policy' must be a MixedPrecisionPolicy (got {mp_policy!r})")
    registries = []
    for level in model.levels:
        experts = cast(GatheredExperts, model.level_modules[level.name])
        # In place, for stacks know the module that holds them.
        object.__setattr__(experts, "__class__", GatheredExperts)
        for stack in stacks_of(experts):
            stack.is_gathered = True
        wrapped = fully_shard(experts, mesh=mesh, mp_policy=replace(mp_policy, output_dtype=None), **options)
        wrapped.set_reduce_scatter_unused_params(True, recurse=False)
        registries.append(experts)
    input_cast = _InputCast(mp_policy)
    if isinstance(model.fusion, nn.Module) and not isinstance(model.fusion, FSDPModule):
        model.fusion.register_forward_pre_hook(input_cast.before)
    fully_shard(model, mesh=mesh, mp_policy=mp_policy, **options)
    usage, thread = Usage(mesh, registries), _Thread(len(registries))
    model._levels = [
        FullyShardedLevel(level, position, registry, usage, thread, input_cast)
        for position, (level, registry) in enumerate(zip(model.levels, registries, strict=True))
    ]
    return model


def _require_rows(model: nn.Module, placement: Any) -> None:
    """Refuse to shard stacks in another way than by experts.

    Raises:
        StackedError: The option ``shard_placement_fn`` wants to.
    """
    for name, parameter in model.named_parameters():
        wanted = placement(parameter) if STACKED in name and placement is not None else None
        if wanted is not None and not (isinstance(wanted, Shard) and wanted.dim == 0):
            raise StackedError(
                f"'shard_placement_fn' must leave stacks to be sharded by experts, on their first axis (got {wanted} "
                f"for {name!r}; return None for it)"
            )
