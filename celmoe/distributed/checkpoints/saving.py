"""Saving: write a new folder, flush, commit in one step, delete old folders.

[Note: Whole or not there] All ranks write into a new folder. The first rank commits once every rank has flushed its
file: the first rank replaces the manifest, a single small file, which names the folder. Only then is the old folder
deleted. If any rank is killed, at any time, the manifest names a whole folder: the old one or the new one. Unfinished
saves leave folders that no manifest names; the next save deletes these folders.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan

from celmoe.errors import CheckpointError
from celmoe.files import flush_folder
from celmoe.stacked.member import held

from .agreement import agree, is_first
from .experts import orders_of
from .manifest import Content, Place, key_of, new_generation, old_generations, place_of, write_manifest
from .optimizer_state import hyperparameters, require_json, state_by_place
from .pieces import Written, joined, require_written, write_pieces

_RULE = "'directory' must take all of a checkpoint"
_CURE = "Mend the cause, and save again: the checkpoint that was there before is kept whole"


def save_checkpoint(
    directory: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint. Every rank calls `save_checkpoint` with the same directory, which all ranks can reach.

    The directory holds the old checkpoint until the new one is whole and on the disk, then the new one alone; it needs
    room for both. After a failed or killed rank, at any moment, or a full disk, the directory holds a whole checkpoint.
    Every rank left raises. If a rank failed, the others raise at once. If a rank is gone, they raise as soon as the
    backend tells, at the latest at the process group's timeout.

    Args:
        directory: The directory to write, made if need be. Its other files are left alone.
        model: A model in one process, spread by `shard_experts` or `shard_levels`, or given to `prepare_ddp`.
        optimizer: The optimizer of the model's parameters.
        extra: More to keep: numbers, strings, lists and mappings of such. Only the first rank's is kept.

    Raises:
        CheckpointError: The optimizer has a parameter that the model does not have; a value can't be kept; the
            directory can't be written; a rank failed, or is gone. Every rank raises.
    """
    folder = Path(directory)
    rank = dist.get_rank() if dist.is_initialized() else 0
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)

    def propose() -> tuple[SavePlan, _Beside]:
        state, values = _state(model, optimizer)
        kept = dict(extra or {})
        require_json(kept, "'extra'")
        groups = None if optimizer is None else hyperparameters(optimizer)
        planner.set_up_planner(state, is_coordinator=is_first())
        return planner.create_local_plan(), _Beside(values, groups, kept)

    beside: list[_Beside] = []

    def settle(proposals: list[tuple[SavePlan, _Beside]]) -> list[tuple[str, SavePlan]]:
        beside.extend(each for _, each in proposals)
        plans, _ = planner.create_global_plan([plan for plan, _ in proposals])
        folder.mkdir(parents=True, exist_ok=True)
        generation = new_generation()
        (folder / generation).mkdir()
        return [(generation, plan) for plan in plans]

    def write() -> list[Written]:
        return write_pieces(folder / generation, f"rank-{rank}.bin", planner.finish_plan(plan), planner)

    def commit(parts: list[list[Written]]) -> list[None]:
        tensors = {place_of(key): tensor for key, tensor in joined(each for part in parts for each in part).items()}
        require_written(folder / generation, tensors.values())
        values = {place: value for each in beside for place, value in each.values.items()}
        flush_folder(folder / generation)
        flush_folder(folder.absolute().parent)
        write_manifest(
            folder, Content(tensors, values, beside[0].groups, beside[0].extra, generation, orders_of(model))
        )
        return [None] * len(parts)

    try:
        generation, plan = agree(propose, settle, rule=_RULE, cure=_CURE)
        agree(write, commit, rule=_RULE, cure=_CURE)
    finally:
        if is_first():
            _sweep(folder)


class _Beside(NamedTuple):
    """One rank's part of a checkpoint beside tensors; see `Content`."""

    values: dict[Place, Any]
    groups: list[dict[str, Any]] | None
    extra: dict[str, Any]


def _state(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> tuple[dict[str, Any], dict[Place, Any]]:
    """This rank's part: tensors, by their place as one string, and values that are no tensors."""
    tensors: dict[Place, Any] = {("model", name): value for name, value in held(model)[0].items()}
    others = [name for (_, name), value in tensors.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise CheckpointError(
            f"'model' must have a state_dict of tensors (got {type(tensors['model', others[0]]).__name__} as "
            f"{others[0]!r}). Keep such state in 'extra'"
        )
    values: dict[Place, Any] = {}
    if optimizer is not None:
        more, values = state_by_place(model, optimizer)
        tensors |= more
    return {key_of(place): value for place, value in tensors.items()}, values


def _sweep(folder: Path) -> None:
    """Delete the folders that the manifest does not name. The next save tries again to delete folders that stay."""
    with suppress(OSError):
        for each in old_generations(folder):
            shutil.rmtree(each, ignore_errors=True)
