"""This rank's part of saved tensors, read into the host's memory and verified."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

import torch
from torch.distributed.checkpoint.default_planner import create_default_local_load_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.tensor import DTensor

from celmoe.errors import CheckpointError

from .manifest import CURE, Piece, Place, SavedTensor, key_of


def stage(
    targets: Mapping[Place, torch.Tensor],
    tensors: Mapping[Place, SavedTensor],
    read: Callable[[Place, Piece, torch.Tensor], None],
) -> dict[Place, torch.Tensor]:
    """Read each target's part: a whole tensor, or this rank's part of a DTensor.

    Args:
        targets: Tensors of the saved shapes; their values are neither read nor changed.
        tensors: The saved tensors.
        read: Fills a contiguous tensor with a piece.

    Returns:
        New tensors on the CPU, of the saved dtypes.

    Raises:
        CheckpointError: Pieces are damaged, or do not make up a target's part.
    """
    by_key = {key_of(place): place for place in targets}
    metadata = Metadata({key: _metadata(tensors[place]) for key, place in by_key.items()})
    plan = create_default_local_load_plan({key: targets[place] for key, place in by_key.items()}, metadata)
    staged = {place: _room(target, tensors[place].dtype) for place, target in targets.items()}
    missing = {place: room.numel() for place, room in staged.items()}
    items = [
        (place, tensors[place].pieces[item.storage_index.index or 0], item)
        for item in plan.items
        if (place := by_key[item.storage_index.fqn])
    ]
    # In the order of their bytes in the files.
    for place, piece, item in sorted(items, key=lambda each: (each[1].file, each[1].start)):
        into = _box(staged[place], item.dest_offsets, item.lengths)
        if tuple(item.lengths) == piece.sizes and into.is_contiguous():
            read(place, piece, into)
        else:
            whole = torch.empty(piece.sizes, dtype=into.dtype)
            read(place, piece, whole)
            into.copy_(_box(whole, item.storage_offsets, item.lengths))
        missing[place] -= prod(item.lengths)
    if incomplete := [place for place, count in missing.items() if count]:
        raise CheckpointError(f"'directory' must hold all of each tensor (got a part of {incomplete[0]}). {CURE}")
    return staged


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _metadata(saved: SavedTensor) -> TensorStorageMetadata:
    chunks = [ChunkStorageMetadata(torch.Size(each.offsets), torch.Size(each.sizes)) for each in saved.pieces]
    return TensorStorageMetadata(TensorProperties(saved.dtype), torch.Size(saved.shape), chunks)


def _room(target: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # Fused optimizers want state with the strides of its parameter.
    return torch.empty_like(local(target), dtype=dtype, device="cpu", requires_grad=False)


def _box(tensor: torch.Tensor, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
    for axis, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
        tensor = tensor.narrow(axis, offset, size)
    return tensor
