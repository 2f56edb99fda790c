"""Hooks that users put on experts after a call that was grouped, or before: all of them fire as in a loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn
from torch.nn.modules import module as module_hooks

from celmoe import EngineRefusedError, ExpertResult, HierarchicalCELMoE
from tests.traps import (
    BATCHES,
    GROUPED,
    Batch,
    Plain,
    assert_like_oracle,
    assert_ran_grouped,
    build,
    experts_of,
    observe,
    oracle_of,
    second,
)


def hooked(register: Callable[[nn.Module, list[str]], Any], whom: str = "all") -> Callable[[HierarchicalCELMoE], None]:
    """Registers a hook that notes its calls."""

    def change(model: HierarchicalCELMoE) -> None:
        model.calls = []
        for expert in experts_of(model) if whom == "all" else [second(model)]:
            register(expert, model.calls)

    return change


def _note(calls: list[str], what: str, value: Any = None) -> Any:
    calls.append(what)
    return value


HOOKS = {
    "forward": lambda expert, calls: expert.register_forward_hook(
        lambda module, given, result: _note(calls, "forward", ExpertResult(result.hidden * 2))
    ),
    "forward that mixes": lambda expert, calls: expert.register_forward_hook(
        lambda module, given, result: ExpertResult(result.hidden - result.hidden.mean(0))
    ),
    "forward always": lambda expert, calls: expert.register_forward_hook(
        lambda *_: _note(calls, "always"), always_call=True
    ),
    "before": lambda expert, calls: expert.register_forward_pre_hook(lambda *_: _note(calls, "before")),
    "before, with names": lambda expert, calls: expert.register_forward_pre_hook(
        lambda *_: _note(calls, "before"), with_kwargs=True
    ),
    "layer": lambda expert, calls: expert.linear.register_forward_hook(
        lambda module, given, rows: _note(calls, "layer", rows * 2)
    ),
    "layer before": lambda expert, calls: expert.linear.register_forward_pre_hook(
        lambda module, given: _note(calls, "layer before", (given[0] * 2,))
    ),
    "layer backward": lambda expert, calls: expert.linear.register_full_backward_hook(
        lambda module, into, out: _note(calls, "backward", (into[0] * 2,))
    ),
    "layer before backward": lambda expert, calls: expert.linear.register_full_backward_pre_hook(
        lambda module, out: _note(calls, "before backward", (out[0] * 2,))
    ),
}
PARAMETER_HOOKS = {
    "weight": lambda expert, calls: expert.linear.weight.register_hook(
        lambda grad: _note(calls, f"weight {tuple(grad.shape)}", grad * 2)
    ),
    "weight that clips": lambda expert, calls: expert.linear.weight.register_hook(
        lambda grad: _note(calls, "clip", grad / grad.norm())
    ),
    "accumulated": lambda expert, calls: expert.linear.weight.register_post_accumulate_grad_hook(
        lambda weight: _note(calls, f"accumulated {tuple(weight.grad.shape)}")
    ),
    "accumulated and dropped": lambda expert, calls: expert.linear.weight.register_post_accumulate_grad_hook(
        lambda weight: _note(calls, "dropped", setattr(weight, "grad", None))
    ),
}


def check_hook(change: Callable[[HierarchicalCELMoE], None], engine: str, *, from_the_start: bool) -> None:
    """The numbers are right, and the hook was called as often as it would have been."""
    subject, twin = build(Plain), build(Plain)
    if not from_the_start:
        assert_like_oracle(subject, twin, Batch)
        assert_ran_grouped(subject, Batch())
    for model in (subject, twin):
        change(model)
    subject.engine = engine
    for make_batch in BATCHES[:3]:
        try:
            assert_like_oracle(subject, twin, make_batch)
        except EngineRefusedError as error:
            assert engine == GROUPED
            assert "hook" in str(error)  # noqa: PT017  # it may refuse for that alone
            assert not subject.calls, "a refused call has called it"
            return
        assert sorted(subject.calls) == sorted(twin.calls)


@pytest.mark.parametrize("from_the_start", [True, False])
@pytest.mark.parametrize("engine", [GROUPED, "auto"])
@pytest.mark.parametrize("whom", ["all", "one"])
@pytest.mark.parametrize("name", HOOKS)
def test_module_hooks(name: str, whom: str, engine: str, from_the_start: bool):
    check_hook(hooked(HOOKS[name], whom), engine, from_the_start=from_the_start)


@pytest.mark.parametrize("name", HOOKS)
def test_module_hooks_are_refused(name: str):
    model = build(Plain)
    hooked(HOOKS[name])(model)
    with pytest.raises(EngineRefusedError, match="hook"):
        Batch()(model)


@pytest.mark.parametrize("engine", [GROUPED, "auto"])
@pytest.mark.parametrize("whom", ["all", "one"])
@pytest.mark.parametrize("name", PARAMETER_HOOKS)
def test_parameter_hooks_keep_firing(name: str, whom: str, engine: str):
    """Once a step for each expert present, with its own gradient, and they are no reason to refuse."""
    subject, twin = build(Plain), build(Plain)
    for model in (subject, twin):
        hooked(PARAMETER_HOOKS[name], whom)(model)
    subject.engine = engine
    for make_batch in BATCHES[:3]:
        assert_like_oracle(subject, twin, make_batch)
        assert sorted(subject.calls) == sorted(twin.calls)
        assert twin.calls or make_batch is BATCHES[2]


# PyTorch warns of a backward hook on a module that returns something else than tensors.
@pytest.mark.filterwarnings("ignore:For backward hooks to be called:UserWarning")
@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("engine", [GROUPED, "auto"])
@pytest.mark.parametrize("from_the_start", [True, False])
@pytest.mark.parametrize("kind", ["forward", "before", "backward"])
def test_global_module_hooks(kind: str, from_the_start: bool, engine: str):
    """They see every module, so every module must run."""
    register = {
        "forward": module_hooks.register_module_forward_hook,
        "before": module_hooks.register_module_forward_pre_hook,
        "backward": module_hooks.register_module_full_backward_hook,
    }[kind]
    subject, twin = build(Plain, engine), build(Plain, engine)
    if not from_the_start:
        assert_like_oracle(subject, twin, Batch)
    seen: list[list[int]] = [[], []]
    for calls, model in zip(seen, (subject, twin), strict=True):
        modules = {id(module): number for number, module in enumerate(model.modules()) if isinstance(module, nn.Linear)}

        def note(module: nn.Module, *_: Any, modules: Any = modules, calls: Any = calls) -> None:
            if id(module) in modules:
                calls.append(modules[id(module)])

        handle = register(note)
        try:
            observe(model, model if model is subject else oracle_of(model), Batch())
        except EngineRefusedError as error:
            assert engine == GROUPED
            assert "hook" in str(error)  # noqa: PT017  # for that alone
            return
        finally:
            handle.remove()
    assert sorted(seen[0]) == sorted(seen[1])
    assert seen[1]


@pytest.mark.parametrize("engine", [GROUPED, "auto"])
def test_a_hook_taken_away_again(engine: str):
    subject, twin = build(Plain), build(Plain)
    for model in (subject, twin):
        model.calls = []
        handles = [HOOKS["layer"](expert, model.calls) for expert in experts_of(model)]
        model.engine = "auto"
        observe(model, model, Batch())
        for handle in handles:
            handle.remove()
        model.engine = engine
    for make_batch in BATCHES:
        assert_like_oracle(subject, twin, make_batch)
    if engine == GROUPED:
        assert_ran_grouped(subject, BATCHES[-1]())
