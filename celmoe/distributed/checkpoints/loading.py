"""Loading: all ranks read and verify everything first; after that nothing can fail any more.

[Note: Memory of a load] Each rank reads its part of the model into the host's memory once more, and copies the part
once all ranks have read theirs. On the CPU the optimizer takes over the state that was read. Another device holds the
state twice only if the optimizer has stepped before.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import torch
from torch import nn

from celmoe.distributed.remote import RemoteExpert
from celmoe.errors import CheckpointError, listed
from celmoe.stacked.member import held

from .agreement import agree
from .experts import require_orders
from .manifest import CURE, Content, Piece, Place, read_manifest
from .optimizer_state import prepared, restore, targets
from .pieces import opened
from .single_file import read_file
from .staging import local, stage

_RULE = "'directory' or 'file' must hold a checkpoint of this model"


def load_checkpoint(
    directory: str | os.PathLike[str], model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> dict[str, Any]:
    """Read a checkpoint into a model, in place. Every rank calls it; any number of ranks may have written it.

    Nothing in the directory is unpickled, so a checkpoint from somebody else can't run code. A rank verifies the
    checksums of all pieces that it needs before anything changes.

    Args:
        directory: The directory that `save_checkpoint` wrote.
        model: The model, spread as it is to run.
        optimizer: The optimizer of the model's parameters, with as many groups as when it was saved.

    Returns:
        The ``extra`` of the checkpoint.

    Raises:
        CheckpointError: The checkpoint is missing, damaged, foreign, or of another model or optimizer; every rank
            raises, and nothing has changed.
    """
    folder = Path(directory)

    def read() -> tuple[Content, Callable[[], None]]:
        content = read_manifest(folder)
        with opened(folder / content.generation) as reader:
            return content, _ready(model, optimizer, content, lambda _, piece, into: reader.read(piece, into))

    return _load(read)


def load_file(
    file: str | os.PathLike[str], model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> dict[str, Any]:
    """Read one file into a model, in place; each rank reads its own part. Every rank calls `load_file`.

    ``torch.load`` reads it with ``weights_only=True``, so a file from somebody else can't run code.

    Args:
        file: A ``state_dict`` that was saved in one process, or a file of `write_file`.
        model: The model, spread as it is to run.
        optimizer: The optimizer of the model's parameters; only for a file of `write_file`.

    Returns:
        The ``extra`` of the checkpoint.

    Raises:
        CheckpointError: The file is missing, damaged, foreign, or of another model or optimizer; every rank raises, and
            nothing has changed.
    """

    def read() -> tuple[Content, Callable[[], None]]:
        content, tensors = read_file(Path(file))

        def fetch(place: Place, _: Piece, into: torch.Tensor) -> None:
            into.copy_(tensors[place])

        return content, _ready(model, optimizer, content, fetch)

    return _load(read)


def _load(read: Callable[[], tuple[Content, Callable[[], None]]]) -> dict[str, Any]:
    """Have every rank read. Change anything only once all ranks have read, and have read the same checkpoint."""
    ready: list[tuple[Content, Callable[[], None]]] = []

    def work() -> str:
        ready.append(read())
        return ready[0][0].generation

    def settle(generations: list[str]) -> list[None]:
        if len(set(generations)) > 1:
            raise CheckpointError(
                f"'directory' must hold one checkpoint for all ranks (got {listed(sorted(set(generations)))}). Give "
                f"one that all ranks reach, and to which nobody writes meanwhile"
            )
        return [None] * len(generations)

    agree(work, settle, rule=_RULE, cure=CURE)
    content, change = ready[0]
    change()
    return content.extra


def _ready(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    content: Content,
    read: Callable[[Place, Piece, torch.Tensor], None],
) -> Callable[[], None]:
    """Read the tensors that this rank needs, and return the function that puts them in place."""
    own, elsewhere = held(model)
    _require_fit(model, own, elsewhere, optimizer, content)
    wanted: dict[Place, torch.Tensor] = {("model", name): value for name, value in own.items()}
    if optimizer is not None:
        wanted |= targets(model, optimizer, content)
    staged = stage(wanted, content.tensors, read)
    state = None if optimizer is None else prepared(model, optimizer, content, staged)

    def change() -> None:
        with torch.no_grad():
            for name, value in own.items():
                local(value).copy_(staged["model", name])
        if optimizer is not None and state is not None:
            restore(optimizer, state, content.groups or ())

    return change


def _require_fit(
    model: nn.Module,
    own: Mapping[str, Any],
    elsewhere: AbstractSet[str],
    optimizer: torch.optim.Optimizer | None,
    content: Content,
) -> None:
    """Refuse a checkpoint of another model or optimizer."""
    spread = tuple(f"{name}." for name, each in model.named_modules() if isinstance(each, RemoteExpert))
    saved = {place[1]: each.shape for place, each in content.tensors.items() if place[0] == "model"}
    missing = [name for name in (*own, *elsewhere) if name not in saved]
    unknown = [name for name in saved if name not in own and name not in elsewhere and not name.startswith(spread)]
    other = [name for name, value in own.items() if name in saved and saved[name] != tuple(value.shape)]
    num_groups = len(content.groups or ())
    fault = None
    if missing or unknown:
        fault = f"lacking {listed(missing)}; too many: {listed(unknown)}"
    elif other:
        fault = f"{other[0]!r} of shape {saved[other[0]]}, here {tuple(own[other[0]].shape)}"
    elif optimizer is not None and content.groups is None:
        fault = "one without an optimizer"
    elif optimizer is not None and num_groups != (ours := len(optimizer.param_groups)):
        fault = f"{num_groups} groups of an optimizer, here {ours}"
    if fault is not None:
        raise CheckpointError(f"{_RULE} (got {fault})")
    require_orders(model, content.experts)
    if bare := [name for name, value in own.items() if value.is_meta]:
        raise CheckpointError(
            f"'model' must have memory to read into (got {listed(bare)} on the meta device). Call "
            f"model.to_empty(device=...) first"
        )
