"""Samples with several experts, or with none: their routes, their plans, and the models' results."""

from __future__ import annotations

import itertools
import pickle
import random
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import celmoe
import celmoe.rows.mixing
from celmoe import (
    CELMoEConfig,
    CELMoELossAPI,
    ExpertConfig,
    ExpertModule,
    ExpertResult,
    GraphError,
    HierarchicalCELMoE,
    HierarchyLevelConfig,
    MissingRouteError,
    PlanError,
    RouteIdError,
    RouteLengthError,
    RouteTypeError,
    RouteWeightError,
    RoutingCompiler,
    RoutingPlan,
    UnknownExpertError,
)
from celmoe.reference import reference_forward
from tests.features import loads_decompositions

WIDTH = 4
PARENTS = {"es": "romance", "pt": "romance", "it": "romance", "ru": "slavic", "pl": "slavic"}


class Row(ExpertModule):
    """Works on each row by itself; its loss is a mean over its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, batch: Any) -> ExpertResult:
        hidden = batch.hidden + torch.tanh(self.linear(batch.hidden))
        return ExpertResult(hidden, {"size": hidden.square().mean()})


def config(*, fallback: str | None = None) -> CELMoEConfig:
    families = {name: ExpertConfig(name) for name in ("romance", "slavic")}
    languages = {name: ExpertConfig(name, parent=parent, loss_weight=0.5) for name, parent in PARENTS.items()}
    levels = [
        HierarchyLevelConfig("universal", {"all": ExpertConfig("all")}),
        HierarchyLevelConfig("family", families, fallback),
        HierarchyLevelConfig("language", languages, None if fallback is None else "it"),
    ]
    return CELMoEConfig(WIDTH, levels, fusion_dropout=0.0)


def model_of(engine: str = "auto", *, is_stacked: bool = False) -> HierarchicalCELMoE:
    torch.manual_seed(0)
    model = HierarchicalCELMoE(config(), lambda *_: Row(), engine=engine).double()
    if is_stacked:
        celmoe.stack_experts(model)
    return model


def compiled(routes: Any, size: int | None = None, **options: Any) -> RoutingPlan:
    return RoutingCompiler(config(), **options)({"language": routes}, size)


# Routes as a user writes them, and as a plan tells them.
SAID = [
    (["es", None], ["es", None]),
    ([{"pt": 0.3, "es": 0.7}, "ru"], [{"es": 0.7, "pt": 0.3}, "ru"]),
    ([{"es": 1.0}, {"es": 1}, {"es": 1.0, "ru": 0.0}], ["es", "es", "es"]),
    ([{"es": 0.5}, None, {"ru": 2.0, "pl": 1}], [{"es": 0.5}, None, {"pl": 1.0, "ru": 2.0}]),
    ([{0: 0.25, 3: 0.5}, 4, None], [{"es": 0.25, "ru": 0.5}, "pl", None]),
    ((None, {"es": 0.1}), [None, {"es": 0.1}]),
    ([None, None], [None, None]),
]


@pytest.mark.parametrize(("said", "told"), SAID)
def test_plans_tell_routes_as_they_were_said(said, told):
    plan = compiled(said)
    assert plan.routes("language") == told
    assert plan.is_mixed == any(not isinstance(route, str) for route in told)
    assert pickle.loads(pickle.dumps(plan)).routes("language") == told
    assert plan.to("meta").to("meta").is_mixed == plan.is_mixed


def test_one_route_for_the_whole_batch():
    assert compiled(None, 2).routes("language") == [None, None]
    assert compiled({"es": 0.5, "pt": 0.5}, 3).routes("language") == [{"es": 0.5, "pt": 0.5}] * 3
    assert compiled({"ru": 1.0}, 2).routes("language") == ["ru", "ru"]
    assert not compiled({"ru": 1.0}, 2).is_mixed
    assert compiled(None, 0).routes("language") == []
    with pytest.raises(RouteLengthError, match="'batch_size' must be given"):
        compiled(None)


def test_only_weights_of_exactly_one_are_plain():
    """0.1 + 0.2 + 0.7 comes out beside 1: shares of one parent are one whole."""
    plan = compiled([{"es": 0.1, "pt": 0.2, "it": 0.7}, {"ru": 0.999}])
    assert plan.routes("family") == ["romance", "slavic"]
    assert plan.routes("language")[1] == {"ru": 0.999}


def test_weights_are_kept_to_the_bit():
    weights = [random.Random(seed).random() * 10**exponent for seed, exponent in enumerate(range(-9, 9))]
    plan = compiled([{"es": weight, "ru": 0.1} for weight in weights])
    assert [route["es"] for route in plan.routes("language")] == weights


def test_a_level_that_is_left_out_takes_the_parents_by_their_share():
    plan = compiled([{"es": 0.5, "pt": 0.25, "ru": 0.25}, {"es": 3.0, "ru": 1.0}, {"pl": 0.5}, None, "it"])
    assert plan.routes("family") == [
        {"romance": 0.75, "slavic": 0.25},
        {"romance": 0.75, "slavic": 0.25},
        "slavic",
        None,
        "romance",
    ]
    assert plan.routes("universal") == ["all"] * 5


def test_the_fallback_comes_before_none():
    routes = [None, {"es": 0.5, "ru": 0.5}, "ru"]
    plan = RoutingCompiler(config(fallback="slavic"))({"language": routes})
    assert plan.routes("family") == ["slavic", {"romance": 0.5, "slavic": 0.5}, "slavic"]
    assert plan.routes("language") == routes
    assert RoutingCompiler(config(fallback="slavic"))({"language": None}, 1).routes("family") == ["slavic"]


def test_orphans_need_a_fallback_as_ever():
    experts = {"a": ExpertConfig("a", parent="x"), "b": ExpertConfig("b")}
    upper = {"x": ExpertConfig("x"), "y": ExpertConfig("y")}
    levels = [HierarchyLevelConfig("upper", upper), HierarchyLevelConfig("lower", experts)]
    with pytest.raises(MissingRouteError, match="these experts of level 'lower' must have a parent: 'b'"):
        RoutingCompiler(CELMoEConfig(4, levels))({"lower": [{"a": 0.5, "b": 0.5}]})
    levels[0].fallback_expert = "y"
    plan = RoutingCompiler(CELMoEConfig(4, levels))({"lower": [{"a": 0.5, "b": 0.5}]})
    assert plan.routes("upper") == [{"x": 0.5, "y": 0.5}]


@pytest.mark.parametrize(
    ("route", "error", "words"),
    [
        ({"es": -0.1}, RouteWeightError, "weights from 0 to 2**64, one of them at least 2**-64 (got {'es': -0.1})"),
        ({"es": float("nan")}, RouteWeightError, "(got {'es': nan})"),
        ({"es": float("inf")}, RouteWeightError, "(got {'es': inf})"),
        ({"es": 0.0, "pt": 0}, RouteWeightError, "(got {'es': 0.0, 'pt': 0})"),
        ({}, RouteWeightError, "(got {})"),
        ({"es": 1e39}, RouteWeightError, "(got {'es': 1e+39})"),
        ({"es": 10**400}, RouteWeightError, "weights from 0 to 2**64"),
        ({"es": 1e-300, "pt": 5e-324}, RouteWeightError, "one of them at least 2**-64"),
        ({"es": "0.5"}, RouteTypeError, "(got '0.5' of type str)"),
        ({"es": True}, RouteTypeError, "(got True of type bool)"),
        ({"es": torch.tensor(0.5)}, RouteTypeError, "of type Tensor)"),
        ({"es": 0.5, "spanish": 0.5}, UnknownExpertError, "(got 'spanish' for 1 of 2 samples; known: 'es', 'pt'"),
        ({"ess": 0.5}, UnknownExpertError, "nearest: 'es'"),
        ({7: 0.5}, RouteTypeError, "either names or integer ids (got both)"),
        ({None: 0.5}, RouteTypeError, "must map names or integer ids to weights (got None)"),
        ({("es",): 0.5}, RouteTypeError, "(got ('es',) of type tuple)"),
        ([0.5], RouteTypeError, "mappings to weights or None (got [0.5] of type list)"),
        (0.5, RouteTypeError, "(got 0.5 of type float)"),
    ],
)
def test_refused_routes(route, error, words):
    with pytest.raises(error) as caught:
        compiled(["es", route])
    assert str(caught.value).startswith("\"routing['language']\" must ")
    assert words in str(caught.value)
    if isinstance(route, dict):
        with pytest.raises((error, RouteIdError)):
            compiled(route, 2)


def test_weights_that_change_no_sum_are_none():
    """Floats of 32 bits, which a plan is made of, hold none of them."""
    routes = [{"es": 1e-46, "ru": 0.5}, {"es": 2.0**-65, "ru": 1}, {"es": 2.0**-64, "ru": 2.0**64}]
    assert compiled(routes).routes("language") == [{"ru": 0.5}, "ru", {"es": 2.0**-64, "ru": 2.0**64}]
    # Shares of parents can be smaller than any weight.
    assert compiled(routes).routes("family") == ["slavic", "slavic", "slavic"]
    by_ids = compiled([{0: 1e-46, 3: 1}, {0: 2.0**64, 3: 2.0**-64}])
    assert by_ids.routes("language") == ["ru", {"es": 2.0**64, "ru": 2.0**-64}]


def test_an_unknown_name_for_the_whole_batch_is_told_as_such():
    with pytest.raises(UnknownExpertError, match=r"\(got 'xx' for the whole batch; known"):
        compiled({"xx": 0.5, "es": 0.5}, 3)


def test_refused_ids_of_several_experts():
    with pytest.raises(RouteIdError, match=r"ids from 0 to 4.*\(got 5 for 1 of 3"):
        compiled([1, {2: 0.5, 5: 0.5}])


def test_unknown_names_go_to_the_fallback_if_asked():
    compiler = RoutingCompiler(config(fallback="slavic"), unknown="fallback")
    plan = compiler({"language": ["es", "xx", {"yy": 0.5, "ru": 0.5}, None]})
    assert plan.routes("language") == ["es", "it", {"it": 0.5, "ru": 0.5}, None]
    assert plan.routes("family") == ["romance", "romance", {"romance": 0.5, "slavic": 0.5}, "slavic"]
    assert compiler({"language": "xx"}, 2).routes("language") == ["it", "it"]
    assert compiler({"universal": ["whatever"], "language": ["es"]}).routes("universal") == ["all"]
    assert pickle.loads(pickle.dumps(compiler))({"language": ["xx"]}).routes("language") == ["it"]
    assert not compiler({"language": ["es", "xx"]}).is_mixed
    with pytest.raises(RouteIdError):
        compiler({"language": [9]})
    with pytest.raises(RouteTypeError):
        compiler({"language": [0.5]})


def test_unknown_names_without_a_fallback_are_refused_with_the_cure():
    compiler = RoutingCompiler(config(), unknown="fallback")
    with pytest.raises(UnknownExpertError, match="got 'xx' for 1 of 1 samples") as caught:
        compiler({"language": ["xx"]})
    assert caught.value.__notes__ == ["celmoe: level 'language' has several experts and no fallback for unknown names"]
    with pytest.raises(UnknownExpertError, match="for the whole batch"):
        compiler({"language": "xx"}, 3)
    with pytest.raises(celmoe.ConfigError, match="'unknown' must be 'refused' or 'fallback' \\(got 'nearest'\\)"):
        RoutingCompiler(config(), unknown="nearest")


def drawn(seed: int, size: int) -> list[Any]:
    choose = random.Random(seed)

    def route() -> Any:
        several = {name: choose.choice([0.1, 0.5, 2.0]) for name in choose.sample([*PARENTS], choose.randint(1, 4))}
        return choose.choice([choose.choice([*PARENTS]), None, several])

    return [route() for _ in range(size)]


@pytest.mark.parametrize("size", [1, 5, 64, 200])
def test_slices_and_joins_are_the_plans_of_these_routes(size):
    routes = drawn(size, size)
    plan = compiled(routes)
    for start, stop in [(0, size), (0, 0), (size // 3, 2 * size // 3), (size // 2, size)]:
        part, wanted = plan.slice(start, stop), compiled(routes[start:stop])
        assert part.is_mixed == wanted.is_mixed
        for level in plan.levels:
            assert_same_plan(part.levels[level], wanted.levels[level])
    plain = compiled(["es", "ru"])
    joined = RoutingPlan.join([plain, plan, plan.slice(0, size // 2), plain])
    wanted = compiled(["es", "ru", *routes, *routes[: size // 2], "es", "ru"])
    for level in plan.levels:
        assert_same_plan(joined.levels[level], wanted.levels[level])


def assert_same_plan(found: Any, wanted: Any) -> None:
    assert found[:5] == wanted[:5]
    assert found.weights == wanted.weights
    for left, right in zip(flat(found), flat(wanted), strict=True):
        assert torch.equal(left, right)


def flat(plan: Any) -> list[torch.Tensor]:
    mixture = () if plan.mixture is None else plan.mixture[2:]
    return [plan.order, plan.inverse, plan.expert_ids, plan.ends, *mixture]


def test_what_a_plan_of_mixed_routes_holds():
    """By hand: es has samples 0 and 1, ru has 1; sample 2 passes through."""
    plan = compiled(["es", {"es": 0.75, "ru": 0.25}, None, "ru"]).levels["language"]
    assert (plan.present, plan.counts, plan.weights) == (("es", "ru"), (2, 2), (1.75, 1.25))
    assert plan.order.tolist() == [0, 1, 1, 3, 2]
    assert plan.inverse.tolist() == [0, 5, 4, 3]
    assert plan.expert_ids.tolist() == [0, -2, -1, 3]
    assert plan.mixture is not None
    assert (plan.mixture.num_passed, plan.mixture.most) == (1, 2)
    assert plan.mixture.places.tolist() == [1, 2]
    assert plan.mixture.row_weights(torch.empty(0, 1)).flatten().tolist() == [1.0, 0.75, 0.25, 1.0, 1.0]
    assert compiled(["es", {"es": 0.75, "ru": 0.25}]).load()["language"].samples["es"] == 2


@pytest.mark.parametrize("is_stacked", [False, True])
@pytest.mark.parametrize("engine", ["looped", "grouped"])
def test_several_experts_are_the_weighted_sum_of_single_runs(engine, is_stacked):
    """Output, losses and all gradients of a level of {"es": 0.7, "ru": 0.3}, beside those of two models run alone."""
    weights = {"es": 0.7, "ru": 0.3}
    api = CELMoELossAPI()
    api.add_level("language", "fit", lambda level, *_: level.hidden.sum())
    hidden = torch.randn(6, WIDTH, dtype=torch.float64)

    def run(routes: Any, factor: float) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        model = model_of(engine, is_stacked=is_stacked)
        rows = hidden.clone().requires_grad_()
        output = model(rows, {"universal": None, "family": None, "language": routes})
        total = factor * api.compute(output).total
        total.backward()
        if is_stacked:
            celmoe.unstack_experts(model)
        grads = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
        return output.levels["language"].hidden, total, {"rows": rows.grad, **grads}

    mixed, total, grads = run([weights] * 6, 1.0)
    parts = [run(name, weight) for name, weight in weights.items()]
    torch.testing.assert_close(mixed, sum(weight * run(name, 1.0)[0] for name, weight in weights.items()))
    torch.testing.assert_close(total, sum(part[1] for part in parts))
    for name, grad in grads.items():
        torch.testing.assert_close(grad, sum(part[2].get(name, torch.zeros_like(grad)) for part in parts))


@pytest.mark.parametrize("is_stacked", [False, True])
@pytest.mark.parametrize("engine", ["looped", "grouped", "auto"])
def test_rows_without_an_expert_pass_through(engine, is_stacked):
    model = model_of(engine, is_stacked=is_stacked)
    hidden = torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)
    output = model(hidden, {"universal": None, "family": ["slavic", None, None], "language": [None, "es", None]})
    states = [level.hidden for level in output.levels.values()]
    assert torch.equal(states[0], hidden)
    assert states[0].data_ptr() != hidden.data_ptr()
    assert torch.equal(states[1][1:], hidden[1:])
    assert torch.equal(states[2][0], states[1][0])
    assert torch.equal(states[2][2], hidden[2])
    states[2][2].sum().backward()
    assert torch.equal(hidden.grad, torch.tensor([[0.0] * WIDTH, [0.0] * WIDTH, [1.0] * WIDTH], dtype=torch.float64))
    assert output.levels["language"].routes == [None, "es", None]


def test_a_detached_expert_does_not_detach_rows_that_pass():
    model = model_of()
    for expert in model.config.levels[2].experts.values():
        expert.stop_gradient_from_parent = True
    hidden = torch.randn(2, WIDTH, dtype=torch.float64, requires_grad=True)
    output = model(hidden, {"universal": None, "family": None, "language": ["es", None]})
    output.levels["language"].hidden.sum().backward()
    assert hidden.grad.tolist() == [[0.0] * WIDTH, [1.0] * WIDTH]


def test_a_batch_of_which_all_pass_can_be_trained_on():
    model = model_of()
    output = model(torch.randn(2, WIDTH, dtype=torch.float64), {"universal": None, "family": None, "language": None})
    output.levels["language"].hidden.sum().backward()
    assert all(each.grad is None for each in model.level_modules.parameters())


@loads_decompositions
def test_second_derivatives_and_forward_mode():
    model = HierarchicalCELMoE(config(), lambda *_: Row(), celmoe.MeanFusion(), engine="looped").double()
    plan = model.compile_routing({"language": drawn(3, 9)})
    hidden = torch.randn(9, WIDTH, dtype=torch.float64, requires_grad=True)

    def run(rows: torch.Tensor) -> torch.Tensor:
        return model(rows, plan).fused_hidden

    assert torch.autograd.gradcheck(run, (hidden,), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (hidden,), fast_mode=True)
    direction = torch.randn_like(hidden)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(run(forward_ad.make_dual(hidden.detach(), direction))).tangent
    torch.testing.assert_close(tangent, torch.autograd.functional.jvp(run, hidden.detach(), direction)[1])


def test_function_transforms():
    model = model_of("looped")
    plan = model.compile_routing({"language": drawn(4, 5)})
    hidden = torch.randn(5, WIDTH, dtype=torch.float64)

    def summed(rows: torch.Tensor) -> torch.Tensor:
        return model(rows, plan).fused_hidden.square().sum()

    wanted = hidden.clone().requires_grad_()
    summed(wanted).backward()
    torch.testing.assert_close(torch.func.grad(summed)(hidden), wanted.grad)
    stack = torch.stack([hidden, 2 * hidden])
    mapped = torch.func.vmap(lambda rows: model(rows, plan).fused_hidden)(stack)
    torch.testing.assert_close(mapped, torch.stack([model(rows, plan).fused_hidden for rows in stack]))


def test_explain_tells_how_many_samples_are_mixed():
    plan = compiled(["es", {"es": 0.5, "ru": 0.5}, None, {"pl": 0.1}])
    lines = {line.level: line.why for line in model_of().explain(plan).levels}
    assert lines["language"].endswith(
        "one gather each way, samples 2 with several experts or a weight, 1 without an expert"
    )
    assert lines["universal"].endswith("one expert present, no gather")
    assert model_of().explain(compiled([None], 1)).levels[2].why.endswith("samples 1 without an expert")


def test_a_compiled_model_leaves_its_graph_for_them():
    model = HierarchicalCELMoE(config(), lambda *_: Silent()).double().eval()
    graph = torch.compile(model, backend="eager")
    hidden = torch.randn(4, WIDTH, dtype=torch.float64)
    plans = [model.compile_routing({"language": routes}) for routes in (["es"] * 4, drawn(5, 4), drawn(6, 4))]
    for plan in [*plans, *plans]:
        assert torch.equal(graph(hidden, plan).fused_hidden, model(hidden, plan).fused_hidden)


class Silent(ExpertModule):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, batch: Any) -> ExpertResult:
        return ExpertResult(self.linear(batch.hidden))


def test_exported_models_refuse_them():
    model = HierarchicalCELMoE(config(), lambda *_: Silent()).eval()
    hidden = torch.randn(3, WIDTH)
    mixed, plain = (model.compile_routing({"language": routes}) for routes in (["es", None, "ru"], ["es", "pt", "ru"]))
    with pytest.raises(GraphError, match="one expert a level in an exported model"):
        torch.export.export(model, (hidden, mixed), strict=False)
    program = torch.export.export(model, (hidden, plain), strict=False)
    with pytest.raises(ValueError, match="tree spec"):
        program.module()(hidden, mixed)


def test_tensors_of_a_mixed_plan_are_no_plan():
    plan = compiled(["es", None])
    leaves, spec = torch.utils._pytree.tree_flatten(plan)
    assert torch.utils._pytree.tree_unflatten(leaves, spec) is plan
    other = torch.utils._pytree.tree_unflatten([leaf.clone() for leaf in leaves], spec)
    with pytest.raises(PlanError, match="one expert a sample"):
        other.routes("language")


@pytest.mark.parametrize("wrong", ["weights of rows", "gradients without weights", "sums of wrong samples"])
def test_wrong_mixtures_are_found(wrong, monkeypatch):
    """Faults of the kind that would go unnoticed in training: the comparison with the oracle finds each."""
    plan = compiled(routes := drawn(1, 40))
    hidden = torch.randn(40, WIDTH, dtype=torch.float64)
    gathered, spread = celmoe.rows.mixing._gathered, celmoe.rows.mixing._spread
    if wrong == "weights of rows":
        monkeypatch.setattr(celmoe.rows.mixing, "_gathered", lambda blocks, plan, _: gathered(blocks, plan, False))
    elif wrong == "gradients without weights":
        monkeypatch.setattr(celmoe.rows.mixing, "_spread", lambda rows, plan, _: spread(rows, plan, False))
    else:
        level = plan.levels["language"]
        assert level.mixture is not None
        swapped = level.mixture._replace(slots=level.mixture.slots.flip(0))
        levels = {**plan.levels, "language": level._replace(mixture=swapped)}
        monkeypatch.setattr(RoutingPlan, "levels", levels)
    assert differs(plan, routes, hidden)
    monkeypatch.undo()
    assert not differs(compiled(routes), routes, hidden)


def differs(plan: RoutingPlan, routes: list[Any], hidden: torch.Tensor) -> bool:
    model, oracle = model_of("looped"), model_of("looped")
    rows, wanted = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    output, expected = model(rows, plan), reference_forward(oracle, wanted, {"language": routes})
    output.fused_hidden.square().sum().backward()
    expected.fused_hidden.square().sum().backward()
    pairs = [(output.fused_hidden, expected.fused_hidden), (rows.grad, wanted.grad)]
    pairs += [(a.grad, b.grad) for a, b in zip(model.parameters(), oracle.parameters(), strict=True)]
    return not all(a is b or torch.allclose(a, b, rtol=1e-9, atol=1e-10) for a, b in pairs)


def test_optimizer_steps_over_mixed_batches_equal_the_oracles():
    for engine, is_stacked in itertools.product(["looped", "grouped"], [False, True]):
        model, oracle = model_of(engine, is_stacked=is_stacked), model_of("looped")
        ours = celmoe.optim.AdamW(model.parameters(), lr=0.1)
        theirs = torch.optim.AdamW(oracle.parameters(), lr=0.1)
        for step in range(3):
            hidden, routes = torch.randn(20, WIDTH, dtype=torch.float64), drawn(step, 20)
            api = CELMoELossAPI()
            for optimizer, output in (
                (ours, model(hidden, {"language": routes})),
                (theirs, reference_forward(oracle, hidden, {"language": routes})),
            ):
                optimizer.zero_grad()
                (api.compute(output).total + output.fused_hidden.square().sum()).backward()
                optimizer.step()
        del ours
        if is_stacked:
            celmoe.unstack_experts(model)
        for name, value in model.named_parameters():
            torch.testing.assert_close(
                value, dict(oracle.named_parameters())[name], msg=f"{engine} {is_stacked} {name}"
            )
