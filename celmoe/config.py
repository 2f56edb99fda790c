"""The config that a user declares: experts, levels, and the hierarchy of both.

Setting a field checks its value. Building a model or a compiler checks that levels and experts fit together
(`enabled_levels`). A user may therefore start from an empty config and fill it.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import numpy as np

from .errors import ConfigError, ConfigTypeError, listed, nearest
from .json_values import checked_fields, json_value

FUSION_TYPES = ("learned", "position_aware")


def require_finite(name: str, value: object) -> None:
    """Refuse a value that is no finite number.

    Raises:
        ConfigTypeError, ConfigError: The value is no number, or not finite.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ConfigTypeError(f"{name!r} must be a number (got {value!r})")
    if not math.isfinite(value):
        raise ConfigError(f"{name!r} must be finite (got {value!r})")


def _check_type(name: str, value: object, kind: type, words: str) -> None:
    if not isinstance(value, kind):
        raise ConfigTypeError(f"{name!r} must be {words} (got {value!r})")


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise ConfigTypeError(f"{name!r} must be a bool (got {value!r})")
    return bool(value)


def _check_name(name: str, value: object) -> None:
    _check_type(name, value, str, "a string")
    if not value:
        raise ConfigError(f"{name!r} must be a non-empty string (got '')")


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ConfigTypeError(f"{name!r} must be an integer (got {value!r})")
    if value < 1:
        raise ConfigError(f"{name!r} must be at least 1 (got {value!r})")


class _Flags:
    """The changes of experts' flags in this process.

    Attributes:
        mark: A text that is another one after each change; a compiler guards texts by their values.
    """

    def __init__(self) -> None:
        self.mark = "0"

    def changed(self) -> None:
        """Note a change."""
        self.mark = str(int(self.mark) + 1)


FLAGS = _Flags()


@dataclass
class ExpertConfig:
    """One expert of a level.

    Attributes:
        name: A label. Routes and checkpoints use the key in `HierarchyLevelConfig.experts`.
        loss_weight: The weight of this expert's losses in `LossBundle.total`.
        stop_gradient_from_parent: If true, the expert's input is detached. Read at every call.
        metadata: Passed to the expert factory.
        gradient_scale: Scales the gradient from this expert into its input. 0 or below detaches the input, 1 or above
            changes nothing. A number overrides `stop_gradient_from_parent`; ``None``, the default, leaves the decision
            to that flag. Read at every call.
        parent: An expert of the level directly above. This expert's samples take the parent if the routing leaves that
            level out.
    """

    name: str
    loss_weight: float = 1.0
    stop_gradient_from_parent: bool = False
    metadata: Mapping[str, object] = field(default_factory=dict)
    _: KW_ONLY
    gradient_scale: float | None = None
    parent: str | None = None

    def __setattr__(self, name: str, value: object) -> None:
        match name:
            case "name":
                _check_type(name, value, str, "a string")
            case "loss_weight":
                require_finite(name, value)
            case "stop_gradient_from_parent":
                value = _flag(name, value)
            case "metadata":
                if isinstance(value, numbers.Real) and not isinstance(value, bool):
                    raise ConfigTypeError(
                        f"'metadata' must be a mapping (got {value!r}); celmoe-vp 3.0.0 had gradient_scale in this "
                        f"place, which is keyword-only here: gradient_scale={value!r}"
                    )
                _check_type(name, value, Mapping, "a mapping")
            case "gradient_scale":
                if value is not None:
                    require_finite(name, value)
            case "parent":
                if value is not None:
                    _check_name(name, value)
        if self.__dict__.get(name, value) is not value:
            FLAGS.changed()
        super().__setattr__(name, value)

    @property
    def input_gradient_scale(self) -> float:
        """The factor on the gradient into the expert's input, from 0.0 (detached) to 1.0 (unchanged)."""
        scale = self.gradient_scale
        if scale is None:
            return 0.0 if self.stop_gradient_from_parent else 1.0
        return min(max(scale, 0.0), 1.0)


@dataclass
class HierarchyLevelConfig:
    """One level: its experts by name, in the order in which they are built and numbered.

    Attributes:
        name: The level's name in routes, outputs and checkpoints.
        experts: The experts by name.
        fallback_expert: The expert that takes the level's samples if the routing leaves the level out. Read at every
            call.
        enabled: If true, models and compilers built from now on have this level.
    """

    name: str
    experts: dict[str, ExpertConfig]
    fallback_expert: str | None = None
    enabled: bool = True

    def __setattr__(self, name: str, value: object) -> None:
        match name:
            case "name":
                _check_name(name, value)
            case "experts":
                _check_type(name, value, Mapping, "a mapping of names to ExpertConfig")
            case "fallback_expert":
                if value is not None:
                    _check_name(name, value)
            case "enabled":
                value = _flag(name, value)
        super().__setattr__(name, value)


@dataclass
class CELMoEConfig:
    """The hierarchy, from the first level that sees the hidden states to the last.

    Attributes:
        hidden_size: Width D of the last axis of the hidden states.
        levels: The levels in order.
        use_learned_fusion: If false, the fusion is the plain mean of the levels, without parameters.
        fusion_dropout: Dropout rate of the built-in fusions.
        fusion_type: ``"learned"`` or ``"position_aware"``.
        fusion_max_positions: The number of positions with a bias of their own in the position-aware fusion.
    """

    hidden_size: int
    levels: list[HierarchyLevelConfig] = field(default_factory=list)
    use_learned_fusion: bool = True
    fusion_dropout: float = 0.1
    _: KW_ONLY
    fusion_type: str = "learned"
    fusion_max_positions: int = 512

    def __setattr__(self, name: str, value: object) -> None:
        match name:
            case "hidden_size" | "fusion_max_positions":
                _check_count(name, value)
            case "levels":
                if isinstance(value, str):
                    raise ConfigTypeError(f"'levels' must be a list of HierarchyLevelConfig (got {value!r})")
                _check_type(name, value, Sequence, "a list of HierarchyLevelConfig")
            case "use_learned_fusion":
                value = _flag(name, value)
            case "fusion_dropout":
                if isinstance(value, str):
                    raise ConfigTypeError(
                        f"'fusion_dropout' must be a number (got {value!r}); celmoe-vp 3.0.0 had fusion_type in this "
                        f"place, which is keyword-only here: fusion_type={value!r}"
                    )
                require_finite(name, value)
                if not 0.0 <= value <= 1.0:  # type: ignore[operator]  # require_finite has seen that it is a number
                    raise ConfigError(f"'fusion_dropout' must be between 0 and 1 (got {value!r})")
            case "fusion_type":
                if value not in FUSION_TYPES:
                    raise ConfigError(f"'fusion_type' must be one of {listed(FUSION_TYPES)} (got {value!r})")
        super().__setattr__(name, value)

    def to_dict(self) -> dict[str, Any]:
        """The config as a dict that JSON gives back as it was; the opposite of `from_dict`.

        Returns:
            The fields by name. Each level has its experts by name, and their order in a list of its own: ids are
            positions in that order, and tools may sort a dict.

        Raises:
            ConfigTypeError, ConfigError: A name is no string, or metadata hold a value that JSON does not give back.
        """
        levels = []
        for level in self.levels:
            where = f"levels[{level.name!r}].experts"
            experts = {
                name: json_value(
                    {
                        "name": expert.name,
                        "loss_weight": float(expert.loss_weight),
                        "stop_gradient_from_parent": expert.stop_gradient_from_parent,
                        "metadata": expert.metadata,
                        "gradient_scale": None if expert.gradient_scale is None else float(expert.gradient_scale),
                        "parent": expert.parent,
                    },
                    f"{where}[{name!r}]",
                )
                for name, expert in level.experts.items()
            }
            own = {"name": level.name, "fallback_expert": level.fallback_expert, "enabled": level.enabled}
            levels.append(own | {"order": [*experts], "experts": json_value(experts, where)})
        return {
            "hidden_size": int(self.hidden_size),
            "use_learned_fusion": self.use_learned_fusion,
            "fusion_dropout": float(self.fusion_dropout),
            "fusion_type": self.fusion_type,
            "fusion_max_positions": int(self.fusion_max_positions),
            "levels": levels,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CELMoEConfig:
        """The config of a dict that `to_dict` gave.

        Args:
            data: The dict; fields with a default may be missing, ``"order"`` may not.

        Raises:
            ConfigTypeError, ConfigError: A field is missing, unknown or unsound; or an order is not of all experts.
        """
        own = ("use_learned_fusion", "fusion_dropout", "fusion_type", "fusion_max_positions")
        fields = checked_fields(data, "data", ("hidden_size", "levels"), own)
        _check_type("levels", levels := fields.pop("levels"), list, "a list of dicts")
        return cls(**fields, levels=[_level_of(level, f"levels[{place}]") for place, level in enumerate(levels)])

    @classmethod
    def from_tree(
        cls, tree: Mapping[str, Any] | Sequence[str], levels: Sequence[str], hidden_size: int, **options: Any
    ) -> CELMoEConfig:
        """The config of a tree of names, whose experts have the names above them for parents.

        Args:
            tree: A dict by the first level's names, of dicts by the next level's, and so on; of lists of the last
                level's. For one level, a list.
            levels: The levels' names, from the first to the last.
            hidden_size: See the class, as for ``options``.
            options: The other fields.

        Raises:
            ConfigTypeError, ConfigError: The tree is not as deep as there are levels, or has a name of one level twice.

        Example::

            tree = {"slavic": ["ru", "pl"], "romance": ["it"]}
            config = CELMoEConfig.from_tree(tree, levels=("family", "language"), hidden_size=64)
        """
        if isinstance(levels, str) or not isinstance(levels, Sequence) or not levels:
            raise ConfigTypeError(f"'levels' must be a sequence of the levels' names, at least one (got {levels!r})")
        if "levels" in options:
            raise ConfigTypeError("'options' must not have 'levels' (got some)")
        experts: list[dict[str, ExpertConfig]] = [{} for _ in levels]
        # Of each subtree, its parent and its level.
        waiting: list[tuple[Any, str | None, int]] = [(tree, None, 0)]
        while waiting:
            below, parent, place = waiting.pop(0)
            _check_branch(below, parent, levels, place)
            for name in below:
                _check_name(f"a name of level {levels[place]!r} in 'tree'", name)
                if name in experts[place]:
                    raise ConfigError(
                        f"'tree' must have each expert of level {levels[place]!r} once (got {name!r} below "
                        f"{experts[place][name].parent!r} and {parent!r})"
                    )
                experts[place][name] = ExpertConfig(name, parent=parent)
                if place + 1 < len(levels):
                    waiting.append((below[name], name, place + 1))
        found = [HierarchyLevelConfig(name, own) for name, own in zip(levels, experts, strict=True)]
        config = cls(hidden_size, found, **options)
        enabled_levels(config)
        return config


def _check_branch(branch: object, parent: str | None, levels: Sequence[str], place: int) -> None:
    """Refuse a part of a tree that is no dict of names, or at the last level no list of names."""
    is_last = place + 1 == len(levels)
    is_right = isinstance(branch, list | tuple) if is_last else isinstance(branch, Mapping)
    if not is_right:
        where = "" if parent is None else f" below {parent!r}"
        what = "list" if is_last else "dict"
        raise ConfigTypeError(
            f"'tree' must have a {what} of the experts of level {levels[place]!r}{where}, for there are "
            f"{len(levels)} levels (got {branch!r})"
        )


def _level_of(data: object, where: str) -> HierarchyLevelConfig:
    """The level of a dict of `CELMoEConfig.to_dict`."""
    fields = checked_fields(data, where, ("name", "order", "experts"), ("fallback_expert", "enabled"))
    order, experts = fields.pop("order"), fields.pop("experts")
    _check_type(f"{where}.order", order, list, "a list of names")
    _check_type(f"{where}.experts", experts, Mapping, "a dict by name")
    if len(order) != len(experts) or {*map(repr, order)} != {*map(repr, experts)}:
        raise ConfigError(
            f"'{where}.order' must have the name of each expert once (got {listed(order)} for {listed(experts)})"
        )
    others = ("loss_weight", "stop_gradient_from_parent", "metadata", "gradient_scale", "parent")
    own = {
        name: ExpertConfig(**checked_fields(experts[name], f"{where}.experts[{name!r}]", ("name",), others))
        for name in order
    }
    return HierarchyLevelConfig(experts=own, **fields)


def enabled_levels(config: CELMoEConfig) -> list[HierarchyLevelConfig]:
    """The enabled levels, after a check that levels, experts and parents fit together.

    Raises:
        ConfigTypeError: A level is no `HierarchyLevelConfig`, an expert is no `ExpertConfig`, or a name is no string.
        ConfigError: No enabled level, a level without experts, an empty name, two enabled levels of one name, or a
            parent that the level above does not have.
    """
    _check_type("config", config, CELMoEConfig, "a CELMoEConfig")
    above: HierarchyLevelConfig | None = None
    for position, level in enumerate(config.levels):
        _check_type(f"levels[{position}]", level, HierarchyLevelConfig, "a HierarchyLevelConfig")
        _check_experts(level, above)
        above = level
    levels = [level for level in config.levels if level.enabled]
    if not levels:
        got = f"{len(config.levels)}, all disabled" if config.levels else "none"
        raise ConfigError(f"'levels' must hold at least one enabled level (got {got})")
    names = [level.name for level in levels]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"'levels' must have distinct names (got {listed(twice)} more than once)")
    return levels


def _check_experts(level: HierarchyLevelConfig, above: HierarchyLevelConfig | None) -> None:
    where = f"levels[{level.name!r}].experts"
    if level.enabled and not level.experts:
        raise ConfigError(f"{where!r} must hold at least one expert (got none)")
    unknown: dict[str, str] = {}
    for name, expert in level.experts.items():
        _check_type(f"a name in {where}", name, str, "a string")
        if not name:
            raise ConfigError(f'"a name in {where}" must be a non-empty string (got {name!r})')
        _check_type(f"{where}[{name!r}]", expert, ExpertConfig, "an ExpertConfig")
        if expert.parent is None:
            continue
        if above is None:
            raise ConfigError(
                f"'parent' of expert {name!r} in level {level.name!r} must be None, for there is no level above "
                f"(got {expert.parent!r})"
            )
        if expert.parent not in above.experts:
            unknown[name] = expert.parent
    if unknown and above is not None:
        experts = f"expert{'s' if len(unknown) > 1 else ''} {listed(unknown)}"
        parents = [*dict.fromkeys(unknown.values())]
        raise ConfigError(
            f"'parent' of {experts} in level {level.name!r} must be an expert of level {above.name!r} "
            f"(got {listed(parents)}; {nearest(parents, above.experts)})"
        )
