"""The library on the stand-in against the oracle on the CPU. Run by `test_standin`, in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import celmoe.devices
import celmoe.grouped.verify
import celmoe.rows.dispatch
from celmoe.engines.registry import ENGINES
from celmoe.reference import reference_forward
from tests.directml.standin import FallbackError, Tally, install, tallied
from tests.experts import KINDS
from tests.parity import Evidence, assert_parity
from tests.slow import slow_after, slow_but
from tests.strategies import (
    CONTEXTS,
    FUSIONS,
    IRREGULAR,
    LAYOUTS,
    MASKS,
    OBJECTIVES,
    WIDTHS,
    Case,
    Expert,
    Level,
    Routes,
    examples,
    hierarchies,
    of_siblings,
    with_routing,
)

DEVICE = install()
ENGINE_NAMES = list(ENGINES)

# Their own operations all run on the device. PyTorch's gated recurrent layers fail there, and lookups are the CPU's.
DEVICE_KINDS = (
    *("linear", "frozen", "mlp", "scale", "in_place", "identity", "reads_mask", "reads_context", "losses", "gated"),
    *("layer_norm", "rms_norm", "einsum", "matmul", "views", "own_parameter", "conv1d", "attention_weights"),
    *("encoder_layer", "packed_attention", "rnn", "masked_losses"),
)


def two_levels(kind: str, width: int = 4, **fields: Any) -> Case:
    """Twelve samples over two experts, then over three of four in an order of their own."""
    ids = (2, 0, 1, 0, 1, 2, 1, 1, 0, 2, 2, 0)
    levels = (
        Level("family", (Expert("b", "linear"), Expert("a", "linear"))),
        Level("language", tuple(Expert(name, kind) for name in ("de", "fr", "ru", "absent"))),
    )
    routing = {"family": Routes((0, 1, 1) * 4), "language": Routes(ids)}
    return Case(levels, len(ids), routing, width=width, fusion="learned", **({"trailing": (3,)} | fields))


def assert_parity_there(case: Case, engine: str, **options: Any) -> Evidence:
    """Check parity as `assert_parity` does with the model on the device; nothing may be refused or run on the CPU."""

    def in_float64() -> Any:
        wide = replace(case, dtype=torch.float64)
        return wide.model(engine), wide.inputs

    with tallied() as tally:
        evidence = assert_parity(
            *(case.model(engine), case.inputs),
            **{"optimizers": ("SGD",), "seed": case.seed, "in_float64": in_float64} | options,
            elsewhere=(DEVICE, lambda step: case.inputs(step, DEVICE)),
        )
    assert not tally.refused, f"refused: {tally.refused}"
    assert not tally.hidden, f"computed on the CPU: {dict(tally.hidden)}"
    return evidence


# By default; in the slow run all kinds go through both engines.
LOOPED = ("linear", "in_place", "reads_mask", "losses", "encoder_layer")
GROUPED = (
    *("linear", "mlp", "in_place", "identity", "reads_mask", "reads_context", "losses", "layer_norm", "einsum"),
    *("own_parameter", "conv1d", "encoder_layer", "rnn", "masked_losses"),
)


@pytest.mark.parametrize(
    ("kind", "engine"),
    slow_but(
        [*((kind, "looped") for kind in LOOPED), *((kind, "grouped") for kind in GROUPED)],
        [(kind, engine) for kind in DEVICE_KINDS for engine in ("looped", "grouped")],
    ),
)
def test_values_gradients_and_steps_equal_the_oracles(kind: str, engine: str):
    evidence = assert_parity_there(two_levels(kind), engine)
    assert evidence.gradients > 0
    assert evidence.missing_gradients > 0 or kind == "identity"
    assert evidence.steps == 2


@pytest.mark.parametrize("engine", ENGINE_NAMES)
@pytest.mark.parametrize("kind", slow_after(1, ["mlp", "encoder_layer"]))
@pytest.mark.parametrize("planned", [False, True], ids=["strings", "plan"])
def test_with_context_mask_and_another_width(kind: str, planned: bool, engine: str):
    case = two_levels(kind, width=6, planned=planned, context="dict", mask="bool", objective="fused")
    assert_parity_there(case, engine)


@pytest.mark.parametrize("engine", ["looped", "auto"])
def test_with_activation_checkpoints(engine: str):
    assert_parity_there(two_levels("checkpointed"), engine)


def many_experts(kind: str) -> Case:
    """A case with enough experts for `auto` to run them as one."""
    names = [f"expert {number}" for number in range(48)]
    ids = tuple((5 * sample) % 47 for sample in range(130))
    level = Level("language", tuple(Expert(name, kind) for name in names))
    return Case((level,), len(ids), {"language": Routes(ids)}, planned=True)


def test_auto_runs_many_experts_as_one():
    case = many_experts("layer_norm")
    assert_parity_there(case, "auto", optimizers=())
    assert "grouped" in str(case.model("auto").to(DEVICE).explain(case.inputs(0, DEVICE).routing))


@pytest.mark.parametrize("engine", ENGINE_NAMES)
def test_without_gradients(engine: str):
    case = two_levels("mlp", training=False)
    model, inputs = case.model(engine), case.inputs()
    with torch.no_grad(), tallied() as tally:
        expected = reference_forward(model, inputs.hidden, inputs.routing).fused_hidden
        found = model.to(DEVICE)(inputs.hidden.to(DEVICE), inputs.routing).fused_hidden
    assert not tally.refused
    torch.testing.assert_close(found.cpu(), expected)


def test_ids_on_the_device_are_read_once_a_level():
    case = two_levels("linear")
    model, inputs = case.model("looped").to(DEVICE), case.inputs(0, DEVICE)
    by_name = model(inputs.hidden, inputs.routing)
    ids = {name: torch.tensor(routes.ids).to(DEVICE) for name, routes in case.routing.items()}
    with tallied() as tally:
        by_id = model(inputs.hidden, ids)
    assert tally.reads == {"copy_": 2}
    assert torch.equal(by_id.fused_hidden, by_name.fused_hidden)


def test_the_self_check_passes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(celmoe.devices, "_open_directml", lambda number: (DEVICE, "a stand-in"))
    with tallied() as tally:
        found = celmoe.devices.self_check("directml")
    assert (found.state, found.detail) == (celmoe.devices.WORKS, "a stand-in")
    assert [check.engine for check in found.checks] == ["looped", "grouped"]
    assert not tally.refused
    assert not tally.hidden


@st.composite
def device_cases(draw: st.DrawFn) -> Case:
    """Cases of experts whose operations all run on the device."""
    # With more of them an einsum of PyTorch's passes through six dimensions.
    trailing = draw(st.sampled_from([(), (1,), (3,)]))
    kinds = [name for name in DEVICE_KINDS if trailing or not KINDS[name].needs_positions]
    case = Case(
        levels=draw(hierarchies(kinds)),
        batch_size=draw(st.sampled_from([1, 2, 7, 17, 31])),
        routing={},
        trailing=trailing,
        width=draw(st.sampled_from(WIDTHS)),
        planned=draw(st.booleans()),
        context=draw(st.sampled_from([each for each in CONTEXTS if each not in IRREGULAR])),
        mask=draw(st.sampled_from(MASKS)),
        layout=draw(st.sampled_from(LAYOUTS)),
        fusion=draw(st.sampled_from(FUSIONS)),
        objective=draw(st.sampled_from(OBJECTIVES)),
        seed=draw(st.integers(0, 100)),
    )
    return draw(with_routing(case))


@pytest.mark.parametrize("engine", ENGINE_NAMES)
@examples(4)
@given(case=device_cases())
def test_any_hierarchy_and_routes_equal_the_oracles(engine: str, case: Case):
    assert_parity_there(case, engine, objective=case.objective, optimizers=())


@examples(8)
@given(case=device_cases().map(of_siblings))
def test_any_siblings_run_as_one_equal_the_oracle(case: Case):
    assert_parity_there(case, "grouped", objective=case.objective, optimizers=())


def forward_and_step(case: Case, engine: str) -> tuple[Tally, Tally]:
    """The device's calls in a forward pass with a plan, and in its backward pass and a step.

    Classes are verified in an uncounted step before.
    """
    model = case.model(engine).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    tallies = []
    for _ in range(2):
        inputs = replace(case, planned=True).inputs(0, DEVICE)
        with tallied() as forward:
            output = model(inputs.hidden, inputs.routing, inputs.context, inputs.mask)
        with tallied() as backward:
            output.fused_hidden.pow(2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        tallies.append((forward, backward))
    return tallies[-1]


@pytest.mark.parametrize("engine", ENGINE_NAMES)
@pytest.mark.parametrize(
    "case",
    [
        two_levels("mlp", context="rows", mask="float"),
        two_levels("encoder_layer", mask="bool"),
        many_experts("linear"),
    ],
    ids=["mlp", "encoder_layer", "many"],
)
def test_nothing_is_read_back_in_a_step_with_a_plan(case: Case, engine: str):
    for tally in forward_and_step(case, engine):
        assert tally.kernels.total() > 10
        assert not tally.reads
        assert not tally.hidden
        assert not tally.refused


# Mutants that the checks above must find.


def by_plain_index_select(rows: torch.Tensor, order: torch.Tensor, inverse: Any, counts: Sequence[int]) -> Any:
    """Its backward pass is `index_add_`."""
    return celmoe.rows.dispatch.cut(rows.index_select(0, order), counts)


def by_index(rows: torch.Tensor, order: torch.Tensor, inverse: Any, counts: Sequence[int]) -> Any:
    return celmoe.rows.dispatch.cut(rows[order], counts)


def by_reading(rows: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor, counts: Sequence[int]) -> Any:
    assert order.max().item() == rows.shape[0] - 1
    return RIGHT(rows, order, inverse, counts)


RIGHT = celmoe.rows.dispatch._scatter_rows


@pytest.fixture
def dispatching(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[..., Any]], None]]:
    def replace_it(wrong: Callable[..., Any]) -> None:
        monkeypatch.setattr(celmoe.rows.dispatch, "_scatter_rows", wrong)

    return replace_it


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        (by_plain_index_select, FallbackError, "index_add"),
        (by_index, AssertionError, r"index\.Tensor_out"),
    ],
)
def test_a_dispatch_that_is_not_for_the_device_is_caught(
    wrong: Callable[..., Any], error: type[Exception], words: str, dispatching: Callable[..., None]
):
    dispatching(wrong)
    with pytest.raises(error, match=words):
        assert_parity_there(two_levels("linear"), "looped")


def test_a_dispatch_that_reads_back_is_caught(dispatching: Callable[..., None]):
    dispatching(by_reading)
    forward, _ = forward_and_step(two_levels("linear"), "looped")
    assert forward.reads == {"_local_scalar_dense": 2}


def test_values_and_gradients_that_differ_are_caught(dispatching: Callable[..., None]):
    dispatching(lambda rows, order, inverse, counts: RIGHT(rows.flip(0), order, inverse, counts))
    with pytest.raises(AssertionError, match="values differ"):
        assert_parity_there(two_levels("linear"), "looped")


def test_a_refusal_that_auto_takes_for_a_reason_to_loop_is_caught(monkeypatch: pytest.MonkeyPatch):
    right = celmoe.grouped.verify.run_program

    def falling_back(program: Any, bound: Any, *rest: Any, **options: Any) -> Any:
        torch.lerp(bound.sample.hidden, bound.sample.hidden, 0.5)
        return right(program, bound, *rest, **options)

    monkeypatch.setattr(celmoe.grouped.verify, "run_program", falling_back)
    with pytest.raises(AssertionError, match="lerp"):
        assert_parity_there(many_experts("layer_norm"), "auto", optimizers=())
