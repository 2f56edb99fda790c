"""Every rank holds the whole model and sees other samples: `DistributedDataParallel`, whatever experts those take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from celmoe.errors import ConfigError, ConfigTypeError, InputError, InputTypeError, ProcessGroupError, listed
from celmoe.hierarchy import HierarchicalCELMoE

from .gradients import tied
from .groups import require_process_group

# What the result depends on, and why it has to be as it is.
_FIXED = {
    "find_unused_parameters": (True, "which experts a batch has is known only when it comes"),
    "static_graph": (False, "no step has the graph of the step before"),
}


class _Objective(nn.Module):
    """A model and what is differentiated: the loss is all that comes out, so that what it doesn't reach is unused."""

    def __init__(self, model: nn.Module, objective: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.model = model
        self._objective = objective
        first = next(model.parameters(), torch.empty(0))
        # A rank whose batch reaches no parameter at all (an empty one, or only frozen experts) still has to take part
        # in the reduction, which begins with the first gradient that arrives.
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
        """Refuse parameters that the reduction does not know: their gradients would stay each rank's own."""
        known = self._known
        if all(id(parameter) in known for parameter in self.model.parameters() if parameter.requires_grad):
            return
        new = [name for name, each in self.model.named_parameters() if each.requires_grad and id(each) not in known]
        raise ProcessGroupError(
            f"'model' must have had all trained parameters when 'prepare_ddp' was called (got {listed(new)} since: "
            f"replaced, or frozen then; call it again)"
        )


def prepare_ddp(model: nn.Module, objective: Callable[..., torch.Tensor], **options: Any) -> DistributedDataParallel:
    """Train a model on several ranks, each with samples, and experts, of its own.

    Calling the result runs ``objective(model, *args, **kwargs)`` and returns its loss; ``backward()`` averages the
    gradients of all ranks. Experts that are absent on all ranks keep ``None``. With each rank's loss from `joined_mean`
    a step is that of one process on the joined batch. Every rank must make the same number of calls and backward
    passes; one without samples makes them with an empty batch. ``no_sync()`` accumulates, as ever.

    The model itself stays as it is: make the optimizer of ``model.parameters()``, save ``model.state_dict()``.

    Args:
        model: A `HierarchicalCELMoE`, or any module that holds some.
        objective: Given the model and what the caller passed, the loss: a floating-point scalar.
        **options: For `DistributedDataParallel`. ``forward_sync_buffers`` is off unless asked for: the first rank's
            buffers say nothing of experts that it has not seen.

    Raises:
        ProcessGroupError: No process group is initialised. When called: a parameter is trained that was not there, or
            frozen, when this was called.
        ConfigError: An option without which ranks hang or diverge; an expert with a collective of its own, or with
            sparse gradients.
        ConfigTypeError: The objective can't be called.

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
    for name, (value, why) in _FIXED.items():
        if options.get(name, value) != value:
            raise ConfigError(f"{name!r} must be {value}, for {why} (got {options[name]!r})")
    refuse_collectives(model)
    refuse_sparse(model, "prepare_ddp")
    options = {"forward_sync_buffers": False, **options, **{name: value for name, (value, _) in _FIXED.items()}}
    return DistributedDataParallel(_Objective(model, objective), **options)


def require_hierarchy(model: object) -> None:
    """Refuse what is no `HierarchicalCELMoE`, and one whose config has changed in structure since it was built.

    Raises:
        ConfigTypeError: It is something else.
        ConfigError: As for `HierarchicalCELMoE.check_config`.
    """
    if not isinstance(model, HierarchicalCELMoE):
        raise ConfigTypeError(f"'model' must be a HierarchicalCELMoE (got {type(model).__name__})")
    model.check_config()


def refuse_collectives(model: nn.Module) -> None:
    """Refuse experts that talk to other ranks themselves: they would wait for ranks that do not run them.

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
    """Refuse experts with sparse gradients: a rank whose samples do not reach one has none to bring.

    Args:
        model: The model.
        call: The call that can't reduce them.

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
