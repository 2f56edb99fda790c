"""Checkpoints of other experts by name, and the order of experts beside every checkpoint."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn

import celmoe
from celmoe import (
    CELMoEConfig,
    CheckpointError,
    ConfigTypeError,
    ExpertConfig,
    HierarchicalCELMoE,
    HierarchyLevelConfig,
    InputTypeError,
    LoadReport,
    UnknownExpertError,
    UnknownLevelError,
    load_experts,
)
from tests.lifecycle import WIDTH, Narrow, Wide

OLD = ["ru", "iw", "zh.Hant", "to", "de"]


def made(names: list[str], kind: type[nn.Module] = Wide, *, is_stacked: bool = False) -> HierarchicalCELMoE:
    levels = [
        HierarchyLevelConfig("f.amily", {"one": ExpertConfig("one"), "two": ExpertConfig("two")}),
        HierarchyLevelConfig("language", {name: ExpertConfig(name) for name in names}),
    ]
    model = HierarchicalCELMoE(CELMoEConfig(WIDTH, levels), lambda *_: kind(), engine="looped")
    if is_stacked:
        celmoe.stack_experts(model)
    return model.eval()


def saved_and_read(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_equal_states(found: Any, expected: Any) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("is_read", [False, True])
@pytest.mark.parametrize("from_stacked", [False, True])
@pytest.mark.parametrize("to_stacked", [False, True])
def test_what_matches_is_loaded(to_stacked, from_stacked, is_read):
    old = made(OLD, is_stacked=from_stacked)
    model = made(["new", "he", "to", "zh.Hant", "ru"], is_stacked=to_stacked)
    before = {key: each.clone() for key, each in model.level_modules["language"]["new"].state_dict().items()}
    state = saved_and_read(old.state_dict()) if is_read else old.state_dict()
    report = load_experts(model, state, rename={"language": {"iw": "he"}})
    assert report == LoadReport(
        {"f.amily": ("one", "two"), "language": ("he", "to", "zh.Hant", "ru")},
        {"f.amily": (), "language": ("new",)},
        {"language": ("de",)},
        True,
        (),
    )
    assert str(report) == "f.amily: 2 loaded\nlanguage: 4 loaded, 1 new ('new'), 1 left ('de')\nfusion: loaded"
    for new, name in {"he": "iw", "to": "to", "zh.Hant": "zh.Hant", "ru": "ru"}.items():
        found, expected = model.level_modules["language"][new], old.level_modules["language"][name]
        assert_equal_states(found.state_dict(), expected.state_dict())
    assert_equal_states(model.level_modules["language"]["new"].state_dict(), before)
    assert_equal_states(model.fusion.state_dict(), old.fusion.state_dict())
    hidden = torch.randn(2, WIDTH)
    routes = {"f.amily": "one", "language": ["he", "ru"]}
    expected = old(hidden, {"f.amily": "one", "language": ["iw", "ru"]}).fused_hidden
    torch.testing.assert_close(model(hidden, routes).fused_hidden, expected)


def test_names_may_be_swapped():
    old, model = made(["a", "b"]), made(["a", "b"])
    load_experts(model, old.state_dict(), rename={"language": {"a": "b", "b": "a"}})
    for one, other in (("a", "b"), ("b", "a")):
        found = model.level_modules["language"][one].state_dict()
        assert_equal_states(found, old.level_modules["language"][other].state_dict())


def test_a_fusion_of_other_levels_is_left_and_told():
    tree = {"x": {"one": ["ru"]}}
    three = CELMoEConfig.from_tree(tree, ("top", "f.amily", "language"), WIDTH)
    model, old = HierarchicalCELMoE(three, lambda *_: Wide()), made(["ru", "de"])
    state = old.state_dict()
    state["head.weight"] = torch.zeros(2)
    report = load_experts(model, state)
    assert not report.fusion
    assert report.new == {"top": ("x",), "f.amily": (), "language": ()}
    assert report.left == {"f.amily": ("two",), "language": ("de",)}
    assert report.other[0] == "head.weight"
    assert all(key.startswith("fusion.") for key in report.other[1:])
    assert "fusion: not loaded\nother keys: 'head.weight', 'fusion.gates.0.weight'" in str(report)


def test_experts_without_tensors_have_nothing_to_load():
    class Same(celmoe.ExpertModule):
        def forward(self, batch):
            return celmoe.ExpertResult(batch.hidden)

    levels = [
        HierarchyLevelConfig("plain", {"a": ExpertConfig("a")}),
        HierarchyLevelConfig("language", {"ru": ExpertConfig("ru")}),
    ]
    model = HierarchicalCELMoE(CELMoEConfig(WIDTH, levels), lambda level, *_: Same() if level == "plain" else Wide())
    assert load_experts(model, made(["ru", "de"]).state_dict()).matched == {"plain": ("a",), "language": ("ru",)}


def _without(key: str) -> Any:
    return {name: each for name, each in made(OLD).state_dict().items() if name != key}


UP = "level_modules.language.ru.up.weight"
REFUSALS = {
    "no model": (InputTypeError, "'model' must be", lambda _: load_experts(nn.Linear(1, 1), {})),
    "no state": (InputTypeError, "'state_dict' must be a mapping", lambda m: load_experts(m, [1])),
    "nothing": (CheckpointError, "'state_dict' must have an expert of the model", lambda m: load_experts(m, {})),
    "another prefix": (
        CheckpointError,
        "keys begin with 'level_modules.'",
        lambda m: load_experts(m, {f"moe.{key}": each for key, each in made(OLD).state_dict().items()}),
    ),
    "a tensor that lacks": (
        CheckpointError,
        "the tensors of expert 'ru' of level 'language' (got others: only there: none; missing there: 'up.weight'",
        lambda m: load_experts(m, _without(UP)),
    ),
    "a mistyped tensor": (
        CheckpointError,
        "only there: 'up.weigth'; missing there: 'up.weight'",
        lambda m: load_experts(m, _without(UP) | {UP.replace("weight", "weigth"): torch.zeros(WIDTH, WIDTH)}),
    ),
    "another shape": (
        CheckpointError,
        "'up.weight' of expert 'ru' of level 'language' in shape (4, 4) (got (2, 2)",
        lambda m: load_experts(m, made(OLD).state_dict() | {UP: torch.zeros(2, 2)}),
    ),
    "no tensor": (CheckpointError, "(got None", lambda m: load_experts(m, made(OLD).state_dict() | {UP: 3})),
    "another kind": (
        CheckpointError,
        "must have the tensors of",
        lambda m: load_experts(m, made(OLD, Narrow).state_dict()),
    ),
    "names for no mapping": (
        ConfigTypeError,
        "'rename' must map levels to names by names",
        lambda m: load_experts(m, made(OLD).state_dict(), rename={"language": "ru"}),
    ),
    "an unknown level": (
        UnknownLevelError,
        "(got 'languages'; nearest: 'language')",
        lambda m: load_experts(m, made(OLD).state_dict(), rename={"languages": {}}),
    ),
    "an unknown name": (
        UnknownExpertError,
        "must give names of the model's experts (got 'rus'; nearest: 'ru'",
        lambda m: load_experts(m, made(OLD).state_dict(), rename={"language": {"ru": "rus"}}),
    ),
    "an unknown old name": (
        CheckpointError,
        "must have experts of the checkpoint (got 'dee'; nearest: 'de'",
        lambda m: load_experts(m, made(OLD).state_dict(), rename={"language": {"dee": "ru"}}),
    ),
    "a name twice": (
        CheckpointError,
        "'rename' must give each expert of level 'language' a name of its own (got 'ru' for 'ru', 'de'",
        lambda m: load_experts(m, made(OLD).state_dict(), rename={"language": {"de": "ru"}}),
    ),
}


@pytest.mark.parametrize("is_stacked", [False, True])
@pytest.mark.parametrize("case", REFUSALS)
def test_a_refused_load_changes_nothing(case, is_stacked):
    kind, words, call = REFUSALS[case]
    model = made(["ru", "zh.Hant", "x"], is_stacked=is_stacked)
    before = {key: each.clone() for key, each in model.state_dict().items()}
    with pytest.raises(kind) as error:
        call(model)
    assert words in str(error.value)
    assert_equal_states(model.state_dict(), before)


@pytest.mark.parametrize("is_stacked", [False, True])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("is_inside", [False, True])
def test_another_order_is_refused(is_inside, strict, is_stacked):
    old, model = made(["a", "b", "c"]), made(["a", "c", "b"], is_stacked=is_stacked)
    state = saved_and_read((nn.Sequential(old) if is_inside else old).state_dict())
    before = {key: each.clone() for key, each in model.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        (nn.Sequential(model) if is_inside else model).load_state_dict(state, strict=strict)
    assert str(error.value) == (
        "'state_dict' must have the experts of level 'language' in the model's order, for ids are positions in it (got "
        "'b' before 'c'; order the model's config like the checkpoint's, 'a', 'b', 'c', or call celmoe.load_experts, "
        "which goes by name, if no data have ids)"
    )
    assert_equal_states(model.state_dict(), before)
    load_experts(model, old.state_dict())
    assert_equal_states({key: model.state_dict()[key] for key in old.state_dict()}, old.state_dict())


def test_the_order_adds_no_key_and_travels_in_the_metadata():
    model = made(["b", "a"])
    state = model.state_dict()
    assert not [key for key in state if not key.startswith(("level_modules.", "fusion."))]
    assert saved_and_read(state)._metadata[""]["celmoe_experts"] == {"f.amily": ["one", "two"], "language": ["b", "a"]}
    assert nn.Sequential(model).state_dict()._metadata["0"]["celmoe_experts"]["language"] == ["b", "a"]


def test_checkpoints_without_an_order_load_as_before():
    old, model = made(["a", "b"]), made(["b", "a"])
    model.load_state_dict(dict(old.state_dict()))
    assert_equal_states({key: model.state_dict()[key] for key in old.state_dict()}, dict(old.state_dict()))


def test_other_experts_in_the_same_order_are_pytorchs_matter():
    old, model = made(["a", "b"]), made(["a", "x", "b"])
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(old.state_dict())
    assert len(model.load_state_dict(old.state_dict(), strict=False).missing_keys) == 4


def test_the_order_follows_changes():
    model = made(["a", "b"])
    model.rename_expert("language", "a", "z")
    model.add_expert("language", "c", ExpertConfig("c"))
    assert model.state_dict()._metadata[""]["celmoe_experts"]["language"] == ["z", "b", "c"]
