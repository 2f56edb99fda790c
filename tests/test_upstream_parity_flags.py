"""Flags of training, and odd routings, give what celmoe-vp gives."""

import pytest

from tests import peer
from tests.peer import FIRST, SECOND, THIRD, make_hidden, make_model, pass_through, routing, train
from tests.upstream_programs import (
    _looped,  # noqa: F401  # an autouse fixture
    both,
    compare,
    every_version,
)

pytestmark = pytest.mark.usefixtures("_as_few_and_as_many")


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
