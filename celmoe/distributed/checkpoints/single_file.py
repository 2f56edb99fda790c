"""One file of a checkpoint, which any process reads with ``torch.load``."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from celmoe.files import replaced, verify_archive

from .agreement import told
from .experts import orders_in, with_orders
from .manifest import CURE, Content, Piece, Place, SavedTensor, read_manifest
from .pieces import opened
from .staging import stage


def write_file(directory: str | os.PathLike[str], file: str | os.PathLike[str]) -> None:
    """Make one file of a checkpoint, in one process: ``torch.load(file)["model"]`` is the model's ``state_dict``.

    Nothing in the directory is unpickled, so a checkpoint from somebody else can't run code. All tensors are held in
    memory at once.

    Args:
        directory: The directory that `save_checkpoint` wrote.
        file: The file to write; ``torch.load`` reads it with ``weights_only=True``. An old file is replaced when the
            new file is whole.

    Raises:
        CheckpointError: The checkpoint is missing, damaged or foreign; or the file can't be written.
    """
    folder = Path(directory)
    content = read_manifest(folder)
    with told("'directory' must hold a whole checkpoint", CURE), opened(folder / content.generation) as reader:
        wanted = {place: torch.empty(each.shape, device="meta") for place, each in content.tensors.items()}
        staged = stage(wanted, content.tensors, lambda _, piece, into: reader.read(piece, into))
    state: dict[str, dict[str, Any]] = {}
    for (kind, name, *key), value in [*staged.items(), *content.values.items()]:
        if kind == "optimizer":
            state.setdefault(name, {})[key[0]] = value
    whole: dict[str, Any] = {
        "model": with_orders(
            {place[1]: value for place, value in staged.items() if place[0] == "model"}, content.experts
        ),
        "extra": json.dumps(content.extra),
    }
    if content.groups is not None:
        groups = {str(place): json.dumps(group) for place, group in enumerate(content.groups)}
        whole["optimizer"] = {"state": state, "groups": groups}
    with told("'file' must take all of it", "Mend the cause, and write again"), replaced(Path(file)) as stream:
        torch.save(whole, stream)


def read_file(file: Path) -> tuple[Content, dict[Place, torch.Tensor]]:
    """Open a file of `write_file`, or a ``state_dict``. Tensors of a zip archive lie in the file until they are read.

    Raises:
        CheckpointError: The file is missing, damaged or foreign.
    """
    with told(
        f"'file' must hold what write_file wrote, or a state_dict ({str(file)!r})",
        "Give such a file; nothing else in it is read than tensors, numbers, strings, lists and mappings",
    ):
        # Ranks share the reading.
        rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        verify_archive(file, rank, size)
        held = torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=True)
        if not isinstance(held, Mapping):
            raise TypeError(f"a {type(held).__name__}")
        if not (isinstance(held.get("model"), Mapping) and isinstance(held.get("extra"), str)):
            held = {"model": held, "extra": "{}"}
        found: dict[Place, Any] = {("model", name): value for name, value in held["model"].items()}
        groups = None
        if "optimizer" in held:
            saved = held["optimizer"]
            groups = [json.loads(saved["groups"][str(place)]) for place in range(len(saved["groups"]))]
            for name, state in saved.get("state", {}).items():
                found |= {("optimizer", name, key): value for key, value in state.items()}
        tensors = {place: value for place, value in found.items() if isinstance(value, torch.Tensor)}
        values = {place: value for place, value in found.items() if place not in tensors}
        if others := [place[1] for place in values if place[0] == "model"]:
            raise TypeError(f"{type(values['model', others[0]]).__name__} as {others[0]!r}")
        whole = {
            place: SavedTensor(value.dtype, tuple(value.shape), [Piece((0,) * value.dim(), tuple(value.shape))])
            for place, value in tensors.items()
        }
        orders = orders_in(held["model"])
        return Content(whole, values, groups, json.loads(held["extra"]), experts=orders), tensors
