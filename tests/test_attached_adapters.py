"""All attached experts changed alike: added, removed, renamed, kept, stacked, frozen, saved, loaded and merged."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import celmoe
from celmoe import ExpertConfig, ExpertModule, ExpertResult
from tests.hosts import NAMES, ROUTES, WIDTH, Bottleneck, Encoder, config, plan_of, tokens


def attached(seed=0, where="blocks.*"):
    torch.manual_seed(seed)
    return celmoe.attach(Encoder(), config(), lambda *_: Bottleneck(), where)


def states_equal(one, two):
    return all(torch.equal(value, two[key]) for key, value in one.items()) and one.keys() == two.keys()


def test_the_mapping():
    model = attached()
    found = celmoe.adapters(model)
    assert [*found] == ["blocks.0", "blocks.1"]
    assert found["blocks.1"] is model.blocks[1].celmoe
    assert repr(found) == "Adapters(2 places, family: 2 experts, language: 4 experts)"
    assert [*celmoe.adapters(model, "blocks.1")] == ["blocks.1"]
    with pytest.raises(KeyError):
        found["blocks.2"]
    assert found.compile_routing({"language": ROUTES}).routes("language") == ROUTES
    assert found.compiler({"language": ROUTES}).routes("family")[:2] == ["germanic", "romance"]


def test_explain_tells_equal_tables_once():
    text = celmoe.adapters(attached()).explain(plan_of(ROUTES))
    assert text.startswith("blocks.0, blocks.1:\nlevel")
    assert text.count("language: 4 Bottleneck") == 1


def test_freezing_the_host_leaves_the_experts():
    model = attached()
    celmoe.freeze_host(model)
    assert {".celmoe." in name for name, each in model.named_parameters() if each.requires_grad} == {True}
    assert {".celmoe." in name for name, each in model.named_parameters() if not each.requires_grad} == {False}
    assert celmoe.adapters(model).freeze("language", "[df]*") == ["de", "fr"]
    model(tokens(), plan=plan_of(ROUTES)).sum().backward()
    for place in celmoe.adapters(model).values():
        grads = {name: each.up.weight.grad for name, each in place.level_modules["language"].items()}
        assert [name for name, grad in grads.items() if grad is None] == ["de", "fr"]
    assert celmoe.adapters(model).unfreeze("language") == NAMES


def test_a_language_more_and_one_less():
    model = attached()
    found = celmoe.adapters(model)
    optimizer = torch.optim.AdamW(model.parameters())
    old = plan_of(ROUTES)
    model(tokens(), plan=old).sum().backward()
    optimizer.step()
    found.add_expert("language", "es", ExpertConfig("es", parent="romance"), warm_start="it", optimizer=optimizer)
    as_italian = {"language": ["it" if name == "fr" else name for name in ROUTES]}
    as_spanish = {"language": ["es" if name == "fr" else name for name in ROUTES]}
    assert torch.equal(model(tokens(), plan=as_spanish), model(tokens(), plan=as_italian))
    with pytest.raises(celmoe.PlanError, match="'plan' must be a plan of a config with 5 experts in level 'language'"):
        model(tokens(), plan=old)
    found.rename_expert("language", "es", "spanish", optimizer=optimizer)
    found.remove_expert("language", "de", optimizer=optimizer)
    assert [*found.config.levels[1].experts] == ["nl", "fr", "it", "spanish"]
    model(tokens(), plan={"language": ["spanish"] * 6}).sum().backward()
    optimizer.step()
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters()))


def test_an_expert_that_one_place_refuses_is_added_nowhere():
    model = attached()
    found = celmoe.adapters(model)
    made = []

    def factory(*_):
        made.append(1)
        if len(made) == 2:
            raise ValueError("no more")
        return Bottleneck()

    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="no more"):
        found.add_expert("language", "es", ExpertConfig("es", parent="romance"), factory=factory)
    assert states_equal(model.state_dict(), before)
    model(tokens(), plan=plan_of(ROUTES))


def test_places_of_several_configs_are_not_changed_alike():
    model = attached(where="blocks.0")
    other = celmoe.CELMoEConfig.from_tree({"a": ["x", "y"]}, levels=("group", "shop"), hidden_size=WIDTH)
    celmoe.attach(model, other, lambda *_: Bottleneck(), "blocks.1")
    with pytest.raises(celmoe.ConfigError, match="places must have one config to be changed alike"):
        celmoe.adapters(model).freeze("language")
    assert celmoe.adapters(model, "blocks.1").freeze("shop") == ["x", "y"]


@pytest.mark.parametrize("stacked", [False, True])
def test_groups_of_parameters(stacked):
    """Each language of all places in its group; a stack that lies in several is cut, which celmoe.optim takes."""
    model = attached()
    found = celmoe.adapters(model)
    if stacked:
        found.stack()
    model.head.requires_grad_(False)
    groups = found.parameter_groups({"language/n*": {"lr": 0.0}, "family/*": {"lr": 0.5, "weight_decay": 0.1}})
    assert [group.get("lr") for group in groups] == [0.0, 0.5, None]
    assert [len(group["params"]) for group in groups[:2]] == [2 * 4, 2 * 4 * (1 if stacked else 2)]
    of_rest = {id(parameter) for parameter in groups[2]["params"]}
    assert id(model.embed.weight) in of_rest
    assert id(model.head.weight) not in of_rest
    optimizer = celmoe.optim.AdamW(groups, lr=0.1)
    before = copy.deepcopy(model.state_dict())
    model(tokens(), plan=plan_of(ROUTES)).square().sum().backward()
    optimizer.step()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) == (".language.nl." in key or key.startswith("head"))


def test_stacks_train_as_ordinary_experts_do():
    models = attached(), attached()
    reports = celmoe.adapters(models[1]).stack()
    assert str(reports["blocks.0"]).count("stacked") == 2
    for model in models:
        optimizer = celmoe.optim.AdamW(model.parameters(), lr=0.1)
        for routes in (ROUTES, ["de", "it"] * 3):
            optimizer.zero_grad()
            model(tokens(), plan=plan_of(routes)).square().sum().backward()
            optimizer.step()
    for key, value in models[0].state_dict().items():
        torch.testing.assert_close(models[1].state_dict()[key], value)
    del optimizer
    celmoe.adapters(models[1]).unstack()
    torch.testing.assert_close(models[1](tokens(), plan=plan_of(ROUTES)), models[0](tokens(), plan=plan_of(ROUTES)))


def test_one_language_needs_no_plan():
    model = attached().eval()
    expected = model(tokens(), plan={"language": ["nl"] * 6})
    one = copy.deepcopy(model)
    celmoe.adapters(one).keep({"language": "nl"})
    torch.testing.assert_close(one(tokens()), expected)
    assert len(list(one.parameters())) < len(list(model.parameters()))
    with celmoe.routed(one, {"language": ["nl"] * 6}):
        torch.testing.assert_close(one(tokens()), expected)
    torch.testing.assert_close(model(tokens(), plan={"language": ["nl"] * 6}), expected)
    exported = torch.export.export(one, (tokens(),))
    torch.testing.assert_close(exported.module()(tokens()), expected)
    two = copy.deepcopy(model)
    celmoe.adapters(two).keep({"language": ["nl", "it"]})
    with pytest.raises(celmoe.MissingRouteError):
        two(tokens())
    assert torch.isfinite(two(tokens(), plan={"language": ["nl", "it"] * 3})).all()


@pytest.mark.parametrize("by", [None, "language", "family"])
@pytest.mark.parametrize("stacked", [False, True])
def test_files_give_the_experts_back(tmp_path, by, stacked):
    model, other = attached(), attached(seed=1)
    if stacked:
        celmoe.adapters(model).stack()
    files = celmoe.save_adapters(model, tmp_path / "experts", by=by)
    assert len(files) == {None: 1, "language": 5, "family": 3}[by]
    reports = celmoe.load_adapters(other, tmp_path / "experts")
    assert [*reports] == ["blocks.0", "blocks.1"]
    assert str(reports["blocks.0"]) == "family: 2 loaded\nlanguage: 4 loaded\nfusion: loaded"
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value) == (".celmoe." in key or "norm" in key)


@pytest.mark.parametrize("by", [None, "language"])
@pytest.mark.parametrize("metadata", [{"rank": 3}, {"rank": 3, "make": nn.Linear}])
def test_files_tell_the_config(tmp_path, by, metadata):
    """A server attaches alike experts without a copy of the training's config."""
    one = config()
    one.levels[1].experts["nl"] = ExpertConfig("nl", parent="germanic", loss_weight=0.5, metadata=metadata)
    celmoe.save_adapters(celmoe.attach(Encoder(), one, lambda *_: Bottleneck(), "blocks.0"), tmp_path / "here", by=by)
    found = celmoe.saved_config(tmp_path / "here")
    assert found.levels[1].experts["nl"].metadata == (metadata if len(metadata) == 1 else {})
    found.levels[1].experts["nl"].metadata = metadata
    assert found == one
    celmoe.load_adapters(celmoe.attach(Encoder(), found, lambda *_: Bottleneck(), "blocks.0"), tmp_path / "here")


@pytest.mark.parametrize(("by", "number"), [(None, 1), ("shop", 3)])
def test_places_of_several_configs_are_saved_together(tmp_path, by, number):
    def build(seed):
        model = attached(seed, where="blocks.0")
        other = celmoe.CELMoEConfig.from_tree({"a": ["x", "y"]}, levels=("group", "shop"), hidden_size=WIDTH)
        return celmoe.attach(model, other, lambda *_: Bottleneck(), "blocks.1")

    models = build(0), build(1)
    assert len(celmoe.save_adapters(models[0], tmp_path / "here", by=by)) == number
    celmoe.load_adapters(models[1], tmp_path / "here")
    for place in ("blocks.0", "blocks.1"):
        states = [celmoe.adapters(model)[place].state_dict() for model in models]
        assert states_equal(*states)
    with pytest.raises(celmoe.CheckpointError, match="for places of one config"):
        celmoe.saved_config(tmp_path / "here")


def test_one_languages_file(tmp_path):
    model, other = attached(), attached(seed=1)
    files = celmoe.save_adapters(model, tmp_path, by="language")
    assert {file.stem for file in files} == {*NAMES, "rest"}
    before = copy.deepcopy(other.state_dict())
    reports = celmoe.load_adapters(other, tmp_path / "nl.safetensors", rename={"language": {"nl": "fr"}})
    assert reports["blocks.1"].matched["language"] == ("fr",)
    for key, value in other.state_dict().items():
        theirs = model.state_dict()[key.replace(".fr.", ".nl.")] if ".language.fr." in key else before[key]
        assert torch.equal(value, theirs)


def test_names_that_no_file_may_have(tmp_path):
    names = ["zh.Hant", "a/b", "..", "rest", "to"]
    one = celmoe.CELMoEConfig.from_tree({"f": names}, levels=("family", "language"), hidden_size=WIDTH)
    models = [celmoe.attach(Encoder(), one, lambda *_: Bottleneck(), "blocks.0") for _ in range(2)]
    files = celmoe.save_adapters(models[0], tmp_path / "here", by="language")
    assert all(file.parent == tmp_path / "here" and file.is_file() for file in files)
    celmoe.load_adapters(models[1], tmp_path / "here")
    states = [celmoe.adapters(model)["blocks.0"].state_dict() for model in models]
    assert states_equal(*states)


def test_a_whole_models_file_will_do(tmp_path):
    from safetensors.torch import save_file

    model, other = attached(), attached(seed=1)
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    celmoe.load_adapters(other, tmp_path / "model.safetensors")
    assert states_equal(
        celmoe.adapters(other)["blocks.1"].state_dict(), celmoe.adapters(model)["blocks.1"].state_dict()
    )


def test_a_file_that_fits_one_place_only_changes_none(tmp_path):
    from safetensors.torch import load_file, save_file

    model, other = attached(), attached(seed=1)
    celmoe.save_adapters(model, tmp_path / "experts")
    tensors = load_file(tmp_path / "experts")
    tensors["blocks.1.celmoe.level_modules.language.de.up.weight"] = torch.zeros(2, 2)
    save_file(tensors, tmp_path / "experts")
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(celmoe.CheckpointError, match=r"must have 'up\.weight' of expert 'de'"):
        celmoe.load_adapters(other, tmp_path / "experts")
    assert states_equal(other.state_dict(), before)


class LowRank(ExpertModule):
    """Reads the layer's input."""

    reads_input = True

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)

    def forward(self, batch):
        return ExpertResult(batch.hidden + self.up(self.down(batch.context["input"])))

    def weight_delta(self):
        return self.up.weight @ self.down.weight


class Affine(ExpertModule):
    """Reads the layer's output."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, batch):
        return ExpertResult(batch.hidden + self.linear(batch.hidden))

    def as_linear(self):
        return self.linear.weight + torch.eye(WIDTH), self.linear.bias


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kinds", [(LowRank, LowRank), (Affine, LowRank), (LowRank, Affine), (Affine, Affine)])
def test_merged_experts_are_the_layers(kinds, bias):
    torch.manual_seed(0)
    model = Encoder()
    if not bias:
        model.blocks[0].linear = nn.Linear(WIDTH, WIDTH, bias=False)
    by_level = dict(zip(("family", "language"), kinds, strict=True))
    celmoe.attach(model, config(), lambda level, *_: by_level[level](), "blocks.*.linear")
    expected = model(tokens(), plan={"language": ["it"] * 6})
    assert celmoe.merge_adapters(model, {"language": "it"}) is model
    assert not [key for key in model.state_dict() if "celmoe" in key]
    torch.testing.assert_close(model(tokens()), expected)
    assert (model.blocks[0].linear.bias is not None) == (bias or Affine in kinds)


def merging(model, **experts):
    return lambda: celmoe.merge_adapters(model, experts or None)


def tied():
    model = celmoe.attach(Encoder(), config(), lambda *_: Affine(), "blocks.0.linear")
    model.blocks[1].linear.weight = model.blocks[0].linear.weight
    return model


def test_what_is_not_linear_is_not_merged():
    affine = celmoe.attach(Encoder(), config(), lambda *_: Affine(), "blocks.*.linear")
    curved = celmoe.attach(Encoder(), config(), lambda *_: Bottleneck(), "blocks.0.linear")
    for call, error, message in (
        (
            merging(attached(), language="de"),
            celmoe.ConfigError,
            "places must be linear layers for experts to be merged (got a Block at 'blocks.0')",
        ),
        (
            merging(curved, language="de"),
            celmoe.ConfigError,
            (
                "experts must be linear to be merged, with weight_delta() or as_linear() (got a Bottleneck: expert "
                "'germanic' of level 'family' at 'blocks.0.linear')"
            ),
        ),
        (
            merging(tied(), language="de"),
            celmoe.ConfigError,
            (
                "places must have weights of their own for experts to be merged (got 'blocks.0.linear', which shares "
                "its weight with 'blocks.1.linear')"
            ),
        ),
        (merging(affine), celmoe.MissingRouteError, None),
        (merging(affine, language="es"), celmoe.UnknownExpertError, None),
    ):
        with pytest.raises(error) as caught:
            call()
        assert message is None or str(caught.value) == message
    assert len(celmoe.adapters(affine)) == 2


class Doubled(nn.Linear):
    """Is a linear layer, but not that of its weight."""

    def forward(self, rows):
        return 2 * super().forward(rows)


class Curved(Affine):
    """Says that it is linear."""

    def forward(self, batch):
        return ExpertResult(torch.tanh(super().forward(batch).hidden))


class Scaled(LowRank):
    """Gives a change that is not its own."""

    def forward(self, batch):
        return ExpertResult(super().forward(batch).hidden * 2)


def made_in_inference_mode():
    with torch.inference_mode():
        return nn.Linear(WIDTH, WIDTH)


LAYERS = {
    "its own forward pass": lambda: Doubled(WIDTH, WIDTH),
    "parametrized": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)),
    "pruned": lambda: prune.l1_unstructured(nn.Linear(WIDTH, WIDTH), "weight", 0.5),
    "with a pruned bias": lambda: prune.l1_unstructured(nn.Linear(WIDTH, WIDTH), "bias", 2),
    "made in inference mode": made_in_inference_mode,
    "complex": lambda: nn.Linear(WIDTH, WIDTH, dtype=torch.complex64),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_that_are_more_than_their_weights_are_not_merged(kind):
    """Written into their weights, a change would be lost, or come out scaled."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), LAYERS[kind]())
    celmoe.attach(model, config(), lambda *_: Affine(), ["0", "1"])
    before = model[0].weight.detach().clone()
    with pytest.raises(celmoe.ConfigError, match=r"^places must be plain linear layers .* \(got '1': "):
        celmoe.merge_adapters(model, {"language": "de"})
    assert len(celmoe.adapters(model)) == 2
    assert torch.equal(model[0].weight, before)


def test_a_layer_that_shares_its_bias_is_not_merged():
    model = celmoe.attach(Encoder(), config(), lambda *_: Affine(), "blocks.0.linear")
    model.blocks[1].linear.bias = model.blocks[0].linear.bias
    with pytest.raises(celmoe.ConfigError, match=r"shares its bias with 'blocks\.1\.linear'"):
        celmoe.merge_adapters(model, {"language": "de"})


@pytest.mark.parametrize("kind", [Curved, Scaled])
def test_experts_that_are_not_what_they_give_are_not_merged(kind):
    model = celmoe.attach(Encoder(), config(), lambda *_: kind(), "blocks.*.linear")
    with pytest.raises(celmoe.ConfigError, match=rf"^experts must be the linear layers .* \(got a {kind.__name__} "):
        celmoe.merge_adapters(model, {"language": "de"})
    assert len(celmoe.adapters(model)) == 2


def test_fused_levels_are_not_merged():
    model = celmoe.attach(Encoder(), config(), lambda *_: Affine(), "blocks.*.linear", fusion="config")
    with pytest.raises(celmoe.ConfigError, match=r"^places must give their last level's output"):
        celmoe.merge_adapters(model, {"language": "de"})
    assert len(celmoe.adapters(model)) == 2


@pytest.mark.parametrize("route", [{"de": 0.5, "nl": 0.5}, None, 0])
def test_what_is_no_name_is_not_merged(route):
    """Of several experts with weights the first would be."""
    model = celmoe.attach(Encoder(), config(), lambda *_: Affine(), "blocks.*.linear")
    with pytest.raises(celmoe.ConfigTypeError) as caught:
        celmoe.merge_adapters(model, {"language": route})
    assert str(caught.value) == f"'experts' must map levels to names of experts (got {route!r} for level 'language')"


@pytest.mark.parametrize("stacked", [False, True], ids=["ordinary", "stacked"])
def test_a_small_change_in_bfloat16_is_merged_whole(stacked):
    """The identity and a thousandth have no sum in bfloat16."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    nn.init.eye_(model[0].weight)
    celmoe.attach(model, config(), lambda *_: celmoe.zoo.Linear(WIDTH).bfloat16(), "0")
    for each in celmoe.adapters(model).values():
        for parameter in each.level_modules.parameters():
            nn.init.constant_(parameter, 1e-3)
    if stacked:
        celmoe.adapters(model).stack()
    celmoe.merge_adapters(model, {"language": "de"})
    small = torch.full((WIDTH, WIDTH), 1e-3, dtype=torch.bfloat16).double()
    one = torch.eye(WIDTH, dtype=torch.float64) + small
    torch.testing.assert_close(model[0].weight.double(), one @ one, rtol=0, atol=1e-6)


def test_merging_in_inference_mode_leaves_layers_that_train():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False))
    celmoe.attach(model, config(), lambda *_: Affine(), "0")
    with torch.inference_mode():
        celmoe.merge_adapters(model, {"language": "de"})
    model(torch.ones(2, WIDTH)).sum().backward()
    assert model[0].bias.grad is not None
