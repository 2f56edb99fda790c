"""The promises of a drop-in: fusions and losses."""

import pytest
import torch
from torch import nn

import celmoe
from celmoe import (
    CELMoELossAPI,
    ExpertResult,
    LearnedFusion,
    LossBundle,
    LossTerm,
    PositionAwareFusion,
)
from tests.peer import make_hidden, make_model, push, routing, state_of, three_levels
from tests.upstream_models import WIDTH, Calling, LastLevel, first_column, level, model_of, ones

# --- fusion ----------------------------------------------------------------------------------------------------------


def levels_hidden(*shape, count=3):
    return [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


def test_learned_fusion_by_its_formula():
    hiddens = levels_hidden(5, WIDTH)
    fusion = LearnedFusion(WIDTH, 3, 0.0)
    total = sum(hidden @ gate.weight.T for gate, hidden in zip(fusion.gates, hiddens, strict=True))
    assert all(gate.bias is None for gate in fusion.gates)
    torch.testing.assert_close(fusion(hiddens), nn.functional.layer_norm(total / 3, (WIDTH,)))


def test_learned_fusion_ends_in_dropout():
    fusion = LearnedFusion(64, 2, 0.5)
    fused = fusion(levels_hidden(50, 64, count=2))
    assert 0.4 < (fused == 0).float().mean() < 0.6
    assert (fusion.eval()(levels_hidden(50, 64, count=2)) != 0).all()


@pytest.mark.parametrize("positions", [1, 3, 4, 9])
def test_position_aware_fusion_by_its_formula(positions):
    """Positions past the maximum, 4, use the last one's bias."""
    hiddens = levels_hidden(2, positions, WIDTH)
    fusion = PositionAwareFusion(WIDTH, 3, 4, 0.0)
    expected = torch.empty(2, positions, WIDTH)
    for sample in range(2):
        for position in range(positions):
            rows = [hidden[sample, position] for hidden in hiddens]
            scores = [gate(row) for gate, row in zip(fusion.level_gates, rows, strict=True)]
            weights = torch.softmax(torch.cat(scores) + fusion.position_bias.weight[min(position, 3)], dim=0)
            expected[sample, position] = sum(weight * row for weight, row in zip(weights, rows, strict=True))
    torch.testing.assert_close(fusion(hiddens), nn.functional.layer_norm(expected, (WIDTH,)))


def test_position_aware_fusion_takes_two_axes_for_one_position():
    fusion = PositionAwareFusion(WIDTH, 3, 4, 0.0)
    hiddens = levels_hidden(6, WIDTH)
    expected = fusion([hidden.unsqueeze(1) for hidden in hiddens]).squeeze(1)
    torch.testing.assert_close(fusion(hiddens), expected)


def test_position_aware_fusion_refuses_more_than_three_axes():
    with pytest.raises(ValueError, match="position-aware"):
        PositionAwareFusion(WIDTH, 3)(levels_hidden(2, 3, 2, WIDTH))
    model = model_of(level("l", "a"), fusion_module=None, fusion_type="position_aware")
    with pytest.raises(ValueError, match="position-aware"):
        model(torch.ones(2, 3, 2, WIDTH))


@pytest.mark.parametrize(
    ("own", "use_learned", "fusion_type", "kind"),
    [
        (True, False, "position_aware", LastLevel),
        (True, True, "learned", LastLevel),
        (False, False, "position_aware", celmoe.MeanFusion),
        (False, False, "learned", celmoe.MeanFusion),
        (False, True, "position_aware", PositionAwareFusion),
        (False, True, "learned", LearnedFusion),
    ],
)
def test_what_decides_the_fusion(own, use_learned, fusion_type, kind):
    model = model_of(
        level("l", "a"),
        fusion_module=LastLevel() if own else None,
        use_learned_fusion=use_learned,
        fusion_type=fusion_type,
    )
    assert type(model.fusion) is kind


def test_a_fusion_of_the_users_own_is_given_the_list_of_the_levels_hidden():
    given = []

    class Own(nn.Module):
        def forward(self, level_hiddens):
            given.extend(level_hiddens)
            return level_hiddens[0] + 1

    output = model_of(level("l", "a"), level("m", "b"), fusion_module=Own())(ones(2))
    assert [each is output.levels[name].hidden for name, each in zip("lm", given, strict=True)] == [True, True]
    assert first_column(output.fused_hidden) == [3.0, 3.0]


# --- losses ----------------------------------------------------------------------------------------------------------


def losses_model():
    def expert(batch):
        return ExpertResult(batch.hidden * 2, {"size": batch.hidden.sum()})

    return model_of(level("up", "core"), level("low", "a", "b"), factory=lambda *_: Calling(expert))


def test_losses_come_in_order_with_names_scopes_and_arguments():
    output = losses_model()(ones(2), {"low": ["b", "a"]})
    calls = {}

    def noted(name, value):
        def loss(*arguments):
            calls[name] = arguments
            return torch.tensor(value)

        return loss

    api = CELMoELossAPI()
    api.add_bridge("up", "low", "tie", noted("tie", 4.0), 0.5)
    api.add_level("low", "flat", noted("flat", 3.0), weight=10.0)
    api.add_global("all", noted("all", 2.0))
    bundle = api.compute(output, "targets", "context")
    assert [(term.name, term.value.item(), term.weight, term.scope) for term in bundle.terms] == [
        ("up.core.size", 8.0, 1.0, "expert"),
        ("low.a.size", 8.0, 1.0, "expert"),
        ("low.b.size", 8.0, 1.0, "expert"),
        ("global.all", 2.0, 1.0, "global"),
        ("low.flat", 3.0, 10.0, "low"),
        ("up->low.tie", 4.0, 0.5, "up->low"),
    ]
    up, low = output.levels["up"], output.levels["low"]
    assert all(one is other for one, other in zip(calls["all"], (output, "targets", "context"), strict=True))
    assert all(one is other for one, other in zip(calls["flat"], (low, output, "targets", "context"), strict=True))
    assert all(one is other for one, other in zip(calls["tie"], (up, low, output, "targets", "context"), strict=True))


def test_targets_and_context_are_none_where_they_are_not_given():
    api = CELMoELossAPI()
    api.add_global("none", lambda _, targets, context: torch.tensor(float(targets is None and context is None)))
    assert api.compute(losses_model()(ones(1), {"low": ["a"]})).as_dict()["global.none"] == 1.0


def test_a_mapping_is_one_term_an_item():
    api = CELMoELossAPI()
    pair = {"one": torch.tensor(1.0), "two": torch.tensor(2.0)}
    api.add_global("g", lambda *_: pair, 3.0)
    api.add_level("low", "l", lambda *_: pair)
    api.add_bridge("up", "low", "b", lambda *_: pair)
    bundle = api.compute(losses_model()(ones(1), {"low": ["a"]}))
    assert [(term.name, term.weight, term.scope) for term in bundle.terms[2:]] == [
        ("global.g.one", 3.0, "global"),
        ("global.g.two", 3.0, "global"),
        ("low.l.one", 1.0, "low"),
        ("low.l.two", 1.0, "low"),
        ("up->low.b.one", 1.0, "up->low"),
        ("up->low.b.two", 1.0, "up->low"),
    ]


def test_total_is_the_weighted_sum_and_differentiable():
    value = torch.tensor(3.0, requires_grad=True)
    bundle = LossBundle([LossTerm("a", value)])
    bundle.add("b", value * value, 0.5, "somewhere")
    assert bundle.total.item() == 7.5
    bundle.total.backward()
    assert value.grad.item() == 4.0


def test_total_of_nothing_is_a_value_error():
    with pytest.raises(ValueError):
        _ = LossBundle().total
    assert LossBundle().as_dict() == {}


def test_as_dict_shows_unweighted_floats_and_the_later_of_two_of_one_name():
    bundle = LossBundle()
    bundle.add("a", torch.tensor(1.0, requires_grad=True), 100.0)
    bundle.add("b", torch.tensor(2.0, dtype=torch.float64))
    bundle.add("a", torch.tensor(3.0), 10.0)
    assert bundle.as_dict() == {"a": 3.0, "b": 2.0}
    assert all(type(value) is float for value in bundle.as_dict().values())
    assert bundle.total.item() == 132.0


# --- a whole program, as its users write it ---------------------------------------------------------------------------


def test_a_seeded_training_repeats_itself():
    def run():
        model = make_model(celmoe, kind="dropout", levels=three_levels(celmoe))
        optimizer = torch.optim.AdamW(model.parameters())
        torch.manual_seed(0)
        for step in range(3):
            optimizer.zero_grad()
            push(model(make_hidden(seed=step), routing())).backward()
            optimizer.step()
        return state_of(model)

    first, second = run(), run()
    assert all(torch.equal(first[name], second[name]) for name in first)
