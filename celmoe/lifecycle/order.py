"""The order of experts, in the metadata of a ``state_dict``: integer ids are positions in that order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from celmoe.errors import CheckpointError, listed
from celmoe.routing.layout import Layout

#: The entry of the model's metadata in a ``state_dict``.
EXPERTS = "celmoe_experts"


def order_of(layout: Layout) -> dict[str, list[str]]:
    """By level, the names of its experts in order."""
    return {level.name: [*level.experts] for level in layout.levels}


def note_order(layout: Layout, destination: Any, prefix: str) -> None:
    """Put the order of experts into the metadata of a ``state_dict`` that has some.

    Args:
        layout: The model's layout.
        destination: The ``state_dict``.
        prefix: The beginning of the model's keys in it.
    """
    metadata = getattr(destination, "_metadata", None)
    if metadata is not None:
        metadata.setdefault(prefix[:-1], {})[EXPERTS] = order_of(layout)


def require_order(layout: Layout, saved: Any, name: str = "state_dict") -> None:
    """Refuse a checkpoint whose experts stand in another order than the model's.

    Experts that only one of both has do not count: PyTorch tells about their keys.

    Args:
        layout: The model's layout.
        saved: By level, the checkpoint's experts in order; anything else says nothing.
        name: The checkpoint's name in errors.

    Raises:
        CheckpointError: Two experts stand the other way round.
    """
    if not isinstance(saved, Mapping):
        return
    for level, experts in order_of(layout).items():
        theirs = [each for each in saved.get(level, ()) if each in set(experts)]
        ours = [each for each in experts if each in set(theirs)]
        if ours == theirs:
            continue
        place = next(place for place, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1])
        raise CheckpointError(
            f"{name!r} must have the experts of level {level!r} in the model's order, for ids are positions in it (got "
            f"{theirs[place]!r} before {ours[place]!r}; order the model's config like the checkpoint's, "
            f"{listed(theirs)}, or call celmoe.load_experts, which goes by name, if no data have ids)"
        )
