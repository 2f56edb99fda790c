"""The load of experts over training steps: who is busy, who is absent, and for how long."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .config import require_finite
from .errors import (
    CheckpointError,
    ConfigError,
    InputError,
    InputTypeError,
    UnknownExpertError,
    UnknownLevelError,
    listed,
    nearest,
)
from .load_figure import Bar, save_loads
from .names import path_key
from .routing.layout import Layout
from .routing.load import LevelLoad, imbalance_of
from .routing.plan import RoutingPlan


@dataclass(slots=True)
class _Count:
    """The counts of one expert.

    Attributes:
        rows: Rows in the whole run.
        recent: Rows weighted by age, as of `step`.
        step: The last step with rows; before the first, the step before the expert was known.
    """

    rows: float
    recent: float
    step: int


class LoadTracker:
    """Counts rows by level and expert over training steps, from plans.

    A step costs a few host numbers for each expert present; no device is asked. The tracker tells the loads of the
    whole run and of recent steps. Recent rows count by age: those of the last step once, those of ``half_life`` steps
    before half as much. An expert's recent rows are ``sum(rows[s] * 0.5 ** ((step - s) / half_life))`` over steps s.

    Experts go by name. The tracker tells of those in the latest plan's config. An added expert counts from then on. A
    removed one keeps its counts, in case it comes back. `rename` lets the counts follow a new name.

    Trackers can be copied, pickled, saved (`state_dict`) and merged over ranks (`merged`). A rank counts its own
    samples, wherever their experts run.

    Args:
        half_life: Steps after which rows count half among the recent ones; a positive number.

    Raises:
        ConfigError, ConfigTypeError: ``half_life`` is not positive, not finite, or no number.

    Example::

        tracker = celmoe.LoadTracker()
        for batch in loader:
            plan = model.compile_routing(batch.routing)
            train(model, batch.hidden, plan)
            tracker.update(plan)
            logger.log(tracker.scalars())  # {"load/language/de": 0.12, ...}
        tracker.save_figure("load.png")
    """

    def __init__(self, half_life: float = 100.0) -> None:
        require_finite("half_life", half_life)
        if half_life <= 0:
            raise ConfigError(f"'half_life' must be positive, in steps (got {half_life!r})")
        self._half_life = float(half_life)
        self._steps = 0
        # By level and name, of all experts that ever were.
        self._counts: dict[str, dict[str, _Count]] = {}
        # By level, the experts of the latest plan's config.
        self._experts: dict[str, tuple[str, ...]] = {}
        self._layout: Layout | None = None

    @property
    def half_life(self) -> float:
        """Steps after which rows count half among the recent ones."""
        return self._half_life

    @property
    def steps(self) -> int:
        """The number of steps so far."""
        return self._steps

    def update(self, *plans: RoutingPlan) -> None:
        """Count one training step.

        Args:
            *plans: The step's plan; with gradient accumulation, the plans of all its micro-batches.

        Raises:
            InputError, InputTypeError: There is no plan, or one is no plan.
            PlanError: The plans are of several configs, or one is of tensors alone, and on meta or traced.
        """
        update = self._update
        if torch.compiler.is_compiling():
            # A graph would hold the numbers of one batch.
            update = torch.compiler.disable(update)
        update(plans)

    def _update(self, plans: Sequence[RoutingPlan]) -> None:
        if not plans:
            raise InputError("'plans' must hold the plan of the step (got none)")
        found = []
        for position, plan in enumerate(plans):
            if not isinstance(plan, RoutingPlan):
                raise InputTypeError(
                    f"'plans[{position}]' must be a RoutingPlan (got {type(plan).__name__}; call "
                    f"model.compile_routing on a routing)"
                )
            plan.require_layout(plans[0].layout, f"plans[{position}]")
            found += [(level.name, level.present, level.counts) for level in plan.levels.values()]
        if plans[0].layout != self._layout:
            self._meet(plans[0].layout)
        self._steps = step = self._steps + 1
        for level, present, counts in found:
            own = self._counts[level]
            for name, rows in zip(present, counts, strict=True):
                count = own[name]
                count.rows += rows
                count.recent = self._aged(count, step) + rows
                count.step = step

    def rename(self, level: str, name: str, new_name: str) -> None:
        """Let an expert's counts go by a new name; call it beside `HierarchicalCELMoE.rename_expert`.

        Args:
            level: The level's name.
            name: The expert's name so far.
            new_name: Its name from then on, which no plan had yet.

        Raises:
            UnknownLevelError, UnknownExpertError: No plan had the level or the expert.
            InputError, InputTypeError: ``new_name`` is tracked already, or is no name.
        """
        if level not in self._counts:
            raise UnknownLevelError(
                f"'level' must be a level of the plans so far (got {level!r}; {nearest(level, self._counts)})"
            )
        counts = self._counts[level]
        if name not in counts:
            raise UnknownExpertError(
                f"'name' must be an expert of the plans so far at level {level!r} (got {name!r}; "
                f"{nearest(name, counts)})"
            )
        if not isinstance(new_name, str) or not new_name:
            raise InputTypeError(f"'new_name' must be a non-empty string (got {new_name!r})")
        if new_name in counts:
            raise InputError(
                f"'new_name' must be no expert of the plans so far at level {level!r} (got {new_name!r}; rename before "
                f"the first plan that has the new name)"
            )
        counts[new_name] = counts.pop(name)
        if level in self._experts:
            self._experts[level] = tuple(new_name if each == name else each for each in self._experts[level])
        self._layout = None

    def load(self) -> dict[str, LevelLoad]:
        """The rows of each expert in the whole run, by level.

        Like `RoutingPlan.load`: rows in total, imbalance, and the experts that were always absent.
        """
        return {level: LevelLoad(level, {name: each.rows for name, each in own}) for level, own in self._known()}

    def recent(self) -> dict[str, LevelLoad]:
        """The recent rows of each expert, by level: rows weighted by their age, see `LoadTracker`."""
        return {
            level: LevelLoad(level, {name: self._aged(each, self._steps) for name, each in own})
            for level, own in self._known()
        }

    def absent(self) -> dict[str, dict[str, int]]:
        """The steps since each expert's last row, by level and name; 0 for the experts of the last step.

        For an expert without a row so far, the steps since it was first known.
        """
        return {level: {name: self._steps - each.step for name, each in own} for level, own in self._known()}

    def scalars(self) -> dict[str, float]:
        """The loads as flat numbers, for a logger.

        Returns:
            A new dict. For each expert ``load/<level>/<expert>``, its share of the level's recent rows, from 0 to 1;
            ``load_run/<level>/<expert>``, its share in the whole run; and ``load_absent/<level>/<expert>``, the steps
            since its last row. For each level ``load_imbalance/<level>`` and ``load_imbalance_run/<level>``, the
            recent imbalance and that of the whole run (see `imbalance_of`), and ``load_rows/<level>``, its rows so
            far. `celmoe.names.path_key` writes the names, so no two experts share a key.
        """
        found: dict[str, float] = {}
        for level, bars in self._bars().items():
            for bar in bars:
                key = path_key(level, bar.expert)
                found[f"load/{key}"] = bar.recent_share
                found[f"load_run/{key}"] = bar.share
                found[f"load_absent/{key}"] = float(bar.steps_absent)
            key = path_key(level)
            found[f"load_imbalance/{key}"] = imbalance_of([bar.recent_share for bar in bars])
            found[f"load_imbalance_run/{key}"] = imbalance_of([bar.share for bar in bars])
            found[f"load_rows/{key}"] = float(sum(bar.rows for bar in bars))
        return found

    def save_figure(self, path: str | os.PathLike[str]) -> Path:
        """Draw the experts' shares of rows, in the whole run and recently, and write the numbers beside.

        Args:
            path: The figure's file. Its ending tells the format, such as ``.png`` or ``.svg``.

        Returns:
            The path of the numbers: the figure's, with the ending ``.csv``.

        Raises:
            PackageMissingError: There is no matplotlib: ``pip install 'celmoe[bench]'``.
            InputError: There was no step yet, or matplotlib writes no such format.
            OSError: A file can't be written.
        """
        if not self._steps:
            raise InputError("'save_figure' must be called after a step (got no call of 'update' yet)")
        return save_loads(self._bars(), Path(path))

    @staticmethod
    def merged(trackers: Iterable[LoadTracker]) -> LoadTracker:
        """The tracker of several ranks' samples together.

        Args:
            trackers: Those of all ranks, which counted as many steps of one config. ``all_gather_object`` of
                ``torch.distributed`` brings them together.

        Returns:
            A new tracker.

        Raises:
            InputError, InputTypeError: There is none; or they differ in half-life, steps or experts; or one is no
                tracker.
        """
        given = list(trackers)
        if not given:
            raise InputError("'trackers' must hold at least one tracker (got none)")
        for position, each in enumerate(given):
            _require_like(each, given[0], f"trackers[{position}]")
        made = LoadTracker(given[0].half_life)
        made._steps, made._experts = given[0]._steps, dict(given[0]._experts)
        for each in given:
            for level, counts in each._counts.items():
                joined = made._counts.setdefault(level, {})
                for name, count in counts.items():
                    known = joined.setdefault(name, _Count(0, 0.0, count.step))
                    step = max(known.step, count.step)
                    recent = made._aged(known, step) + made._aged(count, step)
                    joined[name] = _Count(known.rows + count.rows, recent, step)
        return made

    def state_dict(self) -> dict[str, Any]:
        """The tracker as dicts, lists, strings and numbers, for a checkpoint; JSON takes it, too."""
        return {
            "half_life": self._half_life,
            "steps": self._steps,
            "experts": {level: list(names) for level, names in self._experts.items()},
            "counts": {
                level: {name: [each.rows, each.recent, each.step] for name, each in counts.items()}
                for level, counts in self._counts.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`, half-life included.

        Args:
            state: The state.

        Raises:
            CheckpointError: The state is no tracker's.
        """
        half_life, steps, experts, counts = _parsed(state)
        self._half_life, self._steps, self._experts, self._counts = half_life, steps, experts, counts
        self._layout = None

    def __repr__(self) -> str:
        return f"LoadTracker({'; '.join([f'{self._steps} steps', *map(str, self.load().values())])})"

    def _meet(self, layout: Layout) -> None:
        """Take the experts of a config for those that are told of."""
        self._layout = layout
        self._experts = {level.name: level.experts for level in layout.levels}
        for level, names in self._experts.items():
            counts = self._counts.setdefault(level, {})
            for name in names:
                counts.setdefault(name, _Count(0, 0.0, self._steps))

    def _aged(self, count: _Count, step: int) -> float:
        """An expert's recent rows as of a step."""
        return count.recent * math.exp2((count.step - step) / self._half_life)

    def _known(self) -> Iterable[tuple[str, list[tuple[str, _Count]]]]:
        for level, names in self._experts.items():
            counts = self._counts[level]
            yield level, [(name, counts[name]) for name in names]

    def _bars(self) -> dict[str, list[Bar]]:
        recent, absent = self.recent(), self.absent()
        bars = {}
        for level, load in self.load().items():
            samples, aged = load.samples, recent[level].samples
            shares, recent_shares = _shares([*samples.values()]), _shares([*aged.values()])
            bars[level] = [
                Bar(name, samples[name], share, recent_share, absent[level][name])
                for name, share, recent_share in zip(samples, shares, recent_shares, strict=True)
            ]
        return bars


def _require_like(tracker: Any, first: LoadTracker, name: str) -> None:
    """Refuse a tracker that can't be merged with the first."""
    if not isinstance(tracker, LoadTracker):
        raise InputTypeError(f"{name!r} must be a LoadTracker (got {type(tracker).__name__})")
    for what in ("half_life", "steps"):
        if (own := getattr(tracker, what)) != (wanted := getattr(first, what)):
            raise InputError(f"{name!r} must have {what} {wanted}, as the first tracker (got {own})")
    for level in {**first._experts, **tracker._experts}:
        own, wanted = tracker._experts.get(level, ()), first._experts.get(level, ())
        if own != wanted:
            raise InputError(
                f"{name!r} must have experts {listed(wanted)} at level {level!r}, as the first tracker (got "
                f"{listed(own)})"
            )


def _shares(loads: Sequence[float]) -> list[float]:
    total = sum(loads)
    return [load / total if total else 0.0 for load in loads]


def _parsed(state: Any) -> tuple[float, int, dict[str, tuple[str, ...]], dict[str, dict[str, _Count]]]:
    """The parts of a tracker's state.

    Raises:
        CheckpointError: The state is no tracker's.
    """
    fields = ("half_life", "steps", "experts", "counts")
    if set(_mapping(state, "state")) != set(fields):
        raise CheckpointError(f"'state' must be a LoadTracker's, with {listed(fields)} (got {listed(state)})")
    half_life = float(_number(state["half_life"], "state['half_life']"))
    if not half_life:
        raise CheckpointError("\"state['half_life']\" must be positive (got 0)")
    steps = _whole(state["steps"], "state['steps']")
    counts: dict[str, dict[str, _Count]] = {}
    for level, own in _mapping(state["counts"], "state['counts']").items():
        counts[level] = {}
        for name, each in _mapping(own, f"state['counts'][{level!r}]").items():
            counts[level][name] = _count(each, steps, f"state['counts'][{level!r}][{name!r}]")
    experts: dict[str, tuple[str, ...]] = {}
    for level, names in _mapping(state["experts"], "state['experts']").items():
        known = counts.get(level, {})
        is_good = isinstance(names, list | tuple) and all(isinstance(each, str) and each in known for each in names)
        if not is_good or len(set(names)) < len(names):
            raise CheckpointError(
                f"\"state['experts'][{level!r}]\" must list experts that have counts, each once (got {names!r})"
            )
        experts[level] = tuple(names)
    return half_life, steps, experts, counts


def _count(value: Any, steps: int, where: str) -> _Count:
    if not isinstance(value, list | tuple) or len(value) != 3:
        raise CheckpointError(f'"{where}" must be rows, recent rows and a step (got {value!r})')
    step = _whole(value[2], where)
    if step > steps:
        raise CheckpointError(f'"{where}" must have a step up to {steps} (got {step})')
    return _Count(_number(value[0], where), float(_number(value[1], where)), step)


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise CheckpointError(f'"{where}" must be a mapping by name, as state_dict gives it (got {value!r})')
    return dict(value)


def _number(value: Any, where: str) -> float:
    plain = value.item() if isinstance(value, np.number) else value
    if isinstance(plain, bool) or not isinstance(plain, int | float) or not 0 <= plain <= sys.float_info.max:
        raise CheckpointError(f'"{where}" must hold finite numbers from 0 on (got {value!r})')
    return plain


def _whole(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0:
        raise CheckpointError(f'"{where}" must hold a whole number of steps (got {value!r})')
    return int(value)
