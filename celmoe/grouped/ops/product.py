"""Matrix products with parameters: linear layers, matmul and its kin, einsum, convolutions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional as F

from celmoe.directml import is_directml
from celmoe.grouped.kernels.members import linear_of_members
from celmoe.grouped.kernels.product import linear as segment_linear
from celmoe.grouped.values import (
    CannotGroupError,
    Common,
    Ragged,
    Repeated,
    Rows,
    Stack,
    common,
    like,
    require_axes,
    rows,
    stack,
)

from .table import Run, align, arguments, loop, loop_batch_first, lowered, operation, refuse_row_counts


def by_weights(run: Run, value: Rows, weight: Stack, bias: Stack | None) -> Rows:
    """Multiply each row's last axis by its member's weights: ``[..., K]`` to ``[..., N]`` by ``[N, K]`` a member."""
    if value.axis == value.dim() - 1:
        raise CannotGroupError("mixed samples (a product over the batch axis)")
    if not all(isinstance(each, Stack) for each in (weight, bias) if each is not None):
        raise CannotGroupError("multiplied by a weight, or added a bias, that is no parameter")
    if any(each is not None and each.is_reduced for each in (weight, bias)):
        raise CannotGroupError("mixed samples (what was reduced over the batch came back to rows in a product)")
    num_out, width = weight.shape
    shape = value.plain.movedim(value.axis, 0).shape[:-1]
    positions = value.factor * math.prod(shape[1:])
    if value.plain_shape[-1] != width:
        raise RuntimeError(f"mat1 and mat2 shapes cannot be multiplied ({tuple(value.plain_shape)}, {width}x{num_out})")
    if not positions or not width or not num_out:
        raise CannotGroupError("multiplied matrices without elements")
    own, own_bias = weight.members, () if bias is None else bias.members
    if torch.is_autocast_enabled(value.plain.device.type) or own is None or own_bias is None:
        plain, weight_PNK, bias_PN = lowered(value.plain, weight.plain, None if bias is None else bias.plain)
        _require_one_dtype(plain, weight_PNK, bias_PN)
        flat = plain.movedim(value.axis, 0).reshape(-1, width)
        out = segment_linear(flat, weight_PNK, bias_PN, run.segments, positions)
    else:
        _require_one_dtype(value.plain, own[0], *own_bias[:1])
        # The row axis moves to the front, and every position becomes a row: [R · positions, K].
        flat = value.plain.movedim(value.axis, 0).reshape(-1, width)
        out = linear_of_members(flat, own, own_bias, run.segments, positions)
    return rows(out.view(*shape, num_out).movedim(0, value.axis), value.axis, value.factor)


def _require_one_dtype(*tensors: torch.Tensor | None) -> None:
    found = {tensor.dtype for tensor in tensors if tensor is not None}
    if len(found) > 1:
        raise RuntimeError(f"expected m1 and m2 to have the same dtype, but got: {' and '.join(map(str, found))}")


@operation("linear", namespaces=(F,))
def linear(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Ragged:
    """Compute ``x Wᵀ + b``."""
    value, weight, bias = arguments(("input", "weight", "bias"), args, kwargs, (None,))
    if _are_common(weight, bias) and isinstance(value, Rows) and value.axis < value.dim() - 1:
        # The layer is everybody's.
        return rows(F.linear(value.plain, weight.plain, None if bias is None else bias.plain), value.axis, value.factor)
    if not isinstance(value, Rows) or not isinstance(weight, Stack) or weight.dim() != 2:
        product = matmul(run, func, name, (value, like(weight, weight.plain.mT)), {}) if weight.dim() == 2 else None
        if product is None:
            raise CannotGroupError("multiplied by a weight that is no matrix")
        return product if bias is None else _plus(run, product, bias)
    if bias is None or (isinstance(bias, Stack) and bias.dim() == 1):
        return by_weights(run, value, weight, bias)
    return _plus(run, by_weights(run, value, weight, None), bias)


def _are_common(weight: Ragged, bias: Ragged | None) -> bool:
    return isinstance(weight, Common) and (bias is None or isinstance(bias, Common))


def _plus(run: Run, value: Ragged, bias: Ragged, beta: float = 1) -> Ragged:
    if torch.is_autocast_enabled(value.device.type):
        # PyTorch's own operations would cast both.
        bias = like(bias, bias.plain.to(value.dtype))
    plain, wrap = align(run, "add", [bias, value])
    if beta == 0:
        # The bias is ignored, even if it holds NaN, and gets a gradient of zero.
        return wrap(plain[1] + plain[0].masked_fill(torch.ones_like(plain[0], dtype=torch.bool), 0))
    return wrap(plain[0] * beta + plain[1] if beta != 1 else plain[1] + plain[0])


@operation("matmul", "__matmul__", "mm", "bmm", "mv")
def matmul(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Compute ``a @ b``."""
    left, right = arguments(("input", "other"), args, kwargs)
    if not isinstance(left, Rows) and not isinstance(right, Rows):
        return _of_members(run, func, name, left, right)
    if left.dim() == 0 or right.dim() == 0:
        raise CannotGroupError("multiplied a matrix by a number")
    left, right = _not_repeated(left, right), _not_repeated(right, left)
    left, right = _without_ones(left, right.dim()), _without_ones(right, left.dim())
    if isinstance(left, Rows) and isinstance(right, Stack):
        if right.dim() == 1:
            if left.axis == left.dim() - 1:
                raise CannotGroupError("mixed samples (a product over the batch axis)")
            return _without_last(by_weights(run, left, stack(right.plain.unsqueeze(1), right.is_reduced), None))
        if right.dim() == 2 and left.axis < left.dim() - 1:
            return by_weights(run, left, stack(right.plain.mT, right.is_reduced), None)
    if isinstance(left, Stack) and isinstance(right, Rows) and left.dim() <= 2 <= right.dim():
        if right.axis == right.dim() - 2:
            raise CannotGroupError("mixed samples (a product over the batch axis)")
        # W x = (xᵀ Wᵀ)ᵀ
        turned = rows(right.plain.mT, min(right.axis, right.dim() - 2), right.factor)
        if left.dim() == 1:
            return _without_last(by_weights(run, turned, stack(left.plain.unsqueeze(1), left.is_reduced), None))
        return rows(by_weights(run, turned, left, None).plain.mT, right.axis, right.factor)
    if isinstance(left, Stack) or isinstance(right, Stack):
        return _by_member(run, name, left, right)
    return _batched(run, left, right)


def _not_repeated(value: Ragged, other: Ragged) -> Ragged:
    """Replace a member's matrix repeated for its rows by the matrix itself: a product with rows' matrices is equal."""
    if isinstance(value, Repeated) and isinstance(other, Rows) and not isinstance(other, Repeated):
        fits = value.dim() == 3 and (other.dim(), other.axis, other.factor) == (3, 0, value.factor)
        return value if value.source is None or not fits else value.source
    return value


def _without_ones(value: Ragged, num_axes: int) -> Ragged:
    """Drop a stack's leading axes of length one, down to a matrix, while the other operand has as many axes."""
    while isinstance(value, Stack) and 2 < value.dim() <= num_axes and value.shape[0] == 1:
        value = stack(value.plain.squeeze(1), value.is_reduced)
    return value


def _by_member(run: Run, name: str, left: Ragged, right: Ragged) -> Rows:
    """Multiply rows by each member's matrices, one member after another, as for attention heads."""
    value, other = (left, right) if isinstance(left, Rows) else (right, left)
    if isinstance(other, Stack) and other.is_reduced:
        raise CannotGroupError("mixed samples (what was reduced over the batch came back to rows in a product)")
    assert isinstance(value, Rows)
    # Axes are counted from the back, because broadcasting aligns the operands there.
    axis = value.axis - value.dim()
    summed, kept = (-1, -2) if value is left else (-2, -1)
    if axis == summed or value.dim() == 1:
        raise CannotGroupError("mixed samples (a product over the batch axis)")
    if axis != kept and other.dim() >= -axis and other.shape[axis] != 1:
        raise CannotGroupError("joined a tensor of fixed length to the batch axis (matmul)")
    if other.dim() == 1 and (value is left or axis != kept):
        axis += 1
    product = loop(run, torch.matmul, name, (left, right), {}, axis).plain
    return rows(product, product.dim() + axis, value.factor)


def _without_last(value: Rows) -> Rows:
    return rows(value.plain.squeeze(-1), value.axis, value.factor)


def _of_members(run: Run, func: Any, name: str, left: Ragged, right: Ragged) -> Any:
    if isinstance(left, Common) and isinstance(right, Common):
        return common(left.plain @ right.plain)
    is_reduced = any(isinstance(each, Stack) and each.is_reduced for each in (left, right))
    if left.dim() != 2 or right.dim() != 2:
        # Autocast treats `mv` and `matmul` differently.
        return loop(run, func if name == "mv" else torch.matmul, name, (left, right), {}, None)
    return stack(left.plain @ right.plain, is_reduced)


def _batched(run: Run, left: Ragged, right: Ragged) -> Ragged:
    """Multiply matrices row by row: the row axis stands in front of the last two axes of both operands."""
    num_axes = max(left.dim(), right.dim())
    found = set()
    for value in (left, right):
        if isinstance(value, Rows):
            found.add((value.axis - value.dim(), value.factor))
            is_left = value is left
            # The row axis can't be the summed axis, nor the right operand's last axis.
            if value.axis >= value.dim() - 2 and not (
                is_left and value.dim() >= 2 and value.axis == value.dim() - 2 and isinstance(right, Common)
            ):
                raise CannotGroupError("mixed samples (a product over the batch axis)")
    if len(found) != 1:
        raise CannotGroupError("put samples side by side with others (matmul)")
    from_back, factor = next(iter(found))
    for value in (left, right):
        if isinstance(value, Common) and value.dim() >= -from_back and -from_back > 2 and value.shape[from_back] != 1:
            raise CannotGroupError("joined a tensor of fixed length to the batch axis (matmul)")
    out = left.plain @ right.plain
    if right.dim() == 1:
        num_axes, from_back = num_axes - 1, from_back + 1
    return rows(out, num_axes + from_back, factor)


_FACTORS = {
    "addmm": ("mat1", "mat2"),
    "addmv": ("mat", "vec"),
    "baddbmm": ("batch1", "batch2"),
    "addbmm": ("batch1", "batch2"),
}


@operation(*_FACTORS)
def addmm(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Ragged:
    """Compute ``beta b + alpha x W``; ``addbmm`` sums the product over the first axis."""
    names = ("input", *_FACTORS[name], "beta", "alpha")
    bias, left, right, beta, alpha = arguments(names, args, kwargs, (1, 1))
    refuse_row_counts(name, [beta, alpha])
    product = matmul(run, func, name, (left, right), {})
    if name == "addbmm":
        if isinstance(product, Rows) and product.axis == 0:
            raise CannotGroupError(f"mixed samples ({name} sums over the batch axis)")
        product = like(product, product.plain.sum(int(isinstance(product, Stack))), getattr(product, "axis", 0) - 1)
    return _plus(run, product if alpha == 1 else like(product, product.plain * alpha), bias, beta)


@operation("einsum", namespaces=(torch,))
def einsum(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Ragged:
    """Run rows and a parameter as one product if some letters are summed and others are new, else by member."""
    equation, *values = args
    if len(values) == 1 and isinstance(values[0], tuple | list):
        values = list(values[0])
    if not isinstance(equation, str) or kwargs or "->" not in equation:
        raise CannotGroupError("called einsum without letters for its result")
    inputs, output = equation.replace(" ", "").split("->")
    letters = inputs.split(",")
    if "..." in equation:
        letters, output = _spelled(letters, output, values)
        equation = f"{','.join(letters)}->{output}"
    pairs = list(zip(letters, values, strict=True))
    if any(len(each) != value.dim() or len(set(each)) != len(each) for each, value in pairs):
        raise CannotGroupError("called einsum with a letter twice in one operand")
    of_rows = {(each[value.axis], value.factor) for each, value in pairs if isinstance(value, Rows)}
    if not of_rows:
        return _einsum_of_members(equation, pairs, output)
    if len(of_rows) > 1:
        raise CannotGroupError("put samples side by side with others (einsum)")
    letter, factor = of_rows.pop()
    if letter not in output or any(letter in each for each, value in pairs if not isinstance(value, Rows)):
        raise CannotGroupError("mixed samples (einsum over the batch axis)")
    axis = output.index(letter)
    if not any(isinstance(value, Stack) for value in values):
        return rows(torch.einsum(equation, *(value.plain for value in values)), axis, factor)
    if any(isinstance(value, Stack) and value.is_reduced for value in values):
        raise CannotGroupError("mixed samples (what was reduced over the batch came back to rows in einsum)")
    product = _einsum_as_product(run, pairs, output, letter) if len(values) == 2 else None
    if product is None:
        product = loop(run, torch.einsum, name, [equation, *values], {}, axis).plain
    return rows(product, axis, factor)


def _spelled(letters: list[str], output: str, values: list[Any]) -> tuple[list[str], str]:
    """Replace the dots by letters; shorter dots get the last letters of the longest."""
    free = [letter for letter in "ABCDEFGHIJ" if letter not in "".join(letters)]
    lengths = [value.dim() - len(each.replace("...", "")) for each, value in zip(letters, values, strict=True)]
    most = max(length for each, length in zip(letters, lengths, strict=True) if "..." in each)
    dots = "".join(free[:most])
    spelled = [
        each.replace("...", dots[most - length :]) if "..." in each else each
        for each, length in zip(letters, lengths, strict=True)
    ]
    return spelled, output.replace("...", dots)


def _einsum_of_members(equation: str, pairs: list[tuple[str, Any]], output: str) -> Ragged:
    if all(isinstance(value, Common) for _, value in pairs):
        # The result of one operand may be a view.
        is_given = any(value.is_given for _, value in pairs)
        return common(torch.einsum(equation, *(value.plain for _, value in pairs)), is_given)
    member = next(letter for letter in "ABCDEFGHIJ" if letter not in equation)
    require_axes(pairs[0][1].device, len({*equation} - {*",->"}) + 1)
    names = [member + each if isinstance(value, Stack) else each for each, value in pairs]
    is_reduced = any(isinstance(value, Stack) and value.is_reduced for _, value in pairs)
    joined = f"{','.join(names)}->{member}{output}"
    return stack(torch.einsum(joined, *(value.plain for _, value in pairs)), is_reduced)


def _einsum_as_product(run: Run, pairs: list[tuple[str, Any]], output: str, letter: str) -> torch.Tensor | None:
    """Compute ``...k, ok -> ...o`` in any order and for sets of letters; ``None`` for any other equation."""
    (w, weight), (x, value) = sorted(pairs, key=lambda pair: not isinstance(pair[1], Stack))
    summed = [each for each in w if each in x and each not in output]
    new = [each for each in w if each not in x]
    rest = [each for each in x if each not in summed]
    if not (summed and new and set(rest + new) == set(output) and len(summed) + len(new) == len(w)):
        return None
    turned = value.plain.permute([x.index(each) for each in [*rest, *summed]])
    flat = rows(turned.flatten(len(rest)), rest.index(letter), value.factor)
    matrix = weight.plain.permute(0, *(1 + w.index(each) for each in [*new, *summed]))
    sizes = matrix.shape[1 : 1 + len(new)]
    out = by_weights(run, flat, stack(matrix.reshape(matrix.shape[0], math.prod(sizes), -1)), None).plain
    opened = out.view(*out.shape[:-1], *sizes)
    found = [*rest, *new]
    return opened.permute([found.index(each) for each in output])


@operation("bilinear", namespaces=(F,))
def bilinear(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Ragged:
    """Run one member after another."""
    return loop_batch_first(run, func, name, args, kwargs)


@operation("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", namespaces=(F,))
def convolution(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Ragged:
    """Run a 1-d convolution without groups or dilation as a product with the patches, any other by member."""
    value = args[0] if args else kwargs["input"]
    if name == "conv1d" and isinstance(value, Rows) and value.axis == 0 and value.dim() == 3:
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        value, weight, bias, stride, padding, dilation, groups = arguments(names, args, kwargs, (None, 1, 0, 1, 1))
        step, width, spacing = (_one(each) for each in (stride, padding, dilation))
        if isinstance(weight, Stack) and groups == 1 and spacing == 1 and None not in (step, width):
            size = weight.plain.shape[-1]
            padded = F.pad(value.plain, (width, width))
            if 0 < size <= padded.shape[-1]:
                # [R, C, L, size] -> [R, L, C · size]
                patches = _patches(padded, size, step).transpose(1, 2).flatten(2)
                kernel = stack(weight.plain.flatten(2), weight.is_reduced)
                out = by_weights(run, rows(patches, 0, value.factor), kernel, bias)
                return rows(out.plain.transpose(1, 2), 0, value.factor)
    if value.dim() != int(name[-2]) + 2:
        raise CannotGroupError(f"called {name} without a batch axis")
    return loop_batch_first(run, func, name, args, kwargs)


def _patches(padded_RCL: torch.Tensor, size: int, step: int) -> torch.Tensor:
    """The patches ``[R, C, L', size]`` that a kernel of ``size`` entries sees."""
    if not is_directml(padded_RCL.device):
        return padded_RCL.unfold(2, size, step)
    # The gradient of `unfold` goes through the CPU on DirectML.
    span = (padded_RCL.shape[2] - size) // step * step + 1
    return torch.stack([padded_RCL[:, :, start : start + span : step] for start in range(size)], 3)


def _one(value: Any) -> Any:
    if isinstance(value, tuple | list) and len(value) == 1:
        return value[0]
    return value if isinstance(value, int) else None
