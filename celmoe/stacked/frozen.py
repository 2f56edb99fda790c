"""The stacks with frozen members, which optimizers that move them refuse to step.

PyTorch's optimizers see one parameter in a stack. Weight decay and old momentum would move frozen members, too.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from celmoe.errors import StackedError, listed

#: An optimizer's class with this attribute keeps frozen members as they are.
KEEPS_FROZEN = "keeps_frozen"


class _Stack(Protocol):
    names: tuple[str, ...]
    keys: dict[str, str]
    frozen: frozenset[int]

    def whole(self, path: str) -> torch.Tensor: ...

    def holders(self, path: str) -> frozenset[int]: ...


_STACKS: weakref.WeakSet[Any] = weakref.WeakSet()
_HOOKS: list[Any] = []


def note(stack: _Stack) -> None:
    """Note a stack with frozen members."""
    _STACKS.add(stack)
    if not _HOOKS:
        _HOOKS.append(register_optimizer_step_pre_hook(_require_kept))


def frozen_members() -> Mapping[int, frozenset[int]]:
    """By id of a stacked parameter, the places of the frozen members; only of stacks that have some."""
    stacks: list[_Stack] = [stack for stack in _STACKS if stack.frozen]
    return {id(stack.whole(path)): stack.frozen for stack in stacks for path in stack.keys}


def _require_kept(optimizer: torch.optim.Optimizer, _args: object, _kwargs: object) -> None:
    """Refuse a step that would move frozen members.

    Raises:
        StackedError: The optimizer holds a stack with frozen members, and sees one parameter in it.
    """
    frozen = frozen_members()
    if not frozen or getattr(type(optimizer), KEEPS_FROZEN, False):
        return
    for group in optimizer.param_groups:
        is_plain = type(optimizer) is torch.optim.SGD and not group["momentum"] and not group["weight_decay"]
        if is_plain:
            # A gradient of zero moves nothing then.
            continue
        for parameter in group["params"]:
            if id(parameter) in frozen and parameter.grad is not None:
                stack: _Stack = next(
                    each for each in _STACKS if any(each.whole(path) is parameter for path in each.keys)
                )
                path = next(path for path in stack.keys if stack.whole(path) is parameter)
                # The values of a member that another module has replaced are nobody's.
                kept = stack.frozen & stack.holders(path)
                if not kept:
                    continue
                names = listed(stack.names[member] for member in sorted(kept))
                raise StackedError(
                    f"'optimizer' must keep the frozen experts of a stack as they are (got "
                    f"{type(optimizer).__module__}.{type(optimizer).__name__}, which may move {names} by weight decay "
                    f"and momentum; take one of celmoe.optim, or make it anew after celmoe.unstack_experts)"
                )
