"""Blocks of rows, one for each expert present, that are no views of one another to autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch

from celmoe.torch_internals import (
    is_batch_of_gradients,
    is_forward_differentiated,
    is_jit_traced,
    transforms_are_active,
)

Blocks: TypeAlias = list[torch.Tensor] | tuple[torch.Tensor, ...]


def cut(sorted_rows: torch.Tensor, counts: Sequence[int]) -> Blocks:
    """Blocks of rows that are no views to autograd; nothing else may read ``sorted_rows``."""
    if len(counts) == 1:
        return (sorted_rows,)
    if transforms_are_active() or is_batch_of_gradients(sorted_rows) or is_forward_differentiated():
        # The call below has a rule neither for vmap nor for the older vmap behind `is_grads_batched`, whose batches may
        # hide in a tangent.
        return [block.clone() for block in sorted_rows.split(list(counts))]
    # PyTorch calls a split unsafe if its parts are no views to autograd and count their versions apart. With a shared
    # counter, in-place work on one block would invalidate the tensors that autograd saved of all others. Only these
    # blocks read `sorted_rows`, so nothing is at risk.
    return torch.unsafe_split_with_sizes(sorted_rows, counts)


def records(*inputs: torch.Tensor) -> bool:
    """True if a custom Function is to stand in the autograd graph.

    Function transforms (``torch.func``) and tracing take plain operators only, and get the same result with PyTorch's
    own backward.
    """
    return (
        torch.is_grad_enabled()
        and any(tensor.requires_grad for tensor in inputs)
        and not transforms_are_active()
        and not is_jit_traced()
    )
