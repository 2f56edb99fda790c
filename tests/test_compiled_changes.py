"""Compiled models are made anew when experts change, and train like eager ones."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import celmoe
from celmoe import (
    ExpertBatch,
    ExpertResult,
    HierarchicalCELMoE,
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
    routed,
    stepped,
)

SHIFT = 1.0


class Shifted(Dense):
    """Reads a name of its module, which all experts share."""

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        return ExpertResult(super().forward(batch).hidden + SHIFT)


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
