"""Programs written for celmoe-vp give the same numbers here, bit for bit if the engine is ``looped``.

Each program is one text that runs on both libraries; `tests.peer` has the parts and the comparison.
"""

import pytest
import torch

from tests import peer
from tests.peer import WIDTH, make_hidden, make_model, pass_through, routing, train
from tests.upstream_programs import (
    _looped,  # noqa: F401  # an autouse fixture
    both,
    compare,
    every_version,
)

pytestmark = pytest.mark.usefixtures("_as_few_and_as_many")


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
