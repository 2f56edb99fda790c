"""The promises of a drop-in: routes, calls, gradients and names."""

import pytest
import torch

import celmoe
from celmoe import (
    CELMoELossAPI,
    ExpertConfig,
    ExpertResult,
    HierarchyLevelConfig,
)
from tests.peer import Recorder
from tests.upstream_models import WIDTH, Calling, first_column, level, model_of, ones

# --- routing ---------------------------------------------------------------------------------------------------------


def test_routes_are_batch_aligned_names():
    model = model_of(level("l", "a", "b", "c"))
    assert first_column(model(ones(4), {"l": ["c", "a", "b", "a"]}).fused_hidden) == [5.0, 2.0, 3.0, 2.0]


def test_a_level_left_out_goes_to_its_only_expert_before_the_fallback():
    model = model_of(level("l", "core"), level("m", "a", "b", fallback_expert="b"))
    output = model(ones(2))
    assert output.levels["l"].routes == ["core", "core"]
    assert output.levels["m"].routes == ["b", "b"]


def test_a_level_left_out_with_neither_is_a_key_error():
    model = model_of(level("l", "a", "b"))
    for nothing in (None, {}):
        with pytest.raises(KeyError, match="'l'"):
            model(ones(2), nothing)


def test_a_wrong_length_is_a_value_error():
    with pytest.raises(ValueError, match="'l'"):
        model_of(level("l", "a", "b"))(ones(2), {"l": ["a"]})


def test_an_unknown_expert_is_a_key_error():
    with pytest.raises(KeyError, match="'x'"):
        model_of(level("l", "a", "b"))(ones(2), {"l": ["a", "x"]})


def test_routing_none_is_legal_where_every_level_can_be_broadcast():
    assert first_column(model_of(level("l", "core"))(ones(2), None).fused_hidden) == [7.0, 7.0]


def test_routes_for_a_disabled_level_are_ignored():
    model = model_of(level("l", "a"), level("off", "b", enabled=False))
    assert first_column(model(ones(2), {"off": ["nobody"]}).fused_hidden) == [2.0, 2.0]


def test_the_callers_routing_is_never_changed():
    mine = {"l": ["b", "a"]}
    routes = mine["l"]
    output = model_of(level("l", "a", "b"), level("m", "c"))(ones(2), mine)
    output.levels["l"].routes.reverse()
    assert mine == {"l": ["b", "a"]}
    assert mine["l"] is routes


def test_routes_of_a_level_are_a_list_of_names():
    output = model_of(level("l", "core"), level("m", "a", "b"))(ones(2), {"m": ["b", "a"]})
    for name, routes in {"l": ["core", "core"], "m": ["b", "a"]}.items():
        assert output.levels[name].routes == routes
        assert type(output.levels[name].routes) is list
        assert all(type(each) is str for each in output.levels[name].routes)


# --- execution of a level --------------------------------------------------------------------------------------------


def test_experts_run_in_sorted_order_and_see_their_rows_in_batch_order():
    """Rows, mask rows and context rows are those of the same samples."""
    recorder = Recorder(celmoe, WIDTH)
    model = model_of(level("l", "c", "b", "a"), factory=recorder)
    hidden = torch.arange(5.0).unsqueeze(1).expand(5, WIDTH)
    mask = torch.arange(10, 15)
    model(hidden, {"l": ["c", "a", "c", "a", "c"]}, {"id": torch.arange(20, 25)}, mask)
    seen = [(call["state"], call["hidden"][:, 0].tolist()) for call in recorder.calls]
    assert seen == [({"level": "l", "expert": "a"}, [1.0, 3.0]), ({"level": "l", "expert": "c"}, [0.0, 2.0, 4.0])]
    assert [call["mask"].tolist() for call in recorder.calls] == [[11, 13], [10, 12, 14]]
    assert [call["context"]["id"].tolist() for call in recorder.calls] == [[21, 23], [20, 22, 24]]


def test_an_absent_expert_does_not_run_and_adamw_leaves_it_alone():
    model = model_of(level("l", "a", "b"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    absent = model.level_modules["l"]["b"].factor
    for routes in (["b"], ["a"], ["a"]):
        optimizer.zero_grad()
        model(ones(1), {"l": routes}).fused_hidden.sum().backward()
        if routes == ["a"]:
            assert absent.grad is None
            before = (absent.item(), {key: value.clone() for key, value in optimizer.state[absent].items()})
        optimizer.step()
    after = (absent.item(), optimizer.state[absent])
    assert before == after
    assert before[1]["exp_avg"].item() != 0


@pytest.mark.parametrize("trailing", [(), (3,), (3, 2)])
def test_hidden_of_any_trailing_shape(trailing):
    hidden = torch.ones(3, *trailing, WIDTH)
    output = model_of(level("l", "a", "b"))(hidden, {"l": ["b", "a", "b"]})
    assert output.fused_hidden.shape == hidden.shape
    assert output.fused_hidden.flatten(1)[:, 0].tolist() == [3.0, 2.0, 3.0]
    learned = model_of(level("l", "a", "b"), fusion_module=None)(hidden, {"l": ["b", "a", "b"]})
    assert learned.fused_hidden.shape == hidden.shape


def test_a_levels_output_is_the_next_levels_input():
    model = model_of(level("l", "a", "b"), level("m", "c", "d"))
    output = model(ones(3), {"l": ["a", "b", "a"], "m": ["d", "c", "c"]})
    assert first_column(output.levels["l"].hidden) == [2.0, 3.0, 2.0]
    assert first_column(output.levels["m"].hidden) == [22.0, 15.0, 10.0]


@pytest.mark.parametrize("trailing", [(), (3,)])
def test_an_empty_batch_is_legal(trailing):
    hidden = torch.ones(0, *trailing, WIDTH, requires_grad=True)
    output = model_of(level("l", "a", "b"), fusion_module=None)(hidden, {"l": []})
    assert output.fused_hidden.shape == hidden.shape
    assert output.levels["l"].routes == []


def test_an_empty_sequence_is_legal():
    hidden = torch.ones(2, 0, WIDTH)
    assert model_of(level("l", "a", "b"))(hidden, {"l": ["a", "b"]}).fused_hidden.shape == (2, 0, WIDTH)


def test_gradients_flow_into_hidden_context_and_all_else_that_experts_read():
    outside = torch.tensor(3.0, requires_grad=True)
    hidden, rows = ones(3).requires_grad_(), torch.ones(3, WIDTH, requires_grad=True)
    whole = torch.ones(7, requires_grad=True)

    def expert(batch):
        return batch.hidden * batch.context["rows"] * batch.context["whole"].sum() * outside

    model = model_of(level("l", "a", "b"), factory=lambda *_: Calling(expert))
    model(hidden, {"l": ["a", "b", "a"]}, {"rows": rows, "whole": whole}).fused_hidden.sum().backward()
    assert hidden.grad.unique().item() == 21.0
    assert rows.grad.unique().item() == 21.0
    assert whole.grad.unique().item() == 36.0
    assert outside.grad.item() == 84.0


@pytest.mark.parametrize(
    ("flag", "scale", "expected"),
    [
        (False, None, 1.0),
        (True, None, 0.0),
        (False, 0.25, 0.25),
        (True, 0.25, 0.25),
        (True, 1.0, 1.0),
        (False, 0.0, 0.0),
        (False, -3.0, 0.0),
        (False, 2.0, 1.0),
        (True, 2, 1.0),
    ],
)
def test_gradient_into_the_parent(flag, scale, expected):
    """The scale decides wherever it was given; 0 or below detaches, 1 or above passes."""
    expert = ExpertConfig("a", stop_gradient_from_parent=flag, gradient_scale=scale)
    model = model_of(level("up", "core"), HierarchyLevelConfig("l", {"a": expert}))
    hidden = ones(2).requires_grad_()
    model(hidden).fused_hidden.sum().backward()
    own = model.level_modules["l"]["a"].factor.grad
    assert own.item() == 7.0 * 2 * WIDTH
    if expected == 0.0:
        assert hidden.grad is None
        assert model.level_modules["up"]["core"].factor.grad is None
    else:
        assert hidden.grad.unique().item() == 7.0 * 2.0 * expected


def test_gradient_flags_of_one_expert_leave_its_siblings_alone():
    model = model_of(level("l", "a", "b", "c"))
    model.config.levels[0].experts["a"].stop_gradient_from_parent = True
    model.config.levels[0].experts["b"].gradient_scale = 0.5
    hidden = ones(3).requires_grad_()
    model(hidden, {"l": ["c", "b", "a"]}).fused_hidden.sum().backward()
    assert first_column(hidden.grad) == [5.0, 1.5, 0.0]


def test_fields_that_staged_training_flips_are_read_at_every_call():
    """stop_gradient_from_parent, gradient_scale, loss_weight and fallback_expert; levels and experts are not."""

    def expert(batch):
        return ExpertResult(batch.hidden * 2, {"size": batch.hidden.sum()})

    made = level("l", "a", "b", fallback_expert="a")
    model = model_of(made, factory=lambda *_: Calling(expert))
    hidden = ones(1).requires_grad_()

    def gradient():
        hidden.grad = None
        model(hidden).levels["l"].hidden.sum().backward()
        return hidden.grad[0, 0].item()

    assert gradient() == 2.0
    made.experts["a"].gradient_scale = 0.5
    assert gradient() == 1.0
    made.experts["a"].loss_weight = 4.0
    assert CELMoELossAPI().compute(model(hidden)).total.item() == 4.0 * WIDTH
    made.fallback_expert = "b"
    assert model(hidden).levels["l"].routes == ["b"]
    assert gradient() == 2.0
    made.enabled = False
    made.experts["late"] = ExpertConfig("late")
    assert list(model(hidden).levels) == ["l"]
    with pytest.raises(KeyError):
        model(hidden, {"l": ["late"]})


def test_names_of_losses_and_aux():
    def expert(batch):
        losses = {"size": batch.hidden.sum(), "other": batch.hidden.mean()}
        return ExpertResult(batch.hidden, losses, {"n": 1} if batch.state["expert"] == "b" else {})

    model = model_of(level("l", "a", "b"), level("m", "c"), factory=lambda *_: Calling(expert))
    output = model(ones(3), {"l": ["b", "a", "b"]})
    names = ["l.a.size", "l.a.other", "l.b.size", "l.b.other", "m.c.size", "m.c.other"]
    assert list(output.losses) == names
    assert list(output.levels["l"].losses) == names[:4]
    assert output.losses["l.b.size"] is output.levels["l"].losses["l.b.size"]
    assert output.losses["l.b.size"].item() == 2.0 * WIDTH
    assert output.levels["l"].aux == {"b": {"n": 1}}
    assert output.levels["m"].aux == {}
    assert output.aux == {}
