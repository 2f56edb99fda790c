"""Experts in models of transformers: encoders, decoders, both together; generation, initializers and files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import celmoe
from celmoe import ConfigError, PlanError
from tests.bridges.hosts import (
    POSITIONS,
    WORDS,
    Bottleneck,
    LowRank,
    attached,
    bert,
    config,
    experts_of,
    gpt2,
    llama,
    planned,
    routes,
    stirred,
    t5,
    words,
    xlm_roberta,
)

transformers = pytest.importorskip("transformers")


class Host(NamedTuple):
    build: Callable[[], Any]
    where: Any
    factory: Callable[[], nn.Module] = Bottleneck


HOSTS = {
    "bert, layers": Host(bert, "bert.encoder.layer.*"),
    "bert, attention": Host(bert, "bert.encoder.layer.*.attention.self.[qv]*", LowRank),
    "xlm-r, layers": Host(xlm_roberta, "roberta.encoder.layer.*"),
    "llama, layers": Host(llama, "model.layers.*"),
    "llama, attention": Host(llama, "model.layers.*.self_attn.[qv]_proj", LowRank),
    "gpt2, layers": Host(gpt2, "transformer.h.*"),
    "gpt2, attention": Host(gpt2, "transformer.h.*.attn"),
    "t5, blocks": Host(t5, ["encoder.block.*", "decoder.block.*"]),
    "t5, attention": Host(t5, ["*coder.block.*.layer.0.SelfAttention.[qv]"], LowRank),
}


def given_to(model: Any, size: int) -> dict[str, torch.Tensor]:
    given = words(size)
    if hasattr(model, "decoder"):
        given["decoder_input_ids"] = given["input_ids"].flip(0)
    return given


def cut(given: dict[str, torch.Tensor], rows: list[int]) -> dict[str, torch.Tensor]:
    return {name: each[rows] for name, each in given.items()}


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {
        name: each.grad.clone()
        for name, each in model.named_parameters()
        if ".celmoe." in name and each.grad is not None
    }


@pytest.mark.parametrize("name", HOSTS)
def test_adapters_that_begin_at_zero_change_no_bit(name: str) -> None:
    host = HOSTS[name]
    model = host.build().eval()
    given = given_to(model, 6)
    before = model(**given).logits
    attached(model, host.where, host.factory)
    plan = planned(model, routes(6))
    assert torch.equal(model(**given, plan=plan).logits, before)
    with celmoe.routed(model, plan):
        assert torch.equal(model(**given).logits, before)
    assert not torch.equal(stirred(model)(**given, plan=plan).logits, before)
    assert torch.equal(celmoe.detach(model)(**given).logits, before)


def apart(model: Any, given: dict[str, torch.Tensor], languages: list[str], weights: torch.Tensor) -> torch.Tensor:
    """The logits of a run for each language, with the gradients of all runs together."""
    model.zero_grad()
    logits = torch.zeros_like(weights)
    for language in sorted(set(languages)):
        rows = [row for row, each in enumerate(languages) if each == language]
        found = model(**cut(given, rows), plan=planned(model, [language] * len(rows))).logits
        (found * weights[rows]).sum().backward()
        logits[rows] = found.detach()
    return logits


def together(model: Any, given: dict[str, torch.Tensor], languages: list[str], weights: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    found = model(**given, plan=planned(model, languages)).logits
    (found * weights).sum().backward()
    return found.detach()


@pytest.mark.parametrize("is_stacked", [False, True])
@pytest.mark.parametrize("name", HOSTS)
def test_a_mixed_batch_is_a_run_for_each_language(name: str, is_stacked: bool) -> None:
    """Outputs and the experts' gradients, in float64."""
    host = HOSTS[name]
    model = stirred(attached(host.build().double().eval(), host.where, host.factory)).double()
    if is_stacked:
        celmoe.adapters(model).stack()
    given, languages = given_to(model, 9), routes(9)
    weights = torch.randn_like(model(**given, plan=planned(model, languages)).logits)
    wanted = apart(model, given, languages, weights)
    grads = gradients(model)
    found = together(model, given, languages, weights)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
    other = gradients(model)
    assert other.keys() == grads.keys()
    assert grads
    for key, each in grads.items():
        torch.testing.assert_close(other[key], each, rtol=1e-9, atol=1e-11)
    # The comparison can fail: two samples that change their languages.
    first, second = languages.index("de"), languages.index("fr")
    languages[first], languages[second] = "fr", "de"
    found = together(model, given, languages, weights)
    rows = [row for row in range(9) if row not in (first, second)]
    torch.testing.assert_close(found[rows], wanted[rows], rtol=1e-11, atol=1e-11)
    assert not torch.allclose(found[[first]], wanted[[first]], rtol=1e-6)


def test_absent_languages_have_no_gradient() -> None:
    model = stirred(attached(llama(), "model.layers.*"))
    model(**words(4), plan=planned(model, ["de"] * 4)).logits.sum().backward()
    trained = {name.split("level_modules.")[1].split(".")[1] for name in gradients(model)}
    assert trained == {"germanic", "de"}


GENERATION = {
    "llama": (llama, "model.layers.*"),
    "gpt2": (gpt2, "transformer.h.*"),
    "t5": (t5, ["encoder.block.*", "decoder.block.*"]),
}


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("name", GENERATION)
def test_generation(name: str, num_beams: int) -> None:
    """A batch in many languages generates what each sample generates by itself, beams and cache included."""
    build, where = GENERATION[name]
    model = stirred(attached(build().eval(), where), 0.3)
    languages = ["de", "it", "nl", "de"]
    ids = torch.randint(3, WORDS, (4, 5), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": num_beams, "do_sample": False}
    options["pad_token_id"] = 0

    def generated(rows: list[int], *, languages: list[str] = languages) -> list[list[int]]:
        plan = planned(model, [languages[row] for row in rows])
        with celmoe.routed(model, plan, num_beams=num_beams):
            return model.generate(ids[rows], attention_mask=torch.ones_like(ids[rows]), **options).tolist()

    found = generated([0, 1, 2, 3])
    assert found == [generated([row])[0] for row in range(4)]
    assert found != generated([0, 1, 2, 3], languages=["it", "de", "it", "fr"])


def test_beams_that_nobody_told_of_are_refused() -> None:
    model = attached(llama().eval(), "model.layers.*")
    with celmoe.routed(model, planned(model, ["de", "nl"])), pytest.raises(PlanError) as caught:
        model.generate(torch.ones(2, 3, dtype=torch.long), max_new_tokens=2, num_beams=2)
    assert str(caught.value) == (
        "'plan' must have one sample for each row at 'model.layers.0' (got 2 samples for 4 rows; beams of generation "
        "want num_beams=)"
    )


def sevens(module: nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.data.fill_(7.0)


INITIALIZERS: dict[str, Callable[[Any], Any]] = {
    "init_weights": lambda model: model.init_weights(),
    "post_init": lambda model: model.post_init(),
    "initialize_weights": lambda model: model.initialize_weights(),
    "apply": lambda model: model.apply(model._init_weights),
    "apply of torch's": lambda model: model.apply(sevens),
}


@pytest.mark.parametrize("is_stacked", [False, True])
@pytest.mark.parametrize("how", INITIALIZERS)
def test_the_hosts_initializers_do_not_touch_experts(how: str, is_stacked: bool) -> None:
    model = stirred(attached(bert(), "bert.encoder.layer.*"))
    if is_stacked:
        celmoe.adapters(model).stack()
    before, weight = experts_of(model), model.classifier.weight.detach().clone()
    # What transformers has initialized once it leaves alone.
    for module in (model.classifier, model.bert.encoder.layer[0].output.dense):
        module.__dict__.pop("_is_hf_initialized", None)
        for parameter in module.parameters():
            parameter.__dict__.pop("_is_hf_initialized", None)
    INITIALIZERS[how](model)
    after = experts_of(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    if how != "post_init":
        assert not torch.equal(weight, model.classifier.weight)


class Ready(transformers.BertPreTrainedModel):
    """A model whose authors attach experts while it is built."""

    def __init__(self, config_: Any) -> None:
        super().__init__(config_)
        self.bert = transformers.BertModel(config_, add_pooling_layer=False)
        celmoe.attach(self.bert, config(), lambda level, name, metadata: Bottleneck(), "encoder.layer.*")
        self.post_init()

    def forward(self, **given: Any) -> Any:
        return self.bert(**given)


def test_experts_attached_while_a_model_is_built(tmp_path: Any) -> None:
    """In ``__init__`` experts keep their values; in ``from_pretrained``, which builds shapes only, that is refused."""
    model = Ready(bert().config)
    up = model.bert.encoder.layer[0].celmoe.level_modules["language"]["de"].up.weight
    assert not up.any()
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError) as caught:
        Ready.from_pretrained(tmp_path)
    assert str(caught.value) == (
        "'model' must have its weights before experts are attached (got a device of shapes only at 'encoder.layer.0'; "
        "load the model first)"
    )


def test_a_saved_model_comes_back(tmp_path: Any) -> None:
    """``save_pretrained`` keeps the experts, and ``load_adapters`` brings them back behind the bare model."""
    model = stirred(attached(bert().eval(), "bert.encoder.layer.*"))
    given, plan = words(5), planned(model, routes(5))
    wanted = model(**given, plan=plan).logits
    model.save_pretrained(tmp_path)
    other = transformers.BertForSequenceClassification.from_pretrained(tmp_path).eval()
    assert not torch.equal(other(**given).logits, wanted)
    attached(other, "bert.encoder.layer.*")
    reports = celmoe.load_adapters(other, tmp_path / "model.safetensors")
    assert list(reports) == ["bert.encoder.layer.0", "bert.encoder.layer.1"]
    assert torch.equal(other(**given, plan=plan).logits, wanted)


def test_a_stacked_model_is_saved_like_any_other(tmp_path: Any) -> None:
    """Members are views of one memory, which safetensors refuses for ordinary tensors."""
    model = stirred(attached(bert().eval(), "bert.encoder.layer.*"))
    model.save_pretrained(tmp_path / "plain")
    celmoe.adapters(model).stack()
    model.save_pretrained(tmp_path / "stacked")
    from safetensors.torch import load_file

    plain, stacked = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "stacked"))
    assert plain.keys() == stacked.keys()
    assert all(torch.equal(plain[key], stacked[key]) for key in plain)


def test_more_words() -> None:
    model = stirred(attached(bert().eval(), "bert.encoder.layer.*"))
    given, plan, before = words(4), planned(model, routes(4)), experts_of(model)
    wanted = model(**given, plan=plan).logits
    model.resize_token_embeddings(WORDS + 5, mean_resizing=False)
    assert torch.equal(model(**given, plan=plan).logits, wanted)
    after = experts_of(model)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_outputs_of_all_layers_are_after_the_experts() -> None:
    """What a model shows of its layers is what the next layer gets."""
    model = stirred(attached(bert("BertModel").eval(), "encoder.layer.*"))
    given, plan = words(4), planned(model, routes(4))
    output = model(**given, plan=plan, output_hidden_states=True)
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    bare = celmoe.detach(model)(**given, output_hidden_states=True)
    assert torch.equal(output.hidden_states[0], bare.hidden_states[0])
    assert not torch.equal(output.hidden_states[1], bare.hidden_states[1])
    assert output.last_hidden_state.shape == (4, POSITIONS, 32)


def test_languages_of_one_path_need_no_plan() -> None:
    model = stirred(attached(llama().eval(), "model.layers.*"))
    given = words(3)
    wanted = model(**given, plan=planned(model, ["nl"] * 3)).logits
    celmoe.adapters(model).keep({"language": "nl"})
    torch.testing.assert_close(model(**given).logits, wanted)
