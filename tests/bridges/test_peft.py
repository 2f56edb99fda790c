"""PEFT: its models as hosts, its layers as experts, and merged weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import celmoe
from celmoe import CELMoEConfig, ExpertBatch, ExpertResult, HierarchicalCELMoE
from tests.bridges.hosts import (
    LANGUAGES,
    TREE,
    WIDTH,
    LowRank,
    attached,
    bert,
    experts_of,
    llama,
    planned,
    routes,
    stirred,
    words,
)

peft = pytest.importorskip("peft")
# PEFT asks transformers' models by the name of before.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def adapted(model: Any, *targets: str) -> Any:
    """The model with PEFT's own adapters, which are no identity."""
    torch.manual_seed(3)
    settings = peft.LoraConfig(r=2, lora_alpha=4, target_modules=list(targets), init_lora_weights=False)
    return peft.get_peft_model(model, settings)


HOSTS = {
    "a layer": ("base_model.model.bert.encoder.layer.*", None),
    "an adapted linear layer": ("base_model.model.bert.encoder.layer.*.attention.self.query", LowRank),
    "the linear layer below": ("base_model.model.bert.encoder.layer.*.attention.self.query.base_layer", LowRank),
}


@pytest.mark.parametrize("place", HOSTS)
def test_a_model_of_peft_is_a_host(place: str) -> None:
    """Its own adapters and ours train beside each other; a mixed batch is that of its languages by themselves."""
    where, factory = HOSTS[place]
    model = adapted(bert(), "query", "value").eval()
    given, languages = words(8), routes(8)
    before = model(**given).logits
    attached(model, where, *([factory] if factory else []))
    assert torch.equal(model(**given, plan=planned(model, languages)).logits, before)
    stirred(model)
    logits = model(**given, plan=planned(model, languages)).logits
    for row, language in enumerate(languages):
        alone = model(**{name: each[row : row + 1] for name, each in given.items()}, plan=planned(model, [language]))
        torch.testing.assert_close(alone.logits[0], logits[row], rtol=1e-5, atol=1e-6)
    logits.square().sum().backward()
    trained = {name for name, each in model.named_parameters() if each.grad is not None}
    assert any("lora_A" in name for name in trained)
    assert any(".celmoe." in name for name in trained)
    assert not any("celmoe" not in name and "lora" not in name for name in trained)


def test_pefts_own_file_has_its_own_adapters_only(tmp_path: Any) -> None:
    model = stirred(attached(adapted(bert(), "query").eval(), "base_model.model.bert.encoder.layer.*"))
    given, plan = words(5), planned(model, routes(5))
    wanted = model(**given, plan=plan).logits
    model.save_pretrained(tmp_path / "peft")
    celmoe.save_adapters(model, tmp_path / "ours.safetensors")
    from safetensors.torch import load_file

    assert all("lora" in key for key in load_file(tmp_path / "peft" / "adapter_model.safetensors"))
    other = peft.PeftModel.from_pretrained(bert().eval(), tmp_path / "peft").eval()
    attached(other, "base_model.model.bert.encoder.layer.*")
    celmoe.load_adapters(other, tmp_path / "ours.safetensors")
    torch.testing.assert_close(other(**given, plan=plan).logits, wanted)


def test_switched_off_pefts_adapters_leave_ours() -> None:
    model = stirred(attached(adapted(llama(), "q_proj").eval(), "base_model.model.model.layers.*"))
    given, plan = words(4), planned(model, routes(4))
    both = model(**given, plan=plan).logits
    with model.disable_adapter():
        ours = model(**given, plan=plan).logits
    assert not torch.equal(both, ours)
    celmoe.detach(model)
    with model.disable_adapter():
        assert not torch.equal(model(**given).logits, ours)


def test_pefts_merge_keeps_experts_of_other_places() -> None:
    """``merge_and_unload`` puts plain layers in the place of adapted ones; ours stand behind whole layers."""
    model = stirred(attached(adapted(bert().eval(), "query").eval(), "base_model.model.bert.encoder.layer.*"))
    given, plan = words(4), planned(model, routes(4))
    wanted, experts = model(**given, plan=plan).logits, experts_of(model)
    bare = model.merge_and_unload()
    assert len(experts_of(bare)) == len(experts)
    with celmoe.routed(bare, plan):
        torch.testing.assert_close(bare(**given).logits, wanted, rtol=1e-4, atol=1e-5)


class Adapted(nn.Module):
    """A linear layer with PEFT's adapter, as an expert."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        settings = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["0"], init_lora_weights=False)
        self.inner = peft.inject_adapter_in_model(settings, nn.Sequential(base))

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        return ExpertResult(self.inner(batch.hidden))


@pytest.mark.parametrize("engine", ["looped", "auto"])
def test_pefts_layers_are_experts(engine: str) -> None:
    """Each sample gets the base layer and its own language's product of two matrices."""
    torch.manual_seed(0)
    names = [*LANGUAGES]
    tree = CELMoEConfig.from_tree(TREE, ("family", "language"), hidden_size=WIDTH)
    level = tree.levels[1]
    for each in level.experts.values():
        each.parent = None
    config = CELMoEConfig(WIDTH, [level], use_learned_fusion=False)
    model = HierarchicalCELMoE(config, lambda level, name, metadata: Adapted(nn.Linear(WIDTH, WIDTH)), engine=engine)
    languages, hidden = routes(40), torch.randn(40, WIDTH)
    found = model(hidden, {"language": languages}).fused_hidden
    for row, name in enumerate(languages):
        layer: Any = model.level_modules["language"][name].inner[0]
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        wanted = layer.base_layer(hidden[row]) + 2.0 * (up @ (down @ hidden[row]))
        torch.testing.assert_close(found[row], wanted, rtol=1e-5, atol=1e-5)
    found.square().sum().backward()
    grads = {name: model.level_modules["language"][name].inner[0].lora_A["default"].weight.grad for name in names}
    assert all(grad is not None and grad.any() for grad in grads.values())


@pytest.mark.parametrize("is_stacked", [False, True])
def test_merged_weights_are_the_unmerged_experts(is_stacked: bool) -> None:
    where = ["bert.encoder.layer.*.attention.self.query", "bert.encoder.layer.*.attention.self.value"]
    model = stirred(attached(bert().eval(), where, LowRank))
    if is_stacked:
        celmoe.adapters(model).stack()
    given = words(6)
    wanted = model(**given, plan=planned(model, ["fr"] * 6)).logits
    others = model(**given, plan=planned(model, ["it"] * 6)).logits
    celmoe.merge_adapters(model, {"language": "fr"})
    assert not experts_of(model)
    found = model(**given).logits
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found, others, rtol=1e-3)


def test_an_adapted_layer_is_not_merged_into() -> None:
    """PEFT's layer is no ``nn.Linear``; the one below it is."""
    model = adapted(bert(), "query").eval()
    below = "base_model.model.bert.encoder.layer.*.attention.self.query"
    attached(model, below, LowRank)
    with pytest.raises(celmoe.ConfigError) as caught:
        celmoe.merge_adapters(model, {"language": "nl"})
    assert str(caught.value) == (
        "places must be linear layers for experts to be merged (got a Linear at "
        "'base_model.model.bert.encoder.layer.0.attention.self.query')"
    )
    celmoe.detach(model)
    stirred(attached(model, f"{below}.base_layer", LowRank))
    given = words(3)
    wanted = model(**given, plan=planned(model, ["nl"] * 3)).logits
    celmoe.merge_adapters(model, {"language": "nl"})
    torch.testing.assert_close(model(**given).logits, wanted, rtol=1e-5, atol=1e-6)
