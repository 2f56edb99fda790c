"""Compiled models: one graph for all routings, equal to eager calls, and made anew when experts change."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch.utils.checkpoint import checkpoint

import celmoe
from celmoe import (
    CELMoEConfig,
    CELMoEOutput,
    ExpertBatch,
    ExpertConfig,
    ExpertResult,
    HierarchicalCELMoE,
    HierarchyLevelConfig,
    RoutingPlan,
)

WIDTH = 8
SHIFT = 1.0


class Dense(nn.Module):
    """A layer and a norm, with a number that may be changed."""

    def __init__(self, width: int = WIDTH, inner: int = WIDTH) -> None:
        super().__init__()
        self.up = nn.Linear(width, inner)
        self.norm = nn.LayerNorm(inner)
        self.down = nn.Linear(inner, width)
        self.factor = 1.0

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        inner = self.norm(torch.relu(self.up(batch.hidden))) * self.factor
        return ExpertResult(batch.hidden + self.down(inner))


class Shifted(Dense):
    """Reads a name of its module, which all experts share."""

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        return ExpertResult(super().forward(batch).hidden + SHIFT)


class Masked(Dense):
    """Takes a mask, and a context of rows, a shared tensor and numbers."""

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        context: Any = batch.context
        given = batch.hidden * context["scales"].unsqueeze(-1) + context["shared"] * context["number"]
        hidden = super().forward(ExpertBatch(given)).hidden
        return ExpertResult(hidden if batch.mask is None else hidden * batch.mask.unsqueeze(-1))


class Lossy(Dense):
    """Returns a loss."""

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        hidden = super().forward(batch).hidden
        return ExpertResult(hidden, {"size": hidden.square().mean()})


class Counting(Dense):
    """Counts its calls, which no graph can hold."""

    calls = 0

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        self.calls += 1
        return super().forward(batch)


def built(
    factory: Callable[[str], nn.Module],
    chosen: Sequence[str] = ("universal", "language"),
    universal: Callable[[], nn.Module] = Dense,
) -> HierarchicalCELMoE:
    torch.manual_seed(0)
    # Names that sort in another order than they stand in.
    names = {"universal": ["all"], "family": ["z", "a", "m"], "language": [f"e{place}" for place in (4, 1, 0, 5, 3, 2)]}
    levels = [
        HierarchyLevelConfig(level, {name: ExpertConfig(name) for name in experts})
        for level, experts in names.items()
        if level in chosen
    ]
    model = HierarchicalCELMoE(
        CELMoEConfig(WIDTH, levels, fusion_dropout=0.0),
        lambda level, name, _: universal() if level == "universal" else factory(name),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    # Sums in another order round otherwise.
    return model.double()


def routed(model: HierarchicalCELMoE, size: int, seed: int = 0) -> RoutingPlan:
    draw = random.Random(seed)
    routing = {
        level.name: [draw.choice(list(level.experts)[: 1 + seed % 7]) for _ in range(size)] for level in model.levels
    }
    return model.compile_routing(routing)


class Backend:
    """Counts the graphs that it compiles."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, module: Any, inputs: Any) -> Any:
        from torch._dynamo import lookup_backend

        self.graphs += 1
        return lookup_backend("aot_eager")(module, inputs)


@pytest.fixture(autouse=True)
def _unlimited() -> Iterator[None]:
    # All models share the code of one forward pass. Starting anew for each test would capture all experts again.
    with torch._dynamo.config.patch(recompile_limit=1 << 10, accumulated_recompile_limit=1 << 10):
        yield


Step = tuple[CELMoEOutput, torch.Tensor, dict[str, torch.Tensor | None]]


def stepped(model: nn.Module, call: Any, hidden: torch.Tensor, *arguments: Any) -> Step:
    """Run forward and backward, and give output, gradient of the input, and gradients of the parameters."""
    model.zero_grad()
    given = hidden.clone().requires_grad_()
    output = call(given, *arguments)
    total = output.fused_hidden.square().sum()
    for level in output.levels.values():
        total = total + level.hidden.square().sum()
    total.backward()
    assert given.grad is not None
    return output, given.grad, {name: each.grad for name, each in model.named_parameters()}


def assert_same(found: Step, wanted: Step) -> None:
    for level, output in wanted[0].levels.items():
        torch.testing.assert_close(found[0].levels[level].hidden, output.hidden)
        assert found[0].levels[level].routes == output.routes
    torch.testing.assert_close(found[0].fused_hidden, wanted[0].fused_hidden)
    torch.testing.assert_close(found[1], wanted[1])
    assert found[2].keys() == wanted[2].keys()
    for name, grad in wanted[2].items():
        assert (found[2][name] is None) == (grad is None), name
        torch.testing.assert_close(found[2][name], grad, msg=lambda text, name=name: f"{name}: {text}")


def compared(model: HierarchicalCELMoE, compiled: Any, size: int = 16, seed: int = 0, **others: Any) -> None:
    hidden = torch.randn(size, WIDTH, dtype=torch.float64)
    plan = routed(model, size, seed)
    found = stepped(model, lambda given: compiled(given, plan, **others), hidden)
    assert_same(found, looped(model, hidden, plan, **others))


def looped(model: HierarchicalCELMoE, hidden: torch.Tensor, *arguments: Any, **others: Any) -> Step:
    """The step of a loop over the experts, which is right after any change."""
    model.engine = "looped"
    found = stepped(model, lambda given: model(given, *arguments, **others), hidden)
    model.engine = "auto"
    return found


@pytest.mark.parametrize("is_stacked", [True, False])
def test_one_graph_serves_all_routings(is_stacked: bool) -> None:
    model, backend = built(lambda _: Dense(), ("universal", "family", "language")), Backend()
    if is_stacked:
        celmoe.stack_experts(model)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for seed in range(20):
        compared(model, compiled, seed=seed)
    assert backend.graphs == 1


@pytest.mark.parametrize("is_stacked", [True, False])
def test_a_second_graph_serves_all_batch_sizes(is_stacked: bool) -> None:
    model, backend = built(lambda _: Dense()), Backend()
    if is_stacked:
        celmoe.stack_experts(model)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for seed, size in enumerate((16, 9, 40, 23, 16)):
        compared(model, compiled, size, seed)
    assert backend.graphs <= 2


def test_positions_may_vary() -> None:
    model, backend = built(lambda _: Dense()), Backend()
    celmoe.stack_experts(model)
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
    for seed, (size, positions) in enumerate([(7, 3), (9, 5), (4, 10)]):
        hidden, plan = torch.randn(size, positions, WIDTH, dtype=torch.float64), routed(model, size, seed)
        found = stepped(model, lambda given, plan=plan: compiled(given, plan), hidden)
        assert_same(found, stepped(model, lambda given, plan=plan: model(given, plan), hidden))
    assert backend.graphs <= 2


@pytest.mark.parametrize("kinds", ["stacked", "plain", "two classes"])
def test_a_surrounding_model_stays_one_graph(kinds: str) -> None:
    is_mixed = kinds == "two classes"
    model = built(lambda name: Dense(inner=2 * WIDTH if is_mixed and name in ("e2", "e4") else WIDTH))
    if kinds != "plain":
        celmoe.stack_experts(model)
    before, after, backend = nn.Linear(WIDTH, WIDTH).double(), nn.Linear(WIDTH, 3).double(), Backend()

    def surrounding(hidden: torch.Tensor, plan: RoutingPlan) -> torch.Tensor:
        return torch.tanh(after(model(torch.relu(before(hidden)), plan).fused_hidden))

    compiled = torch.compile(surrounding, fullgraph=True, backend=backend)
    everything = nn.ModuleList([model, before, after])
    for seed in range(4):
        hidden, plan = torch.randn(16, WIDTH, dtype=torch.float64), routed(model, 16, seed)
        grads = []
        for call in (compiled, surrounding):
            everything.zero_grad()
            result = call(hidden, plan)
            result.square().sum().backward()
            grads.append((result, {name: each.grad for name, each in everything.named_parameters()}))
        torch.testing.assert_close(grads[0][0], grads[1][0])
        for name, grad in grads[1][1].items():
            torch.testing.assert_close(grads[0][1][name], grad)
    assert backend.graphs == 1


@pytest.mark.parametrize("is_stacked", [True, False])
def test_masks_and_contexts(is_stacked: bool) -> None:
    model, backend = built(lambda _: Masked()), Backend()
    if is_stacked:
        celmoe.stack_experts(model)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for seed in range(3):
        context = {
            "scales": torch.rand(16).double(),
            "shared": torch.rand(WIDTH).double(),
            "number": 0.5,
            "nothing": None,
        }
        compared(model, compiled, seed=seed, context=context, mask=torch.rand(16).double())
    assert backend.graphs == 1
    compared(model, compiled, context=context | {"number": 0.25}, mask=None)
    assert backend.graphs > 1


@pytest.mark.parametrize("is_stacked", [True, False])
def test_without_gradients(is_stacked: bool) -> None:
    model = built(lambda _: Dense())
    if is_stacked:
        celmoe.stack_experts(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for seed in range(2):
                hidden, plan = torch.randn(16, WIDTH, dtype=torch.float64), routed(model, 16, seed)
                torch.testing.assert_close(compiled(hidden, plan).fused_hidden, model(hidden, plan).fused_hidden)


@pytest.mark.parametrize("is_stacked", [True, False])
def test_autocast(is_stacked: bool) -> None:
    model = built(lambda _: Dense())
    if is_stacked:
        celmoe.stack_experts(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.float()
    hidden, plan = torch.randn(16, WIDTH), routed(model, 16)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = compiled(hidden, plan), model(hidden, plan)
    for level in found.levels:
        assert found.levels[level].hidden.dtype is wanted.levels[level].hidden.dtype
        torch.testing.assert_close(found.levels[level].hidden, wanted.levels[level].hidden, atol=0.05, rtol=0.05)


class InPlace(Dense):
    """Writes into its rows."""

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        batch.hidden.mul_(0.5)
        return ExpertResult(self.down(self.up(batch.hidden)) + batch.hidden)


class Buffered(Dense):
    """Reads a buffer, which no stack holds."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.randn(WIDTH))

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        return ExpertResult(super().forward(batch).hidden + self.shift)


class Recurrent(nn.Module):
    """A GRU or another recurrent layer over positions."""

    def __init__(self, kind: type[nn.RNNBase] = nn.GRU) -> None:
        super().__init__()
        self.layer = kind(WIDTH, WIDTH, batch_first=True)

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        return ExpertResult(batch.hidden + self.layer(batch.hidden)[0])


class Attending(nn.Module):
    """A transformer's layer over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        return ExpertResult(self.layer(batch.hidden))


class Convolving(nn.Module):
    """A convolution that runs expert by expert, for which the host must know their numbers of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv1d(WIDTH, WIDTH, 3, padding=2, dilation=2)

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        return ExpertResult(batch.hidden + self.layer(batch.hidden.transpose(1, 2)).transpose(1, 2))


class Scaling(nn.Module):
    """Parameters that are no matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(WIDTH))
        self.number = nn.Parameter(torch.randn(()))

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        return ExpertResult(batch.hidden * self.scale + self.number * torch.tanh(batch.hidden))


class Embedding(nn.Module):
    """Looks up the context's ids."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, WIDTH)

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        context: Any = batch.context
        return ExpertResult(batch.hidden + (self.table(context["ids"]) if context else self.table.weight[1]))


class Adapter(nn.Module):
    """A frozen layer with a trained addition."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.add = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        return ExpertResult(self.base(batch.hidden) + self.add(batch.hidden))


@pytest.mark.parametrize(
    "kind",
    [InPlace, Buffered, Attending, Convolving, Scaling, Embedding, Adapter],
    ids=lambda kind: kind.__name__,
)
def test_kinds_of_experts(kind: type[nn.Module]) -> None:
    model = built(lambda _: kind())
    celmoe.stack_experts(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    positions = (3,) if kind in (Attending, Convolving) else ()
    for seed, size in enumerate((16, 9)):
        hidden, plan = torch.randn(size, *positions, WIDTH, dtype=torch.float64), routed(model, size, seed + 2)
        context = {"ids": torch.randint(7, (size,))} if kind is Embedding else None
        arguments = (plan, context)
        found = stepped(model, lambda given, arguments=arguments: compiled(given, *arguments), hidden)
        assert_same(found, looped(model, hidden, *arguments))


@pytest.mark.parametrize("is_stacked", [True, False])
@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_recurrent_experts(kind: type[nn.RNNBase], is_stacked: bool) -> None:
    """PyTorch's tracer follows no recurrent layer; a level's only expert is one here, too."""
    model = built(lambda _: Recurrent(kind), universal=lambda: Recurrent(kind))
    if is_stacked:
        celmoe.stack_experts(model)
    backend = Backend()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for seed in range(3):
        hidden, plan = torch.randn(16, 3, WIDTH, dtype=torch.float64), routed(model, 16, seed + 2)
        found = stepped(model, lambda given, plan=plan: compiled(given, plan), hidden)
        assert_same(found, looped(model, hidden, plan))
    assert backend.graphs == 1


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_graphs_do_not_grow_with_positions(kind: type[nn.RNNBase]) -> None:
    from torch._dynamo.backends.common import aot_autograd

    sizes: list[int] = []

    def counted(module: torch.fx.GraphModule, _: Any) -> Any:
        sizes.append(len(module.graph.nodes))
        return make_boxed_func(module.forward)

    for positions in (3, 30):
        model = built(lambda _: Recurrent(kind), universal=lambda: Recurrent(kind))
        celmoe.stack_experts(model)
        compiled = torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=counted))
        hidden = torch.randn(16, positions, WIDTH, dtype=torch.float64)
        compiled(hidden, routed(model, 16)).fused_hidden.sum().backward()
    assert len(sizes) == 4
    # Other sizes take a view more or less.
    assert all(abs(few - many) < 5 for few, many in zip(sizes[:2], sizes[2:], strict=True))


@pytest.mark.parametrize("is_stacked", [True, False])
def test_calls_of_calls_and_checkpoints(is_stacked: bool) -> None:
    model = built(lambda _: Dense(), ("language",))
    if is_stacked:
        celmoe.stack_experts(model)

    def twice(hidden: torch.Tensor, first: RoutingPlan, second: RoutingPlan) -> torch.Tensor:
        middle = checkpoint(lambda given: model(given, first).fused_hidden, hidden, use_reentrant=False)
        return model(middle, second).fused_hidden

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        # Without gradients of the input, only the level's own anchor leads back into the first call.
        hidden, plans = (
            torch.randn(16, WIDTH, dtype=torch.float64),
            [routed(model, 16, seed + 5 * place) for place in (0, 1)],
        )
        grads = []
        for call in (compiled, twice):
            model.zero_grad()
            call(hidden, *plans).square().sum().backward()
            grads.append([parameter.grad for parameter in model.parameters()])
        for found, wanted in zip(*grads, strict=True):
            assert (found is None) == (wanted is None)
            torch.testing.assert_close(found, wanted)


def test_copies_are_models_of_their_own() -> None:
    model = built(lambda _: Dense())
    celmoe.stack_experts(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compared(model, compiled)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.mul_(1.5)
        compared(copied, torch.compile(copied, fullgraph=True, backend="aot_eager"))
        compared(model, compiled)


def test_experts_that_become_trained() -> None:
    model = built(lambda _: Dense()).requires_grad_(False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    hidden, plan = torch.randn(16, WIDTH, dtype=torch.float64), routed(model, 16)
    assert not compiled(hidden, plan).fused_hidden.requires_grad
    model.level_modules["language"].requires_grad_()
    with pytest.raises(celmoe.ChangedError, match="compiles the model anew"):
        compiled(hidden, plan)
    assert compiled(hidden, plan).fused_hidden.requires_grad


def test_names_may_be_given_without_a_full_graph() -> None:
    model = built(lambda _: Dense())
    celmoe.stack_experts(model)
    compiled = torch.compile(model, backend="aot_eager")
    for seed in range(3):
        hidden, plan = torch.randn(16, WIDTH, dtype=torch.float64), routed(model, 16, seed)
        routing = {level: plan.routes(level) for level in plan.levels}
        found = stepped(model, lambda given, routing=routing: compiled(given, routing), hidden)
        assert_same(found, stepped(model, lambda given, plan=plan: model(given, plan), hidden))


@pytest.mark.parametrize("kind", [Lossy, Counting])
def test_experts_that_no_graph_holds_run_beside_it(kind: type[Dense]) -> None:
    model = built(lambda _: kind())
    compiled = torch.compile(model, backend="aot_eager")
    for seed in range(3):
        compared(model, compiled, seed=seed)
    if kind is Lossy:
        plan = routed(model, 16, 5)
        assert (
            compiled(torch.randn(16, WIDTH, dtype=torch.float64), plan).losses.keys()
            == model(torch.randn(16, WIDTH, dtype=torch.float64), plan).losses.keys()
        )
    torch._dynamo.reset()
    with pytest.raises(Exception, match="part of a graph"):
        torch.compile(model, backend="aot_eager", fullgraph=True)(
            torch.randn(16, WIDTH, dtype=torch.float64), routed(model, 16)
        )


class TestChanges:
    """A graph of stacked experts is made anew when they change."""

    def start(self, kind: Callable[[], nn.Module] = Dense) -> tuple[HierarchicalCELMoE, Any, Backend]:
        model, backend = built(lambda _: kind()), Backend()
        celmoe.stack_experts(model)
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        compared(model, compiled)
        return model, compiled, backend

    def test_an_attribute_of_all_experts(self) -> None:
        model, compiled, backend = self.start()
        for expert in model.level_modules["language"].values():  # type: ignore[operator]
            expert.factor = 3.0
        compared(model, compiled)
        assert backend.graphs == 2

    def test_an_attribute_of_one_expert(self) -> None:
        model, compiled, _ = self.start()
        model.level_modules["language"]["e3"].factor = 3.0  # type: ignore[index]
        for seed in range(6):
            compared(model, compiled, seed=seed)

    def test_a_replaced_module(self) -> None:
        model, _, _ = self.start()
        compiled = torch.compile(model, backend="aot_eager")
        compared(model, compiled)
        model.level_modules["language"]["e3"].down = nn.Linear(WIDTH, WIDTH).double()  # type: ignore[index]
        for seed in range(6):
            compared(model, compiled, seed=seed)

    @pytest.mark.parametrize("way", ["item", "attribute"])
    def test_a_replaced_expert(self, way: str) -> None:
        model, compiled, _ = self.start()
        registry: Any = model.level_modules["language"]
        if way == "item":
            registry["e3"] = Dense().double()
        else:
            registry.e3 = Dense().double()
        for seed in range(6):
            compared(model, compiled, seed=seed)

    def test_a_name_of_the_experts_module(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, compiled, _ = self.start(Shifted)
        monkeypatch.setitem(globals(), "SHIFT", 5.0)
        with pytest.raises(celmoe.ChangedError, match="compiles the model anew"):
            compared(model, compiled)
        compared(model, compiled)

    def test_an_object_that_experts_share(self) -> None:
        table = {"factor": 1.0}

        class Sharing(Dense):
            def __init__(self) -> None:
                super().__init__()
                self.table = table

            def forward(self, batch: ExpertBatch) -> ExpertResult:
                return ExpertResult(super().forward(batch).hidden * self.table["factor"])

        model, compiled, _ = self.start(Sharing)
        table["factor"] = 2.0
        with pytest.raises(celmoe.ChangedError, match="compiles the model anew"):
            compared(model, compiled)
        compared(model, compiled)

    def test_an_object_of_one_experts_own(self) -> None:
        class Owning(Dense):
            def __init__(self) -> None:
                super().__init__()
                self.table = {"factor": 1.0}

            def forward(self, batch: ExpertBatch) -> ExpertResult:
                return ExpertResult(super().forward(batch).hidden * self.table["factor"])

        model, compiled, _ = self.start(Owning)
        model.level_modules["language"]["e3"].table["factor"] = 2.0  # type: ignore[index, union-attr]
        for seed in range(6):
            compared(model, compiled, seed=seed)

    def test_training_and_evaluation_take_turns(self) -> None:
        class Dropped(Dense):
            def forward(self, batch: ExpertBatch) -> ExpertResult:
                return ExpertResult(super().forward(batch).hidden * (2.0 if self.training else 1.0))

        model, compiled, backend = self.start(Dropped)
        for turn in range(6):
            model.train(turn % 2 == 0)
            compared(model, compiled, seed=turn)
        assert backend.graphs == 2

    def test_flags_of_the_config(self) -> None:
        model, compiled, _ = self.start()
        for expert in model.levels[-1].experts.values():
            expert.gradient_scale = 0.5
        compared(model, compiled)
        for expert in model.levels[-1].experts.values():
            expert.stop_gradient_from_parent, expert.gradient_scale = True, None
        compared(model, compiled)

    def test_a_forward_hook(self) -> None:
        model, _, _ = self.start()
        calls: list[int] = []
        model.level_modules["language"]["e3"].register_forward_hook(lambda *_: calls.append(1))  # type: ignore[index]
        compiled = torch.compile(model, backend="aot_eager")
        for seed in range(6):
            compared(model, compiled, seed=seed)
        assert calls

    def test_experts_that_are_unstacked(self) -> None:
        model, compiled, _ = self.start()
        celmoe.unstack_experts(model)
        for seed in range(3):
            compared(model, compiled, seed=seed)

    def test_values(self) -> None:
        model, compiled, backend = self.start()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
        compared(model, compiled)
        model.load_state_dict(built(lambda _: Dense()).state_dict(), assign=True)
        compared(model, compiled)
        assert backend.graphs <= 2


# PyTorch lets a graph's second backward pass come at all.
@torch._functorch.config.patch(donated_buffer=False)
def test_a_backward_pass_comes_once() -> None:
    model = built(lambda _: Dense())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(torch.randn(16, WIDTH, dtype=torch.float64), routed(model, 16)).fused_hidden.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(celmoe.GraphError, match="once"):
        loss.backward()


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_absent_experts_stay_as_they_are(name: str) -> None:
    models = [built(lambda _: Dense()) for _ in range(2)]
    celmoe.stack_experts(models[0])
    options: Any = {"lr": 0.01, "weight_decay": 0.1} | ({"momentum": 0.9} if name == "SGD" else {})
    optimizers = [
        getattr(celmoe.optim, name)(models[0].parameters(), **options),
        getattr(torch.optim, name)(models[1].parameters(), **options),
    ]
    compiled = torch.compile(models[0], fullgraph=True, backend="aot_eager")
    for seed in range(8):
        for model, call, optimizer in zip(models, (compiled, models[1]), optimizers, strict=True):
            torch.manual_seed(seed)
            # Two backward passes for some steps, and a pass whose gradient is cleared.
            for part in range(1 + seed % 3):
                if part == 2:
                    optimizer.zero_grad()
                hidden, plan = torch.randn(16, WIDTH, dtype=torch.float64), routed(model, 16, seed + part)
                call(hidden, plan).fused_hidden.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for (key, found), wanted in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-9, msg=lambda text, key=key: f"{key}: {text}")


def test_frozen_experts() -> None:
    model = built(lambda _: Dense())
    celmoe.stack_experts(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compared(model, compiled)
    model.freeze("language", "e[1-3]")
    for seed in range(3):
        compared(model, compiled, seed=seed)
    model.freeze("language")
    compared(model, compiled)
    model.unfreeze("language")
    compared(model, compiled)


def test_segments_are_read_in_every_call() -> None:
    """A compiler may write a level's ends into the very tensor that held another level's."""
    rows, weights = torch.randn(6, WIDTH), torch.randn(2, WIDTH, WIDTH)
    ends = torch.tensor([2, 6], dtype=torch.int32)
    for first in (2, 5, 1):
        ends[0] = first
        wanted = torch.cat([rows[:first] @ weights[0].mT, rows[first:] @ weights[1].mT])
        torch.testing.assert_close(torch.ops.celmoe.multiply(rows, weights, None, ends), wanted)
        sums = torch.stack([rows[:first].sum(0), rows[first:].sum(0)])
        torch.testing.assert_close(torch.ops.celmoe.segment_sum(rows, ends), sums)
        outer = torch.stack([rows[:first].mT @ rows[:first], rows[first:].mT @ rows[first:]])
        torch.testing.assert_close(torch.ops.celmoe.outer(rows, rows, ends), outer)


def test_few_members_are_taken_out_of_a_stack() -> None:
    """A call with few present members computes with those alone, and gives all others zeros."""
    ends = torch.tensor([0, 0, 2, 2, 2, 2, 5, 5, 5], dtype=torch.int32)
    rows, weights, biases = torch.randn(5, WIDTH), torch.randn(9, WIDTH, WIDTH), torch.randn(9, WIDTH)
    own = {2: rows[:2], 6: rows[2:]}
    wanted = torch.cat([each @ weights[member].mT + biases[member] for member, each in own.items()])
    torch.testing.assert_close(torch.ops.celmoe.multiply(rows, weights, biases, ends), wanted)
    zero = torch.zeros(WIDTH, WIDTH)
    outer = torch.stack([own[each].mT @ own[each] if each in own else zero for each in range(9)])
    torch.testing.assert_close(torch.ops.celmoe.outer(rows, rows, ends), outer)
    sums = torch.stack([own[each].sum(0) if each in own else zero[0] for each in range(9)])
    torch.testing.assert_close(torch.ops.celmoe.segment_sum(rows, ends), sums)
