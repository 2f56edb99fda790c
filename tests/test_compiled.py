"""Compiled models: one graph for all routings, equal to eager calls, and made anew when experts change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn

import celmoe
from celmoe import (
    ExpertBatch,
    ExpertResult,
    RoutingPlan,
)
from tests.compiled import (
    WIDTH,
    Backend,
    Dense,
    _unlimited,  # noqa: F401  # an autouse fixture
    assert_same,
    built,
    compared,
    looped,
    routed,
    stepped,
)


class Masked(Dense):
    """Takes a mask, and a context of rows, a shared tensor and numbers."""

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        context: Any = batch.context
        given = batch.hidden * context["scales"].unsqueeze(-1) + context["shared"] * context["number"]
        hidden = super().forward(ExpertBatch(given)).hidden
        return ExpertResult(hidden if batch.mask is None else hidden * batch.mask.unsqueeze(-1))


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
