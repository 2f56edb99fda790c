"""Threads, modes, copies and shared modules: unusual, but legal."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from functools import partial

import pytest
import torch
from torch.autograd import forward_ad

from celmoe import CELMoEConfig, ExpertModule, ExpertResult, HierarchicalCELMoE, HierarchyLevelConfig
from celmoe.reference import reference_forward
from tests.odd_programs import B, close
from tests.refusals import GOOD, WIDTH, Counting, build, level, rows, two_levels

pytestmark = pytest.mark.usefixtures("_as_few_and_as_many")


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_scaled_gradient_scales_tangents_too(requires_grad):
    """There is one derivative, in either mode, even if nothing else records."""
    config = CELMoEConfig(WIDTH, [level("language", ["ru"])], use_learned_fusion=False)
    config.levels[0].experts["ru"].gradient_scale = 0.5

    class Doubling(ExpertModule):
        def forward(self, batch):
            return ExpertResult(2 * batch.hidden)

    model = HierarchicalCELMoE(config, lambda *_: Doubling())
    hidden = rows(3).requires_grad_(requires_grad)
    with forward_ad.dual_level():
        output = model(forward_ad.make_dual(hidden, torch.ones_like(hidden)))
        tangent = forward_ad.unpack_dual(output.fused_hidden).tangent
    assert torch.equal(tangent, torch.ones_like(hidden))
    _, tangent = torch.func.jvp(lambda x: model(x).fused_hidden, (rows(3),), (torch.ones(3, WIDTH),))
    assert torch.equal(tangent, torch.ones_like(hidden))


def test_a_hierarchy_as_an_expert_of_a_hierarchy():
    class Nested(ExpertModule):
        def __init__(self):
            super().__init__()
            self.inner = HierarchicalCELMoE(CELMoEConfig(WIDTH, [level("inner", ("a", "b"))]), lambda *_: Counting())

        def forward(self, batch):
            output = self.inner(batch.hidden, {"inner": batch.context["inner"]})
            return ExpertResult(output.fused_hidden, output.losses)

    torch.manual_seed(0)
    model = HierarchicalCELMoE(CELMoEConfig(WIDTH, [level("outer", ("x", "y"))]), lambda *_: Nested()).eval()
    inner = torch.tensor([0, 1, 1, 0])
    output = model(rows(B), {"outer": ["x", "y", "x", "y"]}, {"inner": inner})
    expected = reference_forward(model, rows(B), {"outer": ["x", "y", "x", "y"]}, {"inner": inner})
    torch.testing.assert_close(output.fused_hidden, expected.fused_hidden)
    assert list(output.losses) == [f"outer.{outer}.inner.{name}.size" for outer in "xy" for name in "ab"]


def test_several_threads_share_a_model_and_its_plans():
    model = build().eval()
    routings = [{"family": [number % 3] * 16, "language": [(i * number) % 4 for i in range(16)]} for number in range(4)]
    plans = [model.compile_routing(routing) for routing in routings]
    expected = [model(rows(16), routing).fused_hidden.detach() for routing in routings]
    wrong = []

    def serve(number):
        with torch.inference_mode():
            for turn in range(40):
                source = plans if turn % 2 else routings
                output = model(rows(16), source[number])
                if not torch.equal(output.fused_hidden, expected[number]):
                    wrong.append(number)
                if output.levels["language"].routes != plans[number].routes("language"):
                    wrong.append(number)

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_plans_cross_modes():
    model = build().eval()
    with torch.inference_mode():
        plan = model.compile_routing(GOOD)
        model(rows(), plan)
    again = pickle.loads(pickle.dumps(copy.deepcopy(plan)))
    for each in (plan, again, plan.to("cpu")):
        hidden = rows().requires_grad_()
        model(hidden, each).fused_hidden.sum().backward()
        assert hidden.grad is not None
    with torch.inference_mode():
        inference_rows = rows() * 1
        model(inference_rows, plan)
    model(inference_rows, plan)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_whole_models_of_other_dtypes(dtype):
    model = build().eval().to(dtype)
    hidden = rows().to(dtype).requires_grad_()
    output = model(hidden, GOOD)
    output.fused_hidden.sum().backward()
    assert output.fused_hidden.dtype == output.levels["family"].hidden.dtype == hidden.grad.dtype == dtype


def test_autocast():
    model = build().eval()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(rows().requires_grad_(), GOOD)
        expected = reference_forward(model, rows(), GOOD)
    assert output.levels["family"].hidden.dtype == torch.bfloat16
    assert torch.equal(output.levels["language"].hidden, expected.levels["language"].hidden)
    output.fused_hidden.float().sum().backward()
    assert model.level_modules["language"]["ru"].linear.weight.grad.dtype == torch.float32


def test_copies_of_a_model_are_their_own():
    model = build(two_levels())
    for copied in (copy.deepcopy(model), loaded(model)):
        copied.config.levels[1].fallback_expert = "de"
        copied.config.levels[0].fallback_expert = "slavic"
        assert copied.compile_routing(None, 2).routes("language") == ["de", "de"]
        assert copied.levels[1] is copied.config.levels[1]
        with pytest.raises(KeyError):
            model.compile_routing(None, 2)
        with torch.no_grad():
            next(copied.parameters()).zero_()
        assert next(model.parameters()).abs().sum() > 0


def loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_copies_of_an_output_have_routes():
    import dataclasses

    model = build().eval()
    with torch.no_grad():
        output = model(rows(), GOOD)
    for each in (copy.deepcopy(output), copy.copy(output), pickle.loads(pickle.dumps(output))):
        assert each.levels["language"].routes == GOOD["language"]
    with torch.no_grad():
        fresh = model(rows(), GOOD).levels["language"]
    assert dataclasses.replace(fresh, name="x").routes == GOOD["language"]
    assert dataclasses.asdict(fresh)["routes"] == GOOD["language"]
    assert "routes=['ru', 'de', 'fr']" in repr(fresh)
    assert fresh.routes is fresh.routes
    fresh.routes = ["mine"]
    assert fresh.routes == ["mine"]
    with pytest.raises(AttributeError, match="'LevelOutput' object has no attribute 'nonsense'"):
        _ = fresh.nonsense


def test_routes_of_an_output_are_nobody_else_s_list():
    model = build().eval()
    routing = copy.deepcopy(GOOD)
    plan = model.compile_routing(routing)
    first, second = model(rows(), plan), model(rows(), plan)
    first.levels["language"].routes.clear()
    assert second.levels["language"].routes == GOOD["language"] == routing["language"]
    # A list that changes after the call is the caller's affair.
    output = model(rows(), routing)
    routing["language"].clear()
    assert output.levels["language"].routes == GOOD["language"]


def test_the_same_list_with_other_names_is_another_routing():
    model = build().eval()
    routing = copy.deepcopy(GOOD)
    model(rows(), routing)
    routing["language"][:] = ["pl", "pl", "ru"]
    assert model(rows(), routing).levels["language"].routes == ["pl", "pl", "ru"]


def test_one_module_for_several_experts_and_levels():
    shared = Counting()
    torch.manual_seed(0)
    model = HierarchicalCELMoE(two_levels(), lambda *_: shared).eval().double()
    found = []
    for forward in (model, partial(reference_forward, model)):
        model.zero_grad()
        hidden = rows().double().requires_grad_()
        forward(hidden, GOOD).fused_hidden.pow(2).sum().backward()
        found.append((hidden.grad, shared.linear.weight.grad))
    for mine, expected in zip(*found, strict=True):
        close(mine, expected)


def test_a_config_read_anew_at_every_call():
    """An ExpertConfig may be swapped for another: staged training does it with dataclasses.replace."""
    import dataclasses

    model = build().eval()
    for detached in (False, True, False):
        experts = model.config.levels[0].experts
        for name in experts:
            experts[name] = dataclasses.replace(experts[name], stop_gradient_from_parent=detached)
        hidden = rows().requires_grad_()
        model(hidden, GOOD).fused_hidden.sum().backward()
        assert (hidden.grad is None) == detached


def test_a_level_left_out_of_the_model_by_enabled_flags_set_later():
    model = build().eval()
    model.config.levels[0].enabled = False
    assert list(model(rows(), GOOD).levels) == ["family", "language"]
    assert isinstance(model.levels[0], HierarchyLevelConfig)


@pytest.mark.parametrize(
    ("routing", "kind"),
    [
        ({"family": [0, -1, 1], "language": [0, 1, 2]}, ValueError),
        ({"family": [True, False, True], "language": [0, 1, 2]}, ValueError),
        ({**GOOD, "galaxy": ["a"] * 3}, KeyError),
    ],
)
def test_the_oracle_refuses_what_the_model_refuses(routing, kind):
    model = build()
    for forward in (model, partial(reference_forward, model)):
        with pytest.raises((kind, TypeError)):
            forward(rows(), routing)


def test_the_oracle_refuses_another_models_plan():
    plan = build(CELMoEConfig(WIDTH, [level("family"), level("language")])).compile_routing(
        {"family": "a", "language": "b"}, 3
    )
    for forward in (build(), partial(reference_forward, build())):
        with pytest.raises(ValueError, match="plan"):
            forward(rows(), plan)
