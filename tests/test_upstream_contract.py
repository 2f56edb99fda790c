"""The promises of a drop-in for celmoe-vp: one small test for each, without the peer.

The sections are those of the specification of celmoe-vp's behaviour. `tests.test_upstream_parity` runs whole programs
on both libraries; a test here says in plain numbers that one promise was broken.
"""

import dataclasses

import pytest
import torch
from torch import nn

import celmoe
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
    LearnedFusion,
    LevelOutput,
    LossBundle,
    LossTerm,
    PositionAwareFusion,
)
from tests.peer import Recorder, make_hidden, make_model, push, routing, state_of, three_levels

WIDTH = 4


class Calling(ExpertModule):
    """An expert that is a function of its batch."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, batch):
        result = self.function(batch)
        return result if isinstance(result, ExpertResult) else ExpertResult(result)


class Affine(ExpertModule):
    """Multiplies by its one parameter."""

    def __init__(self, factor):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(float(factor)))

    def forward(self, batch):
        return ExpertResult(batch.hidden * self.factor)


FACTORS = {"a": 2.0, "b": 3.0, "c": 5.0, "core": 7.0, "d": 11.0}


class LastLevel(nn.Module):
    """A fusion that keeps the numbers readable."""

    def forward(self, level_hiddens):
        return level_hiddens[-1]


def level(name, *experts, **rest):
    return HierarchyLevelConfig(name, {each: ExpertConfig(each) for each in experts}, **rest)


def model_of(*levels, factory=None, fusion_module="last", **config):
    fusion = LastLevel() if fusion_module == "last" else fusion_module
    made = CELMoEConfig(WIDTH, list(levels), **config)
    return HierarchicalCELMoE(made, factory or (lambda _level, expert, _metadata: Affine(FACTORS[expert])), fusion)


def ones(batch_size):
    return torch.ones(batch_size, WIDTH)


def first_column(hidden):
    return hidden[:, 0].tolist()


# --- public names ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "CELMoEConfig",
        "ExpertConfig",
        "HierarchyLevelConfig",
        "ExpertBatch",
        "ExpertModule",
        "ExpertResult",
        "HierarchicalCELMoE",
        "LevelOutput",
        "CELMoEOutput",
        "CELMoELossAPI",
        "LossBundle",
        "LossTerm",
        "LearnedFusion",
        "ExpertMetadata",
        "ExpertContext",
        "ExpertContextMap",
        "ExpertAux",
        "LevelRouting",
        "LossMap",
        "LossResult",
        "LossCallable",
        "LevelLossCallable",
        "BridgeLossCallable",
        "__version__",
        "PositionAwareFusion",
        "routing_constant",
        "validate_routing_length",
        "merge_routing",
    ],
)
def test_public_name(name):
    assert hasattr(celmoe, name)
    assert name in celmoe.__all__


TENSOR = torch.ones(2)


@pytest.mark.parametrize(
    ("made", "fields"),
    [
        (ExpertConfig("x", 2.0, True, {"k": 1}), ("x", 2.0, True, {"k": 1})),
        (HierarchyLevelConfig("l", {}, "f", False), ("l", {}, "f", False)),
        (CELMoEConfig(8, [], False, 0.5), (8, [], False, 0.5)),
        (ExpertBatch(TENSOR, {"c": 1}, TENSOR, {"s": "t"}), (TENSOR, {"c": 1}, TENSOR, {"s": "t"})),
        (ExpertResult(TENSOR, {"l": TENSOR}, {"a": 1}), (TENSOR, {"l": TENSOR}, {"a": 1})),
        (LevelOutput("l", TENSOR, ["r"], {"l": TENSOR}, {"a": 1}), ("l", TENSOR, ["r"], {"l": TENSOR}, {"a": 1})),
        (CELMoEOutput({}, TENSOR, {"l": TENSOR}, {"a": 1}), ({}, TENSOR, {"l": TENSOR}, {"a": 1})),
        (LossTerm("n", TENSOR, 2.0, "s"), ("n", TENSOR, 2.0, "s")),
    ],
    ids=lambda value: type(value).__name__ if dataclasses.is_dataclass(value) else "",
)
def test_positional_order_of_a_dataclass(made, fields):
    names = [field.name for field in dataclasses.fields(made)]
    for name, expected in zip(names, fields, strict=False):
        value = getattr(made, name)
        assert value is expected or value == expected, name
    # All other fields can only be given by keyword.
    assert all(field.kw_only for field in dataclasses.fields(made)[len(fields) :])


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (ExpertConfig("x"), {"loss_weight": 1.0, "stop_gradient_from_parent": False, "metadata": {}}),
        (HierarchyLevelConfig("l", {}), {"fallback_expert": None, "enabled": True}),
        (CELMoEConfig(8), {"levels": [], "use_learned_fusion": True, "fusion_dropout": 0.1}),
        (CELMoEConfig(8), {"fusion_type": "learned", "fusion_max_positions": 512}),
        (ExpertBatch(TENSOR), {"context": None, "mask": None, "state": {}}),
        (ExpertResult(TENSOR), {"losses": {}, "aux": {}}),
        (LossTerm("n", TENSOR), {"weight": 1.0, "scope": "global"}),
    ],
    ids=lambda value: type(value).__name__ if dataclasses.is_dataclass(value) else "",
)
def test_defaults(made, expected):
    assert {name: getattr(made, name) for name in expected} == expected


def test_positional_order_of_the_model_and_its_forward():
    fusion = LastLevel()
    seen = []

    def expert(batch):
        seen.append((batch.context["k"], batch.mask.tolist()))
        return batch.hidden

    model = HierarchicalCELMoE(CELMoEConfig(WIDTH, [level("l", "a", "b")]), lambda *_: Calling(expert), fusion)
    assert model.fusion is fusion
    output = model(ones(2), {"l": ["b", "b"]}, {"k": "v"}, torch.tensor([True, False]))
    assert isinstance(output, CELMoEOutput)
    assert seen == [("v", [True, False])]


def test_positional_order_of_the_fusions():
    learned = LearnedFusion(6, 3, 0.25)
    assert (len(learned.gates), learned.gates[0].in_features, learned.dropout.p) == (3, 6, 0.25)
    aware = PositionAwareFusion(6, 3, 9, 0.25)
    assert (len(aware.level_gates), tuple(aware.position_bias.weight.shape), aware.dropout.p) == (3, (9, 3), 0.25)
    aware = PositionAwareFusion(6, 3)
    assert (aware.position_bias.num_embeddings, aware.dropout.p) == (512, 0.1)


@pytest.mark.parametrize("number", [0.5, 1, 0])
def test_a_gradient_scale_in_fourth_place_is_refused_by_name(number):
    """3.0.0 had it there."""
    with pytest.raises(TypeError, match="gradient_scale="):
        ExpertConfig("x", 1.0, False, number)


def test_a_fusion_type_in_fourth_place_is_refused_by_name():
    """3.0.0 had it there."""
    with pytest.raises(TypeError, match="fusion_type="):
        CELMoEConfig(8, [], True, "position_aware")


@pytest.mark.parametrize(
    "call",
    [
        lambda: ExpertConfig("x", 1.0, False, {}, {}),
        lambda: CELMoEConfig(8, [], True, 0.1, 0.1),
        lambda: HierarchyLevelConfig("l", {}, None, True, None),
    ],
)
def test_a_fifth_positional_argument_is_pythons_own_error(call):
    with pytest.raises(TypeError, match="positional arguments"):
        call()


def test_gradient_scale_reads_none_where_it_was_not_given():
    expert = ExpertConfig("x", stop_gradient_from_parent=True)
    assert expert.gradient_scale is None
    copied = dataclasses.replace(expert, name="y")
    assert copied.gradient_scale is None
    assert copied.stop_gradient_from_parent


# --- construction ----------------------------------------------------------------------------------------------------


def test_only_enabled_levels_in_order():
    model = model_of(level("z", "a"), level("m", "b", enabled=False), level("a", "c"))
    assert [each.name for each in model.levels] == ["z", "a"]
    assert list(model.level_modules) == ["z", "a"]
    assert list(model(ones(1)).levels) == ["z", "a"]


def test_the_factory_is_called_positionally_in_order_before_the_fusion_is_made():
    calls = []

    def factory(*names_and_metadata):
        calls.append(names_and_metadata)
        return nn.Linear(1, 1)

    levels = [level("second", "b", "a"), level("first", "c")]
    levels[0].experts["a"].metadata = {"depth": 3}
    torch.manual_seed(3)
    model = HierarchicalCELMoE(CELMoEConfig(WIDTH, levels), factory)
    assert calls == [("second", "b", {}), ("second", "a", {"depth": 3}), ("first", "c", {})]
    torch.manual_seed(3)
    expected = [nn.Linear(1, 1).weight for _ in calls] + [nn.Linear(WIDTH, WIDTH, bias=False).weight]
    assert torch.equal(model.level_modules["first"]["c"].weight, expected[2])
    assert torch.equal(model.fusion.gates[0].weight, expected[3])


def test_the_key_names_the_expert_whatever_its_config_says():
    seen = []

    def expert(batch):
        seen.append(batch.state["expert"])
        return ExpertResult(batch.hidden, {"size": batch.hidden.sum()}, {"some": 1})

    experts = {"key": ExpertConfig("label"), "other": ExpertConfig("key")}
    made = []
    model = model_of(
        HierarchyLevelConfig("l", experts),
        factory=lambda _, name, __: made.append(name) or Calling(expert),
    )
    output = model(ones(1), {"l": ["key"]})
    assert made == ["key", "other"]
    assert seen == ["key"]
    assert output.levels["l"].routes == ["key"]
    assert list(output.losses) == ["l.key.size"]
    assert list(output.levels["l"].aux) == ["key"]
    with pytest.raises(KeyError):
        model(ones(1), {"l": ["label"]})


def test_checkpoint_keys_and_their_order_with_learned_fusion():
    levels = [level("z", "b", "a"), level("y", "c")]
    model = HierarchicalCELMoE(CELMoEConfig(WIDTH, levels), lambda *_: nn.Linear(1, 1))
    assert list(model.state_dict()) == [
        "level_modules.z.b.weight",
        "level_modules.z.b.bias",
        "level_modules.z.a.weight",
        "level_modules.z.a.bias",
        "level_modules.y.c.weight",
        "level_modules.y.c.bias",
        "fusion.gates.0.weight",
        "fusion.gates.1.weight",
        "fusion.norm.weight",
        "fusion.norm.bias",
    ]


def test_checkpoint_keys_and_their_order_with_position_aware_fusion():
    model = model_of(level("z", "a"), level("y", "b"), fusion_module=None, fusion_type="position_aware")
    assert [key for key in model.state_dict() if key.startswith("fusion")] == [
        "fusion.level_gates.0.weight",
        "fusion.level_gates.0.bias",
        "fusion.level_gates.1.weight",
        "fusion.level_gates.1.bias",
        "fusion.position_bias.weight",
        "fusion.norm.weight",
        "fusion.norm.bias",
    ]


def test_what_clients_read_of_a_model():
    config = CELMoEConfig(WIDTH, [level("l", "a", "b")])
    model = HierarchicalCELMoE(config, lambda *_: nn.Linear(1, 1))
    assert model.config is config
    assert model.levels == config.levels
    assert model.levels[0] is config.levels[0]
    assert isinstance(model.fusion, LearnedFusion)
    for parameter in model.level_modules["l"]["a"].parameters():
        parameter.requires_grad_(False)
    assert sum(parameter.requires_grad for parameter in model.level_modules.parameters()) == 2


def test_a_shared_module_may_hand_out_the_same_memory_again():
    class Reusing(ExpertModule):
        """Writes into one buffer, and returns one result."""

        def __init__(self):
            super().__init__()
            self.register_buffer("memory", torch.zeros(8, WIDTH))
            self.result = ExpertResult(self.memory)

        def forward(self, batch):
            scale = {"a": 2.0, "b": 3.0}[batch.state["expert"]]
            torch.mul(batch.hidden, scale, out=self.memory[: len(batch.hidden)])
            self.result.hidden = self.memory[: len(batch.hidden)]
            return self.result

    shared = Reusing()
    model = HierarchicalCELMoE(CELMoEConfig(WIDTH, [level("l", "a", "b")]), lambda *_: shared)
    with torch.no_grad():
        hidden = model(torch.ones(4, WIDTH), {"l": ["a", "b", "a", "b"]}).levels["l"].hidden
    assert hidden[:, 0].tolist() == [2.0, 3.0, 2.0, 3.0]


def test_experts_without_parameters_of_different_classes_and_shared_are_legal():
    shared = Affine(2.0)
    experts = {
        "a": Calling(lambda batch: batch.hidden + 1),
        "b": shared,
        "c": shared,
        "d": Calling(lambda batch: batch.hidden.repeat(1, 3)[:, :WIDTH] - 1),
    }
    model = model_of(level("l", *experts), factory=lambda _, name, __: experts[name])
    output = model(ones(4), {"l": ["a", "b", "c", "d"]})
    assert first_column(output.fused_hidden) == [2.0, 2.0, 2.0, 0.0]
    output.fused_hidden.sum().backward()
    assert shared.factor.grad.item() == 2 * WIDTH


def test_an_expert_replaced_after_construction_is_the_one_that_runs():
    model = model_of(level("l", "a", "b"))
    model.level_modules["l"]["a"] = Affine(100.0)
    assert first_column(model(ones(2), {"l": ["a", "b"]}).fused_hidden) == [100.0, 3.0]
    assert list(model.state_dict()) == ["level_modules.l.a.factor", "level_modules.l.b.factor"]


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
