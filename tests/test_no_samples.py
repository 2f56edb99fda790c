"""No samples, and samples of no positions, are batches too: they are passed through, never cut off."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from celmoe import (
    CELMoEOutput,
    ExpertBatch,
    Rows,
    Shared,
)
from tests.experts import Features, Pair
from tests.no_samples import DETACHED, FORWARDS, FUSIONS, HALVED, NONE, WIDTH, Looks, Reads, build, leaf, run, zeros


def parts_of(output: CELMoEOutput) -> dict[str, torch.Tensor]:
    return {"fused": output.fused_hidden, **{name: level.hidden for name, level in output.levels.items()}}


@pytest.mark.parametrize("part", ["fused", "family", "language"])
@pytest.mark.parametrize("trailing", [(), (3,), (0,)], ids=str)
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("forward", FORWARDS)
def test_an_encoder_before_the_model_gets_zeros_from_a_loss_on_any_part(forward, fusion, trailing, part):
    model, encoder = build(forward, fusion=fusion), nn.Linear(WIDTH, WIDTH)
    output = run(model, forward, encoder(torch.zeros(0, *trailing, WIDTH)), NONE)
    if fusion == "own" and part == "family":
        part = "fused"  # the fusion overwrites the level's rows
    assert parts_of(output)[part].shape == (0, *trailing, WIDTH)
    parts_of(output)[part].square().sum().backward()
    assert all(map(zeros, encoder.parameters()))
    assert all(parameter.grad is None for parameter in model.level_modules.parameters())
    assert all(zeros(parameter) == (part == "fused") for parameter in model.fusion.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.complex64], ids=str)
@pytest.mark.parametrize("forward", FORWARDS)
def test_rows_keep_their_dtype(forward, dtype):
    hidden = torch.zeros(0, WIDTH, dtype=dtype, requires_grad=True)
    output = run(build(forward, fusion="mean"), forward, hidden, NONE)
    assert {part.dtype for part in parts_of(output).values()} == {dtype}
    output.fused_hidden.sum().abs().backward()
    assert zeros(hidden)


@pytest.mark.parametrize(
    ("family", "language", "reached"),
    [
        (DETACHED, None, False),
        ({"gradient_scale": -1.0}, HALVED, False),
        ([DETACHED, DETACHED, {"gradient_scale": 0.0}], None, False),
        # A batch may come whose experts pass the gradient on.
        ([DETACHED, DETACHED, {}], None, True),
        ([DETACHED, DETACHED, HALVED], HALVED, True),
        # The flag decides only if no scale is given.
        (DETACHED | {"gradient_scale": 1.0}, None, True),
        # The fusion reads the first level's output as well.
        (None, DETACHED, True),
    ],
)
@pytest.mark.parametrize("forward", FORWARDS)
def test_a_level_whose_experts_are_all_detached_ends_the_gradient(forward, family, language, reached):
    hidden = torch.zeros(0, WIDTH, requires_grad=True)
    output = run(build(forward, fusion="mean", family=family, language=language), forward, hidden, NONE)
    output.fused_hidden.sum().backward()
    assert zeros(hidden) == reached
    assert (hidden.grad is None) != reached
    assert output.levels["language"].hidden.requires_grad


@pytest.mark.parametrize("forward", FORWARDS)
def test_a_detached_last_level_is_cut_off_from_the_one_above(forward):
    hidden = torch.zeros(0, WIDTH, requires_grad=True)
    output = run(build(forward, language=DETACHED), forward, hidden, NONE)
    output.levels["language"].hidden.sum().backward()
    assert hidden.grad is None


CONTEXTS: dict[str, Any] = {
    "rows": lambda: [leaf(0, 3)],
    "whole": lambda: [leaf(7, 2), leaf()],
    "shared": lambda: [Shared(leaf(0, 2)), Shared({"deep": [leaf(5)]})],
    "nested": lambda: [{"deep": (1, [leaf(0), "text", None], leaf(2))}],
    "dataclass": lambda: [Features(leaf(0, 2), leaf(3)), Pair(leaf(0), leaf(4))],
    "complex, of another precision, not finite": lambda: [
        torch.ones(2, dtype=torch.complex64, requires_grad=True),
        torch.ones(0, 3, dtype=torch.float64, requires_grad=True),
        torch.full((2,), torch.inf, requires_grad=True),
    ],
}


def leaves_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    elif not isinstance(value, list | tuple):
        value = list(vars(value).values()) if hasattr(value, "__dict__") else []
    return [tensor for item in value for tensor in leaves_in(item)]


@pytest.mark.parametrize("detached", [False, True], ids=["attached", "detached"])
@pytest.mark.parametrize("name", CONTEXTS)
@pytest.mark.parametrize("forward", FORWARDS)
def test_mask_and_context_get_zeros_whether_rows_do_or_not(forward, name, detached):
    options = DETACHED if detached else None
    model = build(forward, family=options, language=options)
    context, mask = {str(place): item for place, item in enumerate(CONTEXTS[name]())}, leaf(0, 2)
    output = run(model, forward, torch.zeros(0, WIDTH), NONE, context, mask)
    output.levels["language"].hidden.sum().backward()
    leaves = [mask, *leaves_in(context)]
    assert len(leaves) > 1
    assert all(map(zeros, leaves))


# Values by sample that are no tensors have no gradient to get; those beside them have.
WITHOUT_GRADIENTS = {
    "array": np.zeros((0, 3)),
    "list": [],
    "marked list": Rows([]),
    "marked array": Rows(np.zeros((0, 2))),
    "nested list": {"words": [], "ids": [np.zeros(0)]},
}


@pytest.mark.parametrize("name", WITHOUT_GRADIENTS)
@pytest.mark.parametrize("forward", FORWARDS)
def test_values_by_sample_that_are_no_tensors_pass_through(forward, name):
    beside, hidden = leaf(0, WIDTH), torch.zeros(0, WIDTH, requires_grad=True)
    given = {"other": WITHOUT_GRADIENTS[name], "beside": beside}
    run(build(forward), forward, hidden, NONE, given).fused_hidden.sum().backward()
    assert zeros(beside)
    assert zeros(hidden)


@pytest.mark.parametrize("forward", FORWARDS)
def test_what_experts_read_gets_what_an_expert_called_alone_gives_it(forward):
    row, every, mask, hidden = leaf(0, WIDTH), leaf(3), leaf(0), torch.zeros(0, WIDTH, requires_grad=True)
    given = {"row": row, "all": every}
    run(build(forward), forward, hidden, NONE, given, mask).levels["family"].hidden.sum().backward()
    found = [each.grad for each in (row, every, mask, hidden)]
    for each in (row, every, mask, hidden):
        each.grad = None
    Reads()(ExpertBatch(hidden, given, mask)).hidden.sum().backward()
    for each, mine in zip((row, every, mask, hidden), found, strict=True):
        assert torch.equal(mine, each.grad)


@pytest.mark.parametrize("forward", FORWARDS)
def test_an_output_has_a_graph_where_that_of_some_samples_has_one(forward):
    """The graph is there if the experts are trained, or if their rows have a gradient."""
    model = build(forward, fusion="mean")
    rows = torch.zeros(0, WIDTH)
    output = run(model, forward, rows, NONE)
    for part in parts_of(output).values():
        part.sum().backward(retain_graph=True)
        assert not part.is_leaf
    assert not any(parameter.grad is not None for parameter in model.parameters())
    model.requires_grad_(False)
    assert not any(part.requires_grad for part in parts_of(run(model, forward, rows, NONE)).values())
    assert not any(
        part.requires_grad for part in parts_of(run(model, forward, leaf(2, WIDTH)[:0].detach(), NONE)).values()
    )
    assert run(model, forward, leaf(0, WIDTH), NONE).fused_hidden.requires_grad
    assert run(model, forward, rows, NONE, None, leaf(0)).fused_hidden.requires_grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("forward", FORWARDS)
def test_without_gradients_there_is_no_graph(forward, mode):
    model = build(forward)
    with mode():
        output = run(model, forward, leaf(0, WIDTH), NONE, {"row": leaf(0, WIDTH)}, leaf(0))
    assert not any(part.requires_grad for part in parts_of(output).values())


@pytest.mark.parametrize("forward", FORWARDS)
def test_no_expert_runs(forward):
    model = build(forward)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    output = run(model, forward, leaf(0, WIDTH), NONE)
    assert torch.equal(before, torch.get_rng_state())
    assert not any(buffer.any() for buffer in model.buffers())
    assert output.losses == output.levels["family"].losses == output.aux == {}


@pytest.mark.parametrize("forward", FORWARDS)
def test_under_autocast(forward):
    encoder, model = nn.Linear(WIDTH, WIDTH), build(forward)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = run(model, forward, encoder(torch.zeros(0, WIDTH)), NONE)
    assert output.levels["family"].hidden.dtype == torch.bfloat16  # that of the rows it was given
    output.fused_hidden.sum().backward()
    assert all(map(zeros, encoder.parameters()))
    assert all(map(zeros, model.fusion.parameters()))


@pytest.mark.parametrize("fusion", ["learned", "mean"])
@pytest.mark.parametrize("forward", FORWARDS)
def test_integers_become_what_experts_make_of_them(forward, fusion):
    model = build(forward, fusion=fusion, make=Looks)
    for size in (2, 0):
        hidden = torch.zeros(size, WIDTH, dtype=torch.int64)
        output = run(model, forward, hidden, {"family": ["a"] * size, "language": ["x"] * size})
        assert {part.dtype for part in parts_of(output).values()} == {torch.float32}
        output.levels["family"].hidden.sum().backward()
    # Without parameters of experts, the rows alone decide the dtype.
    integers = run(build(forward, fusion="mean", make=nn.Identity), forward, hidden, NONE).levels["family"].hidden
    assert integers.dtype == torch.int64


@pytest.mark.parametrize("forward", FORWARDS)
def test_what_a_caller_does_to_an_output_reaches_no_input(forward):
    hidden = leaf(0, WIDTH)
    output = run(build(forward, fusion="mean"), forward, hidden, NONE)
    output.levels["family"].hidden.add_(1)
    assert hidden._version == 0
    wide = torch.zeros(2, 0, WIDTH).transpose(0, 1)
    assert run(build(forward), forward, wide, NONE).levels["family"].hidden.is_contiguous()
