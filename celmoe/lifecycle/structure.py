"""A config's structure with an expert more, less, or of another name; checked before the config is changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from celmoe.config import CELMoEConfig, ExpertConfig, HierarchyLevelConfig
from celmoe.errors import ConfigError, ConfigTypeError, UnknownExpertError, UnknownLevelError, listed, nearest
from celmoe.routing.compiler import RoutingCompiler


class Structure:
    """A structure that a config may take over.

    Args:
        config: The config.
        level: The name of the enabled level that changes.

    Raises:
        UnknownLevelError: The config has no such enabled level.

    Attributes:
        level: The level's config.
        above: The config of the level above, disabled or not; ``None`` for the first level.
        below: The config of the level below, likewise.
    """

    def __init__(self, config: CELMoEConfig, level: str) -> None:
        self._config = config
        enabled = [each.name for each in config.levels if each.enabled]
        if level not in enabled:
            raise UnknownLevelError(f"'level' must be a level of the model (got {level!r}; {nearest(level, enabled)})")
        place = next(place for place, each in enumerate(config.levels) if each.enabled and each.name == level)
        self.level = config.levels[place]
        self.above = config.levels[place - 1] if place else None
        self.below = config.levels[place + 1] if place + 1 < len(config.levels) else None
        # By id of a level's config, its new experts and fallback.
        self._new: dict[int, tuple[dict[str, ExpertConfig], str | None]] = {}
        # By id of a new expert's config, the config that takes over its fields.
        self._origins: dict[int, ExpertConfig] = {}

    @property
    def experts(self) -> dict[str, ExpertConfig]:
        """The level's experts in the new structure."""
        return self._of(self.level)[0]

    @property
    def changed(self) -> list[HierarchyLevelConfig]:
        """The configs of the levels whose experts change."""
        return [each for each in self._config.levels if id(each) in self._new]

    def add(self, name: str, expert: ExpertConfig) -> None:
        """Add an expert, the last of its level.

        Raises:
            ConfigTypeError, ConfigError: A name or config of the wrong kind, a name that exists, or an unknown parent.
        """
        _require_new(name, self.level)
        if not isinstance(expert, ExpertConfig):
            raise ConfigTypeError(f"'config' must be an ExpertConfig (got {expert!r})")
        experts, fallback = self._of(self.level)
        self._new[id(self.level)] = {**experts, name: expert}, fallback
        self._check()

    def remove(self, name: str) -> None:
        """Remove an expert.

        Raises:
            UnknownExpertError: The level has no such expert.
            ConfigError: The expert is its level's last, its fallback, or somebody's parent.
        """
        _require_known("name", name, self.level)
        level, where = self.level, f"expert {name!r} of level {self.level.name!r}"
        if len(level.experts) == 1:
            raise ConfigError(f"'name' must leave an expert to level {level.name!r} (got {name!r}, the last one)")
        if level.fallback_expert == name:
            raise ConfigError(
                f"'name' must not be the fallback (got {where}; set another 'fallback_expert' in the level's "
                f"config, or None)"
            )
        if children := [each for each, config in _experts(self.below).items() if config.parent == name]:
            below = self.below.name if self.below is not None else ""
            raise ConfigError(
                f"'name' must not be a parent (got {where}, the parent of {listed(children)} in level {below!r}; "
                f"remove those first)"
            )
        self._new[id(level)] = (
            {key: each for key, each in level.experts.items() if key != name},
            level.fallback_expert,
        )
        self._check()

    def rename(self, name: str, new: str) -> None:
        """Rename an expert, which keeps its place; its children and the fallback follow.

        Raises:
            UnknownExpertError: The level has no such expert.
            ConfigTypeError, ConfigError: A new name of the wrong kind, or one that exists.
        """
        _require_known("name", name, self.level)
        _require_new(new, self.level, "new_name")
        level = self.level
        own = level.experts[name]
        if own.name == name:
            own = self._edited(own, name=new)
        experts = {new if key == name else key: own if key == name else each for key, each in level.experts.items()}
        fallback = new if level.fallback_expert == name else level.fallback_expert
        self._new[id(level)] = experts, fallback
        children = {each for each, config in _experts(self.below).items() if config.parent == name}
        if self.below is not None and children:
            below = {
                key: self._edited(each, parent=new) if key in children else each
                for key, each in self.below.experts.items()
            }
            self._new[id(self.below)] = below, self.below.fallback_expert
        self._check()

    def commit(self) -> RoutingCompiler:
        """Let the config take over the structure; the config's compiler."""
        for level in self.changed:
            experts, fallback = self._new[id(level)]
            level.experts = {name: self._committed(each) for name, each in experts.items()}
            level.fallback_expert = fallback
        return RoutingCompiler(self._config)

    def _of(self, level: HierarchyLevelConfig) -> tuple[dict[str, ExpertConfig], str | None]:
        return self._new.get(id(level), (level.experts, level.fallback_expert))

    def _edited(self, expert: ExpertConfig, **fields: Any) -> ExpertConfig:
        """A copy with other fields, which an expert's config takes over later if it stands in one place only."""
        made = replace(expert, **fields)
        places = Counter(id(each) for level in self._config.levels for each in level.experts.values())
        if places[id(expert)] == 1:
            # A user's handle on it goes on setting the expert's flags.
            self._origins[id(made)] = expert
        return made

    def _committed(self, expert: ExpertConfig) -> ExpertConfig:
        origin = self._origins.get(id(expert))
        if origin is None:
            return expert
        origin.name, origin.parent = expert.name, expert.parent
        return origin

    def _check(self) -> None:
        levels = []
        for each in self._config.levels:
            experts, fallback = self._of(each)
            levels.append(replace(each, experts=experts, fallback_expert=fallback))
        RoutingCompiler(replace(self._config, levels=levels))


def _experts(level: HierarchyLevelConfig | None) -> Mapping[str, ExpertConfig]:
    return {} if level is None else level.experts


def _require_new(name: object, level: HierarchyLevelConfig, argument: str = "name") -> None:
    if not isinstance(name, str):
        raise ConfigTypeError(f"{argument!r} must be a string (got {name!r})")
    if not name:
        raise ConfigError(f"{argument!r} must be a non-empty string (got '')")
    if name in level.experts:
        raise ConfigError(f"{argument!r} must be new to level {level.name!r} (got {name!r}, which it has)")


def _require_known(argument: str, name: object, level: HierarchyLevelConfig) -> None:
    if not isinstance(name, str) or name not in level.experts:
        raise UnknownExpertError(
            f"{argument!r} must be an expert of level {level.name!r} (got {name!r}; {nearest(name, level.experts)})"
        )
