"""The engine that runs a level's experts one after another.

This engine is right for any module, and reproduces celmoe-vp bit for bit, dropout's random stream included.
"""

from __future__ import annotations

import copy
import numbers
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from celmoe.errors import CELMoEError, ResultError, ResultTypeError
from celmoe.experts import ExpertBatch, ExpertResult, is_aux


def run_looped(experts: Sequence[nn.Module], batches: Iterable[ExpertBatch]) -> list[ExpertResult]:
    """Run each expert on its batch, in order.

    Args:
        experts: The P experts present.
        batches: The experts' batches.

    Returns:
        P results, each checked to hold rows of the input's shape and device.

    Raises:
        ResultTypeError, ResultError: An expert returned no such result. An error that an expert raises passes through,
            with a note that names the expert.
    """
    results = []
    # A module that stands for several experts may hand out the same memory, or the same result, again.
    is_shared = len(set(experts)) < len(experts)
    for expert, batch in zip(experts, batches, strict=True):
        # Experts may write into their batch.
        given, state = batch.hidden, batch.state
        shape, device, dtype, level, name = given.shape, given.device, given.dtype, state["level"], state["expert"]
        try:
            result = expert(batch)
        except Exception as error:
            error.add_note(f"celmoe: raised by expert {name!r} of level {level!r} on {shape[0]} samples")
            raise
        if is_shared and isinstance(result, ExpertResult) and isinstance(result.hidden, torch.Tensor):
            result = copy.copy(result)
            result.hidden = result.hidden.clone()
        results.append(result)
        is_usual = type(result) is ExpertResult and type(result.losses) is dict and type(result.aux) is dict
        if is_usual and all(isinstance(loss, torch.Tensor) for loss in result.losses.values()):
            hidden = result.hidden
            if type(hidden) is torch.Tensor and (hidden.shape, hidden.device, hidden.dtype) == (shape, device, dtype):
                continue
        if fault := _fault(result, shape, device, dtype):
            what, rule, kind = fault
            raise kind(f"{what!r} of expert {name!r} of level {level!r} must {rule}")
    return results


def _fault(
    result: object, shape: torch.Size, device: torch.device, dtype: torch.dtype
) -> tuple[str, str, type[CELMoEError]] | None:
    """The wrong part of a result, the rule that it breaks, and the error to raise; ``None`` for a right result."""
    if not isinstance(result, ExpertResult):
        got = f"the class {result.__name__}" if isinstance(result, type) else type(result).__name__
        return "result", f"be an ExpertResult (got {got})", ResultTypeError
    hidden, losses, aux = result.hidden, result.losses, result.aux
    if not isinstance(hidden, torch.Tensor):
        return "result.hidden", f"be a tensor (got {type(hidden).__name__})", ResultTypeError
    if not isinstance(losses, Mapping):
        return "result.losses", f"be a mapping (got {type(losses).__name__})", ResultTypeError
    for name, loss in losses.items():
        if not isinstance(loss, torch.Tensor | numbers.Real):
            return f"result.losses[{name!r}]", f"be a tensor (got {type(loss).__name__})", ResultTypeError
    if not is_aux(aux):
        return "result.aux", f"be a mapping (got {type(aux).__name__})", ResultTypeError
    if hidden.shape != shape:
        rule = f"have the shape of its input, {tuple(shape)} (got {tuple(hidden.shape)})"
        return "result.hidden", rule, ResultError
    if hidden.device != device:
        return "result.hidden", f"be on {device}, where its input is (got {hidden.device})", ResultError
    if hidden.dtype != dtype and not (hidden.is_floating_point() or hidden.is_complex()):
        return "result.hidden", f"have a floating-point dtype (got {hidden.dtype})", ResultError
    return None
