"""Sums of products by segment, which linear layers, their gradients and all gradients by member come down to.

Four operations are each other's derivatives, so that any of them can be differentiated again and again:

    multiply(x, w)[r] = w[m(r)] x[r]          spread(s)[r] = s[m(r)]
    outer(y, x)[p]    = sum_r y[r] xᵀ[r]      segment_sum(x)[p] = sum_r x[r]       (r over the rows of member p)

Axes: R rows (with positions folded in), P members, K and N widths; m(r) is row r's member.

`backend_for` chooses the backend. On a CPU a call costs less than moving rows, so members of equally many rows
share a batched product. On other devices calls are costly, so one call, or a few, serve all members.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import torch
from torch.autograd import Function

from celmoe.grouped.segments import DeviceSegments, Segments
from celmoe.torch_internals import is_batch_of_gradients, transforms_are_active

from . import even
from .even import EVEN, gradients


class Backend(Protocol):
    """A way to compute the sums, without autograd. Rows come with ``factor`` positions each."""

    def multiply(
        self, x_RK: torch.Tensor, w_PNK: torch.Tensor, bias_PN: torch.Tensor | None, segments: Segments, factor: int
    ) -> torch.Tensor:
        """Multiply ``[R, K]`` by ``[P, N, K]`` to ``[R, N]``, with a bias by member."""

    def outer(self, y_RN: torch.Tensor, x_RK: torch.Tensor, segments: Segments, factor: int) -> torch.Tensor:
        """Multiply and sum ``[R, N]`` and ``[R, K]`` to ``[P, N, K]``."""

    def segment_sum(self, x_RK: torch.Tensor, segments: Segments, factor: int) -> torch.Tensor:
        """Sum ``[R, K]`` to ``[P, K]``."""


class _ByRuns:
    """A batched product for every run of members with equally many rows: no row is moved, none is padded."""

    def multiply(
        self, x_RK: torch.Tensor, w_PNK: torch.Tensor, bias_PN: torch.Tensor | None, segments: Segments, factor: int
    ) -> torch.Tensor:
        width = w_PNK.shape[1]
        out_RN = x_RK.new_empty(x_RK.shape[0], width)
        w_PKN = w_PNK.transpose(1, 2)
        for row, member, count, members in segments.runs:
            if not count:
                continue
            first, length = row * factor, count * factor
            if members == 1:
                x, out = x_RK[first : first + length], out_RN[first : first + length]
                if bias_PN is None:
                    torch.mm(x, w_PKN[member], out=out)
                else:
                    torch.addmm(bias_PN[member], x, w_PKN[member], out=out)
                continue
            x = x_RK[first : first + length * members].view(members, length, -1)
            out = out_RN[first : first + length * members].view(members, length, width)
            w = w_PKN[member : member + members]
            if bias_PN is None:
                torch.bmm(x, w, out=out)
            else:
                torch.baddbmm(bias_PN[member : member + members].unsqueeze(1), x, w, out=out)
        return out_RN

    def outer(self, y_RN: torch.Tensor, x_RK: torch.Tensor, segments: Segments, factor: int) -> torch.Tensor:
        n, k = y_RN.shape[1], x_RK.shape[1]
        out_PNK = x_RK.new_empty(segments.num_members, n, k)
        for row, member, count, members in segments.runs:
            if not count:
                out_PNK[member : member + members].zero_()
                continue
            first, length = row * factor, count * factor
            last = first + length * members
            if members == 1:
                torch.mm(y_RN[first:last].t(), x_RK[first:last], out=out_PNK[member])
                continue
            y = y_RN[first:last].view(members, length, n)
            torch.bmm(
                y.transpose(1, 2),
                x_RK[first:last].view(members, length, k),
                out=out_PNK[member : member + members],
            )
        return out_PNK

    def segment_sum(self, x_RK: torch.Tensor, segments: Segments, factor: int) -> torch.Tensor:
        if (quick := added(x_RK, segments, factor)) is not None:
            return quick
        width = x_RK.shape[1]
        out_PK = x_RK.new_empty(segments.num_members, width)
        for row, member, count, members in segments.runs:
            first, length = row * factor, count * factor
            x = x_RK[first : first + length * members].view(members, length, width)
            torch.sum(x, 1, out=out_PK[member : member + members])
        return out_PK


# So many rows are added one by one. Longer sums add up such sums: roundings grow with the number of additions in a row.
_FEW = 128
# From this many calls on, one that adds rows one by one costs less.
_MANY_RUNS = 8


def added(x_RK: torch.Tensor, segments: Segments, factor: int) -> torch.Tensor | None:
    """Sum over each member's rows on a CPU in one call, to ``[P, K]``; ``None`` where several calls are better."""
    if x_RK.device.type != "cpu" or not (segments.is_stacked or len(segments.runs) >= _MANY_RUNS):
        return None
    precise = torch.promote_types(x_RK.dtype, torch.float32)
    num_members, width = segments.num_members, x_RK.shape[1]
    out_PK, rows = x_RK.new_zeros(num_members, width, dtype=precise), x_RK.to(precise)
    if max(segments.counts) * factor <= _FEW:
        return out_PK.index_add_(0, segments.member_of_row(factor), rows).to(x_RK.dtype)
    block_of_row, member_of_block = segments.blocks(factor, _FEW)
    sums = x_RK.new_zeros(len(member_of_block), width, dtype=precise).index_add_(0, block_of_row, rows)
    return out_PK.index_add_(0, member_of_block, sums).to(x_RK.dtype)


class _Padded:
    """A few calls for any number of members: members with about equally many rows get equally many places.

    Places without a row hold zeros, and their results are dropped.
    """

    def multiply(
        self, x_RK: torch.Tensor, w_PNK: torch.Tensor, bias_PN: torch.Tensor | None, segments: Segments, factor: int
    ) -> torch.Tensor:
        w_PKN = w_PNK.transpose(1, 2)
        parts = []
        for x_MLK, members in self._bucketed(x_RK, segments, factor):
            w = w_PKN[members]
            out = torch.bmm(x_MLK, w) if bias_PN is None else torch.baddbmm(bias_PN[members].unsqueeze(1), x_MLK, w)
            parts.append(out.flatten(0, 1))
        return _joined(parts).index_select(0, segments.padded(factor)[1])

    def outer(self, y_RN: torch.Tensor, x_RK: torch.Tensor, segments: Segments, factor: int) -> torch.Tensor:
        y, x = self._bucketed(y_RN, segments, factor), self._bucketed(x_RK, segments, factor)
        return _joined([torch.bmm(left.transpose(1, 2), right) for (left, _), (right, _) in zip(y, x, strict=True)])

    def segment_sum(self, x_RK: torch.Tensor, segments: Segments, factor: int) -> torch.Tensor:
        return _joined([x_MLK.sum(1) for x_MLK, _ in self._bucketed(x_RK, segments, factor)])

    @staticmethod
    def _bucketed(x_RK: torch.Tensor, segments: Segments, factor: int) -> list[tuple[torch.Tensor, slice]]:
        """``[members, places, K]`` for each bucket, and the slice of its members."""
        index, _ = segments.padded(factor)
        placed = torch.cat([x_RK, x_RK.new_zeros(1, x_RK.shape[1])]).index_select(0, index)
        found = []
        for place, member, most, members in segments.buckets:
            part = placed[place * factor : (place + most * members) * factor]
            found.append((part.view(members, most * factor, x_RK.shape[1]), slice(member, member + members)))
        return found


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class _GroupedMM:
    """PyTorch's own grouped product, one call for all members.

    `grouped_mm` takes no bias, and only strides that are multiples of 16 bytes.
    """

    def multiply(
        self, x_RK: torch.Tensor, w_PNK: torch.Tensor, bias_PN: torch.Tensor | None, segments: Segments, factor: int
    ) -> torch.Tensor:
        ends = segments.ends(factor)
        out_RN = torch.nn.functional.grouped_mm(x_RK.contiguous(), w_PNK.transpose(1, 2), offs=ends)
        if bias_PN is not None:
            out_RN = out_RN + bias_PN.index_select(0, segments.member_of_row(factor))
        return out_RN

    def outer(self, y_RN: torch.Tensor, x_RK: torch.Tensor, segments: Segments, factor: int) -> torch.Tensor:
        ends = segments.ends(factor)
        return torch.nn.functional.grouped_mm(y_RN.contiguous().t(), x_RK.contiguous(), offs=ends)

    def segment_sum(self, x_RK: torch.Tensor, segments: Segments, factor: int) -> torch.Tensor:
        if x_RK.device.type == "cpu":
            return BACKENDS["runs"].segment_sum(x_RK, segments, factor)
        # The sum is a product with ones: eight columns are 16 bytes in every dtype of this backend.
        ones = x_RK.new_ones(x_RK.shape[0], 8)
        return self.outer(x_RK, ones, segments, factor)[:, :, 0]


class _Operators:
    """One operator for each call of a compiled graph, which chooses one of the others when it runs: see `operators`."""

    def multiply(
        self, x_RK: torch.Tensor, w_PNK: torch.Tensor, bias_PN: torch.Tensor | None, segments: Segments, factor: int
    ) -> torch.Tensor:
        found: torch.Tensor = torch.ops.celmoe.multiply(x_RK, w_PNK, bias_PN, segments.ends(factor))
        return found

    def outer(self, y_RN: torch.Tensor, x_RK: torch.Tensor, segments: Segments, factor: int) -> torch.Tensor:
        found: torch.Tensor = torch.ops.celmoe.outer(y_RN, x_RK, segments.ends(factor))
        return found

    def segment_sum(self, x_RK: torch.Tensor, segments: Segments, factor: int) -> torch.Tensor:
        found: torch.Tensor = torch.ops.celmoe.segment_sum(x_RK, segments.ends(factor))
        return found


BACKENDS: dict[str, Backend] = {
    "runs": _ByRuns(),
    "padded": _Padded(),
    "even": EVEN,
    "grouped_mm": _GroupedMM(),
    "operators": _Operators(),
}


def backend_for(device: str, dtype: torch.dtype, widths: tuple[int, ...], padding: float | None = None) -> str:
    """The name of the backend that fits, by a rule and not by measurement, so that a run repeats itself.

    Args:
        device: The device's type.
        dtype: The dtype of rows and weights.
        widths: The lengths of all operands' axes but those of rows and members.
        padding: For a stack, whose weights lie in one tensor already: the nanoseconds that padding costs more, for each
            member, than a call for each.
    """
    if device == "cpu" and padding is None:
        return "runs"
    if device == "cpu" and padding is not None and padding < 0:
        return "even"
    if takes_grouped_mm(device, dtype, widths):
        return "grouped_mm"
    return "runs" if device == "cpu" else "padded"


def takes_grouped_mm(device: str, dtype: torch.dtype, widths: tuple[int, ...]) -> bool:
    """True if PyTorch's grouped product takes operands of this kind; see `backend_for`."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16) if device == "cpu" else (torch.bfloat16, torch.float16)
    return (
        device in ("cpu", "cuda")
        and dtype in dtypes
        and hasattr(torch.nn.functional, "grouped_mm")
        and all(width * dtype.itemsize % 16 == 0 for width in widths)
    )


# Nanoseconds on a CPU core: of one member's part of a call for all, of a multiplication and addition, and of a number
# that is moved. Fitted on an AMD EPYC; a factor of two changes few choices.
_OF_A_MEMBER, _OF_A_PRODUCT, _OF_A_MOVE = 4000.0, 0.04, 0.8


def _padding(segments: Segments, operands: Sequence[torch.Tensor], widths: tuple[int, ...]) -> float | None:
    if not segments.is_stacked:
        return None
    num_rows, members = operands[0].shape[0], segments.num_members
    places = members * max(segments.counts) * (num_rows // segments.num_rows)
    wide, narrow = max(widths), min(widths)
    extra = (places - num_rows) * wide * narrow * _OF_A_PRODUCT + (places + num_rows) * (wide + narrow) * _OF_A_MOVE
    return extra - members * _OF_A_MEMBER


def backend_of(segments: Segments, *operands: torch.Tensor) -> str:
    """The name of the backend for these operands, rows first."""
    # Transposed weights are laid out in memory by their other axis, so both axes count.
    widths = tuple(width for operand in operands for width in operand.shape[1:])
    if isinstance(segments, DeviceSegments):
        # PyTorch's own operator where its rule for shapes knows what its kernel takes.
        is_fit = segments.device.type == "cuda" and takes_grouped_mm("cuda", operands[0].dtype, widths)
        return "grouped_mm" if is_fit else "operators"
    # Members of equally many rows are one run: one batched product, whose rows are not moved.
    padding = None if segments.is_even else _padding(segments, operands, widths)
    return backend_for(segments.device.type, operands[0].dtype, widths, padding)


def _backend(segments: Segments, *operands: torch.Tensor) -> Backend:
    return BACKENDS[backend_of(segments, *operands)]


def repeated(
    w_PNK: torch.Tensor, bias_PN: torch.Tensor | None, segments: Segments
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A product by the same weights again and again, without autograd: ``[R, K]`` into ``[R, N]``, which it returns.

    Args:
        w_PNK: ``[P, N, K]``.
        bias_PN: ``[P, N]`` or ``None``.
        segments: The rows of each member.
    """
    name = backend_of(segments, w_PNK.new_empty(segments.num_rows, w_PNK.shape[2]), w_PNK)
    if name == "even":
        return even.repeated(w_PNK, bias_PN, segments)
    multiply = BACKENDS[name].multiply
    return lambda x_RK, out_RN: out_RN.copy_(multiply(x_RK, w_PNK, bias_PN, segments, 1))


class _Linear(Function):
    """``multiply`` by the weights, or by the transposed weights if ``is_transposed``."""

    @staticmethod
    def forward(
        ctx: Any,
        x_RK: torch.Tensor,
        w_PNK: torch.Tensor,
        bias_PN: torch.Tensor | None,
        segments: Segments,
        factor: int,
        is_transposed: bool,
    ) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x_RK, w_PNK)
        ctx.segments, ctx.factor, ctx.is_transposed = segments, factor, is_transposed
        weights = w_PNK.transpose(1, 2) if is_transposed else w_PNK
        backend = ctx.backend = _backend(segments, x_RK, weights)
        return backend.multiply(x_RK.contiguous(), weights, bias_PN, segments, factor)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if grads[0] is None:
            return (None,) * len(ctx.needs_input_grad)
        x_RK, w_PNK = ctx.saved_tensors
        grad_RN = grads[0].contiguous()
        segments, factor, is_transposed = ctx.segments, ctx.factor, ctx.is_transposed
        if ctx.backend is EVEN and not torch.is_grad_enabled() and not is_batched(grad_RN):
            weights = w_PNK.transpose(1, 2) if is_transposed else w_PNK
            grad_x, grad_w, grad_bias = gradients(grad_RN, x_RK, weights, segments, factor, ctx.needs_input_grad)
            grad_w = grad_w.transpose(1, 2) if is_transposed and grad_w is not None else grad_w
            return grad_x, grad_w, grad_bias, None, None, None
        grad_x = grad_w = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = linear(grad_RN, w_PNK.conj(), None, segments, factor, is_transposed=not is_transposed)
        if ctx.needs_input_grad[1]:
            left, right = (x_RK.conj(), grad_RN) if is_transposed else (grad_RN, x_RK.conj())
            grad_w = outer(left, right, segments, factor)
        if ctx.needs_input_grad[2]:
            grad_bias = segment_sum(grad_RN, segments, factor)
        return grad_x, grad_w, grad_bias, None, None, None


class _Outer(Function):
    @staticmethod
    def forward(ctx: Any, y_RN: torch.Tensor, x_RK: torch.Tensor, segments: Segments, factor: int) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(y_RN, x_RK)
        ctx.segments, ctx.factor = segments, factor
        y_RN, x_RK = y_RN.contiguous(), x_RK.contiguous()
        return _backend(segments, y_RN, x_RK).outer(y_RN, x_RK, segments, factor)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if grads[0] is None:
            return (None,) * len(ctx.needs_input_grad)
        y_RN, x_RK = ctx.saved_tensors
        grad_PNK = grads[0].contiguous()
        grad_y = grad_x = None
        if ctx.needs_input_grad[0]:
            grad_y = linear(x_RK.conj(), grad_PNK, None, ctx.segments, ctx.factor)
        if ctx.needs_input_grad[1]:
            grad_x = linear(y_RN.conj(), grad_PNK, None, ctx.segments, ctx.factor, is_transposed=True)
        return grad_y, grad_x, None, None


class _SegmentSum(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, segments: Segments, factor: int) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.segments, ctx.factor = segments, factor
        x_RK = x.reshape(x.shape[0], x.shape[1:].numel()).contiguous()
        summed = _backend(segments, x_RK).segment_sum(x_RK, segments, factor)
        return summed.view(segments.num_members, *x.shape[1:])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if grads[0] is None:
            return (None,) * len(ctx.needs_input_grad)
        return spread(grads[0], ctx.segments, ctx.factor), None, None


class _Spread(Function):
    @staticmethod
    def forward(ctx: Any, stack: torch.Tensor, segments: Segments, factor: int) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.segments, ctx.factor = segments, factor
        return stack.index_select(0, segments.member_of_row(factor))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if grads[0] is None:
            return (None,) * len(ctx.needs_input_grad)
        return segment_sum(grads[0], ctx.segments, ctx.factor), None, None


def is_batched(*tensors: torch.Tensor) -> bool:
    """Tells if gradients are batches of gradients, as for ``is_grads_batched``: then only plain operators run.

    A forward pass under such a transform is never grouped.
    """
    return transforms_are_active() or any(map(is_batch_of_gradients, tensors))


def linear(
    x_RK: torch.Tensor,
    w_PNK: torch.Tensor,
    bias_PN: torch.Tensor | None,
    segments: Segments,
    factor: int,
    *,
    is_transposed: bool = False,
) -> torch.Tensor:
    """Run each row through its member's weights, to ``[R, N]``; differentiable any number of times.

    Args:
        x_RK: ``[R, K]``, ``factor`` positions for each of the segments' rows.
        w_PNK: ``[P, N, K]``.
        bias_PN: ``[P, N]`` or ``None``.
        segments: The rows of each member.
        factor: Positions folded into each row.
        is_transposed: If true, the weights are ``[P, K, N]``.
    """
    if is_batched(x_RK, w_PNK):
        w_PKN = w_PNK if is_transposed else w_PNK.mT
        out_RN = torch.cat([x @ w for x, w in zip(_cut(x_RK, segments, factor), w_PKN.unbind(0), strict=True)])
        return out_RN if bias_PN is None else out_RN + spread(bias_PN, segments, factor)
    return cast(torch.Tensor, _Linear.apply(x_RK, w_PNK, bias_PN, segments, factor, is_transposed))


def outer(y_RN: torch.Tensor, x_RK: torch.Tensor, segments: Segments, factor: int) -> torch.Tensor:
    """Sum ``y xᵀ`` over each member's rows, to ``[P, N, K]``."""
    if is_batched(y_RN, x_RK):
        pairs = zip(_cut(y_RN, segments, factor), _cut(x_RK, segments, factor), strict=True)
        return torch.stack([y.mT @ x for y, x in pairs])
    return cast(torch.Tensor, _Outer.apply(y_RN, x_RK, segments, factor))


def segment_sum(x: torch.Tensor, segments: Segments, factor: int) -> torch.Tensor:
    """Sum over each member's rows, ``[R, ...]`` to ``[P, ...]``."""
    if is_batched(x):
        return torch.stack([each.sum(0) for each in _cut(x, segments, factor)])
    return cast(torch.Tensor, _SegmentSum.apply(x, segments, factor))


def spread(stack: torch.Tensor, segments: Segments, factor: int) -> torch.Tensor:
    """Give each row its member's entry, ``[P, ...]`` to ``[R, ...]``."""
    if is_batched(stack):
        return stack.index_select(0, segments.member_of_row(factor))
    return cast(torch.Tensor, _Spread.apply(stack, segments, factor))


def _cut(x: torch.Tensor, segments: Segments, factor: int) -> Sequence[torch.Tensor]:
    """The rows of each member."""
    return cast(Sequence[torch.Tensor], x.split([count * factor for count in segments.counts]))
