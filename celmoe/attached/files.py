"""Attached experts in files of their own, by name."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from celmoe.config import CELMoEConfig
from celmoe.errors import (
    CheckpointError,
    ConfigError,
    ConfigTypeError,
    InputTypeError,
    PackageMissingError,
    UnknownLevelError,
    listed,
    nearest,
)
from celmoe.files import replaced
from celmoe.loading import LoadReport, load_experts
from celmoe.names import name_key, parted_key

from .adapters import Adapters, adapters
from .place import CHILD

_SUFFIX, _REST, _LEVELS, _CONFIG = ".safetensors", "rest", "level_modules.", "celmoe"


def save_adapters(model: nn.Module, path: str | Path, *, by: str | None = None) -> list[Path]:
    """Save the experts that are attached to a model, without the model.

    Files are safetensors. A tensor's key is its key in ``model.state_dict()``. A file is whole or not there. It has the
    config of the experts, if all places have one: see `saved_config`.

    Args:
        model: The host.
        path: The file; with ``by`` a folder, which is made.
        by: A level's name: each of its experts then has a file, named for the expert, with its tensors from all places.
            The experts of other levels and the fusions are in ``rest.safetensors``.

    Returns:
        The files.

    Raises:
        InputTypeError, ConfigError: See `adapters`.
        UnknownLevelError: There is no such level.
        PackageMissingError: safetensors is not installed.
        OSError: A file could not be written.
    """
    found = adapters(model)
    tensors = _tensors(found)
    if by is None:
        return [_written(Path(path), tensors, found)]
    levels = list(dict.fromkeys(level.name for each in found.values() for level in each.levels))
    if by not in levels:
        raise UnknownLevelError(f"'by' must be a level of the experts (got {by!r}; {nearest(by, levels)})")
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        parts.setdefault(_file_of(key, by), {})[key] = tensor
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    return [_written(folder / f"{name}{_SUFFIX}", part, found) for name, part in parts.items()]


def load_adapters(
    model: nn.Module, path: str | Path, *, rename: Mapping[str, Mapping[str, str]] | None = None
) -> dict[str, LoadReport]:
    """Load attached experts by name, those that the file and the model both have.

    Args:
        model: The host, with experts attached at the same places.
        path: A file of `save_adapters`, a folder of them, or the ``model.safetensors`` of a whole model.
        rename: See `load_experts`.

    Returns:
        By place what was loaded, what is new in the model, and what was left.

    Raises:
        InputTypeError, ConfigError: See `adapters`.
        CheckpointError: There is no such file; it can't be read; or it has no expert of the model, or one of other
            tensors. Then nothing has changed.
        CELMoEError: See `load_experts`.
        PackageMissingError: safetensors is not installed.
    """
    found = adapters(model)
    tensors = _read(Path(path))
    own: dict[str, dict[str, torch.Tensor]] = {}
    for place in found:
        prefix = _prefix(place)
        if part := {key.removeprefix(prefix): each for key, each in tensors.items() if key.startswith(prefix)}:
            own[place] = part
    if not own:
        raise CheckpointError(
            f"'path' must hold experts of the model's places (got keys {listed(tensors)}; the model's begin with "
            f"{listed(map(_prefix, found))})"
        )
    before = {place: {key: each.clone() for key, each in found[place].state_dict().items()} for place in own}
    reports = {}
    try:
        for place, state in own.items():
            reports[place] = load_experts(found[place], state, rename)
    except BaseException:
        for place in reports:
            found[place].load_state_dict(before[place])
        raise
    return reports


def saved_config(path: str | Path) -> CELMoEConfig:
    """The config of the experts in a file of `save_adapters`, or in a folder of them: to attach alike ones elsewhere.

    Metadata of experts is there if JSON can hold it.

    Raises:
        CheckpointError: There is no such file, it can't be read, `save_adapters` has not written it, or it is of places
            with several configs.
        PackageMissingError: safetensors is not installed.
    """
    file = _files(Path(path))[0]
    _safetensors()
    try:
        with importlib.import_module("safetensors").safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
    except _safetensors_error() as error:
        raise CheckpointError(f"'path' must hold files of safetensors (got {str(file)!r}: {error})") from error
    if _CONFIG not in metadata:
        raise CheckpointError(
            f"'path' must be written by save_adapters, for places of one config (got {str(file)!r}, which has no "
            f"config)"
        )
    return CELMoEConfig.from_dict(json.loads(metadata[_CONFIG]))


def _prefix(place: str) -> str:
    return f"{place}.{CHILD}." if place else f"{CHILD}."


def _tensors(found: Adapters) -> dict[str, torch.Tensor]:
    """All tensors of attached experts, by key; each with memory of its own, as safetensors wants it."""
    tensors: dict[str, torch.Tensor] = {}
    for place, each in found.items():
        for key, value in each.state_dict().items():
            if not isinstance(value, torch.Tensor):
                raise InputTypeError(
                    f"experts must have nothing but tensors in their state to be saved (got {key!r} at {place!r})"
                )
            tensors[_prefix(place) + key] = value.detach().cpu().contiguous().clone()
    if not tensors:
        raise ConfigError("'model' must have attached experts with tensors to be saved (got none)")
    return tensors


def _file_of(key: str, level: str) -> str:
    """The name of the file that a tensor belongs to."""
    _, found, rest = key.partition(f"{CHILD}.{_LEVELS}")
    if found:
        name, rest = parted_key(rest)
        if name == level:
            # As in keys: a name may hold what no file name does.
            return name_key(parted_key(rest)[0]).replace("/", "%2F")
    return _REST


def _written(path: Path, tensors: dict[str, torch.Tensor], found: Adapters) -> Path:
    metadata = {"format": "pt"}
    # Places of several configs have no one to tell.
    if len({each.layout.packed for each in found.values()}) == 1:
        metadata[_CONFIG] = json.dumps(_plain(next(iter(found.values())).config))
    content = _safetensors().save(tensors, metadata)
    with replaced(path) as file:
        file.write(content)
    return path


def _plain(config: CELMoEConfig) -> dict[str, Any]:
    """The config as JSON can hold it."""
    try:
        return config.to_dict()
    except ConfigTypeError:
        levels = [
            replace(level, experts={name: replace(each, metadata={}) for name, each in level.experts.items()})
            for level in config.levels
        ]
        return replace(config, levels=levels).to_dict()


def _files(path: Path) -> list[Path]:
    files = sorted(path.glob(f"*{_SUFFIX}")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise CheckpointError(f"'path' must be a file of safetensors, or a folder with some (got {str(path)!r})")
    return files


def _read(path: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in _files(path):
        try:
            tensors |= _safetensors().load(file.read_bytes())
        except _safetensors_error() as error:
            raise CheckpointError(f"'path' must hold files of safetensors (got {str(file)!r}: {error})") from error
    return tensors


def _safetensors() -> Any:
    try:
        return importlib.import_module("safetensors.torch")
    except ImportError as error:
        raise PackageMissingError(
            "safetensors must be installed to save and load attached experts (pip install safetensors)"
        ) from error


def _safetensors_error() -> type[Exception]:
    kind: type[Exception] = importlib.import_module("safetensors").SafetensorError
    return kind
