"""Losses and gradients of a joined batch: what each rank's share counts for, and one reduction after the backward pass.

Everywhere ranks' gradients are *averaged*, as `DistributedDataParallel` and ``fully_shard`` do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import Function
from torch.distributed.device_mesh import DeviceMesh

from celmoe.errors import InputError, InputTypeError

from .groups import groups_of, require_mesh, require_process_group

# Bytes of gradients in one all-reduce: enough to be worth a message, few enough to be held twice.
_BUCKET_BYTES = 25 * 2**20

_Tensor = TypeVar("_Tensor", bound=torch.Tensor)


def joined_mean(loss_sum: torch.Tensor, count: int, *, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """This rank's part in the mean of a loss over all ranks' samples.

    The mean of what the ranks get is the joined batch's mean loss, and so is that of the gradients. Ranks with fewer
    samples weigh less; one with none has the loss zero, never 0/0. Every rank of the group must call it.

    Args:
        loss_sum: The sum of the loss over this rank's samples, a scalar.
        count: What it was summed over: samples, or tokens.
        group: The ranks; all by default.

    Raises:
        InputError, InputTypeError: The sum is no scalar tensor, or the count is negative.
        ProcessGroupError: No process group is initialised.
    """
    require_process_group("joined_mean")
    if not isinstance(loss_sum, torch.Tensor):
        raise InputTypeError(f"'loss_sum' must be a tensor (got {type(loss_sum).__name__})")
    if loss_sum.numel() != 1:
        raise InputError(f"'loss_sum' must be a scalar (got shape {tuple(loss_sum.shape)})")
    if count < 0:
        raise InputError(f"'count' must be at least 0 (got {count})")
    total = torch.tensor([count], dtype=torch.int64, device=loss_sum.device)
    dist.all_reduce(total, group=group)
    # A tensor: reading it would wait for the device.
    return loss_sum * (dist.get_world_size(group) / total.clamp_min(1).to(loss_sum.dtype).reshape(()))


def reduce_gradients(parameters: Iterable[nn.Parameter], mesh: DeviceMesh) -> None:
    """Average the gradients of parameters that every rank of the mesh holds, after the last backward pass of a step.

    Which collectives run depends on the parameters alone: first who has which gradients, then those that anyone has.
    A parameter that no rank has a gradient of keeps ``None``; a rank that made no backward pass takes part like any
    other. So nothing is sent for experts that are absent everywhere, where `prepare_ddp` sends zeros.

    Args:
        parameters: The same ones on every rank, in the same order.
        mesh: The ranks.

    Raises:
        ProcessGroupError: No process group is initialised.
        ConfigTypeError, MeshError: The mesh is none, or this process is not in it.
    """
    require_process_group("reduce_gradients")
    require_mesh(mesh)
    reduce_over(list(parameters), groups_of(mesh), mesh.size())


def reduce_over(parameters: Sequence[nn.Parameter], groups: Sequence[dist.ProcessGroup], divisor: int) -> None:
    """Sum gradients over groups, one after another, and divide.

    Args:
        parameters: The same ones on every rank of the groups, in the same order.
        groups: This rank's groups.
        divisor: What the sums are divided by.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained:
        return
    if groups:
        trained = _with_gradient_somewhere(trained, groups)
    for bucket in buckets([parameter for parameter in trained if groups or parameter.grad is not None]):
        _reduce_bucket(bucket, groups, divisor)


def _with_gradient_somewhere(
    parameters: Sequence[nn.Parameter], groups: Sequence[dist.ProcessGroup]
) -> list[nn.Parameter]:
    has = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8)
    has = has.to(parameters[0].device)
    for group in groups:
        dist.all_reduce(has, dist.ReduceOp.MAX, group)
    return [parameter for parameter, any_has in zip(parameters, has.tolist(), strict=True) if any_has]


def buckets(tensors: Iterable[_Tensor]) -> list[list[_Tensor]]:
    """Tensors of one dtype and device together, in order, up to so many bytes."""
    done: list[list[_Tensor]] = []
    filling: dict[tuple[torch.dtype, torch.device], tuple[list[_Tensor], int]] = {}
    for tensor in tensors:
        kind = (tensor.dtype, tensor.device)
        bucket, size = filling.get(kind, ([], 0))
        if bucket and size + tensor.nbytes > _BUCKET_BYTES:
            done.append(bucket)
            bucket, size = [], 0
        bucket.append(tensor)
        filling[kind] = (bucket, size + tensor.nbytes)
    return done + [bucket for bucket, _ in filling.values()]


def _reduce_bucket(bucket: Sequence[nn.Parameter], groups: Sequence[dist.ProcessGroup], divisor: int) -> None:
    with torch.no_grad():
        flat = torch.cat(
            [
                parameter.new_zeros(parameter.numel()) if parameter.grad is None else parameter.grad.reshape(-1)
                for parameter in bucket
            ]
        )
        for group in groups:
            dist.all_reduce(flat, group=group)
        flat /= divisor
        for parameter, part in zip(bucket, flat.split([each.numel() for each in bucket]), strict=True):
            if parameter.grad is None:
                parameter.grad = part.view_as(parameter).clone()
            else:
                parameter.grad.copy_(part.view_as(parameter))


class _Tie(Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.anchor = anchor.new_zeros(anchor.shape)
        # Not `view_as`: autograd refuses in-place work on a view made inside a Function.
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return grads[0], ctx.anchor


def tied(value: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
    """The value; a backward pass that starts from it reaches the anchor too, with a gradient of zeros."""
    return cast(torch.Tensor, _Tie.apply(value, anchor)) if torch.is_grad_enabled() else value
