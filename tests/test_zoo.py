"""Ready experts: each beside the oracle, grouped and stacked; the identity at first; what they say of wrong arguments.

A record says how an expert is made and what it is given. All of them go through the same tests.
"""

from __future__ import annotations

import re
import statistics
from functools import partial
from typing import Any

import pytest
import torch

import celmoe
from celmoe import (
    ExpertBatch,
    zoo,
)
from tests.traps import GROUPED, LEVEL, WIDTH, assert_like_oracle, assert_ran_grouped, build, experts_of
from tests.zoo import KINDS, Kind, make_batch, trained

#: Not the identity at first, as the others are.
REPLACING: dict[str, Kind] = {
    "Linear": Kind(lambda: zoo.Linear(WIDTH, residual=False)),
    "MLP": Kind(lambda: zoo.MLP(WIDTH, residual=False)),
    "GLU": Kind(lambda: zoo.GLU(WIDTH, residual=False), ()),
}
ALL = {**KINDS, **{f"{name}, replacing": kind for name, kind in REPLACING.items()}}
DTYPES = [torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("name", ALL)
def test_runs_grouped_and_like_the_oracle(name: str, dtype: torch.dtype):
    """Rows and all gradients, on batches of other counts, with groups of one row and with absent experts."""
    kind = ALL[name]
    subject, twin = (trained(build(kind.make, dtype=dtype)) for _ in range(2))
    for place in range(3):
        batch = make_batch(kind, place, dtype)
        assert_like_oracle(subject, twin, batch)
        assert_ran_grouped(subject, batch())


@pytest.mark.parametrize("name", ALL)
def test_no_operation_runs_expert_by_expert_in_grouped(name: str):
    kind = ALL[name]
    model, batch = build(kind.make), make_batch(kind, 0)()
    batch(model)
    (found,) = model.explain(batch.routing).levels[0].classes
    assert (found.engine, found.operations_looped) == (GROUPED, {})


def observed(kind: Kind, engine: str, dtype: torch.dtype, rows: torch.dtype, *, autocast: bool) -> dict[str, Any]:
    model, batch = trained(build(kind.make, engine, dtype=dtype)), make_batch(kind, 0, rows)()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = batch(model).levels[LEVEL].hidden
    if engine == GROUPED:
        assert_ran_grouped(model, batch)
    output.double().sin().sum().backward()
    leaves = {**batch.leaves, **dict(model.named_parameters())}
    return {"hidden": output} | {name: leaf.grad for name, leaf in leaves.items()}


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
@pytest.mark.parametrize("name", KINDS)
def test_in_bfloat16_grouped_is_as_near_to_float64_as_the_loop(name: str, autocast: bool):
    kind = KINDS[name]
    dtype = torch.float32 if autocast else torch.bfloat16
    exact = observed(kind, "looped", torch.float64, torch.float64, autocast=False)
    looped, grouped = (observed(kind, each, dtype, dtype, autocast=autocast) for each in ("looped", GROUPED))
    far: dict[str, list[tuple[float, float]]] = {}
    for key, wanted in exact.items():
        mine, theirs = grouped[key], looped[key]
        assert (mine is None) == (theirs is None) == (wanted is None), key
        if mine is None:
            continue
        assert mine.dtype == theirs.dtype, key
        within = re.sub(rf"level_modules\.{LEVEL}\.\w+\.", "", key)
        far.setdefault(within, []).append((distance(mine, wanted), distance(theirs, wanted)))
    assert far
    for key, distances in far.items():
        mine, theirs = map(statistics.fmean, zip(*distances, strict=True))
        assert mine <= 1.25 * theirs + 2**-9, (key, mine, theirs)


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm().clamp(min=1e-3))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_begins_as_the_identity_alone_and_grouped(name: str, dtype: torch.dtype):
    """Bit for bit, padding and all, alone and grouped."""
    kind = KINDS[name]
    model, batch = build(kind.make, dtype=dtype), make_batch(kind, 0, dtype)()
    found = batch(model).levels[LEVEL].hidden
    assert_ran_grouped(model, batch)
    assert torch.equal(found, batch.leaves["hidden"])
    mask = batch.mask if kind.masked else None
    alone = experts_of(model)[0](ExpertBatch(batch.leaves["hidden"], batch.context, mask)).hidden
    assert torch.equal(alone, batch.leaves["hidden"])


@pytest.mark.parametrize("name", KINDS)
def test_a_first_step_leaves_the_identity(name: str):
    """The gradient reaches what is zero at first: an expert that can't begin would pass the test before."""
    kind = KINDS[name]
    model, batch = build(kind.make, "looped"), make_batch(kind, 0)()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch(model).levels[LEVEL].hidden.sin().sum().backward()
    optimizer.step()
    assert not torch.equal(batch(model).levels[LEVEL].hidden, batch.leaves["hidden"])


@pytest.mark.parametrize("name", REPLACING)
def test_without_residual_it_is_another_function_grouped(name: str):
    kind = REPLACING[name]
    model, batch = build(kind.make), make_batch(kind, 0)()
    assert not torch.allclose(batch(model).levels[LEVEL].hidden, batch.leaves["hidden"], atol=0.1)


@pytest.mark.parametrize("name", KINDS)
def test_stacks_as_one_class_and_trains_like_ordinary_experts_in_grouped(name: str):
    kind = KINDS[name]
    ordinary, stacked = (trained(build(kind.make, dtype=torch.float64)) for _ in range(2))
    report = celmoe.stack_experts(stacked)
    assert [len(each.experts) for each in report.classes if not each.reason] == [len(experts_of(ordinary))]
    assert len(report.classes) == 1
    (stack,) = stacked._stacks[LEVEL]
    # Nothing of an expert may change unseen, so that a call asks one of them.
    assert stack.is_fixed
    options = {"lr": 0.01, "weight_decay": 0.1, "eps": 1e-3}
    pairs = [
        (ordinary, torch.optim.AdamW(ordinary.parameters(), **options)),
        (stacked, celmoe.optim.AdamW(stacked.parameters(), **options)),
    ]
    for place in range(3):
        outputs = []
        for model, optimizer in pairs:
            optimizer.zero_grad()
            batch = make_batch(kind, place, torch.float64)()
            outputs.append(batch(model).levels[LEVEL].hidden)
            assert_ran_grouped(model, batch)
            outputs[-1].sin().sum().backward()
            optimizer.step()
        torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-10)
    wanted = ordinary.state_dict()
    assert list(stacked.state_dict()) == list(wanted)
    for key, value in stacked.state_dict().items():
        torch.testing.assert_close(value, wanted[key], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["MLP", "Prefix", "Convolution with a mask", "Block with a mask"])
def test_grouped_compiles_without_a_break(name: str):
    """As the graph's own operations, for all routings; shown for two layers, a softmax, shifts and attention."""
    kind = KINDS[name]
    model = trained(build(kind.make, "auto", dtype=torch.float64))
    celmoe.stack_experts(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for place in (0, 3):
        batch = make_batch(kind, place, torch.float64)()
        batch.routing = model.compile_routing(batch.routing)
        found, wanted = batch(compiled).fused_hidden, batch(partial(celmoe.reference.reference_forward, model))
        torch.testing.assert_close(found, wanted.fused_hidden, rtol=1e-10, atol=1e-10)
