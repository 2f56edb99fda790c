"""No samples, and samples of no positions, are batches too: they are passed through, never cut off."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from celmoe import (
    CELMoEConfig,
    CELMoELossAPI,
    CELMoEOutput,
    ExpertBatch,
    ExpertConfig,
    ExpertModule,
    ExpertResult,
    HierarchicalCELMoE,
    HierarchyLevelConfig,
    InputError,
    LossBundle,
    RouteTypeError,
    RoutingCompiler,
    Rows,
    Shared,
)
from celmoe.engines.registry import ENGINES
from celmoe.reference import reference_forward
from tests.experts import Features, Pair

WIDTH = 4
FUSIONS = ("learned", "position_aware", "mean", "own")
FORWARDS = [*ENGINES, "oracle"]
NONE: dict[str, list[str]] = {"family": [], "language": []}


class Reads(ExpertModule):
    """Reads the mask and the context if there are some, counts its calls, and draws a random number in each."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, dtype=dtype)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        hidden = batch.hidden + self.linear(batch.hidden)
        if batch.mask is not None:
            hidden = hidden * batch.mask.reshape(-1, *[1] * (hidden.dim() - 1))
        if isinstance(batch.context, dict) and "row" in batch.context:
            hidden = hidden + batch.context["row"] + batch.context["all"].sum()
        self.calls += 1
        return ExpertResult(hidden + 0 * torch.rand(()), {"size": hidden.square().mean()})


class Looks(ExpertModule):
    """Looks integers up."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 1)

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        rows = batch.hidden
        return ExpertResult(rows if rows.is_floating_point() else self.table(rows).squeeze(-1))


class InPlace(nn.Module):
    """A user's fusion, which writes into the levels' rows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, level_hiddens: list[torch.Tensor]) -> torch.Tensor:
        return level_hiddens[0].mul_(self.weight).add_(level_hiddens[-1])


def build(
    engine: str = "auto", *, fusion: str = "learned", make: Any = Reads, family: Any = None, language: Any = None
) -> HierarchicalCELMoE:
    """Two levels of three experts, whose configs take these options by expert or all the same."""

    def level(name: str, experts: str, options: Any) -> HierarchyLevelConfig:
        of = options if isinstance(options, list) else [options or {}] * 3
        return HierarchyLevelConfig(
            name, {each: ExpertConfig(each, **fields) for each, fields in zip(experts, of, strict=True)}, experts[0]
        )

    config = CELMoEConfig(
        WIDTH,
        [level("family", "abc", family), level("language", "xyz", language)],
        use_learned_fusion=fusion != "mean",
        fusion_type="position_aware" if fusion == "position_aware" else "learned",
        fusion_dropout=0.0,
    )
    torch.manual_seed(0)
    engine = "looped" if engine == "oracle" else engine
    return HierarchicalCELMoE(config, lambda *_: make(), InPlace() if fusion == "own" else None, engine=engine)


def run(model: HierarchicalCELMoE, forward: str, *inputs: Any) -> CELMoEOutput:
    return reference_forward(model, *inputs) if forward == "oracle" else model(*inputs)


def zeros(tensor: torch.Tensor) -> bool:
    """True if there is a gradient, and all of it is zero."""
    return tensor.grad is not None and tensor.grad.shape == tensor.shape and not tensor.grad.any()


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


DETACHED, HALVED = {"stop_gradient_from_parent": True}, {"gradient_scale": 0.5}


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


def leaf(*shape: int) -> torch.Tensor:
    return torch.ones(shape, requires_grad=True)


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
