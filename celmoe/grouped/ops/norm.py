"""Normalization within each row, and pooling over its positions."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.nn import functional as F

from celmoe.directml import is_directml
from celmoe.grouped.kernels.affine import affine_of_members
from celmoe.grouped.kernels.product import backend_of
from celmoe.grouped.values import CannotGroupError, Ragged, Rows, Stack, like, stack

from .table import Run, align, arguments, lowered, operation


def _scaled(run: Run, name: str, value: Ragged, weight: Ragged | None, bias: Ragged | None) -> Ragged:
    if weight is None and bias is None:
        return value
    if (quick := _by_runs(run, value, weight, bias)) is not None:
        return quick
    if weight is None or bias is None:
        plain, wrap = align(run, name, [value, weight if bias is None else bias])
        return wrap(plain[0] * plain[1] if bias is None else plain[0] + plain[1])
    plain, wrap = align(run, name, [bias, value, weight])
    return wrap(torch.addcmul(*plain))


def _by_runs(run: Run, value: Ragged, weight: Ragged | None, bias: Ragged | None) -> Ragged | None:
    """Scale by the members' own vectors if rows come first and calls cost less than moving rows; else ``None``."""
    vectors = [each for each in (weight, bias) if each is not None]
    if not isinstance(value, Rows) or value.axis != 0 or not value.plain.numel():
        return None
    if not all(isinstance(each, Stack) and each.members is not None and each.dim() == 1 for each in vectors):
        return None
    flat = value.plain.reshape(-1, value.plain_shape[-1])
    scales, shifts = (() if each is None else cast(Stack, each).members or () for each in (weight, bias))
    if any(each[0].dtype != flat.dtype for each in (scales, shifts) if each):
        return None
    if backend_of(run.segments, flat) != "runs":
        return None
    scaled = affine_of_members(flat, scales, shifts, run.segments, len(flat) // run.segments.num_rows)
    return like(value, scaled.view(value.plain_shape))


@operation("rms_norm", namespaces=(torch,))
@operation("layer_norm", "rms_norm", namespaces=(F,))
def layer_norm(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Ragged:
    """Normalize over the last axes, then scale and shift each row by its member's vectors."""
    if name == "layer_norm":
        names: tuple[str, ...] = ("input", "normalized_shape", "weight", "bias", "eps")
        value, shape, weight, bias, eps = arguments(names, args, kwargs, (None, None, 1e-5))
    else:
        names, bias = ("input", "normalized_shape", "weight", "eps"), None
        value, shape, weight, eps = arguments(names, args, kwargs, (None, None))
    if isinstance(value, Rows) and value.axis >= value.dim() - len(shape):
        raise CannotGroupError(f"mixed samples ({name} over the batch axis)")
    # Some DirectML kernels have read non-contiguous memory as contiguous.
    inner = value.plain.contiguous() if is_directml(run.segments.device) else value.plain
    dtype = inner.dtype
    if dtype.itemsize < 4:
        # PyTorch's own kernels round once, after the weights.
        inner = inner.float()
        weight, bias = _in_dtype(torch.float32, weight, bias)
        if inner.is_cuda and torch.is_autocast_enabled("cuda"):
            dtype = torch.float32
    normed = F.layer_norm(inner, shape, eps=eps) if name == "layer_norm" else F.rms_norm(inner, shape, eps=eps)
    scaled = _scaled(run, name, like(value, normed), *_in_dtype(normed.dtype, weight, bias))
    return scaled if scaled.dtype == dtype else like(scaled, scaled.plain.to(dtype))


def _in_dtype(dtype: torch.dtype, *vectors: Ragged | None) -> list[Any]:
    """Cast vectors to the rows' dtype, which PyTorch's own mixed-precision kernels return."""
    return [each if each is None or each.dtype == dtype else like(each, each.plain.to(dtype)) for each in vectors]


@operation("group_norm", namespaces=(F,))
def group_norm(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Ragged:
    """Normalize groups of channels of each row, then scale and shift by the members' vectors."""
    names = ("input", "num_groups", "weight", "bias", "eps")
    value, groups, weight, bias, eps = arguments(names, args, kwargs, (None, None, 1e-5))
    if not isinstance(value, Rows) or value.axis != 0:
        raise CannotGroupError(f"called {name} with another axis than the batch first")
    if value.plain.shape[1:].numel() == groups:
        # PyTorch refuses to normalize single values if the batch has one row; this call raises PyTorch's error.
        F.group_norm(value.plain[: min(run.segments.counts) * value.factor], groups)
    dtype = torch.float32 if value.plain.is_cuda and torch.is_autocast_enabled("cuda") else value.dtype
    wide = _wide(value)
    normed = like(value, F.group_norm(wide.plain, groups, eps=eps))
    return _by_channels(run, name, normed, weight, bias, dtype)


def _wide(value: Ragged) -> Ragged:
    """Cast rows of lower precision to float32: PyTorch's own kernels round once, after the weights."""
    return like(value, value.plain.float()) if value.dtype.itemsize < 4 else value


def _by_channels(run: Run, name: str, normed: Ragged, weight: Any, bias: Any, dtype: torch.dtype) -> Ragged:
    """Scale and shift by channel, then cast to ``dtype``."""
    after = normed.dim() - 2
    weight, bias = _in_dtype(normed.dtype, weight, bias)
    scaled = _scaled(run, name, normed, _by_channel(weight, after), _by_channel(bias, after))
    return scaled if scaled.dtype == dtype else like(scaled, scaled.plain.to(dtype))


def _by_channel(value: Any, after: int) -> Any:
    if value is None:
        return None
    if not isinstance(value, Stack):
        raise CannotGroupError("normalized with weights that are no parameters")
    return stack(value.plain.view(*value.plain.shape, *(1,) * after), value.is_reduced)


@operation("batch_norm", namespaces=(F,))
def batch_norm(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Ragged:
    """Normalize by each member's running statistics; refuse training, which mixes samples."""
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    value, mean, variance, weight, bias, training, _, eps = arguments(
        names, args, kwargs, (None, None, False, 0.1, 1e-5)
    )
    if training or mean is None:
        raise CannotGroupError("mixed samples (batch_norm over the batch axis)")
    if not isinstance(value, Rows) or value.axis != 0 or value.dim() < 2:
        raise CannotGroupError(f"called {name} with another axis than the batch first")
    after = value.dim() - 2
    wide = _wide(value)
    mean, variance = _in_dtype(wide.dtype, mean, variance)
    scale = like(variance, (variance.plain + eps).rsqrt())
    plain, wrap = align(run, name, [wide, _by_channel(mean, after), _by_channel(scale, after)])
    return _by_channels(run, name, wrap((plain[0] - plain[1]) * plain[2]), weight, bias, value.dtype)


@operation("instance_norm", namespaces=(F,))
def instance_norm(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Ragged:
    """Normalize over the positions of each row and channel, or by each member's running statistics."""
    names = ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps")
    value, mean, variance, weight, bias, is_own, _, eps = arguments(
        names, args, kwargs, (None, None, None, None, True, 0.1, 1e-5)
    )
    if not is_own:
        result: Ragged = batch_norm(run, func, name, (value, mean, variance, weight, bias, False, 0.1, eps), {})
        return result
    if mean is not None or variance is not None:
        raise CannotGroupError("keep running statistics of their rows (instance_norm)")
    if not isinstance(value, Rows) or value.axis != 0 or value.dim() < 3:
        raise CannotGroupError(f"called {name} with another axis than the batch first")
    wide = _wide(value)
    normed = like(value, F.instance_norm(wide.plain, eps=eps))
    return _by_channels(run, name, normed, weight, bias, value.dtype)


@operation("prelu", namespaces=(torch, torch.Tensor, F))
def prelu(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Ragged:
    """Scale negative entries by channel, the axis behind the batch."""
    value, weight = arguments(("input", "weight"), args, kwargs)
    if not isinstance(value, Rows) or value.axis != 0 or value.dim() < 2 or not isinstance(weight, Stack):
        raise CannotGroupError(f"called {name} with another axis than the batch first")
    plain, wrap = align(run, name, [value, _by_channel(weight, value.dim() - 2)])
    inner, slopes = lowered(*plain)
    return wrap(torch.where(inner > 0, inner, inner * slopes))


@operation(
    *("avg_pool1d", "avg_pool2d", "max_pool1d", "max_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d"),
    *("adaptive_max_pool1d", "adaptive_max_pool2d"),
    namespaces=(F,),
)
def pool(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Ragged:
    """Pool the positions of each row and channel."""
    value, *rest = args
    if not isinstance(value, Rows) or value.axis != 0 or value.dim() != int(name[-2]) + 2:
        raise CannotGroupError(f"called {name} with other axes than batch, channels and positions")
    pooled = func(value.plain, *rest, **kwargs)
    if not isinstance(pooled, torch.Tensor):
        raise CannotGroupError(f"asked {name} for indices")
    return like(value, pooled)
