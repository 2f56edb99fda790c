"""Batches without samples: ways to differentiate, routes and losses."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from celmoe import (
    CELMoELossAPI,
    ExpertBatch,
    ExpertModule,
    ExpertResult,
    InputError,
    LossBundle,
    RouteTypeError,
    RoutingCompiler,
)
from celmoe.engines.registry import ENGINES
from tests.no_samples import DETACHED, FORWARDS, FUSIONS, NONE, WIDTH, Looks, build, leaf, run, zeros


def double_backward(model, hidden):
    (gradient,) = torch.autograd.grad(model(hidden, NONE).fused_hidden.square().sum(), hidden, create_graph=True)
    (gradient.square().sum() + hidden.sum()).backward()


def functional_gradient(model, hidden):
    hidden.grad = torch.func.grad(lambda rows: model(rows, NONE, {"all": leaf(3)}).fused_hidden.sum())(hidden)


def batched_gradients(model, hidden):
    output = model(hidden, NONE).levels["language"].hidden
    (many,) = torch.autograd.grad(output, hidden, torch.zeros(3, *output.shape), is_grads_batched=True)
    assert many.shape == (3, *hidden.shape)
    hidden.grad = many[0]


def vectorized(model, hidden):
    torch.vmap(lambda rows: model(rows, NONE).levels["family"].hidden)(torch.stack([hidden] * 2)).sum().backward()


def checkpointed(model, hidden, *, use_reentrant=False):
    checkpoint(lambda rows: model(rows, NONE).fused_hidden, hidden, use_reentrant=use_reentrant).sum().backward()


def checkpointed_reentrant(model, hidden):
    checkpointed(model, hidden, use_reentrant=True)


def compiled(model, hidden):
    torch._dynamo.reset()
    plan = model.compile_routing(NONE)

    def rows(hidden, row):
        return model(hidden, plan, {"row": row, "all": row}).fused_hidden

    row = leaf(0, WIDTH)
    torch.compile(rows, backend="aot_eager", fullgraph=True)(hidden, row).sum().backward()
    assert zeros(row)


def hooked(model, hidden):
    output, seen = model(hidden, NONE), []
    output.levels["family"].hidden.register_hook(seen.append)
    output.levels["family"].hidden.retain_grad()
    output.fused_hidden.sum().backward()
    assert len(seen) == 1
    assert zeros(output.levels["family"].hidden)


@pytest.mark.parametrize(
    "way",
    [
        double_backward,
        functional_gradient,
        batched_gradients,
        vectorized,
        checkpointed,
        checkpointed_reentrant,
        compiled,
        hooked,
    ],
)
@pytest.mark.parametrize("engine", ENGINES)
def test_ways_to_differentiate(engine, way):
    hidden = leaf(0, WIDTH)
    way(build(engine), hidden)
    assert zeros(hidden)


# --- no positions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [False, True], ids=["no context", "context"])
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("forward", FORWARDS)
def test_samples_of_no_positions_run_their_experts(forward, fusion, context):
    model, encoder = build(forward, fusion=fusion), nn.Linear(WIDTH, WIDTH)
    routing = {"family": ["b", "a", "b", "a"], "language": ["x", "x", "y", "y"]}
    row, mask = leaf(4, 0, WIDTH), leaf(4)
    rest = ({"row": row, "all": leaf(3)}, mask) if context else ()
    output = run(model, forward, encoder(torch.zeros(4, 0, WIDTH)), routing, *rest)
    assert output.fused_hidden.shape == (4, 0, WIDTH)
    assert list(output.losses) == [f"{name}.size" for name in ("family.a", "family.b", "language.x", "language.y")]
    output.fused_hidden.sum().backward()
    assert all(map(zeros, [*encoder.parameters(), *model.fusion.parameters(), *((row, mask) if context else ())]))
    for level, present in (("family", "ab"), ("language", "xy")):
        for name, expert in model.level_modules[level].items():
            assert int(expert.calls) == (name in present)
            assert all(zeros(each) == (name in present) for each in expert.parameters())


@pytest.mark.parametrize("size", [0, 3])
@pytest.mark.parametrize("forward", FORWARDS)
def test_rows_of_no_width(forward, size):
    hidden = leaf(size, 0)
    model = build(forward, fusion="mean", make=lambda: _Calling(lambda batch: batch.hidden * 2))
    output = run(model, forward, hidden, {"family": ["b", "a", "b"][:size], "language": ["x", "y", "y"][:size]})
    output.fused_hidden.sum().backward()
    assert output.fused_hidden.shape == (size, 0)
    assert zeros(hidden)


class _Calling(ExpertModule):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        return ExpertResult(self.function(batch))


# --- routes and losses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "routing",
    [
        {"family": [], "language": []},
        {"family": (), "language": np.array([])},  # as of an empty list of names: floating-point
        {"family": torch.tensor([]), "language": torch.zeros(0, dtype=torch.int64)},
        {"family": np.array([], dtype=object), "language": np.array([], dtype=np.uint8)},
        {"family": "a", "language": "z"},
        {"language": []},
        {},
        None,
    ],
    ids=str,
)
def test_routes_of_no_samples(routing):
    model = build()
    compiler = RoutingCompiler(model.config)
    for plan in (compiler(routing, 0), pickle.loads(pickle.dumps(compiler(routing, 0)))):
        assert plan.batch_size == 0
        for level in plan.levels.values():
            assert level.present == level.counts == ()
            assert [len(each) for each in (level.order, level.inverse, level.expert_ids, level.offsets)] == [0] * 4
            assert plan.routes(level.name) == []
        assert [line.num_present for line in model.explain(plan).levels] == [0, 0]
        for given in (plan, routing):
            hidden = leaf(0, WIDTH)
            model(hidden, given).fused_hidden.sum().backward()
            assert zeros(hidden)


def test_an_unknown_name_for_no_samples_is_still_unknown():
    with pytest.raises(KeyError, match=r"must name an expert of level 'family' \(got 'q' for the whole batch"):
        build()(torch.zeros(0, WIDTH), {"family": "q", "language": []})
    with pytest.raises(RouteTypeError, match=r"must hold integer ids \(got dtype torch\.float32\)"):
        build()(torch.zeros(1, WIDTH), {"family": torch.tensor([0.0]), "language": ["x"]})
    with pytest.raises(ValueError, match=r"must have one axis, the samples \(got shape \(0, 2\)\)"):
        build()(torch.zeros(0, WIDTH), {"family": torch.zeros(0, 2), "language": []})


@pytest.mark.parametrize("forward", FORWARDS)
def test_losses_of_no_expert_add_up_to_zero(forward):
    """A rank without samples makes a backward pass, too."""
    model, encoder, api = build(forward), nn.Linear(WIDTH, WIDTH), CELMoELossAPI()
    bundle = api.compute(run(model, forward, encoder(torch.zeros(0, WIDTH)), NONE))
    assert bundle.terms == []
    assert bundle.as_dict() == {}
    assert bundle.total.item() == 0.0
    bundle.total.backward()
    assert all(map(zeros, encoder.parameters()))
    # The fusion is no part of it, as with samples.
    assert all(parameter.grad is None for parameter in model.parameters())
    bundle.add("mine", torch.tensor(2.0))
    assert bundle.total.item() == 2.0


@pytest.mark.parametrize("forward", FORWARDS)
def test_losses_of_no_expert_reach_the_levels_above_a_detached_one(forward):
    model, encoder = build(forward, language=DETACHED), nn.Linear(WIDTH, WIDTH)
    CELMoELossAPI().compute(run(model, forward, encoder(torch.zeros(0, WIDTH)), NONE)).total.backward()
    assert all(map(zeros, encoder.parameters()))


@pytest.mark.parametrize("size", [1, 3])
def test_some_samples_whose_experts_return_no_loss_have_no_total(size):
    model = build(make=Looks)
    output = model(torch.zeros(size, WIDTH), {"family": ["a"] * size, "language": "x"})
    with pytest.raises(InputError, match="'terms' must hold at least one loss term"):
        _ = CELMoELossAPI().compute(output).total
    with pytest.raises(InputError):
        _ = LossBundle().total
