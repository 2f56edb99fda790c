"""A group's shares of parameters, while experts change: their order, their names, and how an optimizer keeps them.

Axes: M members of a stack.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import nn

from celmoe.names import NamedModules
from celmoe.optim.per_expert import MEMBERS
from celmoe.stacked.naming import named_tensors
from celmoe.stacked.stack import Stack, slot_of

# An expert's name, and a tensor's path in the expert.
Row: TypeAlias = tuple[str, str]


class GroupShare(NamedTuple):
    """A group's share of a parameter: all of it, or some members of a stack."""

    parameter: torch.Tensor
    members: list[int] | None


def ordinary_parameters(expert: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """An expert's parameters that are in no stack, by path."""
    return [
        (f"{prefix}{'.' if prefix else ''}{name}", parameter)
        for prefix, module in expert.named_modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]


def stacked_rows(registry: NamedModules) -> dict[Stack, dict[str, dict[str, int]]]:
    """By stack and path, the places of the members that have a tensor there; replaced modules have none.

    Args:
        registry: A level's experts.
    """
    found: dict[Stack, dict[str, dict[str, int]]] = {}
    for name, expert in registry.items():
        for module in expert.modules():
            if (slot := slot_of(module)) is not None:
                for path in slot.paths.values():
                    if path is not None:
                        found.setdefault(slot.stack, {}).setdefault(path, {})[name] = slot.member
    return found


def share_of(stack: Stack, path: str, groups: Mapping[Row, int], number: int) -> list[GroupShare]:
    """A group's share of a stack; empty if the group has no member."""
    members = [member for member, name in enumerate(stack.names) if groups.get((name, path)) == number]
    if not members:
        return []
    return [GroupShare(stack.whole(path), None if len(members) == len(stack.names) else members)]


def insert(shares: list[GroupShare], share: GroupShare, order: Mapping[int, int]) -> None:
    """Put a share behind the last one that a new model has before it."""
    place = order[id(share.parameter)]
    before = [at for at, each in enumerate(shares) if order.get(id(each.parameter), place) < place]
    after = [at for at, each in enumerate(shares) if order.get(id(each.parameter), place) > place]
    shares.insert(before[-1] + 1 if before else after[0] if after else len(shares), share)


def sort(shares: list[GroupShare], order: Mapping[int, int]) -> None:
    """Put the model's parameters in the model's order; what is not the model's stays at its place."""
    places = [at for at, each in enumerate(shares) if id(each.parameter) in order]
    own = sorted((shares[at] for at in places), key=lambda share: order[id(share.parameter)])
    for at, share in zip(places, own, strict=True):
        shares[at] = share


def write(optimizer: torch.optim.Optimizer, shares: Sequence[Sequence[GroupShare]], names: Names) -> None:
    """Write the groups, which stay the same objects. See [Note: Groups of experts]."""
    numbers: dict[int, int] = {}
    for group, some in zip(optimizer.param_groups, shares, strict=True):
        own = [each for each, _ in some if id(each) not in numbers]
        numbers |= {id(each): number for number, each in enumerate(own, len(numbers))}
        group["params"] = own
        if "param_names" in group:
            group["param_names"] = [names.of(each) for each in own]
    for group, some in zip(optimizer.param_groups, shares, strict=True):
        group.pop(MEMBERS, None)
        if entry := [[numbers[id(each)], members] for each, members in some if members is not None]:
            group[MEMBERS] = entry


class Names:
    """The names that an optimizer's groups give to parameters, if they do.

    Args:
        model: The changed model.
        optimizer: The optimizer before the change.
        before: The model's names before the change, by id of an ordinary parameter.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, before: Mapping[int, str]) -> None:
        self._given = {
            id(parameter): name
            for group in optimizer.param_groups
            for parameter, name in zip(group["params"], group.get("param_names", ()), strict=False)
        }
        self._before = before
        self._now = {id(each): name for name, (each, member) in named_tensors(model).items() if member is None}
        # A model may be a part of the module that named the parameters.
        self._prefix = next(
            (
                name.removesuffix(before[key])
                for key, name in self._given.items()
                if name.endswith(before.get(key, "\0"))
            ),
            "",
        )

    def follow(self, before: torch.Tensor, after: torch.Tensor) -> None:
        """Let a parameter have another one's name."""
        if id(before) in self._given:
            self._given[id(after)] = self._given[id(before)]

    def of(self, parameter: torch.Tensor) -> str:
        """The name of a parameter."""
        given, now = self._given.get(id(parameter)), self._now.get(id(parameter))
        if now is None or (given is not None and given != f"{self._prefix}{self._before.get(id(parameter), now)}"):
            return given or ""
        return f"{self._prefix}{now}"
