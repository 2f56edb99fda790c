"""Programs written for celmoe-vp give the same numbers here, bit for bit if the engine is ``looped``.

Each program is one text that runs on both libraries; `tests.peer` has the parts and the comparison.
"""

import copy
import dataclasses
import sys

import pytest
import torch
from torch import nn

import celmoe
from tests import peer
from tests.features import loads_decompositions
from tests.peer import FIRST, SECOND, THIRD, VERSIONS, WIDTH, make_hidden, make_model, pass_through, routing, train

pytestmark = pytest.mark.usefixtures("_as_few_and_as_many")


@pytest.fixture(autouse=True)
def _looped(monkeypatch):
    """The programs are not changed: the environment alone asks for the engine that promises equal bits."""
    monkeypatch.setenv("CELMOE_ENGINE", "looped")


def compare(program, version, *, tolerance=0.0):
    theirs = program(peer.peer(version))
    ours = program(celmoe)
    peer.assert_same(ours, theirs, tolerance=tolerance)
    return ours


both = pytest.mark.parametrize("version", [FIRST, THIRD])
every_version = pytest.mark.parametrize("version", VERSIONS)
kinds = pytest.mark.parametrize("kind", peer.BODIES)


# --- a pass, a training ----------------------------------------------------------------------------------------------


@every_version
@kinds
@pytest.mark.parametrize("positions", [None, 3])
def test_a_pass_is_equal_to_the_bit(version, kind, positions):
    """Initial parameters, their order, routes, outputs, every gradient and the random stream after dropout."""

    def program(lib):
        return pass_through(make_model(lib, kind=kind), make_hidden(positions=positions), routing())

    result = compare(program, version)
    assert result["grads"]["level_modules.language.nl.body." + first_of(result, "language.nl.body.")] is None
    assert result["hidden.grad"].abs().sum() > 0


def first_of(result, part):
    return next(name.split(part)[1] for name in result["grads"] if part in name)


@every_version
@kinds
def test_ten_steps_of_adamw_are_equal(version, kind):
    def program(lib):
        return train(make_model(lib, kind=kind))

    compare(program, version)


@both
def test_dropout_draws_the_same_numbers_in_experts_and_fusion(version):
    def program(lib):
        model = make_model(lib, kind="dropout", fusion_dropout=0.5)
        return [pass_through(model, make_hidden(positions=4, seed=seed), routing()) for seed in range(3)]

    first = compare(program, version)[0]
    assert (first["fused"] == 0).float().mean() > 0.2


@both
def test_large_groups_and_many_experts(version):
    """Widths and groups at which matrix products take their blocked paths."""

    def program(lib):
        names = [f"e{index}" for index in range(40)]
        level = lib.HierarchyLevelConfig("language", {name: lib.ExpertConfig(name) for name in names})
        model = make_model(lib, kind="linear", levels=[level], width=64)
        draws = torch.randint(40, (1500,), generator=torch.Generator().manual_seed(3)).tolist()
        hidden = peer.random(1500, 64, seed=4).requires_grad_()
        return pass_through(model, hidden, {"language": [names[each] for each in draws]})

    compare(program, version)


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(version, dtype):
    def program(lib):
        model = make_model(lib, kind="mlp").to(dtype)
        return pass_through(model, make_hidden().detach().to(dtype).requires_grad_(), routing())

    compare(program, version)


@both
def test_evaluation_without_gradients(version):
    def program(lib):
        model = make_model(lib, kind="dropout", fusion_dropout=0.5).eval()
        with torch.no_grad():
            output = model(make_hidden(), routing())
        return peer.levels_of(output), output.fused_hidden

    compare(program, version)


@both
def test_an_empty_batch(version):
    def program(lib):
        output = make_model(lib)(torch.zeros(0, WIDTH), {"family": [], "language": []})
        return peer.levels_of(output), output.fused_hidden

    compare(program, version)


# --- mask, context, losses, aux --------------------------------------------------------------------------------------


def rich_pass(model, *, positions=4):
    mask = (peer.random(peer.BATCH, positions, seed=5) > 0).float()
    embedding = peer.random(peer.BATCH, positions, WIDTH, seed=6).requires_grad_()
    result = pass_through(
        model, make_hidden(positions=positions), routing=routing(), context={"embedding": embedding}, mask=mask
    )
    return result, embedding.grad


@every_version
def test_mask_context_losses_and_aux(version):
    def program(lib):
        model = make_model(lib, lambda *_: peer.rich_expert(lib))
        return rich_pass(model)

    result, context_grad = compare(program, version)
    assert context_grad.abs().sum() > 0
    assert list(result["levels"]["language"]["aux"]) == ["fr", "ru"]
    assert "language.ru.size" in result["losses"]


@both
def test_a_bare_tensor_as_context(version):
    def program(lib):
        class Adding(lib.ExpertModule):
            def forward(self, batch):
                return lib.ExpertResult(batch.hidden * batch.context)

        context = peer.random(peer.BATCH, WIDTH, seed=7).requires_grad_()
        result = pass_through(make_model(lib, lambda *_: Adding()), make_hidden(), routing(), context)
        return result, context.grad

    compare(program, version)


@both
def test_what_experts_are_called_with(version):
    """Order of experts, their rows, mask rows, context rows and state; and the arguments of the factory."""

    def program(lib):
        recorder = peer.Recorder(lib)
        levels = peer.three_levels(lib, language={"metadata": {"depth": 2}})
        model = make_model(lib, recorder, levels=levels)
        mask = torch.arange(peer.BATCH) % 3 == 0
        context = {"id": torch.arange(peer.BATCH), "note": "shared"}
        model(make_hidden(), routing(), context, mask)
        return recorder.made, recorder.calls

    made, calls = compare(program, version)
    assert made[-1] == ("language", "nl", {"depth": 2})
    assert [call["state"]["expert"] for call in calls] == [
        *["core", "germanic", "romance", "slavic"],
        *["de", "fr", "it", "pl", "ru"],
    ]


@both
def test_an_int_scalar_and_none_in_the_context(version):
    def program(lib):
        class Scaling(lib.ExpertModule):
            def forward(self, batch):
                assert batch.context["nothing"] is None
                return lib.ExpertResult(batch.hidden * batch.context["factor"])

        model = make_model(lib, lambda *_: Scaling())
        return pass_through(model, make_hidden(), routing(), {"factor": 3, "nothing": None})

    compare(program, version)


# --- losses ----------------------------------------------------------------------------------------------------------


def all_losses(lib):
    """Every scope, a mapping, weights, two terms of one name; the arguments are used, so their order is tested."""
    api = lib.CELMoELossAPI()
    api.add_global("fit", lambda output, targets, context: (output.fused_hidden - targets).square().mean(), weight=0.5)
    api.add_global("twice", lambda output, targets, context: output.fused_hidden.mean() * context["scale"])
    api.add_global("twice", lambda output, targets, context: output.fused_hidden.std(), 2.0)
    api.add_level("family", "parts", lambda level, output, targets, context: by_route(level, output), weight=0.25)
    api.add_level("language", "norm", lambda level, output, targets, context: level.hidden.norm() * context["scale"])
    api.add_bridge(
        "universal",
        "language",
        "near",
        lambda parent, child, output, targets, context: (parent.hidden - child.hidden - targets).abs().mean(),
        weight=3.0,
    )
    return api


def by_route(level, output):
    return {
        name: level.hidden[[route == name for route in level.routes]].mean() * len(output.levels)
        for name in sorted(set(level.routes))
    }


@every_version
def test_losses(version):
    def program(lib):
        model = make_model(lib, lambda *_: peer.rich_expert(lib))
        targets = peer.random(peer.BATCH, 4, WIDTH, seed=8)
        api, bundles = all_losses(lib), []

        def loss(output):
            bundle = api.compute(output, targets, {"scale": 2.0})
            bundles.append(bundle)
            return bundle.total

        mask = torch.ones(peer.BATCH, 4)
        context = {"embedding": peer.random(peer.BATCH, 4, WIDTH, seed=6)}
        passed = pass_through(model, make_hidden(positions=4), routing(), context, mask, loss=loss)
        (bundle,) = bundles
        terms = [(term.name, term.value.detach(), term.weight, term.scope) for term in bundle.terms]
        return passed, terms, bundle.total.detach(), bundle.as_dict()

    _, terms, _, shown = compare(program, version)
    assert [name for name, *_ in terms][-7:] == [
        "global.fit",
        "global.twice",
        "global.twice",
        *(f"family.parts.{name}" for name in sorted(peer.FAMILIES)),
        "language.norm",
        "universal->language.near",
    ][-7:]
    assert len(shown) == len(terms) - 1


@both
def test_a_bundle_by_hand(version):
    def program(lib):
        value = torch.tensor(1.5, requires_grad=True)
        bundle = lib.LossBundle([lib.LossTerm("first", value)])
        bundle.add("second", value * 2, 0.5, "here")
        bundle.add("third", value * 4, weight=2.0)
        bundle.total.backward()
        try:
            empty = lib.LossBundle().total
        except ValueError:
            empty = "ValueError"
        return bundle.terms, bundle.total.detach(), bundle.as_dict(), value.grad, empty, lib.LossBundle().as_dict()

    compare(program, version)


@both
def test_registered_losses_are_seen_in_the_lists(version):
    def program(lib):
        api = all_losses(lib)
        return (
            [(name, weight) for name, weight, _ in api.global_losses],
            {level: [(name, weight) for name, weight, _ in specs] for level, specs in api.level_losses.items()},
            [(parent, child, name, weight) for parent, child, name, weight, _ in api.bridge_losses],
        )

    compare(program, version)


# --- gradient flags, stages ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [FIRST, SECOND])
@pytest.mark.parametrize("which", ["family", "language"])
def test_stop_gradient_from_parent(version, which):
    def program(lib):
        levels = peer.three_levels(lib, **{which: {"stop_gradient_from_parent": True}})
        return pass_through(make_model(lib, levels=levels), make_hidden(positions=2), routing())

    compare(program, version)


@pytest.mark.parametrize("version", [FIRST, SECOND])
def test_stop_gradient_of_some_experts_of_a_level(version):
    def program(lib):
        levels = peer.three_levels(lib)
        levels[2].experts["ru"].stop_gradient_from_parent = True
        levels[2].experts["fr"].stop_gradient_from_parent = True
        return pass_through(make_model(lib, levels=levels), make_hidden(), routing())

    compare(program, version)


@pytest.mark.parametrize("version", [FIRST, SECOND])
def test_an_isolated_level_leaves_no_gradient_above(version):
    """Nothing but the last level is trained: the levels above keep ``None``, hidden included."""

    def program(lib):
        levels = peer.three_levels(lib, language={"stop_gradient_from_parent": True})
        model, hidden = make_model(lib, levels=levels), make_hidden()
        return pass_through(model, hidden, routing(), loss=lambda output: output.levels["language"].hidden.sum())

    result = compare(program, version)
    assert result["hidden.grad"] is None


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.3, 1.0, 2.0])
def test_gradient_scale(scale):
    def program(lib):
        levels = peer.three_levels(lib, family={"gradient_scale": scale}, language={"gradient_scale": 0.7})
        return pass_through(make_model(lib, levels=levels), make_hidden(positions=2), routing())

    compare(program, THIRD)


def test_gradient_scale_of_some_experts_of_a_level():
    def program(lib):
        levels = peer.three_levels(lib)
        for name, scale in {"ru": 0.25, "fr": 0.0, "de": 1.5}.items():
            levels[2].experts[name].gradient_scale = scale
        return pass_through(make_model(lib, levels=levels), make_hidden(), routing())

    compare(program, THIRD)


def test_gradient_scale_beside_the_flag():
    """morphoformer 6.0.0 always sets both. The scale decides."""

    def program(lib):
        both_given = {"stop_gradient_from_parent": True, "gradient_scale": 0.4}
        levels = peer.three_levels(lib, language=both_given)
        return pass_through(make_model(lib, levels=levels), make_hidden(), routing())

    compare(program, THIRD)


@pytest.mark.parametrize("version", [FIRST, SECOND])
def test_staged_training_flips_the_flags_between_steps(version):
    def program(lib):
        model = make_model(lib, kind="dropout")

        def between(step):
            for expert in model.config.levels[2].experts.values():
                expert.stop_gradient_from_parent = step % 3 == 0
            for parameter in model.level_modules["family"].parameters():
                parameter.requires_grad_(step % 2 == 0)

        return train(model, between=between)

    compare(program, version)


def test_staged_training_turns_the_scale_between_steps():
    def program(lib):
        model = make_model(lib)

        def between(step):
            for expert in model.levels[1].experts.values():
                expert.gradient_scale = step / 8

        return train(model, between=between)

    compare(program, THIRD)


# --- routing ---------------------------------------------------------------------------------------------------------


@every_version
def test_fallback_and_broadcast(version):
    def program(lib):
        levels = peer.three_levels(lib)
        levels[1].fallback_expert = "slavic"
        model = make_model(lib, levels=levels)
        first = pass_through(model, make_hidden(), {"language": list(peer.LANGUAGE_ROUTES)})
        levels[1].fallback_expert = "romance"
        levels[2].fallback_expert = "de"
        return first, pass_through(model, make_hidden(), None)

    compare(program, version)


@both
def test_disabled_levels(version):
    def program(lib):
        levels = peer.three_levels(lib)
        levels[1].enabled = False
        return pass_through(make_model(lib, levels=levels), make_hidden(), routing())

    assert list(compare(program, version)["levels"]) == ["universal", "language"]


@both
def test_one_expert_routed_to_everywhere(version):
    def program(lib):
        everywhere = {"family": ["slavic"] * peer.BATCH, "language": ["ru"] * peer.BATCH}
        return pass_through(make_model(lib), make_hidden(), everywhere)

    compare(program, version)


@both
def test_a_batch_in_expert_order_and_nested_levels(version):
    """The library gathers nothing here, and celmoe-vp's numbers are still met."""

    def program(lib):
        ordered = ["de"] * 3 + ["fr"] * 4 + ["pl"] * 2 + ["ru"] * 2
        names = {"family": [peer.FAMILY_OF[each] for each in ordered], "language": ordered}
        return pass_through(make_model(lib, kind="dropout"), make_hidden(), names)

    compare(program, version)


@both
@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"language": ["ru"] * 3}, ValueError),
        ({"family": ["slavic"] * peer.BATCH}, KeyError),
        ({"family": ["slavic"] * peer.BATCH, "language": ["xx"] * peer.BATCH}, KeyError),
        (None, KeyError),
    ],
    ids=["length", "missing level", "unknown expert", "no routing"],
)
def test_wrong_routes_raise_what_callers_catch(version, wrong, error):
    def program(lib):
        levels = peer.three_levels(lib)[1:]
        levels[0].fallback_expert = "slavic"
        model = make_model(lib, levels=levels)
        with pytest.raises(error):
            model(make_hidden(), wrong)
        return error.__name__

    compare(program, version)


def test_the_routing_helpers():
    def program(lib):
        with pytest.raises(ValueError):
            lib.validate_routing_length("family", ["slavic"], 2)
        base, extra = {"family": ["a"], "language": ["x"]}, {"language": ["y"], "universal": ["c"]}
        merged = lib.merge_routing(base, extra)
        return [
            lib.routing_constant("ru", 3),
            lib.validate_routing_length("family", ["slavic"] * 2, 2),
            merged,
            lib.merge_routing(None, extra),
            lib.merge_routing({}, {}),
            base,
            extra,
        ]

    compare(program, THIRD)


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
