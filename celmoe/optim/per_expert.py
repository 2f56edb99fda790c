"""Steps over runs of present experts of a stack: absent ones stay as they are, moments and weight decay included.

Axes: M members of a stack.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain, compress
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch

from celmoe.errors import CheckpointError, ConfigError
from celmoe.stacked.frozen import frozen_members
from celmoe.stacked.parallel import join_reached
from celmoe.stacked.presence import forget, reached
from celmoe.stacked.rows import is_sharded, local, members_here
from celmoe.stacked.stack import Entry

#: A group's entry with the members of stacks that are its own. See [Note: Groups of experts].
MEMBERS = "stack_members"


class Runs:
    """Runs of neighbouring members that are present and have made equally many steps.

    Args:
        present: ``[M]``: true for the members that are stepped.
        steps: ``[M]``: each member's number of steps until now.

    Attributes:
        steps: The number of steps of each run.
    """

    def __init__(self, present: npt.NDArray[np.bool_], steps: npt.NDArray[np.float32]) -> None:
        numbers = np.where(present, steps, -1.0)
        # A rank may hold no member of a sharded stack.
        starts = np.flatnonzero(np.concatenate(([True], numbers[1:] != numbers[:-1]))[: len(numbers)])
        self._sizes = (np.append(starts[1:], len(numbers)) - starts).tolist()
        are_present = present[starts]
        self._are_present = are_present.tolist()
        self.steps = numbers[starts][are_present].astype(np.float32)

    def of(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The runs' parts of a tensor ``[M, ...]``."""
        return list(compress(tensor.split(self._sizes), self._are_present))


class Share(NamedTuple):
    """The part of a parameter that a group steps.

    Attributes:
        parameter: The parameter.
        number: The parameter's place among all of the optimizer's, as in its ``state_dict``.
        members: The places of the members of a stack that are the group's; ``None`` for the whole parameter.
    """

    parameter: torch.Tensor
    number: int
    members: list[int] | None

    def without(self, frozen: frozenset[int]) -> Share:
        """The share without frozen members of its stack."""
        if not frozen:
            return self
        members = range(len(self.parameter)) if self.members is None else self.members
        return self._replace(members=sorted(set(members) - frozen))


class PerExpert(torch.optim.Optimizer):
    """A step over the groups' parameters, stacked and ordinary ones.

    [Note: Groups of experts] A group may be given a stacked expert's own tensors, which are views of stacks. Each stack
    then stands in the ``params`` of one group, the first with one of its members. Every group with some of its members
    keeps them in an entry `MEMBERS`: ``[[number, [member, ...]], ...]``, by the stack's number in the ``state_dict``.
    """

    keeps_frozen = True

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # as torch's
        """Make one step.

        Args:
            closure: Computes the loss anew, and its gradients.

        Returns:
            The closure's loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        join_reached()
        frozen = frozen_members()
        known: dict[Any, Runs] = {}
        for group, shares in zip(self.param_groups, shares_of(self), strict=True):
            some = [share for share in shares if share.parameter.grad is not None]
            if frozen:
                some = [share.without(frozen.get(id(share.parameter), frozenset())) for share in some]
            # PyTorch's SGD knows of no steps without momentum.
            is_counted = bool(group.get("momentum", True))
            runs = [self._runs_of(share, known, is_counted=is_counted) for share in some]
            if some:
                self.step_group(group, [share.parameter for share in some], runs)
        return loss

    def step_group(
        self, group: dict[str, Any], parameters: Sequence[torch.Tensor], all_runs: Sequence[Runs | None]
    ) -> None:
        """Step a group's parameters that have a gradient.

        Args:
            group: The group.
            parameters: The parameters.
            all_runs: The runs of each stack that are stepped, which are counted; ``None`` for an ordinary parameter.
        """
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As usual; the parameters may be a stacked expert's own.

        Raises:
            ConfigError: An expert's tensor is in a group already, or has a name.
        """
        params = param_group.get("params") if isinstance(param_group, dict) else None
        given = [params] if isinstance(params, torch.Tensor) else params
        if isinstance(given, set) or not isinstance(given, Iterable):
            # PyTorch has the words for these.
            super().add_param_group(param_group)
            return
        given = list(given)
        if any(isinstance(each, tuple) and any(isinstance(part, Entry) for part in each) for each in given):
            raise ConfigError("'params' must have stacked experts' tensors without names (got some with names)")
        own: dict[int, tuple[torch.Tensor, list[int]]] = {}
        rest = []
        for each in given:
            if isinstance(each, Entry):
                whole = each.place.stack.whole(each.place.path)
                own.setdefault(id(whole), (whole, []))[1].append(each.place.member)
            else:
                rest.append(each)
        self._require_free(own.values(), rest)
        held = _parameters(self.param_groups)
        numbers = {id(each): number for number, each in enumerate(held)}
        new = [whole for key, (whole, _) in own.items() if key not in numbers]
        numbers |= {id(each): number for number, each in enumerate(new, len(held) + len(rest))}
        entry = {MEMBERS: [[numbers[key], sorted(members)] for key, (_, members) in own.items()]} if own else {}
        super().add_param_group({**param_group, "params": rest + new, **entry})

    def _require_free(self, own: Iterable[tuple[torch.Tensor, list[int]]], rest: Sequence[Any]) -> None:
        """Refuse a second group for an expert's tensor.

        Raises:
            ConfigError: Some tensors have a group already, or are given twice.
        """
        taken: dict[int, list[int] | None] = {}
        for share in chain.from_iterable(shares_of(self) if self.param_groups else ()):
            before = taken.get(id(share.parameter), [])
            taken[id(share.parameter)] = None if share.members is None or before is None else before + share.members
        wholes = set(map(id, rest))
        for whole, members in own:
            others = taken.get(id(whole), [])
            if id(whole) in wholes or others is None or len({*others, *members}) < len(others) + len(members):
                raise ConfigError(
                    "'params' must have each expert's tensor in one parameter group only (got some parameters that "
                    "appear in more than one, or twice)"
                )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As usual; of a stack with members in no group, the gradients of those are kept.

        Args:
            set_to_none: See `torch.optim.Optimizer.zero_grad`.
        """
        own: dict[torch.Tensor, list[int]] = {}
        for parameter, _, members in chain.from_iterable(shares_of(self)):
            if members is not None:
                own.setdefault(parameter, []).extend(members)
        if own:
            # All ranks keep the same gradients.
            join_reached()
        kept = []
        for parameter, members in own.items():
            grad = parameter.grad
            if grad is None or len(members) == len(parameter):
                continue
            if not set_to_none or forget(parameter, members):
                with torch.no_grad():
                    grad[members] = 0
                kept.append((parameter, grad))
                parameter.grad = None
        super().zero_grad(set_to_none)
        for parameter, grad in kept:
            parameter.grad = grad

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As usual.

        Raises:
            CheckpointError: The state is of groups with other members of stacks.
        """
        groups = state_dict["param_groups"]
        for place, (own, saved) in enumerate(zip(self.param_groups, groups, strict=False)):
            if own.get(MEMBERS) != saved.get(MEMBERS):
                raise CheckpointError(
                    f"'state_dict' must be of groups with the same experts as the optimizer's (got others for group "
                    f"{place}; make the optimizer with the groups that were saved)"
                )
        super().load_state_dict(state_dict)

    def _runs_of(self, share: Share, known: dict[Any, Runs], *, is_counted: bool) -> Runs | None:
        """The runs of a stack that are stepped now; ``None`` for an ordinary parameter.

        Args:
            share: The share of the parameter.
            known: The runs that were found in this step: a stack's tensors mostly have the same.
            is_counted: True if the state keeps each member's number of steps. Else all steps are like first ones.
        """
        parameter = share.parameter
        state: dict[str, Any] = self.state.get(parameter, {})
        steps: torch.Tensor | None = state.get("step")
        present = reached(parameter)
        if present is None:
            if share.members is None and (steps is None or not steps.dim()):
                return None
            # A gradient that no backward pass gave is of all members.
            present = np.ones(len(parameter), dtype=np.bool_)
        if share.members is not None:
            own = np.zeros(len(parameter), dtype=np.bool_)
            own[share.members] = True
            present &= own
        members = members_here(parameter)
        if not is_counted:
            steps = torch.zeros(len(parameter))
        elif steps is None:
            # A state without steps is of steps that were all members'.
            steps = torch.full((len(parameter),), 1.0 if state else 0.0)
        elif not steps.dim() or steps.device.type != "cpu":
            # The host reads which runs there are.
            steps = steps.cpu().expand(len(parameter)).clone()
        counts = steps.numpy()
        # Each rank counts the steps of all members, also where it holds some of them.
        here = slice(members.start, members.stop)
        key = present[here].tobytes(), counts[here].tobytes()
        if (runs := known.get(key)) is None:
            runs = known[key] = Runs(present[here], counts[here])
        if is_counted:
            counts += present
            self.state[parameter]["step"] = steps
        return runs


def shares_of(optimizer: torch.optim.Optimizer) -> list[list[Share]]:
    """The shares of each group's parameters. See [Note: Groups of experts]."""
    groups = optimizer.param_groups
    everything = _parameters(groups) if any(MEMBERS in group for group in groups) else []
    found: list[list[Share]] = []
    start = 0
    for group in groups:
        members = dict(group.get(MEMBERS, ()))
        own = [Share(each, number, members.pop(number, None)) for number, each in enumerate(group["params"], start)]
        found.append(own + [Share(everything[number], number, places) for number, places in members.items()])
        start += len(group["params"])
    return found


def _parameters(groups: Sequence[dict[str, Any]]) -> list[torch.Tensor]:
    return [each for group in groups for each in group["params"]]


def parts_of(runs: Runs | None, tensor: torch.Tensor) -> list[torch.Tensor]:
    """The runs' parts of a stack; an ordinary tensor whole. Of a sharded tensor, this rank's part."""
    return [local(tensor)] if runs is None else runs.of(local(tensor))


def grad_of(parameter: torch.Tensor) -> torch.Tensor:
    """The gradient, which the parameter has."""
    grad: Any = parameter.grad
    if is_sharded(parameter) and grad.placements != (wanted := cast(Any, parameter).placements):
        grad = grad.redistribute(placements=wanted)
    assert grad is not None
    return cast(torch.Tensor, grad)
