"""The order of a model's experts beside its tensors: integer ids are positions in that order."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, TypeAlias

from torch import nn

from celmoe.hierarchy import HierarchicalCELMoE
from celmoe.lifecycle.order import EXPERTS, order_of, require_order

# By path of a model in the saved module, and by level, the experts' names in order.
Orders: TypeAlias = dict[str, dict[str, list[str]]]


def orders_of(module: nn.Module) -> Orders:
    """The orders of the experts of all models in a module."""
    return {
        path: order_of(each.layout) for path, each in module.named_modules() if isinstance(each, HierarchicalCELMoE)
    }


def require_orders(module: nn.Module, saved: Orders) -> None:
    """Refuse a checkpoint whose experts stand in another order than the module's.

    Raises:
        CheckpointError: Two experts stand the other way round.
    """
    for path, each in module.named_modules():
        if isinstance(each, HierarchicalCELMoE):
            require_order(each.layout, saved.get(path), "checkpoint")


def checked_orders(said: Any) -> Orders:
    """The orders that a file says, if they have the form.

    Raises:
        TypeError: They have another one.
    """
    is_right = isinstance(said, Mapping) and all(
        isinstance(levels, Mapping)
        and all(isinstance(names, list) and all(isinstance(each, str) for each in names) for names in levels.values())
        for levels in said.values()
    )
    if not is_right:
        raise TypeError(f"an order of experts {said!r}")
    return {path: {level: [*names] for level, names in levels.items()} for path, levels in said.items()}


def with_orders(state: Mapping[str, Any], orders: Orders) -> OrderedDict[str, Any]:
    """A ``state_dict`` with the orders in its metadata."""
    made: Any = OrderedDict(state)
    made._metadata = OrderedDict((path, {EXPERTS: order}) for path, order in orders.items())
    return made  # type: ignore[no-any-return]  # the attribute is no dict's


def orders_in(state: Any) -> Orders:
    """The orders in the metadata of a ``state_dict``; empty without metadata."""
    metadata = getattr(state, "_metadata", None) or {}
    return checked_orders({path: own[EXPERTS] for path, own in metadata.items() if EXPERTS in own})
