"""An optimizer's state by the experts' own names, the same for stacked experts and for experts that are not.

The form is PyTorch's, as `torch.distributed.checkpoint.state_dict.get_optimizer_state_dict` gives it.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from celmoe.errors import CheckpointError, InputTypeError, listed, nearest
from celmoe.stacked.naming import named_tensors, stacked_ids

from .members import Part, cut, joined
from .per_expert import MEMBERS, shares_of

# Entries of a group that say how a step is computed, not what it gives.
_MEANS = frozenset({"foreach", "fused", "capturable", "differentiable"})
_OF_PARAMETERS = frozenset({"params", "param_names", MEMBERS})


def state_by_name(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state by the parameters' names in the model.

    A stacked model gives the names and tensors of the same experts without a stack, whose parameters have state of
    their own. An expert that `celmoe.optim` has never stepped has no state. PyTorch's optimizers count one step for all
    experts of a stack: each of them gets it.

    Moments share memory with the optimizer's, as in ``optimizer.state_dict()``; those of a stack's experts are views of
    one tensor. The optimizer's next step writes into them: copy the result with `copy.deepcopy` to keep it longer.
    `torch.save` writes such a tensor once; `pickle` would write it anew for each of its views.

    Args:
        model: The model, or any module that holds it.
        optimizer: An optimizer of the model's parameters, of PyTorch's or of `celmoe.optim`.

    Returns:
        ``{"state": {name: {key: value}}, "param_groups": [{"params": [name, ...], "lr": ..., ...}, ...]}``.

    Raises:
        InputTypeError: ``model`` is no module, or ``optimizer`` no optimizer.
        CheckpointError: The optimizer has a parameter that the model does not have.
        StackedError: A stack has state that can't be told apart by expert, such as factored moments of its vectors.
    """
    groups = _groups(model, optimizer)
    packed = optimizer.state_dict()
    state: dict[str, dict[str, Any]] = {}
    found: list[dict[str, Any]] = []
    for parts, group in zip(groups, packed["param_groups"], strict=True):
        names = [part.name for part in parts]
        named = {"params": names, **({"param_names": list(names)} if "param_names" in group else {})}
        found.append({key: value for key, value in group.items() if key not in _OF_PARAMETERS} | named)
        for part in parts:
            own = packed["state"].get(part.number)
            if own and (mine := cut(own, part, optimizer, group)):
                state[part.name] = mine
    return {"state": state, "param_groups": found}


def load_state_by_name(model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Give the optimizer a state by name, of the same experts, stacked or not; the opposite of `state_by_name`.

    The optimizer's groups must hold the same names as the state's, in any order. The groups take over the state's
    hyperparameters, but not ``foreach``, ``fused``, ``capturable`` and ``differentiable``. The state is copied.

    Args:
        model: The model, or any module that holds it.
        optimizer: An optimizer of the model's parameters, of PyTorch's or of `celmoe.optim`.
        state: See `state_by_name`.

    Raises:
        InputTypeError: An argument is of the wrong kind.
        CheckpointError: Names, shapes, groups or hyperparameters do not fit; or the optimizer has a parameter that the
            model does not have. Nothing is changed then.
        StackedError: The optimizer can't keep the experts' states apart in a stack. Nothing is changed then.
    """
    own = _groups(model, optimizer)
    given, saved = _checked(state)
    order = _matched(own, saved)
    _require_known(given, [part.name for parts in own for part in parts])
    by_number: dict[int, list[Part]] = {}
    for parts in own:
        for part in parts:
            by_number.setdefault(part.number, []).append(part)
    packed = optimizer.state_dict()
    loaded: dict[int, dict[str, Any]] = {}
    for number, parts in by_number.items():
        if made := joined(parts, given, packed["state"].get(number, {}), optimizer):
            loaded[number] = made
    groups = []
    for place, group in enumerate(packed["param_groups"]):
        new = {key: copy.deepcopy(value) for key, value in saved[order[place]].items() if key not in _OF_PARAMETERS}
        groups.append(_hyperparameters(group, new, place))
    optimizer.load_state_dict({"state": loaded, "param_groups": groups})


def _groups(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[Part]]:
    """The parameters of each group by name; members of stacks stand in the order of the model's names.

    Raises:
        InputTypeError: ``model`` is no module, or ``optimizer`` no optimizer.
        CheckpointError: The optimizer has a parameter that the model does not have.
    """
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"'model' must be a torch.nn.Module (got {type(model).__name__})")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InputTypeError(f"'optimizer' must be a torch.optim.Optimizer (got {type(optimizer).__name__})")
    places: dict[int, list[tuple[str, int | None]]] = {}
    order: dict[str, int] = {}
    for name, (parameter, member) in named_tensors(model).items():
        places.setdefault(id(parameter), []).append((name, member))
        order[name] = len(order)
    found: list[list[Part]] = []
    stacks = stacked_ids(model)
    strangers = 0
    for shares in shares_of(optimizer):
        parts: list[Part] = []
        for parameter, number, members in shares:
            names = places.get(id(parameter), ())
            strangers += not names and id(parameter) not in stacks
            parts += [
                Part(name, parameter, number, member)
                for name, member in names
                if members is None or member is None or member in members
            ]
        has_stacks = any(part.member is not None for part in parts)
        found.append(sorted(parts, key=lambda part: order[part.name]) if has_stacks else parts)
    if strangers:
        raise CheckpointError(
            f"'optimizer' must be of the model's parameters (got {strangers} that the model does not have; make it "
            f"from model.parameters(), after the experts are stacked or unstacked)"
        )
    return found


def _checked(state: Any) -> tuple[Mapping[str, Mapping[str, Any]], list[Mapping[str, Any]]]:
    """The states by name, and the groups, of a state in the form of `state_by_name`.

    Raises:
        InputTypeError: The state has another form.
    """
    is_mapping = isinstance(state, Mapping) and {"state", "param_groups"} <= state.keys()
    given, groups = (state["state"], state["param_groups"]) if is_mapping else (None, None)
    is_right = (
        isinstance(given, Mapping)
        and all(isinstance(name, str) and isinstance(own, Mapping) for name, own in given.items())
        and isinstance(groups, list | tuple)
        and all(isinstance(group, Mapping) and isinstance(group.get("params"), list | tuple) for group in groups)
        and all(isinstance(name, str) for group in groups for name in group["params"])
    )
    if not is_right:
        raise InputTypeError(
            "'state' must be {'state': {name: {...}}, 'param_groups': [{'params': [name, ...], ...}]}, as "
            "celmoe.optim.state_by_name gives it (got another form; optimizer.load_state_dict takes one by position)"
        )
    return cast(Mapping[str, Mapping[str, Any]], given), list(cast(Sequence[Mapping[str, Any]], groups))


def _matched(own: Sequence[Sequence[Part]], saved: Sequence[Mapping[str, Any]]) -> list[int]:
    """For each group of the optimizer, the place of the saved group with the same names.

    Raises:
        CheckpointError: The groups hold other names.
    """
    mine = [name for parts in own for name in (part.name for part in parts)]
    theirs = Counter(name for group in saved for name in group["params"])
    if missing := [name for name in mine if name not in theirs]:
        raise CheckpointError(
            f"'state' must have all parameters of the optimizer in its groups (got none of {listed(missing)}; "
            f"{nearest(missing, theirs)})"
        )
    _require_known(theirs, mine)
    if twice := [name for name, count in theirs.items() if count > 1]:
        raise CheckpointError(f"'state' must have each parameter in one group (got {listed(twice)} more than once)")
    waiting: dict[frozenset[str], list[int]] = {}
    for place, group in enumerate(saved):
        waiting.setdefault(frozenset(group["params"]), []).append(place)
    order = []
    for place, parts in enumerate(own):
        names = frozenset(part.name for part in parts)
        if not waiting.get(names):
            raise CheckpointError(
                f"'state' must have groups of the same parameters as the optimizer's (got none like its group {place}, "
                f"of {listed(sorted(names))}; make the optimizer with the groups that were saved)"
            )
        order.append(waiting[names].pop(0))
    if len(own) != len(saved):
        raise CheckpointError(f"'state' must have {len(own)} groups, like the optimizer (got {len(saved)})")
    return order


def _require_known(names: Mapping[str, Any], known: Sequence[str]) -> None:
    """Refuse names that are no parameter of the optimizer.

    Raises:
        CheckpointError: A name is unknown.
    """
    all_known = set(known)
    if unknown := [name for name in names if name not in all_known]:
        raise CheckpointError(
            f"'state' must be of the optimizer's parameters only (got {listed(unknown)}; {nearest(unknown, known)})"
        )


def _hyperparameters(group: Mapping[str, Any], new: dict[str, Any], place: int) -> dict[str, Any]:
    """A group with saved hyperparameters.

    Raises:
        CheckpointError: They are another optimizer's.
    """
    # A flag may be newer than what was saved.
    needed = [
        key
        for key, value in group.items()
        if key not in _OF_PARAMETERS | _MEANS | {"initial_lr"} and not (value is None or isinstance(value, bool))
    ]
    if missing := [key for key in needed if key not in new]:
        raise CheckpointError(
            f"'state' must hold the hyperparameters of this optimizer (got no {listed(missing)} for its group {place}; "
            f"make the optimizer that was saved)"
        )
    made = {**group, **{key: value for key, value in new.items() if key not in _MEANS}}
    for key, value in group.items():
        if isinstance(value, tuple) and isinstance(made[key], list):
            made[key] = tuple(made[key])
    return made
