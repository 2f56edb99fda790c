"""Losses and gradients of a joined batch: the weight of each rank's share, and one reduction after the backward pass.

Ranks' gradients are always *averaged*, as in `DistributedDataParallel` and ``fully_shard``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import index
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import Function
from torch.distributed.device_mesh import DeviceMesh

from celmoe.errors import InputError, InputTypeError
from celmoe.stacked.parallel import joined_members
from celmoe.stacked.presence import reached, set_reached

from .groups import groups_of, require_mesh, require_process_group

# Bytes of gradients in one all-reduce: enough to be worth a message, few enough to be held twice.
_BUCKET_BYTES = 25 * 2**20

_Tensor = TypeVar("_Tensor", bound=torch.Tensor)


def joined_mean(loss_sum: torch.Tensor, count: int, *, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """This rank's part in the mean of a loss over all ranks' samples.

    The mean of the ranks' results is the joined batch's mean loss; the mean of their gradients is its gradient. Ranks
    with fewer samples weigh less; a rank without samples has the loss zero, never 0/0. Every rank of the group must
    call `joined_mean`. The division runs in float32 at least, so any count is right in float16 and bfloat16. The result
    has the sum's dtype.

    Args:
        loss_sum: The sum of the loss over this rank's samples, a scalar. A float16 sum overflows above 65,504.
        count: The number of samples, or tokens, in the sum. An integer.
        group: The ranks; all by default.

    Raises:
        InputError, InputTypeError: The sum is no scalar tensor; the count is negative, or no integer.
        ProcessGroupError: No process group is initialised.
    """
    require_process_group("joined_mean")
    if not isinstance(loss_sum, torch.Tensor):
        raise InputTypeError(f"'loss_sum' must be a tensor (got {type(loss_sum).__name__})")
    if loss_sum.numel() != 1:
        raise InputError(f"'loss_sum' must be a scalar (got shape {tuple(loss_sum.shape)})")
    try:
        count = index(count)
    except TypeError:
        raise InputTypeError(f"'count' must be an integer (got {count!r})") from None
    if count < 0:
        raise InputError(f"'count' must be at least 0 (got {count})")
    total = torch.tensor(count, dtype=torch.int64, device=loss_sum.device)
    dist.all_reduce(total, group=group)
    dtype = torch.result_type(loss_sum, 1.0)
    wide = torch.promote_types(dtype, torch.float32)
    # The factor stays a tensor: reading its value would wait for the device.
    factor = dist.get_world_size(group) / total.clamp_min(1).double()
    return (loss_sum.to(wide) * factor.to(wide)).to(dtype)


def reduce_gradients(parameters: Iterable[nn.Parameter], mesh: DeviceMesh) -> None:
    """Average the gradients of parameters that every rank of the mesh holds, after the last backward pass of a step.

    All ranks run the same collectives, whichever gradients a rank has: first for the kinds of gradients, then for the
    gradients that any rank has. A parameter without a gradient on any rank keeps ``None``; a rank that made no backward
    pass takes part like any other. Nothing is sent for experts that are absent everywhere; `prepare_ddp` sends zeros
    for such experts.

    Ranks also join their notes of the members that stacks' gradients are of, so that `celmoe.optim` steps the same
    experts on all ranks.

    Sparse gradients (``nn.Embedding(sparse=True)``) stay sparse: ranks send their entries alone. A parameter whose
    gradient is dense on any rank gets a dense gradient on all ranks.

    Args:
        parameters: The same parameters on every rank, in the same order.
        mesh: The ranks.

    Raises:
        ProcessGroupError: No process group is initialised.
        ConfigTypeError, MeshError: ``mesh`` is no mesh, or does not hold this process.
    """
    require_process_group("reduce_gradients")
    require_mesh(mesh)
    reduce_over(list(parameters), groups_of(mesh), mesh.size())


# Kinds of gradients. Ranks' gradients join to the largest of their kinds. A sparse gradient's kind is the number of its
# sparse axes. A stack's is of some of its members.
_NONE, _DENSE, _OF_MEMBERS = 0, 254, 255


def reduce_over(parameters: Sequence[nn.Parameter], groups: Sequence[dist.ProcessGroup], divisor: int) -> None:
    """Sum gradients over groups, one after another, and divide.

    Args:
        parameters: The same parameters on every rank of the groups, in the same order.
        groups: This rank's groups.
        divisor: The divisor of the sums.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained:
        return
    kinds = _joined_kinds(trained, groups)
    stacks = [each for each, kind in zip(trained, kinds, strict=True) if kind == _OF_MEMBERS]
    own = [_members(each) for each in stacks]
    with torch.no_grad():
        for bucket in buckets([each for each, kind in zip(trained, kinds, strict=True) if kind >= _DENSE]):
            _reduce_bucket(bucket, groups, divisor)
        for parameter, kind in zip(trained, kinds, strict=True):
            if _NONE < kind < _DENSE:
                _reduce_sparse(parameter, kind, groups, divisor)
    if groups:
        for stack, members in zip(stacks, joined_members(own, groups, parameters[0].device), strict=True):
            set_reached(stack, members)


def _members(parameter: nn.Parameter) -> npt.NDArray[np.bool_]:
    """``[M]``: true for the members that the gradient of a stack is of."""
    if parameter.grad is None:
        return np.zeros(len(parameter), dtype=np.bool_)
    found = reached(parameter)
    # A gradient that no backward pass gave is of all members.
    return np.ones(len(parameter), dtype=np.bool_) if found is None else found


def _joined_kinds(parameters: Sequence[nn.Parameter], groups: Sequence[dist.ProcessGroup]) -> list[int]:
    kinds = torch.tensor(list(map(_kind, parameters)), dtype=torch.uint8)
    if groups:
        kinds = kinds.to(parameters[0].device)
        for group in groups:
            dist.all_reduce(kinds, dist.ReduceOp.MAX, group)
    return cast(list[int], kinds.tolist())


def _kind(parameter: nn.Parameter) -> int:
    if (grad := parameter.grad) is None:
        return _NONE
    if grad.is_sparse:
        return grad.sparse_dim()
    return _DENSE if reached(parameter) is None else _OF_MEMBERS


def buckets(tensors: Iterable[_Tensor]) -> list[list[_Tensor]]:
    """Tensors of one dtype and device together, in order, up to `_BUCKET_BYTES` or one tensor each."""
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
    flat = torch.cat(
        [
            parameter.new_zeros(parameter.numel())
            if parameter.grad is None
            else parameter.grad.to_dense().reshape(-1)  # sparse here, dense on another rank
            for parameter in bucket
        ]
    )
    # Before the sum: in float16 the sum of two gradients may overflow although their mean does not.
    flat /= divisor
    for group in groups:
        dist.all_reduce(flat, group=group)
    for parameter, part in zip(bucket, flat.split([each.numel() for each in bucket]), strict=True):
        if parameter.grad is None or parameter.grad.is_sparse:
            parameter.grad = part.view_as(parameter).clone()
        else:
            parameter.grad.copy_(part.view_as(parameter))


def _reduce_sparse(parameter: nn.Parameter, sparse_dim: int, groups: Sequence[dist.ProcessGroup], divisor: int) -> None:
    """Send entries alone; all ranks add up the entries in the order of the ranks."""
    if (grad := parameter.grad) is None:
        indices = torch.empty((0, sparse_dim), dtype=torch.int64, device=parameter.device)
        values = parameter.new_empty(0, *parameter.shape[sparse_dim:])
    else:
        if grad.sparse_dim() != sparse_dim:
            grad = grad.to_dense().to_sparse(sparse_dim)
        grad = grad.coalesce()
        indices, values = grad.indices().t(), grad.values() / divisor
    for group in groups:
        count = torch.tensor([len(values)], device=values.device)
        counts = all_gathered(count, group)
        longest = int(counts.max())
        is_entry = torch.arange(longest, device=values.device) < counts
        indices, values = (
            all_gathered(torch.cat([each, each.new_zeros(longest - len(each), *each.shape[1:])]), group)[is_entry]
            for each in (indices, values)
        )
    parameter.grad = torch.sparse_coo_tensor(indices.t(), values, parameter.shape, check_invariants=False).coalesce()


def all_gathered(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """``[G, ...]``: every rank's tensor; all have one shape."""
    num_ranks = dist.get_world_size(group)
    gathered = tensor.new_empty(num_ranks * tensor.numel())
    dist.all_gather_single(gathered, tensor.reshape(-1), group)
    return gathered.view(num_ranks, *tensor.shape)


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
    """The value. A backward pass from the value reaches the anchor too, with a gradient of zeros."""
    return cast(torch.Tensor, _Tie.apply(value, anchor)) if torch.is_grad_enabled() else value
