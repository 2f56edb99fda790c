"""Calls that a model refuses at any time of its life: by which errors, and the call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

import celmoe
from celmoe import CELMoEConfig, ExpertConfig
from celmoe.distributed import load_checkpoint, save_checkpoint
from celmoe.optim import load_state_by_name, state_by_name

# Called with the pair, the name of a level, and the name of one of its experts.
Call = Callable[[Any, str, str], Any]


def _rows(pair: Any, size: int = 2) -> torch.Tensor:
    return torch.ones(size, 4, dtype=pair.alone.dtype)


def _plan(pair: Any) -> celmoe.RoutingPlan:
    """A plan of two samples."""
    return pair.model.compile_routing({each.name: next(iter(each.experts)) for each in pair.alone.enabled}, 2)


def _routed(routes: Callable[[Any, str, str], Any], size: int = 2) -> Call:
    """A forward pass with these routes for the level."""
    return lambda pair, level, name: pair.model(_rows(pair, size), {level: routes(pair, level, name)})


def _by_name(change: Callable[[dict[str, Any]], None]) -> Call:
    """Loading a state that was changed."""

    def call(pair: Any, _level: str, _name: str) -> None:
        state = pair.state()
        change(state)
        load_state_by_name(pair.model, pair.optimizer, state)

    return call


def _without_a_name(state: dict[str, Any]) -> None:
    next(group for group in state["param_groups"] if group["params"])["params"].pop()


def _with_a_stranger(state: dict[str, Any]) -> None:
    state["state"]["level_modules.nowhere.nobody.weight"] = {"step": torch.tensor(1.0)}


def _without_a_rate(state: dict[str, Any]) -> None:
    del state["param_groups"][0]["lr"]


def _after_a_change_by_hand(call: Call) -> Call:
    """A call on a model whose config has got an expert, and the model not."""

    def changed(pair: Any, level: str, name: str) -> None:
        config = next(each for each in pair.model.config.levels if each.name == level)
        config.experts["by hand"] = ExpertConfig("by hand", metadata={"kind": "wide"})
        try:
            call(pair, level, name)
        finally:
            del config.experts["by hand"]

    return changed


class _Raising(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.rand(3)
        raise celmoe.ConfigError("a factory's own")


def _add(pair: Any, level: str, name: str = "quite new", config: Any = None, **options: Any) -> None:
    config = ExpertConfig(str(name), metadata={"kind": "wide"}) if config is None else config
    pair.model.add_expert(level, name, config, **({"optimizer": pair.optimizer} | options))


WRONG_CALLS: dict[str, tuple[tuple[str, ...], Call]] = {
    # Routes.
    "route to nobody": (("UnknownExpertError",), _routed(lambda *_: ["nobody", "nobody"])),
    "route one name to nobody": (("UnknownExpertError",), _routed(lambda *_: "nobody")),
    "route at no level": (("UnknownLevelError",), lambda p, level, n: p.model(_rows(p), {f"{level}s": [n, n]})),
    "too few routes": (("RouteLengthError",), _routed(lambda _p, _l, name: [name])),
    "routes for no samples": (("RouteLengthError",), _routed(lambda *_: [])),
    "an id out of range": (("RouteIdError",), _routed(lambda *_: [0, 99])),
    "an id below zero": (("RouteIdError",), _routed(lambda *_: torch.tensor([0, -1]))),
    "ids of bools": (("RouteTypeError",), _routed(lambda *_: [True, False])),
    "ids of floats": (("RouteTypeError",), _routed(lambda *_: np.array([0.0, 1.0]))),
    "names and ids": (("RouteTypeError",), _routed(lambda _p, _l, name: [name, 0])),
    "weights below zero": (("RouteWeightError",), _routed(lambda _p, _l, name: [{name: -1.0}, name])),
    "weights of zero": (("RouteWeightError",), _routed(lambda _p, _l, name: [{name: 0.0}, name])),
    "weights that are no numbers": (("RouteTypeError",), _routed(lambda _p, _l, name: [{name: "1"}, name])),
    "a mixture with nobody": (
        ("UnknownExpertError",),
        _routed(lambda _p, _l, name: [{name: 0.5, "nobody": 0.5}, name]),
    ),
    "a mixture of one expert twice": (
        ("RouteTypeError",),
        _routed(lambda _p, _l, name: [{name: 0.5, 0: 0.5}, name]),
    ),
    "a routing of no kind": (("RouteTypeError",), lambda p, _, name: p.model(_rows(p), [name, name])),
    "two axes of routes": (("RouteLengthError",), _routed(lambda *_: torch.zeros(2, 1, dtype=torch.int64))),
    "a plan of another batch": (
        ("PlanError",),
        lambda p, *_: p.model(_rows(p, 3), _plan(p)),
    ),
    "a plan of other experts": (
        ("PlanError",),
        lambda p, level, _: p.model(
            _rows(p),
            celmoe.RoutingCompiler(
                CELMoEConfig(4, [celmoe.HierarchyLevelConfig(level, {"quite other": ExpertConfig("quite other")})])
            )(None, 2),
        ),
    ),
    "a part that a plan does not have": (
        ("PlanError",),
        lambda p, *_: _plan(p).slice(1, 3),
    ),
    "no number of samples": (("RouteLengthError",), lambda p, level, name: p.model.compile_routing({level: name})),
    "rows that are no tensor": (("InputTypeError",), lambda p, level, name: p.model([[1.0]], {level: name})),
    "rows of another width": (
        # Without a fusion of the library's own, nobody but the experts knows of the width.
        ("InputError", "RuntimeError"),
        lambda p, *_: p.model(_rows(p)[:, :3], _plan(p)),
    ),
    "rows of another dtype": (
        ("RuntimeError",),
        lambda p, *_: p.model(_rows(p).to(torch.bfloat16), _plan(p)),
    ),
    "a mask of other samples": (
        ("InputError",),
        lambda p, level, name: p.model(_rows(p), {level: name}, mask=torch.ones(3)),
    ),
    # Experts.
    "add one that exists": (("ConfigError",), _add),
    "add an empty name": (("ConfigError",), lambda p, level, _: _add(p, level, "")),
    "add a number": (("ConfigTypeError",), lambda p, level, _: _add(p, level, 3)),
    "add no config": (("ConfigTypeError",), lambda p, level, _: _add(p, level, config={})),
    "add at no level": (("UnknownLevelError",), lambda p, level, _: _add(p, f"{level}s")),
    "add to no parent": (
        ("ConfigError",),
        lambda p, level, _: _add(p, level, config=ExpertConfig("new", metadata={"kind": "wide"}, parent="nobody")),
    ),
    "add from nobody": (("UnknownExpertError",), lambda p, level, _: _add(p, level, warm_start="nobody")),
    "add no module": (("ConfigTypeError",), lambda p, level, _: _add(p, level, factory=lambda *_: nn.Linear)),
    "add by no factory": (("ConfigTypeError",), lambda p, level, _: _add(p, level, factory="wide")),
    "add with a factory that fails": (
        ("ConfigError",),
        lambda p, level, _: _add(p, level, factory=lambda *_: _Raising()),
    ),
    "add one of another kind": (
        ("ConfigError",),
        lambda p, level, name: _add(p, level, warm_start=name, factory=lambda *_: nn.Linear(3, 3, dtype=torch.float64)),
    ),
    "add with no optimizer": (("InputTypeError",), lambda p, level, _: _add(p, level, optimizer=["Adam"])),
    "remove nobody": (
        ("UnknownExpertError",),
        lambda p, level, name: p.model.remove_expert(level, f"{name}s", optimizer=p.optimizer),
    ),
    "rename nobody": (
        ("UnknownExpertError",),
        lambda p, level, name: p.model.rename_expert(level, f"{name}s", "other", optimizer=p.optimizer),
    ),
    "rename to itself": (
        ("ConfigError",),
        lambda p, level, name: p.model.rename_expert(level, name, name, optimizer=p.optimizer),
    ),
    "rename to nothing": (
        ("ConfigTypeError",),
        lambda p, level, name: p.model.rename_expert(level, name, None, optimizer=p.optimizer),
    ),
    "freeze by a number": (("InputTypeError",), lambda p, level, _: p.model.freeze(level, 3)),
    "freeze at no level": (("UnknownLevelError",), lambda p, level, _: p.model.freeze(f"{level}s")),
    "unfreeze nobody": (("UnknownExpertError",), lambda p, level, name: p.model.unfreeze(level, f"{name}s")),
    "add after a change by hand": (("ConfigError",), _after_a_change_by_hand(lambda p, level, _: _add(p, level))),
    "remove after a change by hand": (
        ("ConfigError",),
        _after_a_change_by_hand(lambda p, level, name: p.model.remove_expert(level, name, optimizer=p.optimizer)),
    ),
    "a subset after a change by hand": (
        ("ConfigError",),
        _after_a_change_by_hand(lambda p, level, name: p.model.subset({level: name})),
    ),
    # Subsets, stacks, engines, groups.
    "a subset of nothing": (("ConfigTypeError",), lambda p, *_: p.model.subset({})),
    "a subset of nobody": (("UnknownExpertError",), lambda p, level, name: p.model.subset({level: [name, "nobody"]})),
    "a subset at no level": (("UnknownLevelError",), lambda p, level, name: p.model.subset({f"{level}s": name})),
    "stack no level": (("UnknownLevelError",), lambda p, level, _: celmoe.stack_experts(p.model, [f"{level}s"])),
    "unstack no model": (("InputTypeError",), lambda p, *_: celmoe.unstack_experts(p.model.fusion)),
    "an engine that is none": (("EngineError",), lambda p, *_: setattr(p.model, "engine", "fast")),
    "groups of nobody": (
        ("UnknownExpertError",),
        lambda p, level, _: celmoe.parameter_groups(p.model, {f"{level}/nobody": {"lr": 1.0}}),
    ),
    # Loading.
    "load no experts": (("CheckpointError",), lambda p, *_: celmoe.load_experts(p.model, {"x.weight": torch.ones(1)})),
    "load nobody under a name": (
        ("CheckpointError",),
        lambda p, level, name: celmoe.load_experts(p.model, p.model.state_dict(), {level: {"nobody": name}}),
    ),
    "load under nobody's name": (
        ("UnknownExpertError",),
        lambda p, level, name: celmoe.load_experts(p.model, p.model.state_dict(), {level: {name: "nobody"}}),
    ),
    "load another shape": (
        ("CheckpointError",),
        lambda p, *_: celmoe.load_experts(
            p.model, {key: torch.ones(3) for key in p.model.state_dict() if key.startswith("level_modules")}
        ),
    ),
    "load no checkpoint": (
        ("CheckpointError",),
        lambda p, *_: load_checkpoint("/nowhere/at/all", p.model, p.optimizer),
    ),
    "save into a file": (("CheckpointError",), lambda p, *_: save_checkpoint(__file__, p.model, p.optimizer)),
    "a state without a name": (("CheckpointError",), _by_name(_without_a_name)),
    "a state of a stranger": (("CheckpointError",), _by_name(_with_a_stranger)),
    "a state without a rate": (("CheckpointError",), _by_name(_without_a_rate)),
    "a state by position": (
        ("InputTypeError",),
        lambda p, *_: load_state_by_name(p.model, p.optimizer, p.optimizer.state_dict()),
    ),
    "a state of no optimizer": (("InputTypeError",), lambda p, *_: state_by_name(p.model, p.model)),
    "a config with a field": (
        ("ConfigError", "ConfigTypeError"),
        lambda p, *_: CELMoEConfig.from_dict(p.model.config.to_dict() | {"depth": 3}),
    ),
}
