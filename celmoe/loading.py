"""Loads experts by name from the ``state_dict`` of another model of the same hierarchy, or of another one."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from .errors import (
    CheckpointError,
    ConfigTypeError,
    InputTypeError,
    UnknownExpertError,
    UnknownLevelError,
    listed,
    nearest,
)
from .hierarchy import HierarchicalCELMoE
from .lifecycle.alone import require_alone
from .lifecycle.order import EXPERTS
from .names import NamedModules, parted_key

_EXPERTS, _FUSION = "level_modules.", "fusion."


@dataclass(frozen=True)
class LoadReport:
    """What `load_experts` loaded, and what not; ``str()`` has a line for each level.

    Attributes:
        matched: By level, the experts that were loaded.
        new: By level, the model's experts that the checkpoint does not have.
        left: By level of the checkpoint, the experts that the model does not have, as the checkpoint calls them.
        fusion: True if the fusion was loaded, or has nothing to load.
        other: The checkpoint's keys that are neither an expert's nor the fusion's that was loaded.
    """

    matched: dict[str, tuple[str, ...]]
    new: dict[str, tuple[str, ...]]
    left: dict[str, tuple[str, ...]]
    fusion: bool
    other: tuple[str, ...]

    def __str__(self) -> str:
        lines = []
        for level in dict.fromkeys([*self.matched, *self.left]):
            words = [f"{level}: {len(self.matched.get(level, ()))} loaded"]
            for word, names in (("new", self.new.get(level)), ("left", self.left.get(level))):
                words += [f"{len(names)} {word} ({listed(names)})"] if names else []
            lines.append(", ".join(words))
        lines.append(f"fusion: {'' if self.fusion else 'not '}loaded")
        lines += [f"other keys: {listed(self.other)}"] if self.other else []
        return "\n".join(lines)


@torch.inference_mode(False)
def load_experts(
    model: HierarchicalCELMoE, state_dict: Mapping[str, Any], rename: Mapping[str, Mapping[str, str]] | None = None
) -> LoadReport:
    """Load the experts that a checkpoint and the model both have, by name, and the fusion if it fits.

    The order of experts does not matter, nor whether they are stacked. An expert is loaded whole or not at all.

    Args:
        model: The model.
        state_dict: The ``state_dict`` of another model, ours or celmoe-vp's.
        rename: By level, the model's name of an expert by the name that the checkpoint has for it.

    Returns:
        What was loaded, what is new in the model, and what was left.

    Raises:
        InputTypeError, ConfigTypeError: An argument is of the wrong kind.
        UnknownLevelError, UnknownExpertError: ``rename`` has a level, or a name for an expert, that the model does not
            have.
        CheckpointError: ``rename`` has an expert that the checkpoint does not have, or gives two experts one name; an
            expert has other tensors than the model's; or nothing matches.
        ProcessGroupError: The model is spread over ranks.
    """
    if not isinstance(model, HierarchicalCELMoE):
        raise InputTypeError(f"'model' must be a HierarchicalCELMoE (got {type(model).__name__})")
    if not isinstance(state_dict, Mapping):
        raise InputTypeError(f"'state_dict' must be a mapping of keys to tensors (got {type(state_dict).__name__})")
    require_alone(model, "load_experts")
    saved, fusion, other = _parted(state_dict)
    experts = {level: dict(cast(NamedModules, registry).items()) for level, registry in model.level_modules.items()}
    names = _renamed(saved, experts, {} if rename is None else rename)
    loads: list[tuple[nn.Module, Mapping[str, Any]]] = []
    matched, new = {}, {}
    for level, own in experts.items():
        found = {names[level][name]: state for name, state in saved.get(level, {}).items()}
        # Experts without tensors have no keys.
        has = {name: not expert.state_dict() for name, expert in own.items()}
        matched[level] = tuple(name for name in own if name in found or has[name])
        new[level] = tuple(name for name in own if name not in matched[level])
        for name in own:
            if name in found:
                _require_fit(own[name], found[name], f"expert {name!r} of level {level!r}")
                loads.append((own[name], found[name]))
    if not loads:
        raise CheckpointError(
            f"'state_dict' must have an expert of the model (got {listed(state_dict)}; keys begin with "
            f"'level_modules.', and 'rename' gives the model's names for the checkpoint's)"
        )
    has_fusion = _fits(model.fusion, fusion)
    if has_fusion:
        loads.append((model.fusion, fusion))
    for module, state in loads:
        module.load_state_dict(state)
    left = {
        level: tuple(name for name in own if names[level][name] not in experts.get(level, ()))
        for level, own in saved.items()
    }
    unused = other if has_fusion else [*other, *(f"{_FUSION}{key}" for key in fusion)]
    return LoadReport(matched, new, {level: some for level, some in left.items() if some}, has_fusion, tuple(unused))


def _parted(
    state_dict: Mapping[str, Any],
) -> tuple[dict[str, dict[str, OrderedDict[str, Any]]], OrderedDict[str, Any], list[str]]:
    """The states by level and expert, that of the fusion, and the other keys."""
    metadata: Mapping[str, Any] = getattr(state_dict, "_metadata", None) or {}
    saved: dict[str, dict[str, OrderedDict[str, Any]]] = {}
    fusion: OrderedDict[str, Any] = OrderedDict()
    other: list[str] = []
    for level, names in metadata.get("", {}).get(EXPERTS, {}).items():
        saved[level] = {name: OrderedDict() for name in names}
    prefixes: list[tuple[OrderedDict[str, Any], str]] = [(fusion, _FUSION)]
    for key, value in state_dict.items():
        if key.startswith(_FUSION):
            fusion[key.removeprefix(_FUSION)] = value
            continue
        try:
            level, rest = parted_key(key.removeprefix(_EXPERTS))
            name, path = parted_key(rest)
        except ValueError:
            path = ""
        if not path or not key.startswith(_EXPERTS):
            other.append(key)
            continue
        state = saved.setdefault(level, {}).setdefault(name, OrderedDict())
        if not state:
            prefixes.append((state, key.removesuffix(path)))
        state[path] = value
    # Modules read the version of their own state there.
    for state, prefix in prefixes:
        own = {f"{key}."[len(prefix) :][:-1]: each for key, each in metadata.items() if f"{key}.".startswith(prefix)}
        cast(Any, state)._metadata = OrderedDict(own)
    return saved, fusion, other


def _renamed(
    saved: Mapping[str, Mapping[str, Any]],
    experts: Mapping[str, Mapping[str, nn.Module]],
    rename: Mapping[str, Mapping[str, str]],
) -> dict[str, dict[str, str]]:
    """By level and name in the checkpoint, the name in the model."""
    if not isinstance(rename, Mapping) or not all(isinstance(each, Mapping) for each in rename.values()):
        raise ConfigTypeError(
            f"'rename' must map levels to names by names, {{'level': {{'old': 'new'}}}} (got {rename!r})"
        )
    for level, names in rename.items():
        where = f"rename[{level!r}]"
        if level not in experts:
            raise UnknownLevelError(
                f"'rename' must have levels of the model (got {level!r}; {nearest(level, experts)})"
            )
        if unknown := [new for new in names.values() if new not in experts[level]]:
            raise UnknownExpertError(
                f"{where!r} must give names of the model's experts (got {listed(unknown)}; "
                f"{nearest(unknown, experts[level])})"
            )
        theirs = saved.get(level, {})
        if unknown := [old for old in names if old not in theirs]:
            raise CheckpointError(
                f"{where!r} must have experts of the checkpoint (got {listed(unknown)}; {nearest(unknown, theirs)})"
            )
    found = {level: {name: rename.get(level, {}).get(name, name) for name in own} for level, own in saved.items()}
    for level, names in found.items():
        if twice := [new for new, count in Counter(names.values()).items() if count > 1]:
            olds = [old for old, new in names.items() if new == twice[0]]
            raise CheckpointError(
                f"'rename' must give each expert of level {level!r} a name of its own (got {twice[0]!r} for "
                f"{listed(olds)}; rename, or leave out of 'state_dict', all but one)"
            )
    return found


def _require_fit(module: nn.Module, state: Mapping[str, Any], where: str) -> None:
    own = module.state_dict()
    if own.keys() != state.keys():
        raise CheckpointError(
            f"'state_dict' must have the tensors of {where} (got others: only there: "
            f"{listed(key for key in state if key not in own)}; missing there: "
            f"{listed(key for key in own if key not in state)}; leave the expert out of 'state_dict')"
        )
    for key, value in own.items():
        if _shape(value) != _shape(state[key]):
            raise CheckpointError(
                f"'state_dict' must have {key!r} of {where} in shape {_shape(value)} (got {_shape(state[key])}; leave "
                f"the expert out of 'state_dict')"
            )


def _fits(module: nn.Module, state: Mapping[str, Any]) -> bool:
    own = module.state_dict()
    return own.keys() == state.keys() and all(_shape(value) == _shape(state[key]) for key, value in own.items())


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None
