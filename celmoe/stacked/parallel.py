"""Stacks under `DistributedDataParallel`: ranks whose batches meet other experts reduce, and step, the same ones.

[Note: Stacks under DDP] DDP waits on every rank for the gradient of each of its parameters, unless it searches the
graph for unused ones. A rank's batch may reach no member of a stack. So the hidden states of every level are tied to
all stacks up to that level. The tie gives no gradient: DDP hears of the stack, and takes zeros for this rank's part.
Outside of DDP there is no tie, and a stack that no member of reached keeps ``None``.

DDP adds up gradients, but not the notes on which members they are of (`presence`). Before `celmoe.optim` makes a step,
all ranks join these notes by one all-reduce of a byte for each member, for all stacks of a DDP together. Every rank
that stepped alone would step other members than the rest.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.autograd import Function
from torch.autograd.graph import register_multi_grad_hook

from celmoe.errors import StackedError, listed
from celmoe.names import STACKED, NamedModules
from celmoe.torch_internals import active_ddp, is_joining

from .presence import forget_cleared, kept, reached, set_reached


class _Parallel:
    """The stacks of one DDP.

    Args:
        ddp: The wrapper.

    Attributes:
        ddp: A weak reference to the wrapper.
        stacks: The trained stacked parameters, in the model's order.
        syncs: True if the last forward pass is one whose backward pass reduces gradients.
        is_due: True if ranks have reduced gradients since they joined their notes.
        known: By the experts of a model, the parameters by level that its hidden states are tied to.
        hook: The handle of the hook on gradients; ``None`` without stacks.
    """

    def __init__(self, ddp: Any) -> None:
        self.ddp = weakref.ref(ddp)
        trained = {name: each for name, each in ddp.module.named_parameters() if each.requires_grad}
        self.stacks = [each for name, each in trained.items() if STACKED in name]
        self.syncs = False
        self._group = ddp.process_group
        self._trained = {id(each) for each in trained.values()}
        self.known: Any = weakref.WeakKeyDictionary()
        self.is_due = False
        # DDP needs a gradient of some parameter on every rank, in every backward pass.
        watched = list(trained.values()) if self.stacks else []
        self.hook = register_multi_grad_hook(watched, self._begin, mode="any") if watched else None

    def ties(self, levels: nn.ModuleDict) -> dict[str, list[nn.Parameter]]:
        """By level, the parameters that its hidden states are tied to. See [Note: Stacks under DDP].

        Raises:
            StackedError: An option of the DDP does not go with the experts.
        """
        if levels not in self.known:
            self.known[levels] = self._found(levels)
        return cast(dict[str, list[nn.Parameter]], self.known[levels])

    def _found(self, levels: nn.ModuleDict) -> dict[str, list[nn.Parameter]]:
        ddp: Any = self.ddp()
        if ddp.static_graph:
            raise StackedError(
                "'static_graph' must be False for a model with stacked experts, for no step has the graph of the step "
                "before (got True)"
            )
        if ddp.find_unused_parameters:
            return {}
        ties: dict[str, list[nn.Parameter]] = {}
        before: list[nn.Parameter] = []
        for level, modules in levels.items():
            registry = cast(NamedModules, modules)
            stacks = [each for name, each in registry._parameters.items() if name.startswith(STACKED)]
            others = {name: own for name, expert in registry.items() if (own := _ordinary(expert))}
            if others and len(registry) > 1:
                raise StackedError(
                    f"'find_unused_parameters' must be True where not all of a level's experts are stacked (got False, "
                    f"and in level {level!r} {listed(others)}, which a rank's batch may lack; call "
                    f"celmoe.distributed.prepare_ddp)"
                )
            # The only expert of a level is absent from a batch without samples.
            tied_to: list[Any] = [*stacks, *(each for some in others.values() for each in some)]
            before += [each for each in tied_to if each is not None and id(each) in self._trained]
            ties[level] = list(before)
        return ties

    def _begin(self, _grad: torch.Tensor | None) -> None:
        """Forget what reached stacks before their gradients were cleared, as a backward pass begins to add new ones."""
        forget_cleared(each for each in self.stacks if each.grad is None)
        self.is_due |= self.syncs

    def join(self) -> None:
        """Join the ranks' notes of reached members, once for each reduction."""
        if not self.is_due or not self.stacks or not torch.distributed.is_initialized():
            return
        # The last tells if a backward pass has ever noted members: else the gradient is of all.
        own = [np.append(kept(each), reached(each) is not None) for each in self.stacks]
        joined = joined_members(own, [self._group], self.stacks[0].device)
        for each, members in zip(self.stacks, joined, strict=True):
            if members[-1]:
                set_reached(each, members[:-1])
        self.is_due = False


def joined_members(
    members: Sequence[npt.NDArray[np.bool_]], groups: Sequence[Any], device: torch.device
) -> Sequence[npt.NDArray[np.bool_]]:
    """The members of some stacks that a gradient on any rank is of, by one all-reduce in each group, a byte each.

    Args:
        members: For each stack, ``[M]``: true for the members that this rank's gradient is of.
        groups: This rank's process groups.
        device: The device that the groups' backends take.
    """
    if not members:
        return members
    bits = torch.from_numpy(np.concatenate(members).astype(np.uint8)).to(device)
    for group in groups:
        torch.distributed.all_reduce(bits, torch.distributed.ReduceOp.MAX, group)
    return np.split(bits.cpu().numpy().astype(np.bool_), np.cumsum([len(each) for each in members])[:-1])


def _ordinary(expert: nn.Module) -> list[nn.Parameter]:
    """An expert's trained parameters that are not stacked."""
    found = [each for module in expert.modules() for each in module._parameters.values()]
    return [each for each in found if each is not None and each.requires_grad]


# In the order of their first forward passes, which is the same on all ranks.
_PARALLEL: list[_Parallel] = []


def _parallel_of(ddp: Any) -> _Parallel:
    for each in _PARALLEL:
        if each.ddp() is ddp:
            return each
    _PARALLEL.append(made := _Parallel(ddp))
    weakref.finalize(ddp, _end, made)
    return made


def _end(parallel: _Parallel) -> None:
    _PARALLEL.remove(parallel)
    if parallel.hook is not None:
        parallel.hook.remove()


class _Tie(Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.num_tensors = len(tensors)
        ctx.set_materialize_grads(False)
        # Not `view_as`: autograd refuses in-place work on a view made inside a Function.
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return grads[0], *(None,) * ctx.num_tensors


def tied(value: torch.Tensor, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The value. A backward pass from the value reaches the tensors, too, without a gradient for them."""
    return cast(Any, _Tie.apply)(value, *tensors) if tensors and torch.is_grad_enabled() else value


def ties_of(levels: nn.ModuleDict) -> Mapping[str, Sequence[nn.Parameter]]:
    """By level, the parameters that its hidden states must be tied to; empty unless a DDP holds the experts.

    To be called by each forward pass of a model with stacks.

    Args:
        levels: The model's experts by level.

    Raises:
        StackedError: An option of the DDP does not go with stacked experts.
    """
    ddp = active_ddp()
    if ddp is not None:
        parallel = _parallel_of(ddp)
        if parallel.stacks and is_joining(ddp):
            raise StackedError(
                "'join' must not be entered by a DDP of stacked experts, for ranks that have ended join no members "
                "(got a forward pass in it; give a rank without samples an empty batch)"
            )
        if not ddp.find_unused_parameters and not all(each.requires_grad for each in parallel.stacks):
            raise StackedError(
                "'model' must have a trained expert in each stack of its DistributedDataParallel (got a stack whose "
                "experts are all frozen since; wrap the model anew, or call celmoe.distributed.prepare_ddp)"
            )
        parallel.syncs = ddp.require_backward_grad_sync
        return parallel.ties(levels) if parallel.stacks else {}
    # A checkpoint runs the model again, outside of the wrapper.
    return next((each.known[levels] for each in _PARALLEL if levels in each.known), {})


def join_reached() -> None:
    """Let all ranks know the members that gradients under DDP are of; to be called before presence is read."""
    for each in _PARALLEL:
        each.join()


def is_joined(stack: torch.Tensor) -> bool:
    """True if this rank knows all members that a stack's gradient is of."""
    return not any(each.is_due and any(stack is one for one in each.stacks) for each in _PARALLEL)
