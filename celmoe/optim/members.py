"""A stack's optimizer state cut by member, and put together.

Axes: M members of a stack.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from celmoe.errors import CheckpointError, StackedError, listed

from .optimizers import SGD
from .per_expert import PerExpert

# State that experts of one stack have if their groups ask for it.
_OPTIONAL = frozenset({"max_exp_avg_sq"})
# State of which a stack has one for all members, also if its members are scalars.
COMMON = frozenset({"step", "mu_product", "eta", "mu"})


class Part(NamedTuple):
    """A parameter of one name in an optimizer.

    Attributes:
        name: Its name.
        parameter: The parameter that the optimizer holds.
        number: The parameter's place among all of the optimizer's.
        member: The expert's place in the stack; ``None`` for an ordinary parameter.
    """

    name: str
    parameter: torch.Tensor
    number: int
    member: int | None


def cut(
    own: Mapping[str, Any], part: Part, optimizer: torch.optim.Optimizer, group: Mapping[str, Any]
) -> dict[str, Any]:
    """A member's part of a stack's state; empty if the member was never stepped. An ordinary parameter's state.

    Raises:
        StackedError: The state can't be told apart by expert.
    """
    member, steps = part.member, own.get("step")
    if member is None:
        return dict(own)
    counts = isinstance(steps, torch.Tensor) and steps.dim() == 1
    if isinstance(steps, torch.Tensor) and counts and not steps[member]:
        return {}
    # PyTorch's SGD keeps no number of steps, and only groups with ``amsgrad`` keep maxima.
    left_out = {"step"} if isinstance(optimizer, SGD) else set() if group.get("amsgrad") else {*_OPTIONAL}
    keys = [key for key in own if key not in left_out]
    return {
        key: own[key].select(0, member).clone() if key == "step" and counts else _cut_one(key, own[key], part, member)
        for key in keys
    }


def _cut_one(key: str, value: Any, part: Part, member: int) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.Tensor):
        if _is_like(value.shape, part.parameter.shape) and len(value) == len(part.parameter):
            return value.select(0, member)
        if value.numel() == 1:
            # Each expert's own number of steps is counted in place.
            return value.clone()
    raise StackedError(
        f"'optimizer' must keep a state that can be told apart by expert (got {key!r}, {_told(value)}, of the stack "
        f"with {part.name!r}, of shape {tuple(part.parameter.shape)}; make the optimizer after "
        f"celmoe.unstack_experts, or take one of celmoe.optim)"
    )


def _is_like(shape: Sequence[int], wanted: Sequence[int]) -> bool:
    """True for the shape of a moment, whole or averaged over some of the parameter's axes."""
    return len(shape) == len(wanted) and all(one in (1, other) for one, other in zip(shape, wanted, strict=True))


def _told(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"


def joined(
    parts: Sequence[Part],
    given: Mapping[str, Mapping[str, Any]],
    current: Mapping[str, Any],
    optimizer: torch.optim.Optimizer,
) -> dict[str, Any]:
    """A parameter's state from the states of its names; empty if none of them has any.

    Args:
        parts: All names of the parameter in the optimizer.
        given: States by name.
        current: The parameter's state now.
        optimizer: The optimizer.

    Raises:
        CheckpointError: A state does not fit.
        StackedError: The optimizer can't keep the experts' states apart.
    """
    states = {part: given.get(part.name, {}) for part in parts}
    if parts[0].member is None:
        own = states[parts[0]]
        for key, value in own.items():
            # Some optimizers keep tensors of shapes of their own.
            if not (isinstance(value, torch.Tensor) and getattr(current.get(key), "shape", None) == value.shape):
                _require_shape(key, value, parts[0])
        return {key: _copied(value) for key, value in own.items()}
    found = {part: own for part, own in states.items() if any(value is not None for value in own.values())}
    if not found:
        return {}
    is_per_expert = isinstance(optimizer, PerExpert)
    if not is_per_expert and (lacking := [part.name for part in parts if part not in found]):
        raise _can_not_keep(optimizer, f"no state for {listed(lacking)}, and one for others")
    keys = _keys_of(found, is_per_expert=is_per_expert)
    is_counted = is_per_expert and not isinstance(optimizer, SGD)
    if is_counted and "step" not in keys:
        raise CheckpointError(f"'state' must have the 'step' of {parts[0].name!r} (got {listed(keys)})")
    made: dict[str, Any] = {}
    for key in keys:
        mine = {part: own[key] for part, own in found.items() if key in own}
        values, members = list(mine.values()), torch.tensor([part.member for part in mine])
        if key == "step" and is_counted:
            steps = torch.tensor([float(value) for value in values])
            made[key] = torch.zeros(len(parts[0].parameter)).index_copy_(0, members, steps)
        elif isinstance(values[0], torch.Tensor) and not _is_common(key, values[0], parts[0].parameter):
            made[key] = _stacked(key, values, members, parts[0])
        elif any(value != values[0] for value in values):
            raise _can_not_keep(optimizer, f"several values of {key!r}")
        else:
            made[key] = _copied(values[0])
    if isinstance(optimizer, SGD):
        made["step"] = torch.zeros(len(parts[0].parameter)).index_fill_(
            0, torch.tensor([part.member for part in found]), 1.0
        )
    return made


def _copied(value: Any) -> Any:
    # A deep copy of a view would copy the whole stack that it is of.
    return value.detach().clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)


def _keys_of(found: Mapping[Part, Mapping[str, Any]], *, is_per_expert: bool) -> list[str]:
    """The entries of all experts' states.

    Raises:
        CheckpointError: The experts have different entries, or one of another shape than its parameter's.
    """
    (first, own), *_ = found.items()
    for part, other in found.items():
        differing = other.keys() ^ own.keys()
        if differing - _OPTIONAL if is_per_expert else differing:
            raise CheckpointError(
                f"'state' must have the same entries for all experts of a stack (got {listed(other)} for "
                f"{part.name!r}, and {listed(own)} for {first.name!r})"
            )
        for key, value in other.items():
            _require_shape(key, value, part)
    return list(dict.fromkeys(key for other in found.values() for key in other))


def _stacked(key: str, values: Sequence[torch.Tensor], members: torch.Tensor, part: Part) -> torch.Tensor:
    """``[M, ...]``: the members' values, and zeros for other members.

    Raises:
        CheckpointError: The values have several shapes.
    """
    if len({getattr(value, "shape", None) for value in values}) > 1:
        raise CheckpointError(
            f"'state' must have {key!r} of one shape for all experts of a stack (got several for that of {part.name!r})"
        )
    whole = values[0].new_zeros((len(part.parameter), *values[0].shape))
    return whole.index_copy_(0, members.to(whole.device), torch.stack([value.to(whole) for value in values]))


def _is_common(key: str, value: torch.Tensor, stack: torch.Tensor) -> bool:
    return value.numel() == 1 and (key in COMMON or not _is_like(value.shape, stack.shape[1:]))


def _can_not_keep(optimizer: torch.optim.Optimizer, got: str) -> StackedError:
    return StackedError(
        f"'optimizer' must keep the experts' states apart, for the experts of a stack have made different steps (got "
        f"{type(optimizer).__name__}, and {got}; take an optimizer of celmoe.optim, or call celmoe.unstack_experts "
        f"before the optimizer is made)"
    )


def _require_shape(key: str, value: Any, part: Part) -> None:
    """Refuse a tensor that is neither a scalar nor a moment of its parameter.

    Raises:
        CheckpointError: The tensor has another shape.
    """
    shape = part.parameter.shape if part.member is None else part.parameter.shape[1:]
    if isinstance(value, torch.Tensor) and value.numel() != 1 and not _is_like(value.shape, shape):
        raise CheckpointError(
            f"'state' must have {key!r} of {part.name!r} in the parameter's shape, {tuple(shape)} (got {_told(value)})"
        )
