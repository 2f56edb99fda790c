"""Experts that differ or share, and layers that are more than their weights."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

from celmoe import (
    CELMoEConfig,
    EngineRefusedError,
    ExpertConfig,
    ExpertResult,
    HierarchicalCELMoE,
    HierarchyLevelConfig,
)
from tests.traps import (
    BATCHES,
    GROUPED,
    NAMES,
    WIDTH,
    Batch,
    Plain,
    Trapped,
    assert_like_oracle,
    build,
    check_auto,
    experts_of,
    seed_all,
)


class Varied(Trapped):
    """Its structure depends on which of its siblings it is."""

    def __init__(self, number: int, vary: Any) -> None:
        super().__init__()
        vary(self, number)

    def forward(self, batch):
        return super().forward(batch)


def frozen(expert, number):
    expert.linear.bias.requires_grad_(number % 2 > 0)


def another_width(expert, number):
    expert.linear = nn.Sequential(nn.Linear(WIDTH, 3 + number % 3), nn.Linear(3 + number % 3, WIDTH))


def no_bias(expert, number):
    expert.linear = nn.Linear(WIDTH, WIDTH, bias=number % 2 > 0)


def another_dtype(expert, number):
    if number % 2:
        expert.linear = nn.Sequential(Cast(torch.float64), nn.Linear(WIDTH, WIDTH).double(), Cast(torch.float32))


class Cast(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.to(self.dtype)


def another_activation(expert, number):
    expert.linear = nn.Sequential(expert.linear, [nn.Tanh(), nn.ReLU()][number % 2])


def another_slope(expert, number):
    expert.linear = nn.Sequential(expert.linear, nn.LeakyReLU(0.1 + 0.3 * (number % 2)))


def another_epsilon(expert, number):
    expert.linear = nn.Sequential(expert.linear, nn.LayerNorm(WIDTH, eps=[1e-5, 0.5][number % 2]))


def tied_or_not(expert, number):
    first = nn.Linear(WIDTH, WIDTH)
    second = first if number % 2 else nn.Linear(WIDTH, WIDTH)
    expert.linear = nn.Sequential(first, second)


def weights_tied_or_not(expert, number):
    expert.linear = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    if number % 2:
        expert.linear[1].weight = expert.linear[0].weight


def own_forward(expert, number):
    if number % 2:
        expert.linear.forward = lambda rows: F.linear(rows, expert.linear.weight, expert.linear.bias * 3)


def another_order(expert, number):
    """The same names and shapes, called in another order."""
    layers = [("one", nn.Linear(WIDTH, WIDTH)), ("two", nn.Linear(WIDTH, WIDTH))]
    expert.linear = nn.Sequential()
    for name, layer in layers[:: 1 if number % 2 else -1]:
        expert.linear.add_module(name, layer)


def another_mode(expert, number):
    expert.linear = nn.Sequential(expert.linear, nn.BatchNorm1d(WIDTH).eval())
    expert.linear[1].running_mean.normal_()


def transposed_memory(expert, number):
    if number % 2:
        expert.linear.weight = nn.Parameter(expert.linear.weight.detach().T.contiguous().T)


def buffer_or_parameter(expert, number):
    if number % 2:
        bias = expert.linear.bias.detach()
        del expert.linear.bias
        expert.linear.register_buffer("bias", bias)


SHARED: dict[str, Any] = {}


def _shared(name: str, make: Any) -> Any:
    return SHARED.setdefault(name, make())


def shares_a_weight(expert, number):
    expert.linear.weight = _shared("weight", lambda: nn.Parameter(torch.randn(WIDTH, WIDTH)))


def shares_a_layer(expert, number):
    expert.linear = _shared("layer", lambda: nn.Linear(WIDTH, WIDTH))


def shares_a_weight_in_pairs(expert, number):
    expert.linear.weight = _shared(f"weight {number // 2}", lambda: nn.Parameter(torch.randn(WIDTH, WIDTH)))


def shares_storage(expert, number):
    """Parameters of their own, that see one another's values: views of one tensor."""
    storage = _shared("storage", lambda: torch.randn(WIDTH + 5, WIDTH))
    expert.linear.weight = nn.Parameter(storage[number % 5 : number % 5 + WIDTH])


def shares_a_buffer(expert, number):
    expert.linear = nn.Sequential(expert.linear, AddBuffer(_shared("buffer", lambda: torch.randn(WIDTH))))


class AddBuffer(nn.Module):
    table: torch.Tensor

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows + self.table


VARIETIES = {
    each.__name__: each
    for each in (
        frozen,
        another_width,
        no_bias,
        another_dtype,
        another_activation,
        another_slope,
        another_epsilon,
        tied_or_not,
        weights_tied_or_not,
        own_forward,
        another_order,
        another_mode,
        transposed_memory,
        buffer_or_parameter,
        shares_a_weight,
        shares_a_layer,
        shares_a_weight_in_pairs,
        shares_storage,
        shares_a_buffer,
    )
}


def varied(name: str, engine: str) -> HierarchicalCELMoE:
    SHARED.clear()
    numbers = iter(range(len(NAMES)))
    return build(lambda: Varied(next(numbers), VARIETIES[name]), engine)


@pytest.mark.parametrize("engine", [GROUPED, "auto"])
@pytest.mark.parametrize("name", VARIETIES)
def test_experts_that_differ_or_share(name: str, engine: str):
    """Experts are told apart, or refused: one architecture by name and shape may be several."""
    subject, twin = varied(name, engine), varied(name, engine)
    for make_batch in (*BATCHES, BATCHES[0]):
        try:
            assert_like_oracle(subject, twin, make_batch)
        except EngineRefusedError:
            assert engine == GROUPED


@pytest.mark.parametrize("name", ["shares_a_weight", "shares_a_layer"])
def test_shared_parameters_are_refused_by_name(name: str):
    with pytest.raises(EngineRefusedError, match=r"(?i)shar|weight"):
        Batch()(varied(name, GROUPED))


def weight_normed():
    return weight_norm(nn.Linear(WIDTH, WIDTH))


def spectrally_normed():
    return spectral_norm(nn.Linear(WIDTH, WIDTH))


def orthogonal_weight():
    return orthogonal(nn.Linear(WIDTH, WIDTH))


class Symmetric(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.triu() + weight.triu(1).T


def parametrized():
    layer = nn.Linear(WIDTH, WIDTH)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


def pruned():
    return prune.random_unstructured(nn.Linear(WIDTH, WIDTH), "weight", amount=0.4)


class Hierarchy(nn.Module):
    """Another hierarchy inside."""

    def __init__(self) -> None:
        super().__init__()
        level = HierarchyLevelConfig("inner", {name: ExpertConfig(name) for name in "xy"})
        self.inner = HierarchicalCELMoE(CELMoEConfig(WIDTH, [level]), lambda *_: Plain(), engine="looped")

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.inner(rows, {"inner": "y"}).fused_hidden


class Scripted(nn.Module):
    """Attribute access of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterDict({"one": nn.Parameter(torch.randn(WIDTH, WIDTH))})

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__("weights")["one"] if name == "weight" else super().__getattr__(name)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows @ self.weight


LAYERS = (weight_normed, spectrally_normed, orthogonal_weight, parametrized, pruned, Hierarchy, Scripted)


class With(Trapped):
    """A plain expert around another layer."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.linear = make()


@pytest.mark.parametrize("engine", [GROUPED, "auto"])
@pytest.mark.parametrize("make", LAYERS)
def test_layers_that_are_more_than_their_weights(make: Any, engine: str):
    subject, twin = (build(lambda: With(make), engine) for _ in range(2))
    for make_batch in (*BATCHES, BATCHES[0]):
        try:
            assert_like_oracle(subject, twin, make_batch)
        except EngineRefusedError:
            assert engine == GROUPED


@pytest.mark.parametrize("make", LAYERS[:5])
def test_parametrized_layers_in_eval(make: Any):
    subject, twin = (build(lambda: With(make), "auto").eval() for _ in range(2))
    for make_batch in BATCHES:
        assert_like_oracle(subject, twin, make_batch)


def test_lazy_layers():
    """Weights that come to be at the first call: drawn in the experts' order, and absent ones' not at all."""

    def make():
        return With(functools.partial(nn.LazyLinear, WIDTH))

    models = [build(make, "auto"), build(make)]
    outputs = []
    for model in models:
        forward = model if model.engine == "auto" else functools.partial(_oracle, model)
        for batch in (Batch(), Batch((3, 4), 1)):
            seed_all()
            outputs.append(batch(forward).fused_hidden)
    for mine, theirs in zip(outputs[:2], outputs[2:], strict=True):
        torch.testing.assert_close(mine, theirs)
    for model in models:
        assert isinstance(experts_of(model)[-1].linear.weight, nn.UninitializedParameter)


def _oracle(model: HierarchicalCELMoE, *given: Any) -> Any:
    from celmoe.reference import reference_forward

    return reference_forward(model, *given)


def test_classes_by_name_are_not_classes_by_code():
    """Two Python classes of one name, and of the same parameters."""

    def make_class(factor: int) -> type[Trapped]:
        class Twin(Trapped):
            def forward(self, batch):
                return ExpertResult(self.linear(batch.hidden) * factor)

        return Twin

    kinds = [make_class(2), make_class(3)]

    def model_of(engine: str) -> HierarchicalCELMoE:
        numbers = iter(range(len(NAMES)))

        def make() -> Trapped:
            return kinds[next(numbers) % 2]()

        return build(make, engine)

    for engine in (GROUPED, "auto"):
        subject, twin = model_of(engine), model_of(engine)
        try:
            assert_like_oracle(subject, twin, Batch)
        except EngineRefusedError:
            assert engine == GROUPED


class TwoWidths(Trapped):
    """Classes side by side: three experts of one width, three of another."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.linear = nn.Sequential(nn.Linear(WIDTH, inner), nn.Tanh(), nn.Linear(inner, WIDTH))


def test_two_classes_in_one_level_are_both_grouped():
    def model_of(engine: str) -> HierarchicalCELMoE:
        numbers = iter(range(len(NAMES)))
        return build(lambda: TwoWidths([4, 12][next(numbers) % 2]), engine)

    subject, twin = model_of(GROUPED), model_of(GROUPED)
    for make_batch in BATCHES:
        assert_like_oracle(subject, twin, make_batch)
    (level,) = subject.explain(Batch().routing).levels
    assert sorted(each.experts for each in level.classes) == [("a", "c", "e"), ("b", "d")]
    assert {each.engine for each in level.classes} == {"grouped"}


@pytest.mark.parametrize("engine", [GROUPED, "auto"])
def test_one_expert_of_its_kind_is_no_degradation(engine: str):
    """An odd expert runs alone, and its siblings run as one."""

    def model_of() -> HierarchicalCELMoE:
        model = build(Plain, engine)
        experts_of(model)[1].forward = functools.partial(_forward_with_aux, experts_of(model)[1])
        return model

    subject, twin = model_of(), model_of()
    for make_batch in BATCHES:
        assert_like_oracle(subject, twin, make_batch)


def _forward_with_aux(expert, batch):
    return ExpertResult(expert.linear(batch.hidden), aux={"rows": len(batch.hidden)})


def test_auto_runs_every_variety_of_batch():
    check_auto(Plain)
