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
    CELMoEOutput,
    ExpertBatch,
    ExpertConfig,
    ExpertModule,
    ExpertResult,
    HierarchicalCELMoE,
    HierarchyLevelConfig,
    LearnedFusion,
    LevelOutput,
    LossTerm,
    PositionAwareFusion,
)
from tests.upstream_models import WIDTH, Affine, Calling, LastLevel, first_column, level, model_of, ones

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
