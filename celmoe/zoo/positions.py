"""Rows of positions, and their mask.

Axes: N samples, S positions, D width.
"""

from __future__ import annotations

import torch
from torch import nn

from celmoe.errors import InputError
from celmoe.experts import ExpertBatch


def require_positions(expert: nn.Module, batch: ExpertBatch) -> None:
    """Refuse rows that are not ``[N, S, D]``.

    Raises:
        InputError: They have another number of axes.
    """
    if batch.hidden.dim() != 3:
        raise InputError(
            f"'hidden' must be [B, S, D] for a {type(expert).__name__}, which looks at positions "
            f"(got {batch.hidden.dim()} axes)"
        )


def real_positions(batch: ExpertBatch) -> torch.Tensor | None:
    """True at the positions that are no padding, ``[N, S]`` bool; ``None`` without a mask.

    Raises:
        InputError: The mask is not ``[N, S]``.
    """
    mask = batch.mask
    if mask is None:
        return None
    if mask.dim() != 2 or mask.shape[1] != batch.hidden.shape[1]:
        raise InputError(
            f"'mask' must be [B, S], true at real positions, with a place for each of the {batch.hidden.shape[1]} "
            f"positions (got shape [B, {', '.join(map(str, mask.shape[1:]))}])"
        )
    return mask if mask.dtype == torch.bool else mask != 0
