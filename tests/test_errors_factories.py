"""Refused factories, fusions, engines, loss weights and losses, to the letter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from celmoe import (
    CELMoEConfig,
    CELMoELossAPI,
    ConfigError,
    ConfigTypeError,
    EngineError,
    ExpertConfig,
    HierarchicalCELMoE,
    HierarchyLevelConfig,
    InputError,
    InputTypeError,
    LossBundle,
    LossTerm,
    UnknownLevelError,
)
from tests.config_errors import INF, NAN, levels
from tests.refusals import GOOD, WIDTH, Counting, assert_error, build, level, rows, two_levels

# Factory, fusion and engine


class Builder:
    def __call__(self, level_name, name, metadata):
        return None


FACTORIES = {
    "None": (lambda *_: None, "got NoneType"),
    "class": (lambda *_: nn.Linear, "got the class Linear"),
    "function": (lambda *_: torch.relu, "got builtin_function_or_method"),
    "lambda": (lambda *_: lambda batch: batch, "got function"),
    "list": (lambda *_: [nn.Linear(4, 4)], "got list"),
    "tensor": (lambda *_: torch.zeros(3), "got Tensor"),
    "object": (Builder(), "got NoneType"),
}


@pytest.mark.parametrize("case", FACTORIES)
def test_factories_that_return_no_module(case):
    factory, got = FACTORIES[case]
    with pytest.raises(ConfigTypeError) as caught:
        HierarchicalCELMoE(two_levels(), factory)
    message = f"'expert_factory' must return a torch.nn.Module ({got} for expert 'slavic' of level 'family')"
    assert_error(caught.value, ConfigTypeError, TypeError, message)


@pytest.mark.parametrize("factory", [None, "Linear", {}])
def test_factories_that_cannot_be_called(factory):
    with pytest.raises(ConfigTypeError) as caught:
        HierarchicalCELMoE(two_levels(), factory)
    assert_error(caught.value, ConfigTypeError, TypeError, f"'expert_factory' must be callable (got {factory!r})")


def test_a_factory_that_raises_is_not_disguised():
    error = KeyError("size")

    def factory(*_):
        raise error

    with pytest.raises(KeyError) as caught:
        HierarchicalCELMoE(two_levels(), factory)
    assert caught.value is error


def test_the_factory_is_called_once_an_expert_in_the_configs_order():
    whole = levels(
        level("b", ("z", "a")),
        level("off", enabled=False),
        HierarchyLevelConfig("a", {"k": ExpertConfig("name differs", metadata={"depth": 2})}),
    )
    calls = []
    HierarchicalCELMoE(whole, lambda *names: calls.append(names) or Counting())
    assert calls == [("b", "z", {}), ("b", "a", {}), ("a", "k", {"depth": 2})]
    assert calls[2][2] is whole.levels[2].experts["k"].metadata


@pytest.mark.parametrize("fusion", ["learned", 1, True, [nn.Identity()]])
def test_fusions_that_cannot_be_called(fusion):
    with pytest.raises(ConfigTypeError) as caught:
        build(fusion_module=fusion)
    message = f"'fusion_module' must be a torch.nn.Module, or a callable that is no class (got {fusion!r})"
    assert_error(caught.value, ConfigTypeError, TypeError, message)


def test_a_class_is_no_fusion():
    with pytest.raises(ConfigTypeError) as caught:
        build(fusion_module=nn.Identity)
    message = f"'fusion_module' must be a torch.nn.Module, or a callable that is no class (got {nn.Identity!r})"
    assert_error(caught.value, ConfigTypeError, TypeError, message)


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ("loop", "got 'loop'; nearest: 'looped'"),
        ("LOOPED", "got 'LOOPED'; nearest: 'looped', 'grouped'"),
        ("", "got ''; known: {known}"),
        (None, "got None; known: {known}"),
        (1, "got 1; known: {known}"),
    ],
)
def test_unknown_engines(engine, words, monkeypatch):
    from celmoe.engines.registry import ENGINES

    monkeypatch.delenv("CELMOE_ENGINE", raising=False)
    known = ", ".join(repr(name) for name in ENGINES)
    calls = []
    with pytest.raises(EngineError) as caught:
        HierarchicalCELMoE(two_levels(), lambda *names: calls.append(names), engine=engine)
    message = f"'engine' must be one of {known} ({words.format(known=known)})"
    assert_error(caught.value, EngineError, ValueError, message)
    assert not calls


def test_an_engine_set_later_is_checked_too():
    from celmoe.engines.registry import ENGINES

    model = build()
    with pytest.raises(EngineError, match="'engine' must be one of"):
        model.engine = "fast"
    model.engine = "auto"
    assert model.engine in ENGINES
    assert model(rows(), GOOD).fused_hidden.shape == (3, WIDTH)


def test_the_engine_of_the_environment(monkeypatch):
    from celmoe.engines.registry import ENGINES

    for value, engine in (("looped", "looped"), ("", None), ("auto", None)):
        monkeypatch.setenv("CELMOE_ENGINE", value)
        assert build().engine == (engine or build(engine="auto").engine)
    known = ", ".join(repr(name) for name in ENGINES)
    for value in ("Looped", "fast", " looped"):
        monkeypatch.setenv("CELMOE_ENGINE", value)
        with pytest.raises(EngineError) as caught:
            build()
        assert str(caught.value).startswith(f"'CELMOE_ENGINE' must be one of {known} (got {value!r}; ")
    # The environment does not decide for an engine asked for by name, nor for a model that exists.
    monkeypatch.setenv("CELMOE_ENGINE", "looped")
    model = build()
    monkeypatch.setenv("CELMOE_ENGINE", "nonsense")
    assert model(rows(), GOOD).fused_hidden.shape == (3, WIDTH)
    assert build(engine="looped").engine == "looped"


def test_the_engine_is_keyword_only():
    with pytest.raises(TypeError, match="positional argument"):
        HierarchicalCELMoE(two_levels(), lambda *_: Counting(), None, "looped")


# Losses

WEIGHTS = [
    (NAN, ConfigError, ValueError, "'weight' must be finite (got nan)"),
    (INF, ConfigError, ValueError, "'weight' must be finite (got inf)"),
    (None, ConfigTypeError, TypeError, "'weight' must be a number (got None)"),
    ("1", ConfigTypeError, TypeError, "'weight' must be a number (got '1')"),
    (True, ConfigTypeError, TypeError, "'weight' must be a number (got True)"),
]


@pytest.mark.parametrize(("weight", "kind", "builtin", "message"), WEIGHTS, ids=[repr(each[0]) for each in WEIGHTS])
def test_weights_of_losses(weight, kind, builtin, message):
    api, bundle = CELMoELossAPI(), LossBundle()
    one = torch.tensor(1.0)
    for call in (
        lambda: api.add_global("x", print, weight),
        lambda: api.add_level("family", "x", print, weight),
        lambda: api.add_bridge("family", "language", "x", print, weight),
        lambda: bundle.add("x", one, weight),
        lambda: LossTerm("x", one, weight),
    ):
        with pytest.raises(kind) as caught:
            call()
        assert_error(caught.value, kind, builtin, message)
    assert api.global_losses == api.bridge_losses == bundle.terms == []
    assert api.level_losses == {}


@pytest.mark.parametrize("value", [None, [1.0], "1.0", 1j])
def test_loss_values_that_are_neither_tensor_nor_number(value):
    with pytest.raises(InputTypeError) as caught:
        LossBundle().add("x", value)
    message = f"'value' of loss 'x' must be a tensor or a number (got {value!r})"
    assert_error(caught.value, InputTypeError, TypeError, message)


@pytest.mark.parametrize("value", [1.5, 2, np.float32(2), np.float64(2)])
def test_numbers_are_loss_values(value):
    """celmoe-vp sums them, unless they come first."""
    bundle = LossBundle()
    bundle.add("x", value, 2.0)
    bundle.add("y", torch.tensor(1.0))
    assert bundle.total == 2 * value + 1
    assert bundle.as_dict() == {"x": value, "y": 1.0}
    assert LossBundle([LossTerm("x", value)]).as_dict() == {"x": value}


def test_loss_values_that_are_no_scalars():
    bundle = LossBundle()
    bundle.add("x", torch.ones(1))
    assert bundle.as_dict() == {"x": 1.0}
    bundle.add("y", torch.ones(2, 3))
    with pytest.raises(ValueError) as caught:
        bundle.as_dict()
    assert str(caught.value) == "'value' of loss 'y' must be a scalar (got shape (2, 3))"


def test_a_bundle_without_terms():
    for bundle in (LossBundle(), LossBundle([]), CELMoELossAPI().compute(quiet())):
        with pytest.raises(ValueError, match=r"^'terms' must hold at least one loss term \(got none\)$"):
            _ = bundle.total
        assert bundle.as_dict() == {}


def quiet():
    output = build()(rows(), GOOD)
    output.losses.clear()
    return output


def test_losses_of_unknown_levels():
    output = build()(rows(), GOOD)
    for register, name, who in (
        (lambda api: api.add_level("familly", "size", print), "familly", "level loss 'size'"),
        (lambda api: api.add_bridge("familly", "language", "tie", print), "familly", "bridge loss 'tie'"),
        (lambda api: api.add_bridge("language", "familly", "tie", print), "familly", "bridge loss 'tie'"),
    ):
        api = CELMoELossAPI()
        ran = []
        api.add_global("first", lambda *_, ran=ran: ran.append(1) or torch.tensor(1.0))
        register(api)
        with pytest.raises(UnknownLevelError) as caught:
            api.compute(output)
        message = f"{who} must be registered for levels of the output (got {name!r}; nearest: 'family')"
        assert_error(caught.value, UnknownLevelError, KeyError, message)
        assert not ran


def test_losses_of_several_unknown_levels():
    api = CELMoELossAPI()
    api.add_level("familly", "size", print)
    api.add_bridge("familly", "langage", "tie", print)
    with pytest.raises(UnknownLevelError) as caught:
        api.compute(build()(rows(), GOOD))
    message = (
        "level loss 'size', bridge loss 'tie' must be registered for levels of the output (got 'familly', 'langage'; "
        "nearest to 'familly': 'family'; nearest to 'langage': 'language')"
    )
    assert_error(caught.value, UnknownLevelError, KeyError, message)


def test_flags_from_numpy_are_flags():
    made = ExpertConfig("e", stop_gradient_from_parent=np.bool_(True))
    assert made.stop_gradient_from_parent is True
    assert CELMoEConfig(4, use_learned_fusion=np.bool_(False)).use_learned_fusion is False


@pytest.mark.parametrize("wrong", [0.5, None, "loss"])
def test_losses_that_cannot_be_called(wrong):
    api = CELMoELossAPI()
    for add in (
        lambda: api.add_global("x", wrong),
        lambda: api.add_level("level", "x", wrong),
        lambda: api.add_bridge("upper", "lower", "x", wrong),
    ):
        with pytest.raises(ConfigTypeError) as caught:
            add()
        assert str(caught.value) == f"'fn' of loss 'x' must be callable (got {wrong!r})"
    assert [api.global_losses, api.level_losses, api.bridge_losses] == [[], {}, []]


def test_a_bundle_without_terms_has_no_total():
    with pytest.raises(InputError, match="'terms' must hold at least one loss term"):
        LossBundle().total  # noqa: B018
