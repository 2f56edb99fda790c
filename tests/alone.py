"""A hierarchy in which each expert is alone: the reference of `lives`, which shares no code with the library.

An expert is a dict of tensors. Formulas stand in `KINDS`, one sample runs at a time, and `OPTIMIZERS` are written by
hand. A sample's choice at a level is a mapping of experts to weights: one expert with weight 1 for an ordinary route,
several for a weighted sum, none for a sample that passes through the level unchanged.

Axes: B samples, D width; the axes between them are called trailing.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, NoReturn

import torch
from torch.nn.functional import layer_norm

WIDTH = 4
Choice = Mapping[str, float]
Tensors = Mapping[str, torch.Tensor]


class RefusedError(Exception):
    """The library must refuse this, with an error of the class that is the argument."""


@dataclass(frozen=True)
class Kind:
    """A kind of expert.

    Attributes:
        parameters: The paths of the parameters.
        untrained: The paths of the parameters that require no gradients.
        buffers: The paths of the buffers.
        run: Computes the rows.
        has_loss: True for an expert with a loss ``"size"``, the sum of the squares of its rows.
    """

    parameters: tuple[str, ...]
    run: Callable[[Tensors, torch.Tensor], torch.Tensor]
    untrained: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()
    has_loss: bool = False


def _wide(own: Tensors, rows: torch.Tensor) -> torch.Tensor:
    inner = torch.tanh(rows @ own["up.weight"].T + own["up.bias"])
    return rows + own["scale"] * (inner @ own["down.weight"].T)


def _narrow(own: Tensors, rows: torch.Tensor) -> torch.Tensor:
    return torch.tanh(rows @ own["only.weight"].T + own["only.bias"])


def _adapted(own: Tensors, rows: torch.Tensor) -> torch.Tensor:
    return rows + torch.tanh(rows @ own["base.weight"].T + own["base.bias"]) @ own["down.weight"].T


KINDS = {
    "wide": Kind(("up.weight", "up.bias", "down.weight"), _wide, buffers=("scale",)),
    "narrow": Kind(("only.weight", "only.bias"), _narrow),
    "adapted": Kind(
        ("base.weight", "base.bias", "down.weight"), _adapted, untrained=("base.weight", "base.bias"), has_loss=True
    ),
}

Options = Mapping[str, Any]
State = dict[str, Any]


def _adam(value: torch.Tensor, grad: torch.Tensor, state: State, options: Options) -> None:
    beta1, beta2 = options.get("betas", (0.9, 0.999))
    if not state:
        state.update(step=0.0, exp_avg=torch.zeros_like(value), exp_avg_sq=torch.zeros_like(value))
        if options.get("amsgrad"):
            state["max_exp_avg_sq"] = torch.zeros_like(value)
    state["step"] += 1
    if options["decoupled"]:
        value *= 1 - options["lr"] * options["weight_decay"]
    else:
        grad = grad + options["weight_decay"] * value
    state["exp_avg"] = beta1 * state["exp_avg"] + (1 - beta1) * grad
    state["exp_avg_sq"] = beta2 * state["exp_avg_sq"] + (1 - beta2) * grad * grad
    second = state["exp_avg_sq"]
    if options.get("amsgrad"):
        second = state["max_exp_avg_sq"] = torch.maximum(state["max_exp_avg_sq"], second)
    mean = state["exp_avg"] / (1 - beta1 ** state["step"])
    value -= options["lr"] * mean / (second.sqrt() / math.sqrt(1 - beta2 ** state["step"]) + options["eps"])


def _sgd(value: torch.Tensor, grad: torch.Tensor, state: State, options: Options) -> None:
    grad = grad + options["weight_decay"] * value
    if options["momentum"]:
        before = state.get("momentum_buffer")
        moved = grad.clone() if before is None else options["momentum"] * before + grad
        state["momentum_buffer"] = moved
        grad = grad + options["momentum"] * moved if options.get("nesterov") else moved
    value -= options["lr"] * grad


def _adagrad(value: torch.Tensor, grad: torch.Tensor, state: State, options: Options) -> None:
    grad = grad + options["weight_decay"] * value
    state["step"] += 1
    state["sum"] = state["sum"] + grad * grad
    value -= options["lr"] * grad / (state["sum"].sqrt() + options["eps"])


def _summed(value: torch.Tensor) -> State:
    return {"step": 0.0, "sum": torch.full_like(value, _ADAGRAD["initial_accumulator_value"])}


class Optimizer(NamedTuple):
    """An optimizer by hand.

    Attributes:
        step: Changes a value and its state by a gradient.
        options: Its options, as PyTorch calls them.
        decoupled: True for weight decay that is no part of the gradient.
        first: The state of a value before the first step; empty for most.
    """

    step: Callable[[torch.Tensor, torch.Tensor, State, Options], None]
    options: Options
    decoupled: bool = False
    first: Callable[[torch.Tensor], State] = lambda _: {}


# With this eps, gradients that are zero but for rounding move nothing.
_ADAM = {"lr": 0.01, "weight_decay": 0.1, "eps": 1e-3}
_SGD = {"lr": 0.01, "weight_decay": 0.1, "momentum": 0.9}
_ADAGRAD = {"lr": 0.01, "weight_decay": 0.1, "eps": 1e-3, "initial_accumulator_value": 0.1}
OPTIMIZERS = {
    "AdamW": Optimizer(_adam, _ADAM, decoupled=True),
    "amsgrad": Optimizer(_adam, _ADAM | {"amsgrad": True}, decoupled=True),
    "Adam": Optimizer(_adam, _ADAM),
    "SGD": Optimizer(_sgd, _SGD),
    "nesterov": Optimizer(_sgd, _SGD | {"nesterov": True}),
    "Adagrad": Optimizer(_adagrad, _ADAGRAD, first=_summed),
}


@dataclass(eq=False)
class Expert:
    """An expert, or the fusion.

    Attributes:
        kind: A key of `KINDS`; ``"fusion"`` for the fusion.
        tensors: Parameters and buffers by path; none for an expert of a disabled level.
        states: By path, the optimizer's state.
        groups: By path, the number of the optimizer's group; none for a parameter that no optimizer has.
        stack: The number of the stack that its parameters are in, or ``None``.
    """

    kind: str
    parent: str | None = None
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    states: dict[str, State] = field(default_factory=dict)
    groups: dict[str, int] = field(default_factory=dict)
    is_frozen: bool = False
    loss_weight: float = 1.0
    gradient_scale: float | None = None
    stack: int | None = None

    @property
    def parameters(self) -> tuple[str, ...]:
        """The paths of the parameters."""
        return tuple(self.tensors) if self.kind == "fusion" or not self.tensors else KINDS[self.kind].parameters

    def is_trained(self, path: str) -> bool:
        """True if a parameter requires gradients."""
        return not self.is_frozen and (self.kind == "fusion" or path not in KINDS[self.kind].untrained)

    def clear(self) -> None:
        """Have no gradients."""
        for each in self.tensors.values():
            each.grad = None

    def marked(self) -> None:
        """Let tensors require gradients as they should."""
        for path in self.parameters:
            self.tensors[path].requires_grad_(self.is_trained(path))
            if not self.is_trained(path):
                self.tensors[path].grad = None

    def take(self, tensors: Tensors) -> None:
        """Take over values, in tensors of its own, and have no gradients."""
        self.tensors = {path: each.detach().clone() for path, each in tensors.items()}
        self.marked()

    def forget(self) -> None:
        """Have no optimizer."""
        self.states, self.groups = {}, {}


@dataclass(eq=False)
class Level:
    """A level of the config; experts of a disabled one have no tensors."""

    name: str
    experts: dict[str, Expert]
    fallback: str | None = None
    enabled: bool = True


class Alone:
    """The reference.

    Args:
        levels: The levels.
        fusion: The fusion's tensors; none for the mean.
        optimizer: A key of `OPTIMIZERS`.

    Attributes:
        groups: The options of the optimizer's groups.
        moves_absent: True for an optimizer that sees one parameter in a stack, and moves experts without samples.
    """

    def __init__(self, levels: Sequence[Level], fusion: Tensors, optimizer: str, *, moves_absent: bool) -> None:
        self.levels = list(levels)
        self.fusion = Expert("fusion")
        self.fusion.take(fusion)
        self.optimizer = OPTIMIZERS[optimizer]
        self.moves_absent = moves_absent
        self.groups: list[dict[str, Any]] = []
        self.num_stacks = 0

    @property
    def enabled(self) -> list[Level]:
        """The levels that the model has."""
        return [level for level in self.levels if level.enabled]

    @property
    def experts(self) -> list[Expert]:
        """All experts of the model, and the fusion."""
        return [expert for level in self.enabled for expert in level.experts.values()] + [self.fusion]

    def level(self, name: str) -> Level:
        """The level of this name."""
        return next(level for level in self.levels if level.name == name)

    def below(self, level: Level) -> Level | None:
        """The next level of the config, disabled or not."""
        place = self.levels.index(level) + 1
        return self.levels[place] if place < len(self.levels) else None

    def above(self, level: Level) -> Level | None:
        """The level before, disabled or not."""
        place = self.levels.index(level)
        return self.levels[place - 1] if place else None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all tensors."""
        return next(each.dtype for expert in self.experts for each in expert.tensors.values())

    @property
    def layout(self) -> Any:
        """The parts of the config that plans depend on."""
        return [(each.name, [*each.experts], self._ancestors(each), each.fallback) for each in self.enabled]

    # Routes.

    def choices(self, given: Mapping[str, Sequence[Choice] | Choice], size: int) -> dict[str, list[Choice]]:
        """Each sample's choice at each level, from those of the levels that are given.

        Args:
            given: By level, a choice for each sample, or one for all samples.
            size: Samples B.

        Raises:
            RefusedError: A level that is left out can't be inferred.
        """
        given = {
            level: self._known(self.level(level), own)
            if isinstance(own, Mapping)
            else [self._known(self.level(level), each) for each in own]
            for level, own in given.items()
        }
        found: dict[str, Sequence[Choice] | Choice] = {}
        below: Level | None = None
        for level in reversed(self.enabled):
            if level.name in given:
                found[level.name] = given[level.name]
            elif below is None or len(level.experts) == 1:
                found[level.name] = self._inferred(level, None, {})
            else:
                ancestors = dict(zip(below.experts, self._ancestors(below), strict=True))
                lower = found[below.name]
                # One choice for all samples must be known also if there are no samples.
                found[level.name] = (
                    self._inferred(level, lower, ancestors)
                    if isinstance(lower, Mapping)
                    else [self._inferred(level, choice, ancestors) for choice in lower]
                )
            below = level
        return {name: [each] * size if isinstance(each, Mapping) else list(each) for name, each in found.items()}

    def _inferred(self, level: Level, lower: Choice | None, ancestors: Mapping[str, str | None]) -> Choice:
        """A sample's choice at a level that is left out, from the one at the level below."""
        if len(level.experts) == 1:
            return {next(iter(level.experts)): 1.0}
        if lower is not None and not lower:
            return {} if level.fallback is None else {level.fallback: 1.0}
        found: dict[str, float] = {}
        for name, weight in ({None: 1.0} if lower is None else lower).items():
            parent = level.fallback if (own := ancestors.get(name)) is None else own
            if parent is None:
                raise RefusedError("MissingRouteError")
            found[parent] = found.get(parent, 0.0) + weight / (sum(lower.values()) if lower else 1.0)
        return found

    def _known(self, level: Level, choice: Choice) -> Choice:
        """A choice whose unknown names go to the fallback."""
        if all(name in level.experts for name in choice):
            return choice
        return self._inferred(level, None, {}) if level.fallback or len(level.experts) == 1 else _refuse()

    def _ancestors(self, level: Level) -> list[str | None]:
        """The ancestors of a level's experts in the enabled level above."""
        found = [expert.parent for expert in level.experts.values()]
        above = self.above(level)
        while above is not None and not above.enabled:
            found = [None if name is None else above.experts[name].parent for name in found]
            above = self.above(above)
        return found if above is not None else [None] * len(found)

    # Runs.

    def run(self, hidden: torch.Tensor, choices: Mapping[str, Sequence[Choice]]) -> Run:
        """The rows of each level, the fused rows, and the losses by level and expert."""
        rows: list[torch.Tensor] = []
        losses: dict[tuple[str, str], torch.Tensor] = {}
        weights: dict[tuple[str, str], list[float]] = {}
        for level in self.enabled:
            made = []
            for sample, choice in zip(hidden, choices[level.name], strict=True):
                result = torch.zeros_like(sample) if choice else sample
                for name, weight in choice.items():
                    expert = level.experts[name]
                    own = KINDS[expert.kind].run(expert.tensors, _scaled(sample, expert.gradient_scale))
                    result = result + weight * own
                    if KINDS[expert.kind].has_loss:
                        key = level.name, name
                        losses[key] = losses.get(key, torch.zeros((), dtype=own.dtype)) + own.square().sum()
                        weights.setdefault(key, []).append(weight)
                made.append(result)
            hidden = torch.stack(made) if made else hidden
            rows.append(hidden)
        means = {
            (level, name): self.level(level).experts[name].loss_weight * sum(own) / len(own)
            for (level, name), own in weights.items()
        }
        return Run(rows, self._fused(rows), losses, means)

    def _fused(self, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        own = self.fusion.tensors
        if not own:
            return torch.stack(list(rows)).sum(0) / len(rows)
        gated = [each @ own[f"gates.{place}.weight"].T for place, each in enumerate(rows)]
        return layer_norm(torch.stack(gated).sum(0) / len(rows), (WIDTH,), own["norm.weight"], own["norm.bias"])

    def objective(self, run: Run) -> torch.Tensor:
        """The number whose gradients a step takes."""
        return run.fused.square().sum() + sum(run.loss_weights[key] * loss for key, loss in run.losses.items())

    # Training.

    def begin(self, groups: Sequence[Options]) -> None:
        """Have a new optimizer of these groups, with the states that it begins with."""
        self.groups = [dict(self.optimizer.options) | dict(options) for options in groups]
        for expert in self.experts:
            expert.states = {path: self.first(expert, path) for path in expert.groups}

    def first(self, expert: Expert, path: str) -> State:
        """The state of a parameter before its first step."""
        return self.optimizer.first(expert.tensors[path].detach())

    def step(self) -> None:
        """Step all parameters that have a gradient, each by itself.

        Raises:
            RefusedError: The optimizer would move frozen experts of a stack.
        """
        shared = self._shared() if self.moves_absent else []
        if any(expert.is_frozen for some in shared for expert, _ in some):
            raise RefusedError("StackedError")
        absent = {(id(expert), path) for some in shared for expert, path in some}
        for expert in self.experts:
            for path in expert.parameters:
                value = expert.tensors[path]
                if path not in expert.groups or (value.grad is None and (id(expert), path) not in absent):
                    continue
                grad = torch.zeros_like(value) if value.grad is None else value.grad
                options = self.groups[expert.groups[path]] | {"decoupled": self.optimizer.decoupled}
                with torch.no_grad():
                    self.optimizer.step(value, grad, expert.states.setdefault(path, {}), options)

    def members(self) -> dict[tuple[str, int], dict[str, Expert]]:
        """By level and stack, its members."""
        found: dict[tuple[str, int], dict[str, Expert]] = {}
        for level in self.enabled:
            for name, expert in level.experts.items():
                if expert.stack is not None:
                    found.setdefault((level.name, expert.stack), {})[name] = expert
        return found

    def _shared(self) -> list[list[tuple[Expert, str]]]:
        """The rows of each stacked parameter that has a gradient."""
        return [
            [(each, path) for each in own.values() if path in each.groups]
            for own in self.members().values()
            for path in next(iter(own.values())).parameters
            if any(each.tensors[path].grad is not None for each in own.values())
        ]

    def cast(self, dtype: torch.dtype) -> None:
        """Round everything."""
        for expert in self.experts:
            grads = {path: each.grad for path, each in expert.tensors.items()}
            expert.take({path: each.to(dtype) for path, each in expert.tensors.items()})
            for path, grad in grads.items():
                expert.tensors[path].grad = None if grad is None else grad.to(dtype)
            for state in expert.states.values():
                state.update({key: each.to(dtype) for key, each in state.items() if isinstance(each, torch.Tensor)})

    # Changes.

    def stack(self, names: Sequence[str]) -> None:
        """Stack alike experts of some levels."""
        for level in (self.level(name) for name in names):
            alike: dict[str, list[Expert]] = {}
            for expert in level.experts.values():
                if expert.stack is None:
                    alike.setdefault(expert.kind, []).append(expert)
            for some in alike.values():
                if len(some) > 1:
                    self.num_stacks += 1
                    for expert in some:
                        expert.stack = self.num_stacks

    def unstack(self, names: Sequence[str]) -> None:
        """Let all experts of some levels be ordinary."""
        for level in (self.level(name) for name in names):
            for expert in level.experts.values():
                expert.stack = None

    def subset(self, named: Mapping[str, Sequence[str]]) -> Alone:
        """A smaller hierarchy, which shares no tensor with this one and has no optimizer.

        Args:
            named: By level, names and patterns.
        """
        wanted = {
            level: {each for each in self.level(level).experts for one in patterns if _is_meant(each, one, self, level)}
            for level, patterns in named.items()
        }
        places = [place for place, level in enumerate(self.levels) if level.name in wanted]
        kept: list[set[str]] = [set(wanted.get(level.name, ())) if level.enabled else set() for level in self.levels]
        orphaned = False
        for place in range(max(places), -1, -1):
            level = self.levels[place]
            if orphaned and level.enabled:
                if level.fallback is not None:
                    kept[place].add(level.fallback)
                elif level.name not in wanted:
                    kept[place] = set(level.experts)
            parents = {level.experts[name].parent for name in kept[place]}
            orphaned = None in parents or (orphaned and not level.enabled)
            if place:
                kept[place - 1] |= parents - {None}
        for place in range(max(places) + 1, len(self.levels)):
            own = self.levels[place].experts.items()
            kept[place] = {name for name, each in own if each.parent is None or each.parent in kept[place - 1]}
        if any(level.enabled and not names for level, names in zip(self.levels, kept, strict=True)):
            raise RefusedError("ConfigError")
        made = self.copied()
        for level, names in zip(made.levels, kept, strict=True):
            level.experts = {name: each for name, each in level.experts.items() if name in names}
            level.fallback = level.fallback if level.fallback in names else None
        for expert in made.experts:
            expert.stack = None
        return made

    def copied(self) -> Alone:
        """A copy without gradients."""
        made = copy.copy(self)
        made.groups = copy.deepcopy(self.groups)
        made.fusion = _copied(self.fusion)
        made.levels = [
            Level(each.name, {name: _copied(one) for name, one in each.experts.items()}, each.fallback, each.enabled)
            for each in self.levels
        ]
        return made

    def group_of(self, level: Level, expert: Expert, source: Expert | None) -> dict[str, int]:
        """The groups of a new expert's parameters.

        Raises:
            RefusedError: Nothing tells one group.
        """
        others = [each for each in level.experts.values() if expert.stack in (None, each.stack)]
        every = {group for each in others for group in each.groups.values()}
        found: dict[str, int] = {}
        for path in KINDS[expert.kind].parameters:
            if source is not None and path in source.groups and (source in others or not self.moves_absent):
                found[path] = source.groups[path]
                continue
            fitting = {each.groups[path] for each in others if path in each.groups}
            if not fitting:
                has_path = any(path in each.parameters for each in level.experts.values())
                if expert.stack is not None or (every and has_path):
                    continue
                fitting = every or ({0} if len(self.groups) == 1 else set())
            if len(fitting) != 1:
                raise RefusedError("ConfigError")
            (found[path],) = fitting
        return found


class Run(NamedTuple):
    """The reference's results for a batch.

    Attributes:
        rows: The rows of each level.
        fused: The fused rows.
        losses: By level and expert, the sum of its losses over its samples.
        loss_weights: The weights of the losses: the experts' own, times the mean of the samples' weights.
    """

    rows: list[torch.Tensor]
    fused: torch.Tensor
    losses: dict[tuple[str, str], torch.Tensor]
    loss_weights: dict[tuple[str, str], float]


def matching(pattern: str, names: Iterator[str] | Sequence[str]) -> list[str]:
    """The names that match a pattern, in order."""
    return [name for name in names if fnmatchcase(name, pattern)]


def _refuse() -> NoReturn:
    raise RefusedError("UnknownExpertError")


def _is_meant(name: str, pattern: str, model: Alone, level: str) -> bool:
    """True for the expert of this name; for one that matches, if none has the pattern for a name."""
    return name == pattern if pattern in model.level(level).experts else fnmatchcase(name, pattern)


def _scaled(rows: torch.Tensor, scale: float | None) -> torch.Tensor:
    """The rows, with the gradient into them scaled."""
    if scale is None or scale >= 1.0:
        return rows
    return rows.detach() if scale <= 0.0 else rows.detach() + scale * (rows - rows.detach())


def _copied(expert: Expert) -> Expert:
    made = copy.copy(expert)
    made.groups = dict(expert.groups)
    made.states = {
        path: {key: each.clone() if isinstance(each, torch.Tensor) else each for key, each in state.items()}
        for path, state in expert.states.items()
    }
    made.take(expert.tensors)
    return made
