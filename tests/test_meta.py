"""Shapes without values: models and hidden states on meta, under every engine."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from celmoe import (
    CELMoEConfig,
    ExpertConfig,
    ExpertModule,
    ExpertResult,
    HierarchicalCELMoE,
    HierarchyLevelConfig,
    LearnedFusion,
    PlanError,
    RouteTypeError,
    RoutingCompiler,
)

WIDTH = 8
NUM_SAMPLES = 96


class Block(ExpertModule):
    """Normed, with a buffer and a loss; reads its context, if there is one."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("scale", torch.ones(WIDTH))

    def forward(self, batch):
        hidden = batch.hidden + torch.relu(self.linear(self.norm(batch.hidden))) * self.scale
        if batch.context is not None:
            hidden = hidden + batch.context["bias"].reshape(-1, *[1] * (hidden.dim() - 1))
        if batch.mask is not None:
            hidden = hidden * batch.mask.unsqueeze(-1)
        return ExpertResult(hidden, {"size": hidden.pow(2).mean()})


class WithAux(Block):
    """An expert that only the loop runs."""

    def forward(self, batch):
        result = super().forward(batch)
        result.aux["sum"] = result.hidden.sum()
        return result


class Recurrent(ExpertModule):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def forward(self, batch):
        hidden = batch.hidden if batch.hidden.dim() == 3 else batch.hidden.unsqueeze(1)
        return ExpertResult(self.gru(hidden)[0].reshape(batch.hidden.shape))


def config_of(fusion="learned", num_languages=24):
    families = {f"f{number}": ExpertConfig("f", gradient_scale=0.5 if number else None) for number in range(3)}
    languages = {f"e{number}": ExpertConfig("e", parent=f"f{number % 3}") for number in range(num_languages)}
    levels = [HierarchyLevelConfig("family", families), HierarchyLevelConfig("zh.x", languages)]
    return CELMoEConfig(WIDTH, levels, fusion_type=fusion)


def model_on_meta(expert, engine, fusion="learned", **options):
    with torch.device("meta"):
        return HierarchicalCELMoE(config_of(fusion, **options), lambda *_: expert(), engine=engine)


def routed(how, num_languages=24):
    routing = {"zh.x": [f"e{number % num_languages}" for number in range(NUM_SAMPLES)]}
    if how == "names":
        return routing
    plan = RoutingCompiler(config_of(num_languages=num_languages))(routing)
    return plan.to("meta") if how == "plan on meta" else plan


@pytest.mark.parametrize("shape", [(NUM_SAMPLES, WIDTH), (NUM_SAMPLES, 5, WIDTH)], ids=str)
@pytest.mark.parametrize("expert", [Block, WithAux, Recurrent])
@pytest.mark.parametrize("engine", ["looped", "auto", "grouped"])
def test_every_engine_gives_shapes(engine, expert, shape):
    # Without values a GRU is one small operation after another.
    number = 5 if expert is Recurrent else 24
    model = model_on_meta(expert, engine, "position_aware" if len(shape) == 3 else "learned", num_languages=number)
    for how in ("names", "plan", "plan on meta"):
        hidden = torch.empty(shape, device="meta", requires_grad=True)
        context = {"bias": torch.empty(NUM_SAMPLES, device="meta")}
        mask = torch.empty(shape[:-1], device="meta")
        output = model(hidden, routed(how, number), context, mask)
        assert output.fused_hidden.is_meta
        assert [each.hidden.shape for each in (*output.levels.values(),)] == [hidden.shape] * 2
        assert len(output.losses) == (0 if expert is Recurrent else 27)
        assert all(loss.is_meta for loss in output.losses.values())
        assert len(output.levels["family"].aux) == (3 if expert is WithAux else 0)
        model.zero_grad()
        output.fused_hidden.sum().backward()
        assert hidden.grad.shape == shape
        assert all(parameter.grad.is_meta for parameter in model.parameters() if parameter.grad is not None)
        assert model.level_modules["zh.x"][f"e{number - 1}"].state_dict().keys() == expert().state_dict().keys()
        with torch.no_grad():
            assert model(hidden, routed(how, number)).fused_hidden.shape == shape
        if how != "plan on meta":
            assert output.levels["family"].routes[:4] == ["f0", "f1", "f2", "f0"]


@pytest.mark.parametrize("engine", ["looped", "auto", "grouped"])
def test_a_model_that_was_on_meta_runs_with_values_afterwards(engine):
    model = model_on_meta(Block, engine)
    model(torch.empty(NUM_SAMPLES, WIDTH, device="meta"), routed("plan"))
    torch.manual_seed(0)
    values = HierarchicalCELMoE(config_of(), lambda *_: Block(), engine="looped").eval()
    model.load_state_dict(values.state_dict(), assign=True)
    model.eval()
    hidden = torch.randn(NUM_SAMPLES, WIDTH)
    for how in ("names", "plan"):
        torch.testing.assert_close(model(hidden, routed(how)).fused_hidden, values(hidden, routed(how)).fused_hidden)


def test_ids_on_meta_are_refused():
    model = model_on_meta(Block, "auto")
    hidden = torch.empty(NUM_SAMPLES, WIDTH, device="meta")
    with pytest.raises(RouteTypeError, match=r"must hold ids that can be read \(got a tensor on meta\)"):
        model(hidden, {"zh.x": torch.empty(NUM_SAMPLES, dtype=torch.long, device="meta")})
    with pytest.raises(PlanError, match="must lie where its ids can be read"):
        model(hidden, routed("plan on meta")).levels["zh.x"].routes  # noqa: B018  # made when read


def test_under_a_device_of_meta_plans_still_have_values():
    with torch.device("meta"):
        plan = routed("plan")
        part = plan.slice(1, 4)
    assert plan.device.type == part.device.type == "cpu"
    assert part.routes("family") == ["f1", "f2", "f0"]
    assert isinstance(model_on_meta(Block, "auto").fusion, LearnedFusion)
