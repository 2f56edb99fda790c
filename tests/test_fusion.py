"""The built-in fusions against their formulas, worked out by hand in float64; and which fusion a model gets."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from celmoe import LearnedFusion, MeanFusion, PositionAwareFusion
from tests.refusals import GOOD, WIDTH, build, rows, two_levels


def numbers(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def fill(module):
    """Every parameter gets values of its own, the norm's included."""
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters()):
            parameter.copy_(numbers(*parameter.shape, seed=seed))
    return module.double().eval()


def norm(row, weight, bias):
    mean = sum(row) / len(row)
    variance = sum((value - mean) ** 2 for value in row) / len(row)
    return [(x - mean) / math.sqrt(variance + 1e-5) * w + b for x, w, b in zip(row, weight, bias, strict=True)]


def normed(fusion, row):
    return norm(row, fusion.norm.weight.tolist(), fusion.norm.bias.tolist())


def learned_by_hand(fusion, hiddens):
    """One row: dropout(norm(sum_i gate_i h_i / L))."""
    total = [0.0] * len(hiddens[0])
    for gate, hidden in zip(fusion.gates, hiddens, strict=True):
        for out, weights in enumerate(gate.weight.tolist()):
            total[out] += sum(w * h for w, h in zip(weights, hidden, strict=True))
    return normed(fusion, [value / len(hiddens) for value in total])


def position_aware_by_hand(fusion, hiddens, position):
    """One row: a softmax over levels of gate_i(h_i) + bias[position, i]."""
    bias = fusion.position_bias.weight.tolist()[min(position, fusion.max_positions - 1)]
    scores = [
        sum(w * h for w, h in zip(gate.weight[0].tolist(), hidden, strict=True)) + gate.bias.item() + bias[index]
        for index, (gate, hidden) in enumerate(zip(fusion.level_gates, hiddens, strict=True))
    ]
    largest = max(scores)
    weights = [math.exp(score - largest) for score in scores]
    mixed = [
        sum(weight / sum(weights) * hidden[column] for weight, hidden in zip(weights, hiddens, strict=True))
        for column in range(len(hiddens[0]))
    ]
    return normed(fusion, mixed)


@pytest.mark.parametrize("num_levels", [1, 2, 3])
@pytest.mark.parametrize("middle", [(), (5,), (2, 3)])
def test_learned(num_levels, middle):
    fusion = fill(LearnedFusion(3, num_levels, 0.3))
    hiddens = [numbers(2, *middle, 3, seed=10 + index) for index in range(num_levels)]
    flat = [hidden.reshape(-1, 3).tolist() for hidden in hiddens]
    expected = [learned_by_hand(fusion, row) for row in zip(*flat, strict=True)]
    found = fusion(hiddens)
    assert found.shape == hiddens[0].shape
    torch.testing.assert_close(found.reshape(-1, 3), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-11)


@pytest.mark.parametrize("num_levels", [1, 2, 3])
@pytest.mark.parametrize("num_positions", [1, 4, 9])
def test_position_aware(num_levels, num_positions):
    """Nine positions, of which the last five lie past the four that have a bias: they use the last one."""
    fusion = fill(PositionAwareFusion(3, num_levels, max_positions=4))
    hiddens = [numbers(2, num_positions, 3, seed=10 + index) for index in range(num_levels)]
    found = fusion(hiddens)
    for sample in range(2):
        for position in range(num_positions):
            row = [hidden[sample, position].tolist() for hidden in hiddens]
            expected = torch.tensor(position_aware_by_hand(fusion, row, position), dtype=torch.float64)
            torch.testing.assert_close(found[sample, position], expected, rtol=0, atol=1e-11)


def test_position_aware_takes_rows_without_positions_for_one_position():
    fusion = fill(PositionAwareFusion(3, 2, max_positions=4))
    hiddens = [numbers(4, 3, seed=index) for index in range(2)]
    found = fusion(hiddens)
    expected = torch.tensor(
        [position_aware_by_hand(fusion, row, 0) for row in zip(*(hidden.tolist() for hidden in hiddens), strict=True)],
        dtype=torch.float64,
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    # Equal to the bit to the same rows with an axis of one position.
    assert torch.equal(found, fusion([hidden[:, None] for hidden in hiddens])[:, 0])


def test_position_aware_whole_positions_may_be_missing():
    fusion = PositionAwareFusion(3, 2)
    assert fusion([torch.zeros(2, 0, 3)] * 2).shape == (2, 0, 3)
    assert fusion([torch.zeros(0, 4, 3)] * 2).shape == (0, 4, 3)
    assert fusion([torch.zeros(0, 3)] * 2).shape == (0, 3)


def test_every_position_s_bias_gets_its_gradient():
    fusion = fill(PositionAwareFusion(3, 2, max_positions=4))
    fusion([numbers(2, 2, 3), numbers(2, 2, 3, seed=1)]).pow(3).sum().backward()
    touched = fusion.position_bias.weight.grad.abs().sum(1) > 0
    assert touched.tolist() == [True, True, False, False]


def test_mean():
    hiddens = [numbers(2, 3, seed=index) for index in range(3)]
    torch.testing.assert_close(MeanFusion()(hiddens), (hiddens[0] + hiddens[1] + hiddens[2]) / 3, rtol=0, atol=1e-15)
    assert torch.equal(MeanFusion()(hiddens[:1]), hiddens[0])
    assert not MeanFusion().state_dict()


def test_parameters_and_their_order():
    learned = LearnedFusion(3, 2, 0.1)
    assert [(name, tuple(value.shape)) for name, value in learned.state_dict().items()] == [
        ("gates.0.weight", (3, 3)),
        ("gates.1.weight", (3, 3)),
        ("norm.weight", (3,)),
        ("norm.bias", (3,)),
    ]
    position_aware = PositionAwareFusion(3, 2)
    assert [(name, tuple(value.shape)) for name, value in position_aware.state_dict().items()] == [
        ("level_gates.0.weight", (1, 3)),
        ("level_gates.0.bias", (1,)),
        ("level_gates.1.weight", (1, 3)),
        ("level_gates.1.bias", (1,)),
        ("position_bias.weight", (512, 2)),
        ("norm.weight", (3,)),
        ("norm.bias", (3,)),
    ]
    assert position_aware.dropout.p == learned.dropout.p == 0.1


@pytest.mark.parametrize("fusion", [LearnedFusion(3, 2, 0.5), PositionAwareFusion(3, 2, dropout=0.5)])
def test_dropout_comes_last(fusion):
    hiddens = [torch.randn(200, 3) for _ in range(2)]
    whole = fusion.eval()(hiddens)
    dropped = fusion.train()(hiddens)
    kept = dropped != 0
    assert 0.4 < kept.double().mean() < 0.6
    torch.testing.assert_close(dropped[kept], 2 * whole[kept])


@pytest.mark.parametrize("fusion", [LearnedFusion(3, 2, 0.0), PositionAwareFusion(3, 2, 4, 0.0), MeanFusion()])
def test_gradients(fusion):
    hiddens = [numbers(2, 5, 3, seed=index).requires_grad_() for index in range(2)]
    fusion = fusion.double()
    assert torch.autograd.gradcheck(lambda *each: fusion(each), hiddens)
    assert torch.autograd.gradgradcheck(lambda *each: fusion(each), hiddens)


def test_levels_are_not_changed():
    for fusion in (LearnedFusion(3, 2, 0.0), PositionAwareFusion(3, 2), MeanFusion()):
        hiddens = [torch.ones(2, 3), torch.ones(2, 3)]
        fused = fusion(hiddens)
        with torch.no_grad():
            fused.zero_()
        assert all(hidden.sum() == 6 for hidden in hiddens)
        one = torch.ones(2, 3)
        with torch.no_grad():
            MeanFusion()([one]).zero_()
        assert one.sum() == 6


class Own(nn.Module):
    def forward(self, hiddens):
        return hiddens[0]


@pytest.mark.parametrize("fusion_type", ["learned", "position_aware"])
@pytest.mark.parametrize("use_learned_fusion", [True, False])
def test_which_fusion_a_model_gets(fusion_type, use_learned_fusion):
    fields = {"fusion_type": fusion_type, "use_learned_fusion": use_learned_fusion}
    own = Own()
    assert build(two_levels(**fields), fusion_module=own).fusion is own
    built = build(two_levels(**fields)).fusion
    expected = {"learned": LearnedFusion, "position_aware": PositionAwareFusion}[fusion_type]
    assert type(built) is (expected if use_learned_fusion else MeanFusion)
    if not use_learned_fusion:
        model = build(two_levels(**fields)).eval()
        assert not any(name.startswith("fusion") for name in model.state_dict())
        output = model(rows(), GOOD)
        first, second = (level.hidden for level in output.levels.values())
        torch.testing.assert_close(output.fused_hidden, (first + second) / 2)


def test_an_own_fusion_that_is_empty_is_still_the_user_s():
    """celmoe-vp writes ``fusion_module or LearnedFusion(...)``, which drops a module of length zero."""
    own = nn.Sequential()
    assert build(fusion_module=own).fusion is own


def test_what_the_config_says_of_fusions():
    model = build(two_levels(fusion_type="position_aware", fusion_max_positions=7, fusion_dropout=0.3))
    assert model.fusion.max_positions == 7
    assert model.fusion.dropout.p == 0.3
    assert model.fusion.num_levels == 2
    assert build(two_levels(fusion_dropout=0.4)).fusion.dropout.p == 0.4


def test_a_disabled_level_takes_no_part():
    config = two_levels()
    config.levels[0].enabled = False
    model = build(config)
    assert len(model.fusion.gates) == 1
    assert list(model(rows(), GOOD).levels) == ["language"]


def test_a_fusion_replaced_later_is_used():
    model = build().eval()
    model.fusion = Own()
    output = model(rows(), GOOD)
    assert torch.equal(output.fused_hidden, output.levels["family"].hidden)


def test_the_fusion_is_made_after_the_experts():
    """With one seed, experts start with celmoe-vp's parameters, under any fusion."""
    first = build(two_levels(fusion_type="position_aware")).level_modules.state_dict()
    second = build().level_modules.state_dict()
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert first["family.slavic.linear.weight"].shape == (WIDTH, WIDTH)
