"""Compares a program with the loop, on a few rows of every member, before its experts first run as one.

Two comparisons must agree for each member. First, the expert itself and its traced graph give the same: the trace is
true for this very member. Second, the graph of each member alone and the program of all members give the same,
gradients too. In the second, the members' tensors are copies in which no element is zero: behind a zero, wrong
gradients would look right. Nothing is left behind: rows and tensors are copies, and the random state is restored.
Random operations do the same on all sides.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from celmoe.errors import listed
from celmoe.experts import ExpertBatch, ExpertResult
from celmoe.grouped.ops.reduce import without_gumbel_noise
from celmoe.rows.context import ContextRows
from celmoe.torch_internals import unwatched

from .capture import Captured, Sample, WrongResult
from .program import Bound, Outcome, Program, bound_to_kinds, run_program
from .segments import Segments
from .values import CannotGroupError
from .waiting import told

# Numbers of rows that the members get in turn.
COUNTS = (2, 3)
# The fractional parts of its multiples all differ, and neighbours differ much.
_GOLDEN = 0.6180339887498949
# Number of members whose tensors are copied at a time.
_AT_A_TIME = 16
# Relative to the largest value, by the lowest precision in use: a grouped run sums in another order.
_TOLERANCES = {
    torch.float64: 1e-10,
    torch.complex128: 1e-10,
    torch.float32: 1e-4,
    torch.complex64: 1e-4,
    torch.float16: 0.01,
    torch.bfloat16: 0.05,
}


class Few(NamedTuple):
    """The source of the rows that members are compared on.

    Attributes:
        hidden: The hidden states, ``[N, ...]``, of any N rows that the level is given.
        mask: The mask, ``[N, ...]``, or ``None``.
        context: The batch's context.
    """

    hidden: torch.Tensor
    mask: torch.Tensor | None
    context: ContextRows


class Verifiable(Protocol):
    """The parts of a class's record that `verify` uses."""

    program: Program | None
    operations_looped: dict[str, int]
    writes: bool
    draws: bool


class _Rehearsal(TorchFunctionMode):
    """Replaces random operations as a rehearsed program does.

    Attributes:
        called: The names of the functions that were called, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        self.called.append(name)
        if "dropout" in name and func in _DROPOUTS:
            options = dict(zip(("p", "training", "inplace"), args[1:], strict=False)) | kwargs
            p = options.get("p", 0.5)
            is_training = options.get("training", "alpha" not in name)
            return args[0] * (1.0 - 0.5 * float(p)) if is_training and p else args[0] * 1
        if name in ("rand_like", "randn_like"):
            return torch.full_like(args[0], 0.5, **kwargs)
        if name in ("rand", "randn"):
            sizes = args[0] if len(args) == 1 and isinstance(args[0], tuple | list) else args or kwargs.pop("size")
            return torch.full(tuple(sizes), 0.5, **kwargs)
        if func is F.gumbel_softmax:
            return without_gumbel_noise(*args, **{"_eps" if key == "eps" else key: kwargs[key] for key in kwargs})
        if name == "scaled_dot_product_attention":
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
            kwargs = kwargs | ({"dropout_p": 0.0} if "dropout_p" in kwargs else {})
        if name in _DROPOUT_PLACES and len(args) > _DROPOUT_PLACES[name]:
            place = _DROPOUT_PLACES[name]
            args = (*args[:place], 0.0, *args[place + 1 :])
        return func(*args, **kwargs)


# The position of the dropout rate among a function's arguments.
_DROPOUT_PLACES = {"multi_head_attention_forward": 10, "gru": 5, "lstm": 5, "rnn_tanh": 5, "rnn_relu": 5}
_DROPOUTS = {F.dropout, F.alpha_dropout, F.feature_alpha_dropout, F.dropout1d, F.dropout2d, F.dropout3d}


_Part: TypeAlias = Callable[[slice], Sample]


class _Leaf(NamedTuple):
    """A tensor whose gradient is compared, and the tensor's name in messages."""

    tensor: torch.Tensor
    name: str


def verify(record: Verifiable, members: Sequence[nn.Module], few: Few) -> list[str | None]:
    """Compare a grouped run with the loop, for each member.

    Args:
        record: The members' class: gives the program, and takes notes on the program's run.
        members: Any number of members.
        few: The source of rows.

    Returns:
        For each member the difference, in words that follow "its experts", or ``None``.
    """
    found: list[str | None] = []
    is_grad_enabled = torch.is_grad_enabled()
    device = few.hidden.device
    state = torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    with (
        torch.inference_mode(False),
        torch.set_grad_enabled(is_grad_enabled),
        unwatched(),
        _autocast_of(device.type),
    ):
        try:
            firsts = range(0, len(members), _AT_A_TIME)
            for first in told(firsts, len(firsts), "comparing experts with the loop"):
                found += _verified(record, members[first : first + _AT_A_TIME], few)
        except CannotGroupError as error:
            found = [error.args[0]] * len(members)
        except Exception as error:  # noqa: BLE001  # whatever it is, the loop will tell the user
            found = [_raised(error)] * len(members)
        finally:
            torch.set_rng_state(state[0])
            if state[1] is not None:
                torch.cuda.set_rng_state(state[1], device)
    return found


def _verified(record: Verifiable, members: Sequence[nn.Module], few: Few) -> list[str | None]:
    program = record.program
    assert program is not None
    captured = program.captured
    counts = [COUNTS[place % len(COUNTS)] for place in range(len(members))]
    leaves, sample = _rows(few, sum(counts))
    tensors = [[_stirred(tensor) for tensor in captured.own(member)] for member in members]
    segments = Segments(counts, few.hidden.device)
    by_input = list(zip(*tensors, strict=True))
    if program.calls is None:
        seen = bound_to_kinds(program, Bound(_private(sample, few.context), by_input, members[0]), segments)
        record.program = program = seen
    given = _private(sample, few.context)
    grouped = run_program(program, Bound(given, by_input, members[0]), segments, is_rehearsal=True)
    record.operations_looped = grouped.operations_looped
    record.writes, record.draws = grouped.writes, grouped.draws
    parts = _parts(sample, few.context, counts)
    alone = [_alone(captured, *each) for each in zip(members, tensors, parts, strict=True)]
    hidden = torch.cat([each[0] for each in alone])
    agree = _Agreement(
        [sample.hidden, *(each for own in tensors for each in own), *(each for one in alone for each in one)]
    )
    found: list[str | None] = [None] * len(members)
    for place, (member, part) in enumerate(zip(members, parts, strict=True)):
        found[place] = _differs_from_expert(member, part, captured, agree)
    # A program that is wrong for one member runs for none.
    if all(map(agree, grouped.hidden.split(counts), [each[0] for each in alone])):
        shared = _difference(grouped, hidden, alone, captured, leaves, tensors, agree)
    else:
        shared = "differ in their results, run as one"
    if shared is not None:
        found = [each or shared for each in found]
    return found


def _rows(few: Few, number: int) -> tuple[list[_Leaf], Sample]:
    """Copies of some rows: as leaves, and as the input of a call."""
    index = (torch.arange(number) % few.hidden.shape[0]).to(few.hidden.device)

    def taken(tensor: torch.Tensor) -> torch.Tensor:
        some = tensor.detach().index_select(0, index)
        # Every other row stays as it is given.
        some[1::2] = _without_zeros(some[1::2])
        return _copy(some, tensor.requires_grad and torch.is_grad_enabled())

    hidden = taken(few.hidden)
    mask = None if few.mask is None else taken(few.mask)
    aligned = [taken(each) for each in few.context.aligned]
    leaves = [_Leaf(hidden, "their hidden states")]
    leaves += [_Leaf(each, "their mask or context") for each in ([] if mask is None else [mask]) + aligned]
    return leaves, Sample(hidden, mask, aligned)


def _copy(tensor: torch.Tensor, requires_grad: bool) -> torch.Tensor:
    copy = tensor.detach().clone()
    return copy.requires_grad_(requires_grad and (copy.is_floating_point() or copy.is_complex()))


def _stirred(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a member's tensor, in which no element is zero."""
    with torch.no_grad():
        values = _without_zeros(tensor)
    return _copy(values, tensor.requires_grad)


def _without_zeros(values: torch.Tensor) -> torch.Tensor:
    """Values with small positive numbers in place of zeros, in imaginary parts too."""
    if values.is_complex():
        return torch.view_as_complex(_without_zeros(torch.view_as_real(values.resolve_conj()).contiguous()))
    if not values.is_floating_point():
        return values
    # Drawn on the host, without the caller's random state.
    drawn = np.random.default_rng(0).uniform(0.05, 0.15, tuple(values.shape)).astype(np.float32)
    return values.where(values != 0, torch.from_numpy(drawn).to(values.device).to(values.dtype))


def _private(sample: Sample, context: ContextRows) -> Sample:
    """A copy of a sample whose rows may be written into, and are no leaves."""
    mask = None if sample.mask is None else sample.mask.clone()
    return Sample(sample.hidden.clone(), mask, context.build([each.clone() for each in sample.context]))


def _parts(sample: Sample, context: ContextRows, counts: Sequence[int]) -> list[_Part]:
    """For each member a function that copies some of its rows anew, because an expert may write into rows."""
    hidden = sample.hidden.split(list(counts))
    masks = None if sample.mask is None else sample.mask.split(list(counts))
    aligned = [each.split(list(counts)) for each in sample.context]

    def part(place: int) -> _Part:
        return lambda taken: Sample(
            hidden[place][taken].clone(),
            None if masks is None else masks[place][taken].clone(),
            context.build([each[place][taken].clone() for each in aligned]),
        )

    return [part(place) for place in range(len(counts))]


def _alone(captured: Captured, member: nn.Module, own: Sequence[torch.Tensor], part: _Part) -> list[torch.Tensor]:
    """One member's hidden states and losses by the traced graph."""
    arguments = part(slice(None)).arguments(member)
    tensors = iter(own)
    inputs = [next(tensors) if kind == "own" else read(arguments) for kind, read in captured.inputs]
    with _Rehearsal():
        outputs = captured.module(*inputs)
    return [outputs[place] if kind == "output" else inputs[place] for kind, place in captured.outputs]


def _differs_from_expert(member: nn.Module, part: _Part, captured: Captured, agree: _Agreement) -> str | None:
    own = [_copy(tensor, tensor.requires_grad) for tensor in captured.own(member)]
    alone = _alone(captured, member, own, part)
    try:
        (result, calls), (first_row, calls_of_one) = _called(member, part(slice(None))), _called(member, part(slice(1)))
    except Exception as error:  # noqa: BLE001  # whatever it is, the loop will tell the user
        return _raised(error)
    for each in (result, first_row):
        if not isinstance(each, ExpertResult) or tuple(each.losses) != captured.losses:
            return "return something else than PyTorch's tracer saw"
    for mine, theirs in zip(alone, [result.hidden, *result.losses.values()], strict=True):
        if not isinstance(theirs, torch.Tensor) or not agree(mine, theirs):
            return "compute something else than PyTorch's tracer saw"
    # Weights that change nothing yet, as those of a new norm, may hide that they are left out.
    if calls != calls_of_one or not agree(alone[0][:1], first_row.hidden):
        return "compute something else from one row than from several"
    return None


def _raised(error: Exception) -> str:
    return WrongResult(f"raise {type(error).__name__} on a few rows ({error})")


def _called(member: nn.Module, sample: Sample) -> tuple[Any, list[str]]:
    """The expert's result, and its calls of PyTorch."""
    with _Rehearsal() as rehearsal:
        result = member(ExpertBatch(sample.hidden, sample.context, sample.mask, {"level": "", "expert": ""}))
    return result, rehearsal.called


def _difference(
    grouped: Outcome,
    hidden: torch.Tensor,
    alone: Sequence[Sequence[torch.Tensor]],
    captured: Captured,
    leaves: Sequence[_Leaf],
    tensors: Sequence[Sequence[torch.Tensor]],
    agree: _Agreement,
) -> str | None:
    for number, name in enumerate(captured.losses, start=1):
        for mine, theirs in zip(grouped.losses[name], alone, strict=True):
            if not agree(mine, theirs[number]):
                return f"differ in the loss {name!r}, run as one"
    own = [_Leaf(each, repr(name)) for member in tensors for each, name in zip(member, captured.names, strict=True)]
    inputs = [each for each in (*leaves, *own) if each.tensor.requires_grad]
    losses = [loss for name in captured.losses for loss in grouped.losses[name]]
    wanted_losses = [each[number] for number in range(1, 1 + len(captured.losses)) for each in alone]
    try:
        found = _gradients([grouped.hidden, *losses], inputs)
        wanted = _gradients([hidden, *wanted_losses], inputs)
    except RuntimeError as error:
        # A forward pass raises nothing, so no loop would tell the user.
        return f"raise {type(error).__name__} in a backward pass on a few rows ({error})"
    for leaf, left, right in zip(inputs, found, wanted, strict=True):
        if (left is None) != (right is None) or (left is not None and right is not None and not agree(left, right)):
            return f"differ in the gradient of {leaf.name}, run as one"
    return None


def _gradients(outputs: Sequence[torch.Tensor], inputs: Sequence[_Leaf]) -> Sequence[torch.Tensor | None]:
    """The gradients of a weighted sum of all outputs, in which no two elements have equal weights.

    Neighbouring weights differ much: nearly equal ones give norms small gradients, in low precision nothing but noise.
    """
    outputs = [output for output in outputs if output.requires_grad]
    if not outputs or not inputs:
        return [None] * len(inputs)
    # Made on the host: not every device has float64.
    weights = [torch.from_numpy(0.5 + np.arange(1, 1 + output.numel()) * _GOLDEN % 1.0) for output in outputs]
    sent = [
        weight.view(output.shape).to(output.dtype).to(output.device)
        for weight, output in zip(weights, outputs, strict=True)
    ]
    return torch.autograd.grad(outputs, [each.tensor for each in inputs], sent, allow_unused=True)


def _autocast_of(device: str) -> contextlib.AbstractContextManager[Any]:
    if not torch.is_autocast_enabled(device):
        return contextlib.nullcontext()
    # Autocast's cache of casts would outlive the comparison.
    return torch.autocast(device, torch.get_autocast_dtype(device), cache_enabled=False)


class _Agreement:
    """Tells if two tensors agree as closely as the lowest precision of a computation allows.

    Args:
        tensors: The tensors that the computation takes and gives.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        device = tensors[0].device.type
        dtypes = {each.dtype for each in tensors if each.is_floating_point() or each.is_complex()}
        if torch.is_autocast_enabled(device):
            dtypes.add(torch.get_autocast_dtype(device))
        unknown = dtypes - _TOLERANCES.keys()
        if unknown:
            raise CannotGroupError(f"compute in {listed(sorted(map(str, unknown)))}, whose precision is not known")
        self._tolerance = max((_TOLERANCES[each] for each in dtypes), default=0.0)

    def __call__(self, mine: torch.Tensor, theirs: torch.Tensor) -> bool:
        # Compared on the host, which supports all operations that read values.
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
        return bool(((mine - theirs).where(finite, 0).abs() <= self._tolerance * largest).all())
