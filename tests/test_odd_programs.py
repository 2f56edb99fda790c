"""Programs that are unusual but legal: transforms of torch.func, tracing, threads, hooks, odd modes and copies.

They should give the naive oracle's results under the same transform: the oracle is made of plain torch operations.
"""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from celmoe import ExpertModule, ExpertResult
from celmoe.reference import reference_forward
from tests.odd_programs import B, close
from tests.refusals import WIDTH, build, rows

pytestmark = pytest.mark.usefixtures("_as_few_and_as_many")

# Rows that must be gathered, rows that stand in order, one expert present, and levels whose orders are one.
ROUTINGS = {
    "mixed": {"family": ["slavic", "romance", "slavic", "germanic"], "language": ["ru", "fr", "pl", "de"]},
    "sorted": {"family": ["germanic", "germanic", "romance", "slavic"], "language": ["de", "de", "fr", "ru"]},
    "single": {"family": "slavic", "language": "ru"},
    "same order": {"family": ["slavic", "germanic", "slavic", "germanic"], "language": ["ru", "de", "ru", "de"]},
}


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
