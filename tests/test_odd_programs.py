"""Programs that are unusual but legal: transforms of torch.func, tracing, threads, hooks, odd modes and copies.

They should give the naive oracle's results under the same transform: the oracle is made of plain torch operations.
"""

from __future__ import annotations

import copy
import io
import pickle
import threading
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from celmoe import CELMoEConfig, ExpertModule, ExpertResult, HierarchicalCELMoE, HierarchyLevelConfig
from celmoe.reference import reference_forward
from tests.refusals import GOOD, WIDTH, Counting, build, level, rows, two_levels

pytestmark = pytest.mark.usefixtures("_as_few_and_as_many")

# Rows that must be gathered, rows that stand in order, one expert present, and levels whose orders are one.
ROUTINGS = {
    "mixed": {"family": ["slavic", "romance", "slavic", "germanic"], "language": ["ru", "fr", "pl", "de"]},
    "sorted": {"family": ["germanic", "germanic", "romance", "slavic"], "language": ["de", "de", "fr", "ru"]},
    "single": {"family": "slavic", "language": "ru"},
    "same order": {"family": ["slavic", "germanic", "slavic", "germanic"], "language": ["ru", "de", "ru", "de"]},
}
B = 4


class Runs:
    """One model as a function of rows, by the engine and by the oracle."""

    def __init__(self, routing, **options):
        self.routing = routing
        self.model = build(**options).eval().double()

    def engine(self, hidden):
        return self.model(hidden, self.routing).fused_hidden

    def oracle(self, hidden):
        return reference_forward(self.model, hidden, self.routing).fused_hidden

    def with_parameters(self, forward, parameters, hidden):
        wrapped = Wrapper(self.model, partial(forward, self))
        named = {f"model.{name}": value for name, value in parameters.items()}
        return torch.func.functional_call(wrapped, named, (hidden,))


class Wrapper(nn.Module):
    def __init__(self, model, forward):
        super().__init__()
        self.model = model
        self.function = forward

    def forward(self, hidden):
        return self.function(hidden)


@pytest.fixture(params=ROUTINGS)
def runs(request):
    return Runs(ROUTINGS[request.param])


@pytest.fixture
def quiet():
    """torch's own warnings: deprecations inside it, and batching rules that it has not written yet."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.usefixtures("quiet")
def test_forward_mode_through_torch_func(runs):
    hidden, tangent = rows(B).double(), torch.linspace(-1, 1, B * WIDTH).double().reshape(B, WIDTH)
    value, slope = torch.func.jvp(runs.engine, (hidden,), (tangent,))
    expected, expected_slope = torch.func.jvp(runs.oracle, (hidden,), (tangent,))
    assert expected_slope.abs().sum() > 0
    close(value, expected)
    close(slope, expected_slope)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("needs_grad", [False, True])
def test_forward_mode_through_dual_numbers(runs, needs_grad):
    tangents = []
    for forward in (runs.engine, runs.oracle):
        with forward_ad.dual_level():
            hidden = rows(B).double().requires_grad_(needs_grad)
            dual = forward_ad.make_dual(hidden, torch.ones_like(hidden))
            tangents.append(forward_ad.unpack_dual(forward(dual)).tangent)
    close(*tangents)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("where", ["one expert", "one level", "everywhere"])
def test_forward_mode_past_detached_experts(runs, needs_grad, where):
    """Blocks without a tangent beside blocks with one: they count as zeros, not as missing rows."""
    for each in runs.model.config.levels[:1] if where == "one level" else runs.model.config.levels:
        for name, expert in each.experts.items():
            if where != "one expert" or name in ("slavic", "fr"):
                expert.stop_gradient_from_parent = True
    tangents = []
    for forward in (runs.engine, runs.oracle):
        with forward_ad.dual_level():
            hidden = rows(B).double().requires_grad_(needs_grad)
            dual = forward_ad.make_dual(hidden, torch.ones_like(hidden))
            tangents.append(forward_ad.unpack_dual(forward(dual)).tangent)
    found, expected = (torch.zeros(B, WIDTH).double() if each is None else each for each in tangents)
    close(found, expected)


@pytest.mark.usefixtures("quiet")
def test_gradients_of_torch_func(runs):
    hidden = rows(B).double()
    parameters = {name: value.detach() for name, value in runs.model.named_parameters()}
    for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd):
        found, expected = (
            transform(lambda values, forward=forward: runs.with_parameters(forward, values, hidden).pow(2).mean())(
                parameters
            )
            for forward in (Runs.engine, Runs.oracle)
        )
        assert found.keys() == expected.keys()
        for name in found:
            close(found[name], expected[name])
    close(torch.func.jacrev(runs.engine)(hidden), torch.func.jacrev(runs.oracle)(hidden))


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("scale", [0.5, 0.0])
def test_scaled_gradients_under_transforms(runs, scale):
    for each in runs.model.config.levels:
        for expert in each.experts.values():
            expert.gradient_scale = scale

    def loss(hidden):
        return runs.engine(hidden).pow(2).mean()

    hidden = rows(B).double().requires_grad_()
    parameters = {name: value.detach() for name, value in runs.model.named_parameters()}
    grads = torch.autograd.grad(loss(hidden), [hidden, *runs.model.parameters()], allow_unused=True)
    found = [
        torch.func.grad(loss)(hidden.detach()),
        *torch.func.grad(lambda values: runs.with_parameters(Runs.engine, values, hidden.detach()).pow(2).mean())(
            parameters
        ).values(),
    ]
    for mine, expected in zip(found, grads, strict=True):
        close(mine, torch.zeros_like(mine) if expected is None else expected)


@pytest.mark.usefixtures("quiet")
def test_vmap(runs):
    stacked = torch.stack([rows(B).double(), 2 * rows(B).double()])
    close(torch.func.vmap(runs.engine)(stacked), torch.stack([runs.engine(each) for each in stacked]))


def test_second_derivatives(runs):
    hidden = rows(B).double().requires_grad_()
    found = []
    for forward in (runs.engine, runs.oracle):
        (slope,) = torch.autograd.grad(forward(hidden).tanh().sum(), hidden, create_graph=True)
        found.append(torch.autograd.grad(slope.pow(2).sum(), [hidden, *runs.model.parameters()], allow_unused=True))
    for mine, expected in zip(*found, strict=True):
        assert (mine is None) == (expected is None)
        if mine is not None:
            close(mine, expected)


def test_batched_gradients(runs):
    hidden = rows(B).double().requires_grad_()
    directions = torch.eye(B * WIDTH, dtype=torch.float64).reshape(-1, B, WIDTH)
    output = runs.engine(hidden)
    (batched,) = torch.autograd.grad(output, hidden, directions, is_grads_batched=True, retain_graph=True)
    for direction, found in zip(directions, batched, strict=True):
        close(found, torch.autograd.grad(output, hidden, direction, retain_graph=True)[0])


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("strategy", ["forward-mode", "reverse-mode"])
def test_vectorized_jacobians(runs, strategy):
    hidden = rows(B).double()
    found, expected = [
        torch.autograd.functional.jacobian(forward, hidden, vectorize=True, strategy=strategy)
        for forward in (runs.engine, runs.oracle)
    ]
    close(found, expected)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_scaled_gradient_scales_tangents_too(requires_grad):
    """There is one derivative, in either mode, even if nothing else records."""
    config = CELMoEConfig(WIDTH, [level("language", ["ru"])], use_learned_fusion=False)
    config.levels[0].experts["ru"].gradient_scale = 0.5

    class Doubling(ExpertModule):
        def forward(self, batch):
            return ExpertResult(2 * batch.hidden)

    model = HierarchicalCELMoE(config, lambda *_: Doubling())
    hidden = rows(3).requires_grad_(requires_grad)
    with forward_ad.dual_level():
        output = model(forward_ad.make_dual(hidden, torch.ones_like(hidden)))
        tangent = forward_ad.unpack_dual(output.fused_hidden).tangent
    assert torch.equal(tangent, torch.ones_like(hidden))
    _, tangent = torch.func.jvp(lambda x: model(x).fused_hidden, (rows(3),), (torch.ones(3, WIDTH),))
    assert torch.equal(tangent, torch.ones_like(hidden))


def test_gradients_of_a_levels_output(runs):
    """Each level's output is the next one's input, in the graph too."""
    hidden = rows(B).double().requires_grad_()
    found = []
    for forward in (runs.model, partial(reference_forward, runs.model)):
        upper, lower = forward(hidden, runs.routing).levels.values()
        found.append(torch.autograd.grad(lower.hidden.tanh().sum(), [upper.hidden, hidden]))
    for mine, expected in zip(*found, strict=True):
        close(mine, expected)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("grad", [False, True])
def test_a_traced_model_is_no_constant(runs, grad):
    """torch.jit.trace of one routing; the traced operations must depend on the rows."""
    example, other = rows(B).double(), -3 * rows(B).double()
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(Wrapper(runs.model, runs.engine), (example,), check_trace=False)
        close(traced(other), runs.engine(other))


@pytest.mark.usefixtures("quiet")
def test_compiled_with_graph_breaks():
    """Without a warning about the library's own code, for that is the user's terminal."""
    warnings.filterwarnings("error", message=".*lru_cache")
    runs = Runs(ROUTINGS["mixed"])
    torch._dynamo.reset()
    compiled = torch.compile(runs.model, backend="eager")
    for hidden in (rows(B).double(), -2 * rows(B).double()):
        mine, plain = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
        found, expected = compiled(mine, runs.routing), runs.model(plain, runs.routing)
        close(found.fused_hidden, expected.fused_hidden)
        found.fused_hidden.pow(2).sum().backward()
        expected.fused_hidden.pow(2).sum().backward()
        close(mine.grad, plain.grad)
    torch._dynamo.reset()


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_whole_model_checkpointed(runs, reentrant):
    runs.model.train()
    gradients = []
    for run in (runs.engine, lambda hidden: checkpoint(runs.engine, hidden, use_reentrant=reentrant)):
        torch.manual_seed(0)
        runs.model.zero_grad()
        hidden = rows(B).double().requires_grad_()
        run(hidden).pow(2).sum().backward()
        gradients.append([hidden.grad, *(value.grad for value in runs.model.parameters())])
    for mine, expected in zip(*gradients, strict=True):
        assert (mine is None) == (expected is None)
        assert mine is None or torch.equal(mine, expected)


def test_backward_twice_adds_up(runs):
    hidden = rows(B).double().requires_grad_()
    loss = runs.engine(hidden).pow(2).sum()
    loss.backward(retain_graph=True)
    once = [hidden.grad.clone(), *(value.grad.clone() for value in runs.model.parameters() if value.grad is not None)]
    loss.backward()
    twice = [hidden.grad, *(value.grad for value in runs.model.parameters() if value.grad is not None)]
    assert all(torch.equal(2 * first, second) for first, second in zip(once, twice, strict=True))


def test_hooks_on_rows_outputs_parameters_and_modules(runs):
    seen = []
    model = runs.model
    expert = model.level_modules["language"]["ru"]
    handles = [
        expert.register_forward_hook(lambda *_: seen.append("forward")),
        expert.register_forward_pre_hook(lambda *_: seen.append("before")),
        expert.linear.weight.register_hook(lambda grad: seen.append("weight") or 2 * grad),
        expert.linear.register_full_backward_hook(lambda *_: seen.append("backward")),
    ]
    hidden = rows(B).double().requires_grad_()
    hidden.register_hook(lambda grad: seen.append("hidden"))
    output = model(hidden, runs.routing)
    middle = output.levels["family"].hidden
    middle.retain_grad()
    middle.register_hook(lambda grad: seen.append("middle"))
    output.fused_hidden.pow(2).sum().backward()
    assert sorted(seen) == sorted(["before", "forward", "weight", "backward", "middle", "hidden"])
    assert middle.grad.abs().sum() > 0
    for handle in handles:
        handle.remove()
    doubled = expert.linear.weight.grad.clone()
    model.zero_grad()
    runs.engine(rows(B).double().requires_grad_()).pow(2).sum().backward()
    close(doubled, 2 * expert.linear.weight.grad)


class Penalized(ExpertModule):
    """A gradient penalty of its own input, inside the forward pass."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, batch):
        hidden = batch.hidden if batch.hidden.requires_grad else batch.hidden.requires_grad_()
        made = self.linear(hidden).tanh()
        (slope,) = torch.autograd.grad(made.sum(), hidden, create_graph=True)
        return ExpertResult(made, {"penalty": slope.pow(2).sum()})


@pytest.mark.parametrize("needs_grad", [False, True])
def test_an_expert_that_differentiates_itself(runs, needs_grad):
    for experts in runs.model.level_modules.values():
        for name in list(experts):
            experts[name] = Penalized().double()
    totals = []
    for forward in (runs.model, partial(reference_forward, runs.model)):
        runs.model.zero_grad()
        output = forward(rows(B).double().requires_grad_(needs_grad), runs.routing)
        sum(output.losses.values()).backward()
        totals.append([value.grad for value in runs.model.parameters()])
    for mine, expected in zip(*totals, strict=True):
        assert (mine is None) == (expected is None)
        if mine is not None:
            close(mine, expected)


class InPlace(ExpertModule):
    def __init__(self, scale=2.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, batch):
        batch.hidden.mul_(3).add_(1)
        batch.hidden[..., 0] = 0
        return ExpertResult(batch.hidden * self.scale)


@pytest.mark.parametrize("scale", [None, 0.5, 0.0])
@pytest.mark.parametrize("needs_grad", [False, True])
def test_work_in_place(runs, scale, needs_grad):
    for each in runs.model.config.levels:
        for expert in each.experts.values():
            expert.gradient_scale = scale
    for experts in runs.model.level_modules.values():
        for name in list(experts):
            experts[name] = InPlace().double()
    found = []
    for forward in (runs.engine, runs.oracle):
        runs.model.zero_grad()
        hidden = rows(B).double().requires_grad_(needs_grad)
        output = forward(hidden)
        output.pow(2).sum().backward()
        assert torch.equal(hidden.detach(), rows(B).double())
        found.append([output, hidden.grad, *(value.grad for value in runs.model.parameters())])
    for mine, expected in zip(*found, strict=True):
        assert (mine is None) == (expected is None)
        if mine is not None:
            close(mine, expected)


def test_a_hierarchy_as_an_expert_of_a_hierarchy():
    class Nested(ExpertModule):
        def __init__(self):
            super().__init__()
            self.inner = HierarchicalCELMoE(CELMoEConfig(WIDTH, [level("inner", ("a", "b"))]), lambda *_: Counting())

        def forward(self, batch):
            output = self.inner(batch.hidden, {"inner": batch.context["inner"]})
            return ExpertResult(output.fused_hidden, output.losses)

    torch.manual_seed(0)
    model = HierarchicalCELMoE(CELMoEConfig(WIDTH, [level("outer", ("x", "y"))]), lambda *_: Nested()).eval()
    inner = torch.tensor([0, 1, 1, 0])
    output = model(rows(B), {"outer": ["x", "y", "x", "y"]}, {"inner": inner})
    expected = reference_forward(model, rows(B), {"outer": ["x", "y", "x", "y"]}, {"inner": inner})
    torch.testing.assert_close(output.fused_hidden, expected.fused_hidden)
    assert list(output.losses) == [f"outer.{outer}.inner.{name}.size" for outer in "xy" for name in "ab"]


def test_several_threads_share_a_model_and_its_plans():
    model = build().eval()
    routings = [{"family": [number % 3] * 16, "language": [(i * number) % 4 for i in range(16)]} for number in range(4)]
    plans = [model.compile_routing(routing) for routing in routings]
    expected = [model(rows(16), routing).fused_hidden.detach() for routing in routings]
    wrong = []

    def serve(number):
        with torch.inference_mode():
            for turn in range(40):
                source = plans if turn % 2 else routings
                output = model(rows(16), source[number])
                if not torch.equal(output.fused_hidden, expected[number]):
                    wrong.append(number)
                if output.levels["language"].routes != plans[number].routes("language"):
                    wrong.append(number)

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_plans_cross_modes():
    model = build().eval()
    with torch.inference_mode():
        plan = model.compile_routing(GOOD)
        model(rows(), plan)
    again = pickle.loads(pickle.dumps(copy.deepcopy(plan)))
    for each in (plan, again, plan.to("cpu")):
        hidden = rows().requires_grad_()
        model(hidden, each).fused_hidden.sum().backward()
        assert hidden.grad is not None
    with torch.inference_mode():
        inference_rows = rows() * 1
        model(inference_rows, plan)
    model(inference_rows, plan)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_whole_models_of_other_dtypes(dtype):
    model = build().eval().to(dtype)
    hidden = rows().to(dtype).requires_grad_()
    output = model(hidden, GOOD)
    output.fused_hidden.sum().backward()
    assert output.fused_hidden.dtype == output.levels["family"].hidden.dtype == hidden.grad.dtype == dtype


def test_autocast():
    model = build().eval()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(rows().requires_grad_(), GOOD)
        expected = reference_forward(model, rows(), GOOD)
    assert output.levels["family"].hidden.dtype == torch.bfloat16
    assert torch.equal(output.levels["language"].hidden, expected.levels["language"].hidden)
    output.fused_hidden.float().sum().backward()
    assert model.level_modules["language"]["ru"].linear.weight.grad.dtype == torch.float32


def test_odd_modes(runs):
    expected = runs.engine(rows(B).double())
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(runs.engine(rows(B).double()), expected)
    finally:
        torch.use_deterministic_algorithms(False)
    with torch.device("meta"):
        assert torch.equal(runs.engine(rows_on_cpu()), expected)
    with torch.autograd.graph.save_on_cpu(), torch.no_grad():
        assert torch.equal(runs.engine(rows(B).double()), expected)


def rows_on_cpu():
    return torch.randn(
        B, WIDTH, generator=torch.Generator("cpu").manual_seed(1), device="cpu", dtype=torch.float32
    ).double()


def test_copies_of_a_model_are_their_own():
    model = build(two_levels())
    for copied in (copy.deepcopy(model), loaded(model)):
        copied.config.levels[1].fallback_expert = "de"
        copied.config.levels[0].fallback_expert = "slavic"
        assert copied.compile_routing(None, 2).routes("language") == ["de", "de"]
        assert copied.levels[1] is copied.config.levels[1]
        with pytest.raises(KeyError):
            model.compile_routing(None, 2)
        with torch.no_grad():
            next(copied.parameters()).zero_()
        assert next(model.parameters()).abs().sum() > 0


def loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_copies_of_an_output_have_routes():
    import dataclasses

    model = build().eval()
    with torch.no_grad():
        output = model(rows(), GOOD)
    for each in (copy.deepcopy(output), copy.copy(output), pickle.loads(pickle.dumps(output))):
        assert each.levels["language"].routes == GOOD["language"]
    with torch.no_grad():
        fresh = model(rows(), GOOD).levels["language"]
    assert dataclasses.replace(fresh, name="x").routes == GOOD["language"]
    assert dataclasses.asdict(fresh)["routes"] == GOOD["language"]
    assert "routes=['ru', 'de', 'fr']" in repr(fresh)
    assert fresh.routes is fresh.routes
    fresh.routes = ["mine"]
    assert fresh.routes == ["mine"]
    with pytest.raises(AttributeError, match="'LevelOutput' object has no attribute 'nonsense'"):
        _ = fresh.nonsense


def test_routes_of_an_output_are_nobody_else_s_list():
    model = build().eval()
    routing = copy.deepcopy(GOOD)
    plan = model.compile_routing(routing)
    first, second = model(rows(), plan), model(rows(), plan)
    first.levels["language"].routes.clear()
    assert second.levels["language"].routes == GOOD["language"] == routing["language"]
    # A list that changes after the call is the caller's affair.
    output = model(rows(), routing)
    routing["language"].clear()
    assert output.levels["language"].routes == GOOD["language"]


def test_the_same_list_with_other_names_is_another_routing():
    model = build().eval()
    routing = copy.deepcopy(GOOD)
    model(rows(), routing)
    routing["language"][:] = ["pl", "pl", "ru"]
    assert model(rows(), routing).levels["language"].routes == ["pl", "pl", "ru"]


def test_one_module_for_several_experts_and_levels():
    shared = Counting()
    torch.manual_seed(0)
    model = HierarchicalCELMoE(two_levels(), lambda *_: shared).eval().double()
    found = []
    for forward in (model, partial(reference_forward, model)):
        model.zero_grad()
        hidden = rows().double().requires_grad_()
        forward(hidden, GOOD).fused_hidden.pow(2).sum().backward()
        found.append((hidden.grad, shared.linear.weight.grad))
    for mine, expected in zip(*found, strict=True):
        close(mine, expected)


def test_a_config_read_anew_at_every_call():
    """An ExpertConfig may be swapped for another: staged training does it with dataclasses.replace."""
    import dataclasses

    model = build().eval()
    for detached in (False, True, False):
        experts = model.config.levels[0].experts
        for name in experts:
            experts[name] = dataclasses.replace(experts[name], stop_gradient_from_parent=detached)
        hidden = rows().requires_grad_()
        model(hidden, GOOD).fused_hidden.sum().backward()
        assert (hidden.grad is None) == detached


def test_a_level_left_out_of_the_model_by_enabled_flags_set_later():
    model = build().eval()
    model.config.levels[0].enabled = False
    assert list(model(rows(), GOOD).levels) == ["family", "language"]
    assert isinstance(model.levels[0], HierarchyLevelConfig)


@pytest.mark.parametrize(
    ("routing", "kind"),
    [
        ({"family": [0, -1, 1], "language": [0, 1, 2]}, ValueError),
        ({"family": [True, False, True], "language": [0, 1, 2]}, ValueError),
        ({**GOOD, "galaxy": ["a"] * 3}, KeyError),
    ],
)
def test_the_oracle_refuses_what_the_model_refuses(routing, kind):
    model = build()
    for forward in (model, partial(reference_forward, model)):
        with pytest.raises((kind, TypeError)):
            forward(rows(), routing)


def test_the_oracle_refuses_another_models_plan():
    plan = build(CELMoEConfig(WIDTH, [level("family"), level("language")])).compile_routing(
        {"family": "a", "language": "b"}, 3
    )
    for forward in (build(), partial(reference_forward, build())):
        with pytest.raises(ValueError, match="plan"):
            forward(rows(), plan)
