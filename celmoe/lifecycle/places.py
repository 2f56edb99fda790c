"""The places of parameters in an optimizer's groups, and the state there, while experts change.

An ordinary parameter stays the same object, so its state stays. A stack is made anew, and each of its rows is known by
the expert's name and the tensor's path.

Axes: M members of a stack.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from celmoe.errors import ConfigError, InputTypeError, StackedError
from celmoe.names import NamedModules
from celmoe.optim.members import COMMON, Part, cut, joined
from celmoe.optim.per_expert import PerExpert, shares_of
from celmoe.stacked.naming import named_tensors
from celmoe.stacked.stack import Stack

from .shares import GroupShare, Names, Row, insert, ordinary_parameters, share_of, sort, stacked_rows, write

# Moments that are zero before a parameter's first step.
_ZERO_AT_FIRST = frozenset(
    {
        *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer"),
        *("square_avg", "grad_avg", "acc_delta"),
    }
)


class _After(NamedTuple):
    """A level after a change.

    Attributes:
        made: By id of a stack that was opened, the stack that was made anew.
        renamed: By old name of an expert, the new one.
        groups: By row of a stack or new expert, the number of its group.
        ordinary: By name of an expert and path, the parameters that are in no stack.
    """

    made: Mapping[int, Stack]
    renamed: Mapping[str, str]
    groups: Mapping[Row, int]
    ordinary: Mapping[str, Mapping[str, nn.Parameter]]


class Places:
    """Where an optimizer has a model's parameters before experts change.

    Args:
        model: The model.
        optimizer: The optimizer.
        registry: The experts of the level that changes.
        opened: The stacks of the level that are made anew.

    Raises:
        InputTypeError: ``optimizer`` is no optimizer.
        ConfigError: The optimizer's state does not go by parameter.
        StackedError: A stack has state that can't be told apart by expert.

    Attributes:
        optimizer: The optimizer.
        group_of: By row of the level's experts, the number of its group.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, registry: NamedModules, opened: Sequence[Stack]
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise InputTypeError(f"'optimizer' must be a torch.optim.Optimizer (got {type(optimizer).__name__})")
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ConfigError(
                "'optimizer' must keep a state for each parameter (got LBFGS, whose history is of all together; make "
                "it anew)"
            )
        self.optimizer = optimizer
        self._model = model
        self._groups = [[GroupShare(each, members) for each, _, members in shares] for shares in shares_of(optimizer)]
        # By id of a stacked parameter, the stack and the path.
        self._whole_of = {id(stack.whole(path)): (stack, path) for stack in opened for path in stack.keys}
        # Their ids must not be given to others.
        self._kept = [stack.whole(path) for stack in opened for path in stack.keys]
        self._registry = registry
        self._order = {id(each): place for place, each in enumerate(model.parameters())}
        self._names = {
            id(parameter): name for name, (parameter, member) in named_tensors(model).items() if member is None
        }
        rows = stacked_rows(registry)
        self.group_of = self._grouped(rows)
        self._state_of: dict[Row, dict[str, Any]] = {}
        for stack, path in self._whole_of.values():
            whole = stack.whole(path)
            for name, member in rows[stack].get(path, {}).items() if whole in optimizer.state else ():
                if (number := self.group_of.get((name, path))) is not None:
                    part = Part(f"{name}/{path}", whole, 0, member)
                    if mine := cut(optimizer.state[whole], part, optimizer, optimizer.param_groups[number]):
                        self._state_of[name, path] = mine
        # Groups that have the model's parameters in the order of a new model keep them so.
        orders = [[self._order[id(each)] for each, _ in some if id(each) in self._order] for some in self._groups]
        self._is_sorted = [order == sorted(order) for order in orders]

    def _grouped(self, rows: Mapping[Stack, Mapping[str, Mapping[str, int]]]) -> dict[Row, int]:
        """By row of the level's experts, the number of its group."""
        wholes = {id(stack.whole(path)): (path, own[path]) for stack, own in rows.items() for path in own}
        found: dict[Row, int] = {}
        place_of: dict[int, int] = {}
        for number, shares in enumerate(self._groups):
            for parameter, members in shares:
                if id(parameter) in wholes:
                    path, places = wholes[id(parameter)]
                    found |= {
                        (name, path): number for name, member in places.items() if members is None or member in members
                    }
                else:
                    place_of[id(parameter)] = number
        for name, expert in self._registry.items():
            for path, parameter in ordinary_parameters(expert):
                if id(parameter) in place_of:
                    found[name, path] = place_of[id(parameter)]
        return found

    def require_first_values(self, stack: Stack) -> None:
        """Refuse a new row in a stack whose state begins with values that nobody knows.

        Raises:
            StackedError: The optimizer counts a stack's steps together, and keeps other moments than those of zeros.
        """
        wholes = [] if isinstance(self.optimizer, PerExpert) else [stack.whole(path) for path in stack.keys]
        for whole in wholes:
            for key, value in self.optimizer.state.get(whole, {}).items():
                is_moment = isinstance(value, torch.Tensor) and value.shape == whole.shape and key not in COMMON
                if is_moment and key not in _ZERO_AT_FIRST and not _is_sum(self.optimizer, key):
                    raise StackedError(
                        f"'optimizer' must have a state whose first value is known (got {key!r} of "
                        f"{type(self.optimizer).__name__}; take one of celmoe.optim, or make the optimizer anew)"
                    )

    def move(
        self,
        made: Mapping[int, Stack],
        renamed: Mapping[str, str],
        gone: Collection[int],
        new: Mapping[Row, int | None],
    ) -> None:
        """Give the optimizer the model's parameters as they are now.

        Args:
            made: By id of a stack that was opened, the stack that was made anew; none if no member is left for one.
            renamed: By old name of an expert, the new one.
            gone: The ids of ordinary parameters that are no part of the model any more.
            new: By row of a new expert, its group.
        """
        groups = {(renamed.get(name, name), path): group for (name, path), group in self.group_of.items()}
        groups |= {row: group for row, group in new.items() if group is not None}
        states = {(renamed.get(name, name), path): state for (name, path), state in self._state_of.items()}
        own = {name: dict(ordinary_parameters(each)) for name, each in self._registry.items()}
        after = _After(made, renamed, groups, own)
        shares = [self._followed(number, after, gone) for number in range(len(self._groups))]
        order = {id(each): place for place, each in enumerate(self._model.parameters())}
        self._take_in(new, shares, after, order)
        for is_sorted, some in zip(self._is_sorted, shares, strict=True):
            if is_sorted:
                sort(some, order)
        names = Names(self._model, self.optimizer, self._names)
        for old in self._kept:
            stack, path = self._whole_of[id(old)]
            if id(stack) in made:
                names.follow(old, made[id(stack)].whole(path))
        for parameter in [each for each in self.optimizer.state if id(each) in self._whole_of or id(each) in gone]:
            del self.optimizer.state[parameter]
        self._take_states(after, states, {name for name, _ in new})
        write(self.optimizer, shares, names)

    def _followed(self, number: int, after: _After, gone: Collection[int]) -> list[GroupShare]:
        """A group's shares, with what has come in place of opened stacks, and without what is gone."""
        found: list[GroupShare] = []
        held = {id(each) for some in self._groups for each, _ in some}
        for share in self._groups[number]:
            if id(share.parameter) not in self._whole_of:
                found += [] if id(share.parameter) in gone else [share]
                continue
            stack, path = self._whole_of[id(share.parameter)]
            if (anew := after.made.get(id(stack))) is not None:
                found += share_of(anew, path, after.groups, number)
            # Experts that have left the stack have parameters of their own.
            for name in (after.renamed.get(name, name) for name in stack.names):
                own = after.ordinary.get(name, {}).get(path)
                if own is not None and id(own) not in held and after.groups.get((name, path)) == number:
                    found.append(GroupShare(own, None))
        return found

    def _take_in(
        self,
        new: Mapping[Row, int | None],
        shares: Sequence[list[GroupShare]],
        after: _After,
        order: Mapping[int, int],
    ) -> None:
        """Add a new expert's parameters to the shares of its groups."""
        held = {id(each) for some in shares for each, _ in some}
        for (name, path), group in new.items():
            if group is None:
                continue
            own = after.ordinary[name].get(path)
            if own is not None and id(own) not in held:
                held.add(id(own))
                insert(shares[group], GroupShare(own, None), order)
                self._begin(own, group)
            for stack in after.made.values() if own is None else ():
                # The stack's other members may be in other groups only.
                if name in stack.names and not any(each is stack.whole(path) for each, _ in shares[group]):
                    shares[group] += share_of(stack, path, after.groups, group)

    def _take_states(self, after: _After, states: Mapping[Row, dict[str, Any]], new: Collection[str]) -> None:
        """Give each row its state, in stacks that were made anew and out of stacks."""
        for stack in after.made.values():
            for path in stack.keys:
                whole = stack.whole(path)
                rows = {name: member for member, name in enumerate(stack.names) if (name, path) in after.groups}
                given = {name: states.get((name, path), {}) for name in rows}
                like = next((state for state in given.values() if state), None)
                if like is not None and not isinstance(self.optimizer, PerExpert):
                    given |= {name: self._first(like, whole[0]) for name in rows if name in new}
                parts = [Part(name, whole, 0, member) for name, member in rows.items()]
                if parts and (state := joined(parts, given, {}, self.optimizer)):
                    self.optimizer.state[whole] = state
        for (name, path), state in states.items():
            if (own := after.ordinary.get(name, {}).get(path)) is not None:
                self.optimizer.state[own] = {key: _cloned(each) for key, each in state.items()}

    def _first(self, like: Mapping[str, Any], row: torch.Tensor) -> dict[str, Any]:
        """The state of a row that was never stepped, in a stack whose steps are counted together."""
        return {
            key: torch.full_like(each, self._first_value(key))
            if isinstance(each, torch.Tensor) and each.shape == row.shape and key not in COMMON
            else _cloned(each)
            for key, each in like.items()
        }

    def _first_value(self, key: str) -> float:
        return float(self.optimizer.defaults["initial_accumulator_value"]) if _is_sum(self.optimizer, key) else 0.0

    def _begin(self, parameter: torch.Tensor, group: int) -> None:
        """Give a new parameter the state that an optimizer makes before the first step."""
        if isinstance(self.optimizer, torch.optim.Adagrad):
            options = self.optimizer.param_groups[group]
            own = {key: options[key] for key in ("foreach", "fused") if key in options}
            start = float(self.optimizer.defaults["initial_accumulator_value"])
            made = torch.optim.Adagrad([parameter], initial_accumulator_value=start, **own)
            self.optimizer.state[parameter] = made.state[parameter]


def _is_sum(optimizer: torch.optim.Optimizer, key: str) -> bool:
    return key == "sum" and isinstance(optimizer, torch.optim.Adagrad)


def _cloned(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value
