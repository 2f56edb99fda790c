"""Experts, fusions and transforms of every kind give what celmoe-vp gives."""

import copy
import dataclasses
import sys

import pytest
import torch
from torch import nn

import celmoe
from tests import peer
from tests.features import loads_decompositions
from tests.peer import FIRST, THIRD, VERSIONS, WIDTH, make_hidden, make_model, pass_through, routing, train
from tests.upstream_programs import (
    _looped,  # noqa: F401  # an autouse fixture
    both,
    compare,
    every_version,
)

pytestmark = pytest.mark.usefixtures("_as_few_and_as_many")


# --- clients' uses of a model ----------------------------------------------------------------------------------------


@every_version
def test_frozen_experts(version):
    def program(lib):
        model = make_model(lib)
        for parameter in model.level_modules["language"]["ru"].parameters():
            parameter.requires_grad_(False)
        for parameter in model.level_modules["universal"].parameters():
            parameter.requires_grad_(False)
        return train(model, steps=3), pass_through(model, make_hidden(), routing())

    compare(program, version)


@every_version
def test_absent_experts_stay_untouched_by_adamw(version):
    """Routes change between steps: moments and weight decay of an absent expert stand still."""

    def program(lib):
        def inputs(step):
            names = [("ru", "fr"), ("de", "ru"), ("it", "it"), ("fr", "nl")][step % 4]
            routes = [names[index % 2] for index in range(peer.BATCH)]
            return {
                "hidden": make_hidden(seed=200 + step),
                "routing": {"family": [peer.FAMILY_OF[each] for each in routes], "language": routes},
            }

        return train(make_model(lib), make_inputs=inputs)

    result = compare(program, version)
    assert not any("language.pl" in name and grad is not None for name, grad in result["steps"][9]["grads"].items())


@every_version
def test_a_replaced_expert(version):
    def program(lib):
        model = make_model(lib, kind="linear")
        before = pass_through(model, make_hidden(), routing())
        model.zero_grad()
        model.level_modules["language"]["ru"] = peer.plain_expert(lib, peer.BODIES["gru"](WIDTH))
        return before, pass_through(model, make_hidden(), routing()), list(model.state_dict())

    compare(program, version)


@every_version
def test_shared_modules_and_parameters(version):
    """Two experts are one module, two others share one weight, across levels too."""

    def program(lib):
        made = {}

        def factory(level, expert, metadata):
            body = nn.Linear(WIDTH, WIDTH)
            if expert == "fr":
                return made["ru"]
            if expert == "de":
                body.weight = made["slavic"].body.weight
            made[expert] = peer.plain_expert(lib, body)
            return made[expert]

        model = make_model(lib, factory)
        return pass_through(model, make_hidden(), routing()), train(model, steps=3)

    compare(program, version)


@every_version
def test_experts_of_different_classes_widths_and_none_with_parameters(version):
    def program(lib):
        bodies = {"ru": "gru", "fr": "transformer", "de": "dropout"}

        def factory(level, expert, metadata):
            if expert == "romance":
                return peer.plain_expert(lib, nn.Identity())
            if expert in bodies:
                return peer.plain_expert(lib, peer.BODIES[bodies[expert]](WIDTH))
            wide = len(expert) * 3
            return peer.plain_expert(lib, nn.Sequential(nn.Linear(WIDTH, wide), nn.Tanh(), nn.Linear(wide, WIDTH)))

        return pass_through(make_model(lib, factory), make_hidden(positions=3), routing())

    compare(program, version)


@both
def test_batch_norm_in_experts_keeps_its_statistics(version):
    def program(lib):
        def factory(level, expert, metadata):
            return peer.plain_expert(lib, nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)))

        doubled = {name: routes * 2 for name, routes in routing().items()}
        model = make_model(lib, factory)
        model(peer.random(2 * peer.BATCH, WIDTH, seed=9), doubled)
        return peer.state_of(model)

    compare(program, version)


class Concatenating(nn.Module):
    """A fusion of a user's own."""

    def __init__(self):
        super().__init__()
        self.join = nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, level_hiddens):
        assert isinstance(level_hiddens, list)
        return self.join(torch.cat(level_hiddens, dim=-1))


@every_version
def test_a_fusion_of_the_users_own(version):
    def program(lib):
        torch.manual_seed(peer.SEED)
        model = make_model(lib, fusion_module=Concatenating())
        return pass_through(model, make_hidden(), routing()), list(model.state_dict())

    result, keys = compare(program, version)
    assert keys[-2:] == ["fusion.join.weight", "fusion.join.bias"]
    assert result["grads"]["fusion.join.weight"] is not None


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_position_aware_fusion(dtype, tolerance):
    """Its sum over levels is made in another order, so it is near, not equal: to rounding, in each dtype."""

    def program(lib):
        model = make_model(lib, fusion_type="position_aware", fusion_max_positions=4)
        nn.init.normal_(model.fusion.position_bias.weight, generator=torch.Generator().manual_seed(11))
        model.to(dtype)
        rows = [make_hidden(positions=length).detach().to(dtype).requires_grad_() for length in (2, 4, 7)]
        return [pass_through(model, each, routing()) for each in rows]

    compare(program, THIRD, tolerance=tolerance)


def test_position_aware_fusion_in_ten_steps():
    def program(lib):
        model = make_model(lib, fusion_type="position_aware", fusion_max_positions=4, fusion_dropout=0.3)
        return train(
            model,
            make_inputs=lambda step: {"hidden": make_hidden(positions=5, seed=300 + step), "routing": routing()},
        )

    compare(program, THIRD, tolerance=1e-4)


@pytest.mark.parametrize("version", [FIRST, THIRD])
def test_fusions_by_themselves(version):
    def program(lib):
        hiddens = [peer.random(2, 3, WIDTH, seed=seed) for seed in (1, 2)]
        learned = getattr(lib, "LearnedFusion", None) or type(make_model(lib).fusion)
        torch.manual_seed(peer.SEED)
        fusions = [learned(WIDTH, 2, 0.5)]
        if version == THIRD:
            fusions += [lib.PositionAwareFusion(WIDTH, 2), lib.PositionAwareFusion(WIDTH, 2, 2, 0.0)]
        return [(fusion(hiddens).detach(), dict(fusion.state_dict())) for fusion in fusions]

    compare(program, version, tolerance=1e-6)


# --- torch's transforms over a model ----------------------------------------------------------------------------------


@both
def test_functional_call_and_torch_func_gradients(version):
    def program(lib):
        model, hidden = make_model(lib), make_hidden().detach()
        parameters = {name: value.detach() for name, value in model.named_parameters()}

        def loss(parameters):
            return peer.push(torch.func.functional_call(model, parameters, (hidden, routing())))

        return torch.func.grad(loss)(parameters)

    compare(program, version)


@both
@loads_decompositions
def test_forward_mode_gradients(version):
    def program(lib):
        model, hidden = make_model(lib), make_hidden().detach()
        tangent = peer.random(*hidden.shape, seed=12)
        return torch.func.jvp(lambda rows: model(rows, routing()).fused_hidden, (hidden,), (tangent,))

    _, tangent = compare(program, version, tolerance=1e-6)
    assert tangent.abs().sum() > 0


@both
def test_second_gradients(version):
    def program(lib):
        model, hidden = make_model(lib), make_hidden()
        loss = peer.push(model(hidden, routing()))
        (first,) = torch.autograd.grad(loss, hidden, create_graph=True)
        first.square().sum().backward()
        return first.detach(), hidden.grad, peer.grads_of(model)

    compare(program, version)


@both
def test_copies_of_a_model(version):
    def program(lib):
        model = make_model(lib, kind="gru")
        return pass_through(copy.deepcopy(model), make_hidden(), routing()), peer.grads_of(model)

    compare(program, version)


# --- declarations ----------------------------------------------------------------------------------------------------


@both
def test_positional_calls_that_both_versions_share(version):
    """Calls by the positional order of `upstream.md`; `test_upstream_contract` has the differences of 3.0.0."""

    def program(lib):
        tensor = torch.ones(2)
        config = lib.CELMoEConfig(4, [], False)
        level = lib.HierarchyLevelConfig("level", {"a": lib.ExpertConfig("a", 2.0, True)}, "a", False)
        expert = level.experts["a"]
        values = [
            (config.hidden_size, config.levels, config.use_learned_fusion, config.fusion_dropout),
            (level.name, list(level.experts), level.fallback_expert, level.enabled),
            (expert.name, expert.loss_weight, expert.stop_gradient_from_parent, expert.metadata),
            vars(lib.ExpertBatch(tensor, {"a": 1}, tensor, {"level": "x"})),
            vars(lib.ExpertBatch(tensor)),
            vars(lib.ExpertResult(tensor, {"loss": tensor}, {"aux": 1})),
            vars(lib.ExpertResult(tensor)),
            vars(lib.LossTerm("name", tensor, 2.0, "scope")),
            vars(lib.LossTerm("name", tensor)),
        ]
        level_output = lib.LevelOutput("name", tensor, ["a"], {"loss": tensor}, {"aux": 1})
        output = lib.CELMoEOutput({"name": level_output}, tensor, {"loss": tensor}, {"aux": 1})
        values.append([getattr(level_output, name) for name in ("name", "hidden", "routes", "losses", "aux")])
        values.append([getattr(output, name) for name in ("fused_hidden", "losses", "aux")])
        return values

    compare(program, version)


@every_version
def test_every_public_name_is_importable_from_celmoe(version):
    """Names that the peer keeps in submodules are in ours at the top."""
    lib = peer.peer(version)
    for name in [*lib.__all__, "__version__"]:
        assert hasattr(celmoe, name), name
    for module in (lib, *submodules_of(lib)):
        for name, value in vars(module).items():
            if isinstance(value, type) and value.__module__.startswith(lib.__name__) and not name.startswith("_"):
                assert hasattr(celmoe, name), name


def submodules_of(lib):
    return [module for name, module in list(sys.modules.items()) if name.startswith(lib.__name__ + ".")]


@both
def test_dataclasses_are_dataclasses(version):
    """Clients call `dataclasses.replace`, `asdict` and `fields` on them; our fields begin with the peer's of 1.1.4."""
    lib = peer.peer(version)
    for name in ("CELMoEConfig", "ExpertConfig", "HierarchyLevelConfig", "ExpertBatch", "ExpertResult", "LossTerm"):
        theirs = {field.name for field in dataclasses.fields(getattr(lib, name))}
        ours = [field.name for field in dataclasses.fields(getattr(celmoe, name))]
        assert theirs <= set(ours), name
        if version == FIRST:
            assert ours[: len(theirs)] == [field.name for field in dataclasses.fields(getattr(lib, name))], name


# --- the comparison can fail -----------------------------------------------------------------------------------------


def program_for_mutants(lib):
    return pass_through(make_model(lib, kind="linear"), make_hidden(), routing())


@pytest.mark.parametrize(
    "mutate",
    [
        lambda result: result["fused"].view(torch.int32)[0, 0].add_(1),
        lambda result: result["grads"].update({"level_modules.language.nl.body.weight": torch.zeros(WIDTH, WIDTH)}),
        lambda result: result["levels"]["language"]["routes"].reverse(),
        lambda result: result["grads"].update(
            {name: result["grads"].pop(name) for name in [next(iter(result["grads"]))]}
        ),
        lambda result: result["hidden.grad"].copy_(result["hidden.grad"].flip(0)),
        lambda result: result["random"].add_(1),
    ],
    ids=["last bit", "zeros for None", "routes", "order of keys", "swapped rows", "random stream"],
)
def test_the_comparison_sees(mutate):
    right, wrong = program_for_mutants(celmoe), program_for_mutants(celmoe)
    peer.assert_same(right, wrong)
    mutate(wrong)
    with pytest.raises(AssertionError):
        peer.assert_same(right, wrong)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("method", ["_run_level", "_select_context", "_normalize_routing", "_level_registry"])
def test_a_subclass_that_would_be_ignored_is_refused(version, method):
    """celmoe-vp's model calls these; an override that is never called would be silently without effect."""
    assert hasattr(peer.peer(version).HierarchicalCELMoE, method)
    with pytest.raises(celmoe.ConfigTypeError) as caught:
        type("Mine", (celmoe.HierarchicalCELMoE,), {method: lambda self, *args: None})
    assert str(caught.value).startswith(f"'Mine' must not override {method!r} (got a subclass written for celmoe-vp")


def test_other_subclasses_are_welcome():
    class Mine(celmoe.HierarchicalCELMoE):
        def forward(self, hidden, *args, **kwargs):
            return super().forward(hidden * 2, *args, **kwargs)

    class Later(Mine):
        pass

    assert issubclass(Later, celmoe.HierarchicalCELMoE)
