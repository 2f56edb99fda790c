"""Grouped and looped side by side on a few rows, before a class is grouped for the first time.

Two members see different numbers of the class's own rows; what they give, the gradients of what they were given, and
those of their parameters must agree. It leaves no trace: members are likenesses with copies of their tensors, rows are
copies, and random numbers are not drawn (both sides do the same in their place).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .experts import ExpertBatch, ExpertResult
from .ragged import CannotGroupError
from .segments import Segments
from .signature import Watched
from .tally import Tally, entering
from .template import Given, Outcome, Template, run_template
from .watchers import unwatched

# Rows of the two members.
COUNTS = (2, 3)
# Relative to the largest value; sums are taken in another order.
_TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.complex64: 1e-4, torch.complex128: 1e-10}


class _Rehearsal(TorchFunctionMode):
    """Does in place of random operations what a rehearsed template does."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if "dropout" in name and func in _DROPOUTS:
            options = dict(zip(("p", "training", "inplace"), args[1:], strict=False)) | kwargs
            p = options.get("p", 0.5)
            return args[0] * (1.0 - 0.5 * float(p)) if options.get("training", True) and p else args[0] * 1
        if name in ("rand_like", "randn_like"):
            return torch.full_like(args[0], 0.5, **kwargs)
        if name in ("rand", "randn"):
            sizes = args[0] if len(args) == 1 and isinstance(args[0], tuple | list) else args or kwargs.pop("size")
            return torch.full(tuple(sizes), 0.5, **kwargs)
        if name == "scaled_dot_product_attention":
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
            kwargs = kwargs | ({"dropout_p": 0.0} if "dropout_p" in kwargs else {})
        if name in _DROPOUT_PLACES and len(args) > _DROPOUT_PLACES[name]:
            place = _DROPOUT_PLACES[name]
            args = (*args[:place], 0.0, *args[place + 1 :])
        return func(*args, **kwargs)


# Where functions that drop out inside take their rate.
_DROPOUT_PLACES = {"multi_head_attention_forward": 10, "gru": 5, "lstm": 5, "rnn_tanh": 5, "rnn_relu": 5}
_DROPOUTS = {F.dropout, F.alpha_dropout, F.feature_alpha_dropout, F.dropout1d, F.dropout2d, F.dropout3d}


def prove(members: Sequence[Watched], given: Given, program: tuple[str, ...], *, has_losses: bool) -> str | None:
    """Whether grouped equals looped for a class and a program.

    Args:
        members: Two members or more; two are taken.
        given: What the class is given.
        program: The operations of the run that is to be proven.
        has_losses: Whether it gives losses.

    Returns:
        What differs, in words that follow "its experts", or ``None``.
    """
    pair = members[:2]
    num_rows = given.hidden.shape[0]
    autocast = _autocast_of(given.hidden.device.type)
    # A mode of inference would hold the rows' gradients back.
    with torch.inference_mode(False), torch.enable_grad(), unwatched(), autocast:
        index = (torch.arange(sum(COUNTS)) % num_rows).to(given.hidden.device)
        few = Given(
            _copy(given.hidden.index_select(0, index)),
            None if given.mask is None else _copy(given.mask.index_select(0, index)),
            [_copy(each.index_select(0, index)) for each in given.aligned],
            given.build_context,
            given.shared,
        )
        tensors = [[_copy(tensor, tensor.requires_grad) for tensor in member.tensors] for member in pair]
        segments = Segments(COUNTS, given.hidden.device)
        try:
            grouped = _grouped(pair, tensors, few, segments, Tally(len(pair)) if has_losses else None)
            if grouped.operations != program:
                return "computed something else on a few rows"
            looped = _looped(pair, tensors, few)
        except CannotGroupError as error:
            return str(error)
        return _difference(grouped, looped, few, tensors, pair)


def _autocast_of(device: str) -> contextlib.AbstractContextManager[Any]:
    if not torch.is_autocast_enabled(device):
        return contextlib.nullcontext()
    # Its cache of casts would outlive the proof.
    return torch.autocast(device, torch.get_autocast_dtype(device), cache_enabled=False)


def _copy(tensor: torch.Tensor, requires_grad: bool = True) -> torch.Tensor:
    copy = tensor.detach().clone()
    return copy.requires_grad_(requires_grad and (copy.is_floating_point() or copy.is_complex()))


def _private(given: Given, tally: Tally | None = None) -> Given:
    """Rows that an expert may write into, and that are no leaves."""

    def own(tensor: torch.Tensor) -> torch.Tensor:
        return (tensor if tally is None else entering(tensor, tally)).clone()

    return Given(
        own(given.hidden),
        None if given.mask is None else own(given.mask),
        [own(each) for each in given.aligned],
        given.build_context,
        given.shared,
    )


def _grouped(
    pair: Sequence[Watched], tensors: list[list[torch.Tensor]], few: Given, segments: Segments, tally: Tally | None
) -> Outcome:
    template = Template(pair[0].module, pair[0].signature)
    members, given = list(zip(*tensors, strict=True)), _private(few, tally)
    return run_template(template, members, given, segments, is_rehearsal=True, tally=tally)


def _looped(pair: Sequence[Watched], tensors: list[list[torch.Tensor]], few: Given) -> list[ExpertResult]:
    results = []
    given = _private(few)
    blocks = [each.split(list(COUNTS)) for each in (given.hidden, *given.aligned)]
    masks = [None, None] if given.mask is None else given.mask.split(list(COUNTS))
    for place, member in enumerate(pair):
        template = Template(member.module, member.signature)
        template.fill(
            [
                _as_parameter(value, leaves[0].is_buffer)
                for value, leaves in zip(tensors[place], member.signature.leaves, strict=True)
            ]
        )
        batch = ExpertBatch(
            blocks[0][place].clone(),
            given.build_context([each[place].clone() for each in blocks[1:]]),
            None if masks[place] is None else masks[place].clone(),  # type: ignore[union-attr]  # checked here
            {"level": "", "expert": ""},
        )
        with _Rehearsal():
            results.append(template.run(batch))
    return results


def _as_parameter(value: torch.Tensor, is_buffer: bool) -> torch.Tensor:
    # A view, so that the copy stays the leaf whose gradient is asked for.
    if is_buffer:
        return value
    view = value.view_as(value)
    view._is_param = True
    return view


def _difference(
    grouped: Outcome, looped: list[ExpertResult], few: Given, tensors: list[list[torch.Tensor]], pair: Sequence[Watched]
) -> str | None:
    hidden = torch.cat([result.hidden for result in looped])
    if not _agree(grouped.hidden, hidden):
        return "differ in their results, run as one"
    names = list(looped[0].losses)
    if list(grouped.losses) != names or any(list(each.losses) != names for each in looped):
        return "differ in the names of their losses, run as one"
    for name in names:
        for mine, theirs in zip(grouped.losses[name], looped, strict=True):
            if not _agree(mine, theirs.losses[name]):
                return f"differ in the loss {name!r}, run as one"
    leaves = [tensor for member in tensors for tensor in member]
    rows = [few.hidden, *([] if few.mask is None else [few.mask]), *few.aligned]
    inputs = [each for each in (*rows, *leaves) if each.requires_grad]
    found = _gradients([grouped.hidden, *(loss for each in grouped.losses.values() for loss in each)], inputs)
    wanted = _gradients([hidden, *(each.losses[name] for name in names for each in looped)], inputs)
    for where, left, right in zip(inputs, found, wanted, strict=True):
        if (left is None) != (right is None) or (left is not None and right is not None and not _agree(left, right)):
            return f"differ in the gradient of {_name(where, few, tensors, pair)}, run as one"
    return None


def _name(where: torch.Tensor, few: Given, tensors: list[list[torch.Tensor]], pair: Sequence[Watched]) -> str:
    if where is few.hidden:
        return "their hidden states"
    for member, values in zip(pair, tensors, strict=True):
        for value, leaves in zip(values, member.signature.leaves, strict=True):
            if value is where:
                return repr(leaves[0].name)
    return "their mask or context"


def _gradients(outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor | None]:
    """Of a weighted sum of all outputs, so that no two elements count alike."""
    outputs = [output for output in outputs if output.requires_grad]
    if not outputs:
        return [None] * len(inputs)
    # Made on the host: not every device has float64.
    weights = [torch.from_numpy(np.linspace(0.5, 1.5, output.numel())) for output in outputs]
    sent = [
        weight.view(output.shape).to(output.dtype).to(output.device)
        for weight, output in zip(weights, outputs, strict=True)
    ]
    return torch.autograd.grad(outputs, inputs, sent, allow_unused=True)


def _agree(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    # On the host, where whatever reads values can be asked.
    mine, theirs = mine.detach().cpu(), theirs.detach().cpu()
    if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
        return False
    if not mine.numel():
        return True
    if not mine.is_floating_point() and not mine.is_complex():
        return bool((mine == theirs).all())
    finite = theirs.isfinite()
    if not bool((finite == mine.isfinite()).all()):
        return False
    largest = theirs.where(finite, 0).abs().max()
    tolerance = _TOLERANCES.get(mine.dtype, 4 * torch.finfo(mine.dtype).eps)
    return bool(((mine - theirs).where(finite, 0).abs() <= tolerance * largest).all())
