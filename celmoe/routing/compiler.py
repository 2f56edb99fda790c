"""Compile a user's routing to a plan: each level is routed, broadcast or inferred from the level below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from celmoe.config import CELMoEConfig, HierarchyLevelConfig, enabled_levels
from celmoe.errors import (
    ConfigError,
    MissingRouteError,
    PlanError,
    RouteLengthError,
    RouteTypeError,
    UnknownExpertError,
    UnknownLevelError,
    listed,
    nearest,
)

from .layout import Layout, LevelLayout
from .memberships import ForAll, Memberships, merged
from .plan import RoutingPlan, make_plan
from .routes import Codes, LevelCodes, LevelRoutes, RouteTable, Routing, code_array

_NO_PARENT = -1
_REFUSED, _FALLBACK = "refused", "fallback"


class RoutingCompiler:
    """Turns routings into plans for one config. Picklable and free of modules: it runs in ``DataLoader`` workers.

    Args:
        config: The hierarchy. Construction reads levels, experts and parents: later changes have no effect. Every call
            reads `fallback_expert`.
        unknown: The treatment of names that are no expert of their level: ``"refused"``; or ``"fallback"``, which takes
            the level's only expert, else its `fallback_expert`, in their place.

    Raises:
        ConfigError, ConfigTypeError: The config is not sound (see `config.enabled_levels`), or ``unknown`` is neither.

    Attributes:
        configs: The enabled levels' configs; a copy of a compiler, pickled or not, has their names and fallbacks only.

    Example::

        compiler = RoutingCompiler(config)
        plan = compiler({"family": ["slavic", "romance"], "language": ["ru", "fr"]})
        plan = compiler({"language": ["ru", {"es": 0.7, "pt": 0.3}, None]})
    """

    def __init__(self, config: CELMoEConfig, *, unknown: str = _REFUSED) -> None:
        if unknown not in (_REFUSED, _FALLBACK):
            raise ConfigError(f"'unknown' must be {_REFUSED!r} or {_FALLBACK!r} (got {unknown!r})")
        self._takes_unknown = unknown == _FALLBACK
        self.configs = enabled_levels(config)
        # Names of disabled levels too: their routes are ignored.
        self._names = frozenset(level.name for level in config.levels)
        fallbacks = [level.fallback_expert for level in self.configs]
        ancestors = [_ancestors(config.levels, place) for place, level in enumerate(config.levels) if level.enabled]
        layout = Layout(
            LevelLayout(level.name, tuple(level.experts), parents, fallback)
            for level, parents, fallback in zip(self.configs, ancestors, fallbacks, strict=True)
        )
        self._tables = [RouteTable(level.name, level.experts) for level in layout.levels]
        self._parents = [
            _parent_codes(upper, lower, parents)
            for upper, lower, parents in zip(self._tables, self._tables[1:], ancestors[1:], strict=False)
        ]
        self._fallbacks_and_layout = fallbacks, layout

    @property
    def layout(self) -> Layout:
        """The part of the config that plans depend on: the current fallbacks, and all else from construction."""
        fallbacks = [level.fallback_expert for level in self.configs]
        known, layout = self._fallbacks_and_layout
        if fallbacks != known:
            pairs = zip(layout.levels, fallbacks, strict=True)
            layout = Layout(level._replace(fallback=fallback) for level, fallback in pairs)
            self._fallbacks_and_layout = fallbacks, layout
        return layout

    def __getstate__(self) -> dict[str, Any]:
        # Later calls read only the configs' fallbacks; metadata may hold anything, even a lambda or a module.
        return {**vars(self), "configs": [replace(level, experts={}) for level in self.configs]}

    def __call__(self, routing: Routing | RoutingPlan | None = None, batch_size: int | None = None) -> RoutingPlan:
        """Compile the routing of one batch.

        Args:
            routing: For each level a sequence, NumPy array or tensor of names or ids (positions in the level's
                experts), one for each sample; or one route for the whole batch. In a sequence, a mapping of names or
                ids to weights stands for the weighted sum of several experts, and ``None`` for no expert: the row
                passes through the level unchanged. A level that is left out gives each sample the parents of the
                sample's experts in the level below, by their shares of the weights; else the only expert, else the
                fallback. If none of these applies, a sample without an expert in the level below has none here.
            batch_size: Samples B; needed only if nothing in the routing has a length.

        Raises:
            UnknownLevelError, UnknownExpertError: A name is no level or expert of the config.
            MissingRouteError: A level that is left out can't be inferred.
            RouteLengthError: The number of routes is not the number of samples, or there is no batch size.
            RouteIdError, RouteTypeError: Ids are out of range, or routes are of the wrong kind.
            RouteWeightError: Weights are not from 0 to 2**64, or all of a sample's are below 2**-64, and count as 0.
            PlanError: ``routing`` is a plan for another config or batch size.
        """
        if batch_size is not None:
            batch_size = _checked_size(batch_size)
        return self.compile(routing, batch_size, told_by="'batch_size'")

    def compile(self, routing: Routing | RoutingPlan | None, batch_size: int | None, *, told_by: str) -> RoutingPlan:
        """Compile like ``__call__``, for a batch size that ``told_by`` names in errors."""
        if isinstance(routing, RoutingPlan):
            routing.require_layout(self.layout)
            # A compiler takes a tensor's size for any, and an attribute for this one.
            size_of_plan = routing.indices[0][2].shape[0] if routing.indices else routing.batch_size
            # Not `in`, which a compiler answers wrongly for a size that it takes for any.
            if batch_size is not None and batch_size != size_of_plan:
                raise PlanError(
                    f"'routing' must be a plan for the {batch_size} samples of {told_by} (got one for "
                    f"{routing.batch_size})"
                )
            return routing
        given: dict[str, LevelCodes] = {}
        if routing is not None:
            self._check_levels(routing)
            for position, table in enumerate(self._tables):
                if table.level in routing:
                    routes = routing[table.level]
                    given[table.level] = (
                        self._encoded(position, routes) if self._takes_unknown else table.encode(routes)
                    )
        size = _agreed_size(given, batch_size, told_by)
        codes: list[LevelCodes] = []
        below: LevelCodes | None = None
        # Go from the lowest level up, for a level that is left out asks the level below.
        for position in reversed(range(len(self._tables))):
            level = self._tables[position].level
            below = given[level] if level in given else self._inferred(position, below)
            codes.append(below)
        # Not `isinstance` for each: ordinary routes are planned in microseconds.
        spread: Any = codes[::-1]
        if ForAll in map(type, codes):
            spread = [each.spread(size).settled() if isinstance(each, ForAll) else each for each in spread]
        return make_plan(self.layout, self._tables, spread, size)

    def _encoded(self, position: int, routes: LevelRoutes) -> LevelCodes:
        """A level's codes, with unknown names sent to its fallback."""
        table, unknown = self._tables[position], self._default(position)
        try:
            return table.encode(routes, unknown)
        except UnknownExpertError as error:
            error.add_note(f"celmoe: level {table.level!r} has several experts and no fallback for unknown names")
            raise

    def _check_levels(self, routing: Routing) -> None:
        if type(routing) is not dict and not isinstance(routing, Mapping):
            raise RouteTypeError(
                f"'routing' must be a mapping of levels to routes, a RoutingPlan or None (got {type(routing).__name__})"
            )
        if unknown := [level for level in routing if level not in self._names]:
            enabled = [table.level for table in self._tables]
            raise UnknownLevelError(
                f"'routing' must have levels of the config for keys (got {listed(unknown)}; "
                f"{nearest(unknown, enabled)})"
            )

    def _inferred(self, position: int, below: LevelCodes | None) -> LevelCodes:
        """The codes of a level that the routing leaves out, from those of the level below."""
        table = self._tables[position]
        if below is None:
            code = self._default(position)
            if code is None:
                raise MissingRouteError(
                    f"'routing' must have a key for level {table.level!r}, which has {len(table.experts)} experts and "
                    f"no fallback (known: {listed(table.experts)})"
                )
            return code
        if len(table.experts) == 1:
            return 0
        if isinstance(below, ForAll):
            one = self._of_parents(position, below.one)
            return ForAll(one) if isinstance(one, Memberships) else int(one[0])
        if isinstance(below, Memberships):
            return self._of_parents(position, below)
        if isinstance(below, int):
            return int(self._parents_of(position, np.array([below]))[0])
        return self._parents_of(position, code_array(below)).astype(table.dtype)

    def _of_parents(self, position: int, below: Memberships) -> Codes | Memberships:
        """The memberships of the parents: a parent's weight is its children's share of the sample's weights."""
        totals = np.bincount(below.samples, weights=below.weights, minlength=below.size)
        parents = self._parents_of(position, below.codes).astype(self._tables[position].dtype)
        found = merged(parents, below.samples, below.weights / totals[below.samples], below.size)
        default = self._default(position)
        if default is not None:
            without = np.setdiff1d(np.arange(below.size, dtype=np.int64), below.samples)
            codes = np.concatenate([found.codes, np.full(len(without), default, dtype=found.codes.dtype)])
            samples = np.concatenate([found.samples, without])
            found = merged(codes, samples, np.concatenate([found.weights, np.ones(len(without))]), below.size)
        return found.settled()

    def _parents_of(self, position: int, below: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The code of the parent of each code of the level below, else the default."""
        table = self._tables[position]
        parents: npt.NDArray[Any] = self._parents[position][below]
        orphaned = parents == _NO_PARENT
        if orphaned.any():
            code = self._default(position)
            if code is None:
                lower = self._tables[position + 1]
                orphans = np.unique(below[orphaned]).tolist()
                raise MissingRouteError(
                    f"'routing' must have a key for level {table.level!r}, which has no fallback, or these experts of "
                    f"level {lower.level!r} must have a parent: "
                    f"{listed(lower.sorted_experts[each] for each in orphans)}"
                )
            parents = np.where(orphaned, code, parents)
        return parents

    def _default(self, position: int) -> int | None:
        """The code of samples without a route or parent: the only expert's, else the fallback's."""
        table, fallback = self._tables[position], self.configs[position].fallback_expert
        if len(table.experts) == 1:
            return 0
        if fallback is None:
            return None
        if fallback not in table.code_by_name:
            raise UnknownExpertError(
                f"'fallback_expert' of level {table.level!r} must be one of its experts (got {fallback!r}; "
                f"{nearest(fallback, table.experts)})"
            )
        return table.code_by_name[fallback]


def _checked_size(batch_size: object) -> int:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int | np.integer):
        raise RouteTypeError(f"'batch_size' must be an integer (got {batch_size!r})")
    if batch_size < 0:
        raise RouteLengthError(f"'batch_size' must be at least 0 (got {batch_size})")
    return int(batch_size)


def _agreed_size(codes: Mapping[str, LevelCodes], batch_size: int | None, told_by: str) -> int:
    """The one length that all routes and the caller agree on."""
    size = batch_size
    for level, code in codes.items():
        if isinstance(code, int) or type(code) is ForAll:
            continue  # one route for however many samples there are
        length = code.size if type(code) is Memberships else len(code)
        if size is None:
            size, told_by = length, f'"routing[{level!r}]"'
        elif length != size:
            raise RouteLengthError(
                f'"routing[{level!r}]" must have one route for each of the {size} samples of {told_by} (got {length})'
            )
    if size is None:
        raise RouteLengthError("'batch_size' must be given where no routes have a length (got None)")
    return size


def _ancestors(levels: Sequence[HierarchyLevelConfig], position: int) -> tuple[str | None, ...]:
    """The ancestors of a level's experts, in order, in the enabled level above.

    In disabled levels between, the experts' own parents lead up.
    """
    found = [expert.parent for expert in levels[position].experts.values()]
    for above in reversed(levels[:position]):
        if above.enabled:
            return tuple(found)
        found = [None if name is None else above.experts[name].parent for name in found]
    return (None,) * len(found)


def _parent_codes(upper: RouteTable, lower: RouteTable, parents: Sequence[str | None]) -> npt.NDArray[np.int64]:
    """The code of the parent in the upper level, or -1, for each code of the lower level."""
    codes = [_NO_PARENT if name is None else upper.code_by_name[name] for name in parents]
    return np.array(codes, dtype=np.int64)[lower.ids_by_code]
