"""An optimizer's state by its parameters' names."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from celmoe.distributed.remote import stand_ins
from celmoe.errors import CheckpointError, listed
from celmoe.optim.members import Part, cut, joined
from celmoe.optim.per_expert import MEMBERS, PerExpert, shares_of
from celmoe.stacked.member import held
from celmoe.stacked.naming import stacked_ids
from celmoe.stacked.rows import is_sharded, local, members_here
from celmoe.stacked.stack import slot_of

from .manifest import Content, Place

# Entries of a group that name its parameters by their places.
_OF_PARAMETERS = frozenset({"params", "param_names", MEMBERS})


class Owned(NamedTuple):
    """A parameter of one expert, or of no expert, in an optimizer.

    Attributes:
        parameter: The optimizer's parameter: the expert's own, or a stack of several experts' ``[M, ...]``.
        names: All its names in the model's ``state_dict``; tied parameters have several.
        member: The expert's place in the stack; ``None`` for a parameter that is no stack.
        group: The optimizer's group.
    """

    parameter: nn.Parameter
    names: list[str]
    member: int | None
    group: dict[str, Any]


def trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Owned]:
    """The optimizer's parameters, by expert.

    The parameters of a `RemoteExpert` stand for gradients on other ranks, and are left out.

    Raises:
        CheckpointError: The optimizer has a parameter that the model does not have.
    """
    names = _names(model)
    elsewhere, stacks = set(stand_ins(model)), stacked_ids(model)
    found: list[Owned] = []
    strangers = 0
    for group, shares in zip(optimizer.param_groups, shares_of(optimizer), strict=True):
        for share in shares:
            parameter = cast(nn.Parameter, share.parameter)
            if parameter in elsewhere:
                continue
            by_member = names.get(parameter, {})
            strangers += not by_member and id(parameter) not in stacks
            found += [
                Owned(parameter, its, member, group)
                for member, its in by_member.items()
                if share.members is None or member is None or member in share.members
            ]
    if strangers:
        raise CheckpointError(
            f"'optimizer' must be of the model's parameters (got {strangers} that the model does not have). Make "
            f"it from model.parameters()"
        )
    return found


def _names(model: nn.Module) -> dict[nn.Parameter, dict[int | None, list[str]]]:
    """The names of each parameter in the model's ``state_dict``, by member of a stack."""
    here, elsewhere = held(model)
    saved = here.keys() | elsewhere
    names: dict[nn.Parameter, dict[int | None, list[str]]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        dotted = f"{prefix}." if prefix else ""
        own: dict[str, tuple[Any, int | None]] = {name: (each, None) for name, each in module._parameters.items()}
        if (slot := slot_of(module)) is not None:
            own |= {
                name: (slot.stack.whole(path), slot.member) for name, path in slot.paths.items() if path is not None
            }
        for name, (parameter, member) in own.items():
            if parameter is not None and f"{dotted}{name}" in saved:
                names.setdefault(parameter, {}).setdefault(member, []).append(f"{dotted}{name}")
    return names


def state_by_place(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[Place, Any], dict[Place, Any]]:
    """The optimizer's state by place: tensors, and values that are no tensors.

    Raises:
        CheckpointError: See `trained`; or JSON can't hold a value.
        StackedError: The state of a stack can't be told apart by expert.
    """
    tensors: dict[Place, Any] = {}
    values: dict[Place, Any] = {}
    for owned in trained(model, optimizer):
        for key, value in _state_of(owned, optimizer).items():
            if not isinstance(value, torch.Tensor):
                require_json(value, f"the optimizer's state {key!r} of {owned.names[0]!r}")
            for name in owned.names:
                (tensors if isinstance(value, torch.Tensor) else values)["optimizer", name, key] = value
    return tensors, values


def _state_of(owned: Owned, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of one expert's parameter; none for a member of a stack that another rank holds."""
    state: dict[str, Any] = optimizer.state.get(owned.parameter, {})
    if owned.member is None or not state:
        return state
    here = members_here(owned.parameter)
    if owned.member not in here:
        return {}
    state = {key: _of_members(value, owned.parameter, here) for key, value in state.items()}
    part = Part(owned.names[0], local(owned.parameter), 0, owned.member - here.start)
    return cut(state, part, optimizer, owned.group)


def _of_members(value: Any, stack: torch.Tensor, here: range) -> Any:
    """The part of a stack's state that is of the members here."""
    if not isinstance(value, torch.Tensor) or not is_sharded(stack):
        return value
    # Each rank knows the steps of all members.
    return value[here.start : here.stop] if value.dim() == 1 and not is_sharded(value) else local(value)


def hyperparameters(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The hyperparameters of each group, as JSON can hold them.

    Raises:
        CheckpointError: JSON can't hold a value.
    """
    groups = [
        {
            key: value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
            for key, value in group.items()
            if key not in _OF_PARAMETERS
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
    for owned, places in _places(model, optimizer, content):
        is_here = owned.member is None or owned.member in members_here(owned.parameter)
        for place in places:
            if place in content.tensors:
                shape = content.tensors[place].shape
                if owned.member is None and _is_like(owned.parameter, shape):
                    found[place] = owned.parameter
                elif is_here or place[2] == "step":
                    found[place] = torch.empty(shape, device="meta")
    return found


def prepared(
    model: nn.Module, optimizer: torch.optim.Optimizer, content: Content, staged: Mapping[Place, torch.Tensor]
) -> dict[nn.Parameter, dict[str, Any]]:
    """The state of each of this rank's parameters, on its device; empty for a parameter without saved state.

    [Note: Device of a step] State lands on its parameter's device. Only ``step`` stays on the host, as it does in
    ``torch.optim``, unless its group is ``capturable`` or ``fused``: then the optimizer reads ``step`` on the device,
    in float32.

    Raises:
        CheckpointError: The optimizer's groups can't take the saved hyperparameters, or its state not the saved one.
        StackedError: The optimizer can't keep the experts' states apart in a stack.
    """
    _require_groups(optimizer, content)
    by_parameter: dict[nn.Parameter, list[tuple[Owned, dict[str, Any]]]] = {}
    for owned, places in _places(model, optimizer, content):
        own = {
            place[2]: content.values[place] if place in content.values else staged[place]
            for place in places
            if place in content.values or place in staged
        }
        by_parameter.setdefault(owned.parameter, []).append((owned, own))
    return {
        parameter: _of_stack(parameter, parts, optimizer)
        if parts[0][0].member is not None
        else {key: _placed(parts[0][0], key, value, content) for key, value in parts[0][1].items()}
        for parameter, parts in by_parameter.items()
    }


def _placed(owned: Owned, key: str, value: Any, content: Content) -> Any:
    parameter = owned.parameter
    if not isinstance(value, torch.Tensor):
        return value
    if key == "step":
        is_on_device = owned.group.get("capturable") or owned.group.get("fused")
        return value.to(parameter.device, torch.float32) if is_on_device else value
    place = next(each for name in owned.names if (each := ("optimizer", name, key)) in content.tensors)
    return _spread(value.to(parameter.device), parameter, content.tensors[place].shape)


def _of_stack(
    stack: nn.Parameter, parts: Sequence[tuple[Owned, dict[str, Any]]], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """The state of a stack from its experts' states. See [Note: Device of a step].

    Raises:
        CheckpointError, StackedError: See `joined`.
    """
    here = members_here(stack)
    given, own_parts, steps = {}, [], torch.zeros(len(stack))
    for owned, own in parts:
        assert owned.member is not None
        steps[owned.member] = float(own.get("step", any(value is not None for value in own.values())))
        if owned.member in here:
            given[owned.names[0]] = own
            own_parts.append(Part(owned.names[0], local(stack), 0, owned.member - here.start))
    made = joined(own_parts, given, {}, optimizer) if own_parts else {}
    if isinstance(optimizer, PerExpert) and steps.any() and is_sharded(stack):
        made["step"] = steps
    is_on_device = any(owned.group.get("capturable") or owned.group.get("fused") for owned, _ in parts)
    for key, value in made.items():
        if key == "step" and (isinstance(optimizer, PerExpert) or not is_on_device):
            continue
        if isinstance(value, torch.Tensor):
            made[key] = _spread(value.to(stack.device), stack, tuple(stack.shape) if value.dim() else ())
    return made


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
) -> list[tuple[Owned, Sequence[Place]]]:
    """The places of each parameter's saved state, under the first of the parameter's names that has some."""
    by_name: dict[str, list[Place]] = {}
    for place in (*content.tensors, *content.values):
        if place[0] == "optimizer":
            by_name.setdefault(place[1], []).append(place)
    return [
        (owned, next((by_name[name] for name in owned.names if name in by_name), ()))
        for owned in trained(model, optimizer)
    ]


def _is_like(parameter: nn.Parameter, shape: tuple[int, ...]) -> bool:
    """True if state of this shape is spread as its parameter is."""
    return bool(shape) and shape == tuple(parameter.shape)


def _spread(value: torch.Tensor, parameter: nn.Parameter, shape: tuple[int, ...]) -> torch.Tensor:
    """A rank's part of state, sharded as its parameter is if it has the parameter's shape."""
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
            if key in _OF_PARAMETERS
            or (isinstance(group.get(key), torch.Tensor) and not isinstance(value, bool | int | float))
            or (isinstance(group.get(key), tuple) and not isinstance(value, list))
        ]
        if wrong:
            raise CheckpointError(
                f"'directory' or 'file' must hold hyperparameters of this optimizer (got others of {listed(wrong)}). "
                f"Make the optimizer as it was when it was saved"
            )
