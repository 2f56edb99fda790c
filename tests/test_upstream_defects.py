"""Defects of celmoe-vp that ours does not have: each check is one text, which ours passes and the peer must fail.

A check that the peer passes as well shows nothing, so that is a failure too. Costs are counted (comparisons of names,
numbers written in a backward pass, reads of a device), never timed.
"""

import numpy as np
import pytest
import torch
from torch import nn

import celmoe
from tests import peer
from tests.defects import CHECKS, WIDTH, defect, error_of, expert_of, identity, level_of, linear_model, model_of, ones
from tests.peer import THIRD


def pytest_generate_tests(metafunc):
    if "check" in metafunc.fixturenames:
        metafunc.parametrize(("check", "fails", "versions"), CHECKS)


def test_ours_passes(check, fails, versions):
    check(celmoe)


def test_the_peer_fails(check, fails, versions):
    for version in versions:
        with pytest.raises(fails):
            check(peer.peer(version))


@defect(fails=RuntimeError)
def autocast_works_with_linear_experts(lib):
    model, hidden = linear_model(lib), ones(3).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(hidden, {"l": ["a", "b", "a"]})
    assert output.levels["l"].hidden.dtype == torch.bfloat16
    output.levels["l"].hidden.sum().backward()
    assert hidden.grad.dtype == torch.float32
    assert model.level_modules["l"]["a"].body.weight.grad.dtype == torch.float32


@defect(fails=RuntimeError)
def experts_of_different_dtypes_are_promoted(lib):
    def expert(batch):
        return batch.hidden.double() if batch.state["expert"] == "b" else batch.hidden.bfloat16()

    hidden = model_of(lib, expert, level_of(lib, "a", "b"), use_learned_fusion=False)(ones(2), {"l": ["a", "b"]})
    assert hidden.levels["l"].hidden.dtype == torch.float64


# --- names -----------------------------------------------------------------------------------------------------------

# Attributes of `nn.ModuleDict` and of `nn.Module`, a dot, and names that look like an escape.
HARD_NAMES = ["to", "pop", "keys", "values", "items", "type", "forward", "training", "_modules", "zh.Hant", ".", " "]
HARD_NAMES += ["zh%2EHant", "zh%252EHant", "%", "zh.Hant.", "weight", "日本語"]


@defect(fails=KeyError)
def any_name_names_an_expert_and_a_level(lib):
    names = HARD_NAMES

    class Scale(lib.ExpertModule):
        def __init__(self, factor):
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(float(factor)))

        def forward(self, batch):
            return lib.ExpertResult(batch.hidden * self.factor, {"size": batch.hidden.sum()})

    def build(offset):
        levels = [level_of(lib, *names, name=name) for name in ("to", "zh.Hant", "plain")]
        config = lib.CELMoEConfig(WIDTH, levels, use_learned_fusion=False)
        return lib.HierarchicalCELMoE(config, lambda level, name, _: Scale(names.index(name) + offset))

    model = build(1)
    routing = {name: list(names) for name in ("to", "zh.Hant", "plain")}
    output = model(ones(len(names)), routing)
    expected = [(index + 1.0) ** 3 for index in range(len(names))]
    assert output.levels["plain"].hidden[:, 0].tolist() == expected
    assert output.levels["plain"].routes == names
    # One key each, in checkpoints and in losses.
    state = model.state_dict()
    assert len(state) == len(output.losses) == 3 * len(names)
    assert all(len(level.losses) == len(names) for level in output.levels.values())
    # The modules answer to the real names.
    assert sorted(model.level_modules["zh.Hant"]) == sorted(names)
    for index, name in enumerate(names):
        assert model.level_modules["to"][name].factor.item() == index + 1
    # And a checkpoint finds everything again.
    other = build(100)
    assert other.load_state_dict(state).missing_keys == []
    assert torch.equal(other(ones(len(names)), routing).fused_hidden, output.fused_hidden)


def accepts_name(name):
    def check(lib):
        model = model_of(lib, lambda batch: batch.hidden * 2, level_of(lib, name, "b", name="l"))
        output = model(ones(2), {"l": [name, "b"]})
        assert output.levels["l"].routes == [name, "b"]
        assert name in model.level_modules["l"]
        model = model_of(lib, lambda batch: batch.hidden * 2, level_of(lib, "b", name=name))
        assert list(model(ones(2), {name: ["b", "b"]}).levels) == [name]
        assert name in model.level_modules

    check.__name__ = f"{name}_is_a_name"
    return check


for _name in ("to", "pop", "keys", "type", "zh.Hant"):
    defect(fails=KeyError)(accepts_name(_name))


@defect()
def an_empty_name_is_refused_in_words(lib):
    """The peer's error is torch's, about a module's key."""
    error = error_of(lambda: model_of(lib, identity, level_of(lib, "")))
    assert isinstance(error, ValueError)
    assert "name" in str(error)
    assert isinstance(error_of(lambda: model_of(lib, identity, level_of(lib, "a", name=""))), ValueError)


# --- configs and routes that can't be meant --------------------------------------------------------------------------


@defect()
def routes_for_an_unknown_level_are_an_error(lib):
    model = model_of(lib, identity, level_of(lib, "a", name="family"))
    error = error_of(lambda: model(ones(1), {"famly": ["a"]}))
    assert isinstance(error, KeyError)
    assert "'famly'" in str(error)
    assert "'family'" in str(error)


@defect()
def two_levels_of_one_name_are_an_error(lib):
    error = error_of(lambda: model_of(lib, identity, level_of(lib, "a"), level_of(lib, "b")))
    assert isinstance(error, ValueError)
    assert "'l'" in str(error)


@defect()
def no_level_at_all_is_an_error_when_the_model_is_built(lib):
    config = lib.CELMoEConfig(WIDTH)

    def build():
        return lib.HierarchicalCELMoE(config, lambda *_: expert_of(lib, identity))

    assert isinstance(error_of(build), ValueError)
    config.levels.append(level_of(lib, "a", enabled=False))
    assert isinstance(error_of(build), ValueError)
    # An empty config may still be filled first.
    config.levels.append(level_of(lib, "a", name="m"))
    assert build()(ones(1)).levels.keys() == {"m"}


@defect()
def an_unknown_expert_is_found_before_anything_runs(lib):
    ran = []

    def expert(batch):
        ran.append(batch.state["expert"])
        return batch.hidden

    levels = [level_of(lib, "core", name="universal"), level_of(lib, "russian", "french", name="language")]
    model = model_of(lib, expert, *levels)
    error = error_of(lambda: model(ones(4), {"language": ["french", "rusian", "xx", "rusian"]}))
    assert isinstance(error, KeyError)
    assert ran == []
    message = str(error)
    # The level, the names, their number of samples, and the nearest name.
    for part in ("'language'", "'rusian'", "'xx'", "3 of 4", "'russian'"):
        assert part in message, part


@defect(fails=KeyError)
def ids_in_a_list_are_routes(lib):
    takes_routes(lib, [2, 0, 2])


@defect(fails=KeyError)
def ids_in_a_tensor_are_routes(lib):
    takes_routes(lib, torch.tensor([2, 0, 2]))


@defect(fails=KeyError)
def ids_in_an_array_are_routes(lib):
    takes_routes(lib, np.array([2, 0, 2], dtype=np.int16))


@defect(fails=ValueError)
def names_in_an_array_are_routes(lib):
    takes_routes(lib, np.array(["c", "x", "c"]))


def takes_routes(lib, routes):
    """Ids are positions in the level's experts as declared, not as sorted."""
    output = model_of(lib, identity, level_of(lib, "x", "b", "c"))(ones(3), {"l": routes})
    assert output.levels["l"].routes == ["c", "x", "c"]
    assert type(output.levels["l"].routes) is list
    assert all(type(each) is str for each in output.levels["l"].routes)


# --- experts that break their contract -------------------------------------------------------------------------------


def names_the_expert(error, expert):
    assert isinstance(error, ValueError)
    assert "'l'" in str(error)
    assert repr(expert) in str(error)


@defect()
def another_number_of_rows_is_an_error_that_names_the_expert(lib):
    model = model_of(lib, lambda batch: batch.hidden[:1], level_of(lib, "a", "b"))
    names_the_expert(error_of(lambda: model(ones(3), {"l": ["b", "a", "b"]})), "b")


@defect()
def two_wrong_numbers_of_rows_do_not_cancel(lib):
    def expert(batch):
        return torch.ones(3 if batch.state["expert"] == "a" else 1, WIDTH)

    model = model_of(lib, expert, level_of(lib, "a", "b"))
    names_the_expert(error_of(lambda: model(ones(4), {"l": ["a", "b", "a", "b"]})), "a")


@defect()
def another_trailing_shape_is_an_error_that_names_the_expert(lib):
    for wrong in (lambda hidden: hidden[:, :1], lambda hidden: hidden.unsqueeze(1), lambda hidden: hidden.sum(1)):
        model = model_of(lib, lambda batch, wrong=wrong: wrong(batch.hidden), level_of(lib, "a", "b"))
        names_the_expert(error_of(lambda model=model: model(ones(3), {"l": ["a", "b", "a"]})), "a")


def works_in_place(batch):
    for value in (batch.hidden, batch.mask, batch.context["rows"]):
        value.zero_()
    return batch.hidden


@defect()
def an_expert_that_works_in_place_never_reaches_the_caller(lib):
    """The peer hands out the caller's own context if one expert has the whole batch."""
    for routes in (["a", "a", "a"], ["a", "b", "a"], ["a", "a", "b"]):
        hidden, mask, rows = ones(3), ones(3), torch.arange(1.0, 4.0)
        model = model_of(lib, works_in_place, level_of(lib, "a", "b", name="l"), level_of(lib, "c", name="m"))
        model(hidden, {"l": routes}, {"rows": rows}, mask)
        assert hidden.eq(1).all()
        assert mask.eq(1).all()
        assert rows.tolist() == [1.0, 2.0, 3.0]


# --- fusion ----------------------------------------------------------------------------------------------------------


@defect(versions=[THIRD])
def position_aware_fusion_takes_a_batch_without_positions_for_one_position(lib):
    """The peer reads the hidden size for the number of positions."""
    torch.manual_seed(0)
    fusion = lib.PositionAwareFusion(WIDTH, 2, 8, 0.0)
    hiddens = [torch.randn(WIDTH, WIDTH), torch.randn(WIDTH, WIDTH)]
    one_position = fusion([hidden.unsqueeze(1) for hidden in hiddens]).squeeze(1)
    fused = fusion(hiddens)
    assert fused.shape == one_position.shape
    assert torch.allclose(fused, one_position, atol=1e-6)
