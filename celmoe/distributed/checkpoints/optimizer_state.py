"""An optimizer's state by its parameters' names."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from celmoe.distributed.data_parallel import refuse_stacks
from celmoe.distributed.remote import stand_ins
from celmoe.errors import CheckpointError, listed

from .manifest import Content, Place


def trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[nn.Parameter, list[str]]:
    """The optimizer's parameters, each with all its names in the model's ``state_dict``; tied ones have several.

    The parameters of a `RemoteExpert` stand for gradients on other ranks, and are left out.

    Raises:
        CheckpointError: The optimizer has a parameter that the model does not have.
    """
    saved = model.state_dict().keys()
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in saved:
            names.setdefault(parameter, []).append(name)
    elsewhere = set(stand_ins(model))
    own = [each for group in optimizer.param_groups for each in group["params"] if each not in elsewhere]
    refuse_stacks(model, "an optimizer's state")
    if strangers := [each for each in own if each not in names]:
        raise CheckpointError(
            f"'optimizer' must be of the model's parameters (got {len(strangers)} that the model does not have). Make "
            f"it from model.parameters()"
        )
    return {parameter: names[parameter] for parameter in own}


def state_by_place(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[Place, Any], dict[Place, Any]]:
    """The optimizer's state by place: tensors, and values that are no tensors.

    Raises:
        CheckpointError: See `trained`; or JSON can't hold a value.
    """
    tensors: dict[Place, Any] = {}
    values: dict[Place, Any] = {}
    for parameter, names in trained(model, optimizer).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, torch.Tensor):
                require_json(value, f"the optimizer's state {key!r} of {names[0]!r}")
            for name in names:
                (tensors if isinstance(value, torch.Tensor) else values)["optimizer", name, key] = value
    return tensors, values


def hyperparameters(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The hyperparameters of each group, as JSON can hold them.

    Raises:
        CheckpointError: JSON can't hold a value.
    """
    groups = [
        {
            key: value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
            for key, value in group.items()
            if key not in ("params", "param_names")
        }
        for group in optimizer.param_groups
    ]
    for place, group in enumerate(groups):
        for key, value in group.items():
            require_json(value, f"hyperparameter {key!r} of the optimizer's group {place}")
    return groups


def require_json(value: Any, what: str) -> None:
    """Refuse a value that JSON can't hold.

    Raises:
        CheckpointError: JSON can't hold the value.
    """
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{what} must be made of numbers, strings, None, lists and mappings (got: {error}). Keep other things in a "
            f"file of their own"
        ) from None


def targets(model: nn.Module, optimizer: torch.optim.Optimizer, content: Content) -> dict[Place, torch.Tensor]:
    """By place, tensors that are spread as the optimizer's state is to be; only the tensors' layout counts."""
    found: dict[Place, torch.Tensor] = {}
    for parameter, places in _places(model, optimizer, content).items():
        for place in places:
            if place in content.tensors:
                shape = content.tensors[place].shape
                found[place] = parameter if _is_like(parameter, shape) else torch.empty(shape, device="meta")
    return found


def prepared(
    model: nn.Module, optimizer: torch.optim.Optimizer, content: Content, staged: Mapping[Place, torch.Tensor]
) -> dict[nn.Parameter, dict[str, Any]]:
    """The state of each of this rank's parameters, on its device; empty for a parameter without saved state.

    [Note: Device of a step] State lands on its parameter's device. Only ``step`` stays on the host, as it does in
    ``torch.optim``, unless its group is ``capturable`` or ``fused``: then the optimizer reads ``step`` on the device,
    in float32.

    Raises:
        CheckpointError: The optimizer's groups can't take the saved hyperparameters.
    """
    _require_groups(optimizer, content)
    on_device = {
        parameter
        for group in optimizer.param_groups
        if group.get("capturable") or group.get("fused")
        for parameter in group["params"]
    }
    state: dict[nn.Parameter, dict[str, Any]] = {}
    for parameter, places in _places(model, optimizer, content).items():
        own = state[parameter] = {}
        for place in places:
            key = place[2]
            if place in content.values:
                own[key] = content.values[place]
            elif key == "step":
                value = staged[place]
                own[key] = value.to(parameter.device, torch.float32) if parameter in on_device else value
            else:
                own[key] = _placed(parameter, staged[place], content.tensors[place].shape)
    return state


def restore(
    optimizer: torch.optim.Optimizer,
    state: Mapping[nn.Parameter, dict[str, Any]],
    groups: Sequence[Mapping[str, Any]],
) -> None:
    """Give the optimizer its prepared state. Nothing in here can fail."""
    for parameter, own in state.items():
        if own:
            optimizer.state[parameter] = own
        else:
            optimizer.state.pop(parameter, None)
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        for key, value in saved.items():
            if isinstance(group.get(key), torch.Tensor):
                group[key].fill_(value)
            else:
                group[key] = tuple(value) if isinstance(group.get(key), tuple) else value


def _places(
    model: nn.Module, optimizer: torch.optim.Optimizer, content: Content
) -> dict[nn.Parameter, Sequence[Place]]:
    """The places of each parameter's saved state, under the first of the parameter's names that has some."""
    by_name: dict[str, list[Place]] = {}
    for place in (*content.tensors, *content.values):
        if place[0] == "optimizer":
            by_name.setdefault(place[1], []).append(place)
    return {
        parameter: next((by_name[name] for name in names if name in by_name), ())
        for parameter, names in trained(model, optimizer).items()
    }


def _is_like(parameter: nn.Parameter, shape: tuple[int, ...]) -> bool:
    """True if state of this shape is spread as its parameter is."""
    return bool(shape) and shape == tuple(parameter.shape)


def _placed(parameter: nn.Parameter, value: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    value = value.to(parameter.device)
    if not (isinstance(parameter, DTensor) and _is_like(parameter, shape)):
        return value
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(
        value, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )


def _require_groups(optimizer: torch.optim.Optimizer, content: Content) -> None:
    """Refuse hyperparameters that the groups can't take."""
    for group, saved in zip(optimizer.param_groups, content.groups or (), strict=True):
        wrong = [
            key
            for key, value in saved.items()
            if key in {"params", "param_names"}
            or (isinstance(group.get(key), torch.Tensor) and not isinstance(value, bool | int | float))
            or (isinstance(group.get(key), tuple) and not isinstance(value, list))
        ]
        if wrong:
            raise CheckpointError(
                f"'directory' or 'file' must hold hyperparameters of this optimizer (got others of {listed(wrong)}). "
                f"Make the optimizer as it was when it was saved"
            )
