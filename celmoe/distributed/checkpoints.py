"""Checkpoints that any number of ranks writes, and any other number reads, whatever is spread how; on ``torch``'s DCP.

Tensors stand under the names that they have in the model in one process: every rank saves what it holds, and reads what
it holds. An optimizer's state goes by the same names, and what has none (an expert that was never routed to) has none
after loading.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, distribute_tensor

from celmoe.errors import CheckpointError, listed

from .remote import RemoteExpert, stand_ins

_Directory = str | os.PathLike[str]


def save_checkpoint(
    directory: _Directory,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint. Every rank calls it, with the same directory, which all can reach.

    Args:
        directory: Where to; made if need be.
        model: In one process, spread by `shard_experts` or `shard_levels`, or what was given to `prepare_ddp`.
        optimizer: Of the model's parameters.
        extra: What else to keep, the same on all ranks: numbers, strings, lists and mappings of such.

    Raises:
        CheckpointError: The optimizer has a parameter that the model does not have.
    """
    state: dict[str, Any] = {"model": dict(model.state_dict()), "extra": json.dumps(dict(extra or {}))}
    if optimizer is not None:
        names = _names(model)
        known = {*names, *stand_ins(model)}
        strangers = [each for group in optimizer.param_groups for each in group["params"] if each not in known]
        if strangers:
            raise CheckpointError(
                f"'optimizer' must be of the model's parameters (got {len(strangers)} that the model does not have)"
            )
        state["optimizer"] = {
            "state": {names[each]: dict(optimizer.state[each]) for each in names if optimizer.state.get(each)},
            "groups": {
                str(place): json.dumps(_hyperparameters(group)) for place, group in enumerate(optimizer.param_groups)
            },
        }
    with _alone_or_not() as no_dist:
        save(state, checkpoint_id=directory, no_dist=no_dist)


def load_checkpoint(
    directory: _Directory, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> dict[str, Any]:
    """Read a checkpoint into a model, in place. Every rank calls it; there may be other ones than wrote it.

    Args:
        directory: What `save_checkpoint` wrote.
        model: Spread as it is to be.
        optimizer: Of the model's parameters, with as many groups as when it was saved.

    Returns:
        What was kept beside.

    Raises:
        CheckpointError: The checkpoint is of another model or optimizer; every rank raises, and nothing has changed.
    """
    metadata = FileSystemReader(directory).read_metadata()
    sizes = {
        path: entry.size if isinstance(entry := metadata.state_dict_metadata[key], TensorStorageMetadata) else None
        for key, path in cast(dict[str, tuple[str, ...]], metadata.planner_data).items()
    }
    own = dict(model.state_dict())
    saved = {path[1]: size for path, size in sizes.items() if path[0] == "model"}
    num_groups = sum(path[:2] == ("optimizer", "groups") for path in sizes)
    _require_fit(model, own, saved, optimizer, num_groups)
    state: dict[str, Any] = {"model": own, "extra": ""}
    if optimizer is not None:
        groups = dict.fromkeys(map(str, range(num_groups)), "")
        state["optimizer"] = {"state": _room(model, optimizer, sizes, metadata), "groups": groups}
    with _alone_or_not() as no_dist:
        load(state, checkpoint_id=directory, no_dist=no_dist)
    if optimizer is not None:
        _restore(model, optimizer, state["optimizer"]["state"], state["optimizer"]["groups"])
    return cast(dict[str, Any], json.loads(state["extra"]))


def write_file(directory: _Directory, file: _Directory) -> None:
    """Make one file of a checkpoint, in one process: ``torch.load(file)["model"]`` is the model's ``state_dict``.

    Args:
        directory: What `save_checkpoint` wrote.
        file: Where to; ``torch.load`` reads it with ``weights_only=True``.
    """
    dcp_to_torch_save(directory, file)


def load_file(file: _Directory, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Read one file into a model, in place, on each rank what that holds.

    Args:
        file: A ``state_dict`` that was saved in one process, or what `write_file` wrote.
        model: Spread as it is to be.
        optimizer: Of the model's parameters; only from a file of `write_file`.

    Returns:
        What was kept beside.

    Raises:
        CheckpointError: The file is of another model or optimizer; every rank raises, and nothing has changed.
    """
    content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    if not (isinstance(content.get("model"), Mapping) and isinstance(content.get("extra"), str)):
        content = {"model": content, "extra": "{}"}
    own = dict(model.state_dict())
    saved = {name: value.shape for name, value in content["model"].items()}
    _require_fit(model, own, saved, optimizer, len(content.get("optimizer", {}).get("groups", ())))
    if optimizer is not None:
        given = content["optimizer"].get("state", {})
        state = {
            name: {key: _like(parameter, value) for key, value in given[name].items()}
            for parameter, name in _trained(model, optimizer)
            if name in given
        }
        _restore(model, optimizer, state, content["optimizer"]["groups"])
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(_like(value, content["model"][name]))
    return cast(dict[str, Any], json.loads(content["extra"]))


@contextmanager
def _alone_or_not() -> Iterator[bool]:
    """Whether this is one process without a group; saving and loading in such is meant, so no warning is due."""
    is_alone = not dist.is_initialized()
    with warnings.catch_warnings():
        if is_alone:
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield is_alone


def _names(model: nn.Module) -> dict[nn.Parameter, str]:
    """The names of the parameters that are here."""
    elsewhere = set(stand_ins(model))
    return {parameter: name for name, parameter in model.named_parameters() if parameter not in elsewhere}


def _trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[nn.Parameter, str]]:
    names = _names(model)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter in names:
                yield parameter, names[parameter]


def _hyperparameters(group: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value.item() if isinstance(value, torch.Tensor) else value
        for key, value in group.items()
        if key not in ("params", "param_names")
    }


def _require_fit(
    model: nn.Module,
    own: Mapping[str, torch.Tensor],
    saved: Mapping[str, torch.Size | None],
    optimizer: torch.optim.Optimizer | None,
    num_groups: int,
) -> None:
    """Refuse a checkpoint of something else, on every rank if on one."""
    elsewhere = tuple(f"{name}." for name, each in model.named_modules() if isinstance(each, RemoteExpert))
    missing = [name for name in own if name not in saved]
    unknown = [name for name in saved if name not in own and not name.startswith(elsewhere)]
    other = [name for name, value in own.items() if name in saved and saved[name] != value.shape]
    fault = None
    if missing or unknown:
        fault = f"lacking {listed(missing)}; too many: {listed(unknown)}"
    elif other:
        fault = f"{other[0]!r} of shape {tuple(saved[other[0]] or ())}, here {tuple(own[other[0]].shape)}"
    elif optimizer is not None and num_groups != (ours := len(optimizer.param_groups)):
        fault = f"{num_groups} groups of an optimizer, here {ours}" if num_groups else "one without an optimizer"
    faults: list[str | None] = [fault]
    if dist.is_initialized():
        faults = [None] * dist.get_world_size()
        dist.all_gather_object(faults, fault)
    for rank, each in enumerate(faults):
        if each is not None:
            where = f" on rank {rank}" if len(faults) > 1 else ""
            raise CheckpointError(f"'directory' or 'file' must hold a checkpoint of this model (got{where} {each})")


def _room(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    sizes: Mapping[tuple[str, ...], torch.Size | None],
    metadata: Metadata,
) -> dict[str, dict[str, Any]]:
    """Tensors for the state that was saved of this rank's parameters, spread as those are."""
    keys = {path: key for key, path in cast(dict[str, tuple[str, ...]], metadata.planner_data).items()}
    by_name: dict[str, dict[str, tuple[str, ...]]] = {}
    for path in sizes:
        if path[:2] == ("optimizer", "state"):
            by_name.setdefault(path[2], {})[path[3]] = path
    room: dict[str, dict[str, Any]] = {}
    for parameter, name in _trained(model, optimizer):
        for key, path in by_name.get(name, {}).items():
            entry = metadata.state_dict_metadata[keys[path]]
            into = room.setdefault(name, {})
            if not isinstance(entry, TensorStorageMetadata):
                into[key] = None
            elif entry.size == parameter.shape and entry.size:
                into[key] = torch.zeros_like(parameter, dtype=entry.properties.dtype)
            else:
                into[key] = torch.zeros(entry.size, dtype=entry.properties.dtype)
    return room


def _like(target: torch.Tensor, whole: Any) -> Any:
    """A value of one process, where and how its parameter is here."""
    if not isinstance(whole, torch.Tensor) or whole.shape != target.shape or not whole.shape:
        return whole
    if isinstance(target, DTensor):
        # Every rank has read all of it: each cuts out its part.
        value = whole.to(target.device_mesh.device_type)
        return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
    return whole.to(target.device)


def _restore(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, dict[str, Any]],
    groups: Mapping[str, str],
) -> None:
    for parameter, name in list(_trained(model, optimizer)):
        if name in state:
            optimizer.state[parameter] = {
                key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in state[name].items()
            }
        else:
            optimizer.state.pop(parameter, None)
    for place, group in enumerate(optimizer.param_groups):
        for key, value in json.loads(groups[str(place)]).items():
            if isinstance(group.get(key), torch.Tensor):
                group[key].fill_(value)
            else:
                group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
