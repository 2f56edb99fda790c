"""Experts behind modules of any model: outputs, plans, dtypes, losses, compilers, and the way back."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import celmoe
from celmoe import CELMoEConfig, ExpertModule, ExpertResult, Rows, Shared
from tests.hosts import (
    CLASSES,
    NAMES,
    ROUTES,
    WIDTH,
    WRAPPERS,
    Bottleneck,
    Encoder,
    Penalized,
    config,
    hidden_of,
    plan_of,
    tokens,
)

PLACES = "blocks.*"


def attached(wrapper="tensor", *, zero=False, where=PLACES, kind=Bottleneck, **options):
    torch.manual_seed(0)
    return celmoe.attach(Encoder(wrapper), config(), lambda *_: kind(zero=zero), where, **options)


def by_language(model, given, routes):
    """The rows of each language through a run of its own."""
    output = torch.empty(*given.shape, CLASSES)
    for name in set(routes):
        rows = [row for row, route in enumerate(routes) if route == name]
        with celmoe.routed(model, plan_of([name] * len(rows))):
            output[rows] = model(given[rows])
    return output


@pytest.mark.parametrize("wrapper", [name for name in WRAPPERS if name != "object"])
def test_a_mixed_batch_is_that_of_separate_runs(wrapper):
    model, given = attached(wrapper), tokens()
    mixed = model(given, plan=plan_of(ROUTES))
    torch.testing.assert_close(mixed, by_language(model, given, ROUTES))
    assert not torch.allclose(mixed, model(given, plan=plan_of(ROUTES[::-1])))


@pytest.mark.parametrize("stacked", [False, True])
def test_experts_that_run_as_one_are_those_one_by_one(stacked):
    """So few experts are looped by default: here they must run as one, or the engine raises."""
    given, found = tokens(), []
    for engine in ("grouped", "looped"):
        model = attached(engine=engine)
        if stacked:
            celmoe.adapters(model).stack()
        output = model(given, plan=plan_of(ROUTES))
        output.square().sum().backward()
        if stacked:
            celmoe.adapters(model).unstack()
        found.append((output, {name: each.grad for name, each in model.named_parameters()}))
    assert {level.engine for level in celmoe.adapters(attached(engine="grouped"))["blocks.0"].explain().levels} == {
        "grouped"
    }
    torch.testing.assert_close(found[0][0], found[1][0])
    for name, grad in found[0][1].items():
        torch.testing.assert_close(grad, found[1][1][name])


def test_both_ways_to_give_a_plan_are_one():
    model, given = attached(), tokens()
    plan = plan_of(ROUTES)
    with celmoe.routed(model, plan):
        assert torch.equal(model(given), model(given, plan=plan))
    with celmoe.routed(model, {"language": ROUTES}):
        assert torch.equal(model(given), model(given, plan={"language": ROUTES}))


@pytest.mark.parametrize("wrapper", ["tensor", "tuple", "mapping"])
def test_experts_that_start_as_zero_start_as_nothing(wrapper):
    torch.manual_seed(0)
    plain = Encoder(wrapper)
    assert torch.equal(plain(tokens()), attached(wrapper, zero=True)(tokens(), plan=plan_of(ROUTES)))


def test_the_rest_of_an_output_stays():
    for wrapper in ("tuple", "list", "named tuple", "mapping"):
        model = attached(wrapper)
        with celmoe.routed(model, plan_of(ROUTES)):
            output = model.blocks[0](torch.randn(6, 5, WIDTH))
        assert type(output) is type(WRAPPERS[wrapper](torch.zeros(1)))
        assert hidden_of(output).shape == (6, 5, WIDTH)
        assert (output.rest if wrapper in ("named tuple", "mapping") else output[1]) in ("rest", None)


def test_a_hook_that_gets_the_output_before_keeps_it():
    """A mapping is copied: who has looked at the module's own output still holds that."""
    torch.manual_seed(0)
    model, seen = Encoder("mapping"), []
    model.blocks[0].register_forward_hook(lambda module, args, output: seen.append(output))
    celmoe.attach(model, config(), lambda *_: Bottleneck(), "blocks.0")
    model(tokens(), plan=plan_of(ROUTES))
    plain = Encoder("mapping")
    plain.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(seen[0]["last_hidden_state"], plain.blocks[0](plain.embed(tokens()))["last_hidden_state"])


def test_parameters_gradients_and_state_are_the_models():
    model = attached()
    model(tokens(), plan=plan_of(ROUTES[:1] * 6)).sum().backward()
    experts = celmoe.adapters(model)["blocks.0"].level_modules["language"]
    assert experts["de"].up.weight.grad is not None
    assert experts["it"].up.weight.grad is None
    keys = [key for key in model.state_dict() if ".celmoe." in key]
    assert "blocks.1.celmoe.level_modules.language.it.up.weight" in keys
    assert len(keys) == 2 * 6 * 4
    assert {*Encoder().state_dict()} == {*model.state_dict()} - {*keys}


def test_one_places_experts_are_not_another_places():
    first, second = celmoe.adapters(attached()).values()
    assert not torch.equal(
        first.level_modules["language"]["de"].up.weight, second.level_modules["language"]["de"].up.weight
    )


def test_nested_plans_and_plans_of_two_models():
    one, two, given = attached(), attached(), tokens()
    outer, inner = plan_of(ROUTES), plan_of(ROUTES[::-1])
    expected = one(given, plan=outer), one(given, plan=inner), two(given, plan=inner)
    with celmoe.routed(one, outer):
        with celmoe.routed(two, inner), celmoe.routed(one, inner):
            assert torch.equal(one(given), expected[1])
            assert torch.equal(two(given), expected[2])
        assert torch.equal(one(given), expected[0])
        assert torch.equal(one(given, plan=inner), expected[1])
        assert torch.equal(one(given), expected[0])


def test_places_of_two_configs_have_a_plan_each():
    model = attached(where="blocks.0")
    other = CELMoEConfig.from_tree({"a": ["x", "y"]}, levels=("group", "shop"), hidden_size=WIDTH)
    celmoe.attach(model, other, lambda *_: Bottleneck(), "blocks.*.linear")
    shops = celmoe.RoutingCompiler(other)({"shop": ["x", "y", "x", "y", "x", "y"]})
    with celmoe.routed(model, plan_of(ROUTES)), celmoe.routed(model, shops):
        both = model(tokens())
    with celmoe.routed(model, shops):
        assert torch.equal(model(tokens(), plan=plan_of(ROUTES)), both)
        with pytest.raises(celmoe.MissingRouteError, match=r"blocks\.0"):
            model(tokens())


def test_a_models_own_keyword_stays_its_own():
    class Planning(Encoder):
        def forward(self, given, plan=None):
            return super().forward(given), plan

    model = celmoe.attach(Planning(), config(), lambda *_: Bottleneck(), PLACES)
    with celmoe.routed(model, plan_of(ROUTES)):
        assert model(tokens(), plan="mine")[1] == "mine"


def test_a_pass_that_skips_a_place_has_no_losses_of_it():
    class Skipping(Encoder):
        def forward(self, given, skip=False):
            hidden = self.blocks[0](self.embed(given))
            return self.head(hidden if skip else self.blocks[1](hidden))

    model = celmoe.attach(Skipping(), config(), lambda *_: Penalized(), PLACES)
    with celmoe.routed(model, plan_of(ROUTES)) as run:
        model(tokens())
        assert {key[:8] for key in run.losses} == {"blocks.0", "blocks.1"}
        before = run.losses
        model(tokens(), skip=True)
    assert {key[:8] for key in before} == {"blocks.0", "blocks.1"}
    assert {key[:8] for key in run.losses} == {key[:8] for key in run.loss_weights} == {"blocks.0"}


def test_beams_repeat_a_plan():
    model, given = attached(), tokens()
    plan = plan_of(ROUTES)
    repeated = given.repeat_interleave(3, 0)
    with celmoe.routed(model, plan, num_beams=3, mask=torch.ones(6, 5)):
        torch.testing.assert_close(model(repeated), model(given).repeat_interleave(3, 0))
    assert torch.equal(model(repeated, plan=plan.repeat_interleave(3)), model(repeated, plan=plan_of(_tripled(ROUTES))))


def _tripled(names):
    return [name for name in names for _ in range(3)]


def test_context_and_mask_reach_the_experts():
    class Reader(ExpertModule):
        def forward(self, batch):
            return ExpertResult(batch.hidden + batch.context["shift"][:, None] * batch.mask[..., None])

    model = celmoe.attach(Encoder(), config(), lambda *_: Reader(), "blocks.1")
    # Of every sample another mask, so that a sample with another one's is seen.
    shift, mask = torch.randn(6, WIDTH), torch.rand(6, 5)
    with celmoe.routed(model, plan_of(ROUTES), context={"shift": shift}, mask=mask):
        shifted = model(tokens())
    plain = Encoder()
    plain.load_state_dict(model.state_dict(), strict=False)
    hidden = plain.blocks[1](plain.blocks[0](plain.embed(tokens()))) + 2 * shift[:, None] * mask[..., None]
    torch.testing.assert_close(shifted, plain.head(hidden))
    with celmoe.routed(model, plan_of(ROUTES), context={"shift": shift}, mask=mask, num_beams=2):
        twice = model(tokens().repeat_interleave(2, 0))
    torch.testing.assert_close(twice, shifted.repeat_interleave(2, 0))


def test_the_first_argument_is_that_of_the_forward_pass():
    """And not the first of the keywords, in whatever order the host writes them."""

    class Attention(nn.Module):
        def forward(self, query, key):
            return query - key

    class Host(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = Attention()

        def forward(self, hidden):
            return self.attention(key=torch.zeros_like(hidden), query=hidden)

    class Reader(ExpertModule):
        reads_input = True

        def forward(self, batch):
            return ExpertResult(batch.hidden + batch.context["input"])

    hidden = torch.ones(6, WIDTH)
    model = celmoe.attach(Host(), config(), lambda *_: Reader(), "attention")
    assert torch.equal(model(hidden, plan=plan_of(ROUTES)), 3 * hidden)


# By kind a value with an item for each of 6 samples, and what an expert makes of those of its samples.
VALUES = {
    "tensor": (torch.arange(6.0), lambda own: own),
    "marked tensor": (Rows(torch.arange(6.0)), lambda own: own),
    "list": (list(range(6)), torch.tensor),
    "marked list": (Rows(list(range(6))), torch.tensor),
    "tuple": (tuple(range(6)), torch.tensor),
    "texts": (list("abcdef"), lambda own: torch.tensor([ord(each) for each in own])),
    "array": (np.arange(6), torch.from_numpy),
    "nested": ({"deep": [Rows(torch.arange(6.0))]}, lambda own: own["deep"][0]),
}


@pytest.mark.parametrize("kind", VALUES)
def test_each_beam_has_its_samples_context(kind):
    """Kept whole, a list of 6 would be the same for all samples."""
    value, read = VALUES[kind]

    class Reader(ExpertModule):
        def forward(self, batch):
            assert len(batch.context["table"]) == len(batch.context["beams"]) == 12
            return ExpertResult(batch.hidden + read(batch.context["value"]).float()[:, None, None])

    model = celmoe.attach(Encoder(), config(), lambda *_: Reader(), "blocks.0")
    # As long as all beams together, and shared all the same.
    table, beams = Shared(torch.zeros(12)), Shared(list(range(12)))
    context = {"value": value, "table": table, "beams": beams}
    with celmoe.routed(model, plan_of(ROUTES), context=context):
        expected = model(tokens())
    with celmoe.routed(model, plan_of(ROUTES), context=context, num_beams=2):
        torch.testing.assert_close(model(tokens().repeat_interleave(2, 0)), expected.repeat_interleave(2, 0))
        torch.testing.assert_close(model(tokens()), expected)


class ReadsInput(ExpertModule):
    """Adds a multiple of the input of its module, which is wider than its output."""

    reads_input = True

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(WIDTH, CLASSES, bias=False)

    def forward(self, batch):
        return ExpertResult(batch.hidden + self.map(batch.context["input"]))


@pytest.mark.parametrize("keyword", [False, True])
def test_experts_may_read_the_input_of_their_module(keyword):
    model = celmoe.attach(Encoder(), config(), lambda *_: ReadsInput(), "head")
    if keyword:
        head = model.head.forward
        model.head.forward = lambda rows: head(rows)  # noqa: PLW0108  # its argument has another name
    given = torch.randn(6, 5, WIDTH)
    with celmoe.routed(model, plan_of(ROUTES)):
        output = model.head(rows=given) if keyword else model.head(given)
    (place,) = celmoe.adapters(model).values()
    expected = nn.functional.linear(given, model.head.weight, model.head.bias)
    for row, name in enumerate(ROUTES):
        family = next(
            level for level in ("germanic", "romance") if place.config.levels[1].experts[name].parent == level
        )
        for level, expert in (("family", family), ("language", name)):
            expected[row] = expected[row] + place.level_modules[level][expert].map(given[row])
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_experts_keep_their_dtype_and_the_host_its_own(dtype):
    torch.manual_seed(0)
    model = celmoe.attach(Encoder().to(dtype), config(), lambda *_: Bottleneck(), PLACES)
    output = model(tokens(), plan=plan_of(ROUTES))
    assert output.dtype is dtype
    assert {each.dtype for place in celmoe.adapters(model).values() for each in place.parameters()} == {torch.float32}
    output.float().sum().backward()
    assert model.double()(tokens(), plan=plan_of(ROUTES)).dtype is torch.float64


def test_autocast():
    model = attached()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(tokens(), plan=plan_of(ROUTES))
    torch.testing.assert_close(output.float(), model(tokens(), plan=plan_of(ROUTES)), rtol=0.1, atol=0.1)


def test_losses_are_collected_by_place():
    model = attached(kind=Penalized)
    with celmoe.routed(model, plan_of(ROUTES)) as run:
        model(tokens())
    assert len(run.losses) == 2 * (2 + len(NAMES))
    assert {*run.losses} == {*run.loss_weights} == {*run.loss_shares}
    assert run.loss_shares["blocks.1.language.de.size"] == pytest.approx(2 / 6)
    sum(run.losses.values()).backward()
    assert celmoe.adapters(model)["blocks.0"].level_modules["language"]["de"].down.weight.grad is not None
    with pytest.raises(celmoe.ResultError, match="must return no losses unless they are read"):
        model(tokens(), plan=plan_of(ROUTES))


class Twice(nn.Module):
    """Runs one block twice, as ALBERT does its only layer."""

    def __init__(self):
        super().__init__()
        self.block = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden):
        return self.block(self.block(hidden))


def test_a_place_that_runs_twice_has_the_sum_of_its_losses():
    """The second call's alone would leave the first one's out of training."""
    torch.manual_seed(0)
    model, hidden = Twice(), torch.randn(6, WIDTH)
    celmoe.attach(model, config(), lambda *_: Penalized(), "block")
    with celmoe.routed(model, plan_of(ROUTES)) as first:
        between = model.block(hidden)
    with celmoe.routed(model, plan_of(ROUTES)) as second:
        model.block(between)
    with celmoe.routed(model, plan_of(ROUTES)) as both:
        for _ in range(2):
            model(hidden)
            for key, loss in both.losses.items():
                torch.testing.assert_close(loss, first.losses[key] + second.losses[key])
    assert both.losses.keys() == first.losses.keys()


def test_initializers_of_the_host_leave_experts_alone():
    model = attached(zero=True)
    before = copy.deepcopy(model.state_dict())

    def initialize(module):
        if isinstance(module, nn.Linear):
            nn.init.ones_(module.weight)

    model.apply(initialize)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) == (
            ".celmoe." in key or "norm" in key or "bias" in key or "embed" in key
        )


@pytest.mark.parametrize("stacked", [False, True])
def test_one_compilation_serves_all_routings(stacked):
    model = attached()
    if stacked:
        celmoe.adapters(model).stack()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for routes in (ROUTES, ROUTES[::-1], ["nl"] * 6):
        expected = model(tokens(), plan=plan_of(routes))
        torch.testing.assert_close(compiled(tokens(), plan=plan_of(routes)), expected)
        with celmoe.routed(model, plan_of(routes)):
            torch.testing.assert_close(compiled(tokens()), expected)
    assert len(graphs) == 1
    torch.compiler.reset()


@pytest.mark.parametrize("pattern", ["*", "?*", "[!x]*"])
def test_a_part_stands_for_a_name_and_not_for_the_model_itself(pattern):
    """Experts behind the model, too, would change its results."""
    head = nn.Module()
    head.first, head.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
    celmoe.attach(head, config(), lambda *_: Bottleneck(), pattern)
    assert [*celmoe.adapters(head)] == ["first", "second"]
    celmoe.detach(head)
    celmoe.attach(head, config(), lambda *_: Bottleneck(), "")
    assert [*celmoe.adapters(head)] == [""]
