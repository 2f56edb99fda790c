"""The engine of each level and the reason, as a table for people and as a dict for programs."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from .names import NamedModules
from .routing.plan import LevelPlan
from .stacked.stack import slot_of

_HEADINGS = {
    "level": "level",
    "engine": "engine",
    "experts": "experts",
    "present": "present",
    "rows": "rows/expert (min median max)",
    "parameters": "parameters",
    "megabytes": "MB",
    "how": "how",
}


@dataclass(frozen=True)
class ClassExplanation:
    """The present experts of one structure.

    Attributes:
        architecture: The name of the experts' Python class.
        experts: The experts' names.
        engine: ``"grouped"`` if the experts run as one, else ``"looped"``.
        reason: The reason for the engine, in words.
        operations_looped: Operations without a grouped form, which run member by member, and their counts.
        rows_per_expert: Least, median and most samples of an expert, or ``None`` without a plan.
        parameter_bytes: Bytes of the experts' parameters.
    """

    architecture: str
    experts: tuple[str, ...]
    engine: str
    reason: str
    operations_looped: Mapping[str, int]
    rows_per_expert: tuple[int, float, int] | None
    parameter_bytes: int


@dataclass(frozen=True)
class LevelExplanation:
    """One level's line.

    Attributes:
        level: The level's name.
        engine: The engine that runs its experts; ``"mixed"`` if some classes are grouped and some looped.
        num_experts: Experts E of the level.
        num_present: Experts P in the plan, or ``None`` without a plan.
        rows_per_expert: Least, median and most samples of a present expert, or ``None``.
        num_parameters: Parameters of all the level's experts, shared ones counted once.
        parameter_bytes: Bytes of the present experts' parameters; without a plan, of all experts' parameters.
        why: The reason for the engine, and the copies of rows that the plan saves.
        movement: The last part of `why`: how the plan moves rows; empty without a plan.
        classes: The present experts by structure; the experts of one structure run in one way.
    """

    level: str
    engine: str
    num_experts: int
    num_present: int | None
    rows_per_expert: tuple[int, float, int] | None
    num_parameters: int
    parameter_bytes: int
    why: str
    movement: str = ""
    classes: tuple[ClassExplanation, ...] = ()


@dataclass(frozen=True)
class Explanation:
    """All levels' lines; ``str()`` gives the table.

    Attributes:
        levels: One line a level, in order.
    """

    levels: tuple[LevelExplanation, ...]

    def as_dict(self) -> dict[str, dict[str, object]]:
        """The lines as plain data, by level."""
        return {line.level: dataclasses.asdict(line) for line in self.levels}

    def __str__(self) -> str:
        rows = [tuple(_HEADINGS.values()), *(_cells(line) for line in self.levels)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:], *self._class_lines()])

    def _class_lines(self) -> list[str]:
        """A line for each class of each level; levels of the looped engine have no classes."""
        lines = []
        for line in self.levels:
            for each in line.classes:
                level = line.level if line.level.isprintable() else repr(line.level)
                rows = "" if each.rows_per_expert is None else ", {} {:g} {} rows each".format(*each.rows_per_expert)
                looped = ", ".join(f"{count} {name}" for name, count in each.operations_looped.items())
                reason = f"{each.reason}, member by member: {looped}" if looped else each.reason
                lines.append(
                    f"{level}: {len(each.experts)} {each.architecture} {each.engine}, {reason}{rows}, "
                    f"{each.parameter_bytes / 1e6:.2f} MB"
                )
        return ["", *lines] if lines else []


def explain_level(
    level: str,
    modules: NamedModules,
    engine: str,
    present: Sequence[nn.Module],
    plan: LevelPlan | None,
    classes: Sequence[ClassExplanation],
) -> LevelExplanation:
    """One level's line; runs no expert.

    Args:
        level: The level's name.
        modules: All the level's experts.
        engine: The engine that runs the experts.
        present: The experts in the plan; without a plan, all experts.
        plan: The level's plan.
        classes: The present experts by structure; empty if the engine does not ask.
    """
    why = "runs any module, one present expert after another"
    several = [each for each in classes if len(each.experts) > 1]
    found = {each.engine for each in several}
    if several:
        engine = found.pop() if len(found) == 1 else "mixed"
        why = "; ".join(dict.fromkeys(f"{len(each.experts)} {each.architecture} {each.reason}" for each in several))
    elif classes:
        engine = "looped"
    rows = None
    if plan is not None and plan.counts:
        rows = spread_of(plan.counts)
    movement = ""
    if plan is not None and (plan.counts or plan.mixture is not None):
        movement = _movement(plan)
        why = f"{why}; {movement}"
    return LevelExplanation(
        level=level,
        engine=engine,
        num_experts=len(modules),
        num_present=None if plan is None else len(plan.present),
        rows_per_expert=rows,
        num_parameters=sum(parameter.numel() for parameter in _initialized([modules])),
        parameter_bytes=parameter_bytes(present),
        why=why,
        movement=movement,
        classes=tuple(classes),
    )


def spread_of(counts: Sequence[int]) -> tuple[int, float, int]:
    """Least, median and most."""
    return min(counts), float(statistics.median(counts)), max(counts)


def parameter_bytes(modules: Iterable[nn.Module]) -> int:
    """Bytes of the modules' parameters, shared ones counted once."""
    return sum(parameter.nbytes for parameter in _initialized(modules))


def _movement(plan: LevelPlan) -> str:
    if plan.mixture is not None:
        several = plan.mixture.slots.shape[0] // max(1, plan.mixture.most)
        words = {"with several experts or a weight": several, "without an expert": plan.mixture.num_passed}
        samples = ", ".join(f"{count} {each}" for each, count in words.items() if count)
        return f"one gather each way, samples {samples}"
    if len(plan.counts) == 1:
        return "one expert present, no gather"
    if plan.is_sorted:
        return "batch already in expert order, no gather"
    if plan.follows_previous:
        return "same order as the level above"
    return "one gather each way"


def _initialized(modules: Iterable[nn.Module]) -> list[torch.Tensor]:
    """The modules' parameters, each once, without those that a lazy module has not sized yet.

    A stacked expert's are given by their shapes only: other ranks may hold their values.
    """
    found: dict[Any, torch.Tensor] = {}
    for part in (part for module in modules for part in module.modules()):
        found |= {id(each): each for each in part._parameters.values() if each is not None}
        if (slot := slot_of(part)) is not None:
            wholes = [slot.stack.whole(path) for path in slot.paths.values() if path is not None]
            found |= {(id(each), slot.member): _one_of(each) for each in wholes if id(each) not in found}
    return [parameter for parameter in found.values() if not is_lazy(parameter)]


def _one_of(stack: torch.Tensor) -> torch.Tensor:
    return torch.empty(stack.shape[1:], dtype=stack.dtype, device="meta")


def _cells(line: LevelExplanation) -> tuple[str, ...]:
    rows = "-" if line.rows_per_expert is None else "{} {:g} {}".format(*line.rows_per_expert)
    return (
        line.level if line.level.isprintable() else repr(line.level),
        line.engine,
        str(line.num_experts),
        "-" if line.num_present is None else str(line.num_present),
        rows,
        f"{line.num_parameters:,}",
        f"{line.parameter_bytes / 1e6:.2f}",
        # The lines below the table tell the reasons of classes.
        line.movement if line.classes else line.why,
    )
