"""The part of a config that decides plans, as one value that is cheap to compare and to send.

Two configs of one layout give every routing the same plan. A plan carries its layout, and a model refuses a plan of
another layout: plans cross processes, and configs change between two calls.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from celmoe.errors import listed


class LevelLayout(NamedTuple):
    """One enabled level.

    Attributes:
        name: The level's name.
        experts: The experts' names in the config's order.
        parents: The ancestor of each of `experts` in the enabled level above, or ``None``.
        fallback: The level's `fallback_expert`.
    """

    name: str
    experts: tuple[str, ...]
    parents: tuple[str | None, ...]
    fallback: str | None


class Layout:
    """The enabled levels of a config in order, with their experts, parents and fallbacks.

    Attributes:
        packed: `levels` as bytes. Every call compares the layouts of plans from other processes; comparing the bytes of
            256 experts takes a tenth of the time of comparing their names.
    """

    __slots__ = ("packed",)

    def __init__(self, levels: Iterable[LevelLayout]) -> None:
        # With escapes, one character and two surrogates would be the same bytes.
        text = json.dumps([*levels], ensure_ascii=False, separators=(",", ":"))
        self.packed = text.encode("utf-8", "surrogatepass")

    @classmethod
    def of_packed(cls, packed: bytes) -> Layout:
        """The layout of these bytes; see `packed`."""
        return cls(_unpacked(packed))

    @property
    def levels(self) -> tuple[LevelLayout, ...]:
        """One `LevelLayout` a level, in order."""
        return _unpacked(self.packed)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self.packed == other.packed

    def __hash__(self) -> int:
        return hash(self.packed)

    def __repr__(self) -> str:
        return f"Layout({list(self.levels)})"

    def difference(self, wanted: Layout) -> tuple[str, str] | None:
        """The first difference: the wanted value in words, and this layout's value; ``None`` for equal layouts."""
        if self.packed == wanted.packed:
            return None
        ours, theirs = [level.name for level in self.levels], [level.name for level in wanted.levels]
        if ours != theirs:
            return f"levels {listed(theirs)}", listed(ours)
        pairs = zip(self.levels, wanted.levels, strict=True)
        return next(found for got, level in pairs if (found := _difference(got, level)) is not None)


@lru_cache(maxsize=16)
def _unpacked(packed: bytes) -> tuple[LevelLayout, ...]:
    levels = json.loads(packed.decode("utf-8", "surrogatepass"))
    return tuple(LevelLayout(name, tuple(experts), tuple(parents), last) for name, experts, parents, last in levels)


def _difference(got: LevelLayout, wanted: LevelLayout) -> tuple[str, str] | None:
    """Like `Layout.difference`, for two levels of one name."""
    level = f"level {wanted.name!r}"
    if set(got.experts) != set(wanted.experts):
        extra, missing = dict.fromkeys(got.experts), dict.fromkeys(wanted.experts)
        for name in [name for name in extra if name in missing]:
            del extra[name], missing[name]
        count = f"{len(got.experts)}; only there: {listed(extra)}; missing there: {listed(missing)}"
        return f"{len(wanted.experts)} experts in {level}", count
    for position, (here, name) in enumerate(zip(got.experts, wanted.experts, strict=True)):
        if here != name:
            return f"expert {name!r} at position {position} of {level}", repr(here)
    for name, ours, theirs in zip(wanted.experts, got.parents, wanted.parents, strict=True):
        if ours != theirs:
            return f"parent {theirs!r} for expert {name!r} of {level}", repr(ours)
    if got.fallback != wanted.fallback:
        return f"fallback_expert {wanted.fallback!r} in {level}", repr(got.fallback)
    return None
