"""Data parallelism: `DistributedDataParallel` with the whole model on every rank, for samples of any experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from celmoe.errors import (
    ConfigError,
    ConfigTypeError,
    InputError,
    InputTypeError,
    ProcessGroupError,
    listed,
)
from celmoe.hierarchy import HierarchicalCELMoE
from celmoe.names import STACKED

from .gradients import tied
from .groups import require_process_group

# Options on which the result depends: the value, and the reason for the value.
_FIXED = {
    "find_unused_parameters": (True, "which experts a batch has is known only when it comes"),
    "static_graph": (False, "no step has the graph of the step before"),
}


class _Objective(nn.Module):
    """A model and its objective. The loss is the only output, so parameters that the loss doesn't reach are unused."""

    def __init__(self, model: nn.Module, objective: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.model = model
        self._objective = objective
        first = next(model.parameters(), torch.empty(0))
        # The reduction begins with the first gradient that arrives. The anchor gives a gradient to a rank whose batch
        # reaches no parameter (an empty batch, or only frozen experts).
        self.anchor = nn.Parameter(torch.zeros((), device=first.device))
        self._known = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The loss."""
        if torch.is_grad_enabled():
            self._require_known()
        loss = self._objective(self.model, *args, **kwargs)
        if not isinstance(loss, torch.Tensor):
            raise InputTypeError(f"'objective' must return a tensor (got {type(loss).__name__})")
        if loss.numel() != 1 or not loss.is_floating_point():
            raise InputError(
                f"'objective' must return a floating-point scalar (got shape {tuple(loss.shape)}, {loss.dtype})"
            )
        return tied(loss, self.anchor)

    def _require_known(self) -> None:
        """Refuse parameters unknown to the reduction: each rank would keep its own gradients of them."""
        known = self._known
        if all(id(parameter) in known for parameter in self.model.parameters() if parameter.requires_grad):
            return
        new = [name for name, each in self.model.named_parameters() if each.requires_grad and id(each) not in known]
        raise ProcessGroupError(
            f"'model' must have had all trained parameters when 'prepare_ddp' was called (got {listed(new)} since: "
            f"replaced, or frozen then; call it again)"
        )


def prepare_ddp(model: nn.Module, objective: Callable[..., torch.Tensor], **options: Any) -> DistributedDataParallel:
    """Wrap a model to train on several ranks, each with samples, and experts, of its own.

    Calling the result runs ``objective(model, *args, **kwargs)`` and returns its loss; ``backward()`` averages the
    gradients of all ranks. Experts that are absent on all ranks keep ``None``. If each rank's loss comes from
    `joined_mean`, a step equals that of one process on the joined batch. Every rank must make the same number of calls
    and backward passes; a rank without samples passes an empty batch. ``no_sync()`` accumulates, as ever.

    The model itself does not change: make the optimizer of ``model.parameters()``, save ``model.state_dict()``.

    Args:
        model: A `HierarchicalCELMoE`, or any module that holds some.
        objective: Takes the model and the caller's arguments, and returns the loss: a floating-point scalar.
        **options: Options of `DistributedDataParallel`. ``forward_sync_buffers`` is off by default: the first rank's
            buffers say nothing of experts that the rank has not seen. ``find_unused_parameters=False`` is for stacked
            experts: the objective must reach ``fused_hidden`` then, or the last level's hidden states, on every rank.

    Raises:
        ProcessGroupError: No process group is initialised. The result raises it for a trained parameter that was
            missing, or frozen, in the call of `prepare_ddp`.
        ConfigError: An option would make ranks hang or diverge; an expert has a collective of its own, or sparse
            gradients.
        ConfigTypeError: The objective is not callable.

    Example::

        def objective(model, hidden, routing, targets):
            errors = model(hidden, routing).fused_hidden - targets
            return joined_mean(errors.square().mean(-1).sum(), len(targets))

        parallel = prepare_ddp(model, objective)
        parallel(hidden, routing, targets).backward()
    """
    require_process_group("prepare_ddp")
    if not callable(objective):
        raise ConfigTypeError(f"'objective' must be callable (got {objective!r})")
    fixed = dict(_FIXED)
    if any(STACKED in name for name, _ in model.named_parameters()):
        # The model itself sees to it that a stack is used.
        del fixed["find_unused_parameters"]
    for name, (value, why) in fixed.items():
        if options.get(name, value) != value:
            raise ConfigError(f"{name!r} must be {value}, for {why} (got {options[name]!r})")
    refuse_collectives(model)
    refuse_sparse(model, "prepare_ddp")
    options = {"forward_sync_buffers": False, **{name: value for name, (value, _) in _FIXED.items()}, **options}
    return DistributedDataParallel(_Objective(model, objective), **options)


def require_hierarchy(model: object) -> None:
    """Refuse a model that is no `HierarchicalCELMoE`, or whose config changed in structure after the model was built.

    Raises:
        ConfigTypeError: The model is something else.
        ConfigError: See `HierarchicalCELMoE.check_config`.
    """
    if not isinstance(model, HierarchicalCELMoE):
        raise ConfigTypeError(f"'model' must be a HierarchicalCELMoE (got {type(model).__name__})")
    model.check_config()


def refuse_collectives(model: nn.Module) -> None:
    """Refuse experts with collectives of their own: these would wait for ranks that do not run the expert.

    Raises:
        ConfigError: An expert has a `SyncBatchNorm`.
    """
    for name, module in _inside_experts(model):
        if isinstance(module, nn.SyncBatchNorm):
            raise ConfigError(
                f"'model' must have no SyncBatchNorm in its experts, for it waits for ranks that do not run the "
                f"expert (got one at 'level_modules.{name}')"
            )


def refuse_sparse(model: nn.Module, call: str) -> None:
    """Refuse experts with sparse gradients: a rank whose samples do not reach the expert has no such gradient.

    Args:
        model: The model.
        call: The call that can't reduce sparse gradients.

    Raises:
        ConfigError: An expert has a trained embedding with ``sparse=True``.
    """
    for name, module in _inside_experts(model):
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse and module.weight.requires_grad:
            raise ConfigError(
                f"'model' must have no embedding with sparse=True in its experts for '{call}' (got one at "
                f"'level_modules.{name}': set sparse=False, or call reduce_gradients instead)"
            )


def _inside_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for hierarchy in model.modules():
        if isinstance(hierarchy, HierarchicalCELMoE):
            yield from hierarchy.level_modules.named_modules()
