"""Stacked experts beside ordinary ones: values, gradients, checkpoints, copies, and the limits of a view."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel

import celmoe
from celmoe import (
    ExpertModule,
    ExpertResult,
    HierarchicalCELMoE,
    StackedError,
)
from tests.stacks import (
    ENGINES,
    MLP,
    NAMES,
    ROUTES,
    WIDTH,
    Recurrent,
    assert_alike,
    assert_same_state,
    build,
    by_expert,
    expert_of,
    run,
    stacked,
)


class Buffered(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.rand(WIDTH))

    def forward(self, batch):
        return ExpertResult(super().forward(batch).hidden * self.scale)


class Losing(ExpertModule):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.weight = nn.Parameter(torch.rand(WIDTH))

    def forward(self, batch):
        rows = self.linear(batch.hidden) * self.weight
        return ExpertResult(rows, {"size": rows.square().mean()})


class Normed(ExpertModule):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))

    def forward(self, batch):
        return ExpertResult(self.linear(batch.hidden))


KINDS = [MLP, Buffered, Recurrent, Losing, Normed]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", KINDS)
def test_stacked_experts_compute_the_same(kind, engine):
    plain, model = build(kind, "looped"), stacked(kind, engine)
    for routes in (ROUTES, NAMES, ["e1", "e1", "e4"], NAMES[::-1]):
        assert_alike(plain, model, routes)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stack_is_one_parameter_for_each_tensor(kind):
    plain, model = build(kind), stacked(kind)
    in_experts = [path for path, _ in expert_of(plain, "e0").named_parameters()]
    shapes = {tuple(parameter.shape) for parameter in model.level_modules.parameters()}
    assert len(list(model.level_modules.parameters())) == len(in_experts)
    assert shapes == {(len(NAMES), *expert_of(plain, "e0").get_parameter(path).shape) for path in in_experts}
    assert {name: tuple(each.shape) for name, each in by_expert(model).items()} == {
        name: tuple(each.shape) for name, each in by_expert(plain).items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_have_the_experts_keys_both_ways(kind):
    plain, model = build(kind), stacked(kind)
    assert_same_state(plain, model)
    other = build(kind, seed=1)
    assert str(model.load_state_dict(other.state_dict())) == "<All keys matched successfully>"
    assert_same_state(other, model)
    assert_alike(other, model)
    plain.load_state_dict(model.state_dict())
    assert_same_state(plain, model)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_are_assigned(kind):
    other = build(kind, seed=1)
    with torch.device("meta"):
        empty = build(kind)
    for model in (stacked(kind), empty):
        celmoe.stack_experts(model)
        model.load_state_dict(other.state_dict(), assign=True)
        assert_same_state(other, model)
        assert_alike(other, model)


def test_a_checkpoint_that_lacks_keys_names_them():
    model = stacked()
    state = build(seed=1).state_dict()
    del state["level_modules.language.e3.up.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*level_modules\.language\.e3\.up\.weight"):
        model.load_state_dict(state)
    before = expert_of(model, "e3").up.weight.clone()
    assert model.load_state_dict(state, strict=False).missing_keys == ["level_modules.language.e3.up.weight"]
    assert torch.equal(expert_of(model, "e3").up.weight, before)


def test_a_single_expert_is_saved_and_loaded():
    model, other = stacked(), build(seed=1)
    expert_of(model, "e2").load_state_dict(expert_of(other, "e2").state_dict())
    found = expert_of(model, "e2").state_dict()
    assert list(found) == list(expert_of(other, "e2").state_dict())
    assert all(torch.equal(found[key], value) for key, value in expert_of(other, "e2").state_dict().items())


@pytest.mark.parametrize("kind", [MLP, Recurrent])
def test_unstacking_gives_ordinary_modules_of_the_same_values(kind):
    plain, model = build(kind), stacked(kind)
    run(plain), run(model)
    celmoe.unstack_experts(model)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert type(expert_of(model, "e0")) is kind
    assert all(type(each) is nn.Parameter for each in model.parameters())
    for name, tensor in by_expert(model).items():
        # Absent experts have none, as ordinary ones: an optimizer would move them by decay.
        wanted = by_expert(plain)[name].grad
        assert (tensor.grad is None) == (wanted is None), name
        if wanted is not None:
            torch.testing.assert_close(tensor.grad, wanted)
    assert_same_state(plain, model)
    model.zero_grad()
    assert_alike(plain, model)


def _saved_whole(model: HierarchicalCELMoE) -> HierarchicalCELMoE:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": _saved_whole,
    "averaged": lambda model: AveragedModel(model).module,
}


@pytest.mark.parametrize("kind", [Buffered, Recurrent])
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_is_stacked_and_has_memory_of_its_own(way, kind):
    plain, model = build(kind), stacked(kind)
    run(model)
    twin = COPIES[way](model)
    assert_same_state(model, twin)
    with torch.no_grad():
        next(iter(twin.level_modules.parameters())).add_(1.0)
    assert_alike(plain, model)
    twin.load_state_dict(plain.state_dict())
    assert_alike(plain, twin)


def test_a_copied_expert_is_an_ordinary_module():
    model = stacked()
    lone = copy.deepcopy(expert_of(model, "e2"))
    assert type(lone) is MLP
    assert all(type(each) is nn.Parameter for each in lone.parameters())
    with torch.no_grad():
        lone.up.weight.zero_()
    assert expert_of(model, "e2").up.weight.any()


@pytest.mark.parametrize("engine", ENGINES)
def test_stacks_move_and_are_cast_as_a_whole(engine):
    plain, model = build(Buffered, "looped").double(), stacked(Buffered, engine).double()
    for found, expected in zip(run(model, dtype=torch.float64), run(plain, dtype=torch.float64), strict=True):
        torch.testing.assert_close(found, expected)
    model.float(), plain.float()
    assert_alike(plain, model)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_functional_call_reads_the_given_stacks(engine):
    model, other = stacked(engine=engine), stacked(seed=1)
    run(model)
    given = {name: parameter.detach().clone() for name, parameter in other.named_parameters()}
    hidden = torch.randn(len(ROUTES), WIDTH)
    found = functional_call(model, given, (hidden, {"language": ROUTES})).fused_hidden
    torch.testing.assert_close(found, other(hidden, {"language": ROUTES}).fused_hidden)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_steps_stacks_as_it_steps_experts_that_are_all_present(optimizer):
    plain, model = build(engine="looped").double(), stacked().double()
    steps = [optimizer(each.parameters(), lr=0.1) for each in (plain, model)]
    for _ in range(3):
        for each, step in zip((plain, model), steps, strict=True):
            run(each, NAMES, torch.float64)
            step.step()
    ours = model.state_dict()
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(ours[key], value)


REFUSED = {
    "to": lambda expert: expert.to(torch.float64),
    "half": lambda expert: expert.half(),
    "zero_grad": lambda expert: expert.zero_grad(),
    "requires_grad_ of a module": lambda expert: expert.requires_grad_(False),
    "requires_grad_ of a tensor": lambda expert: expert.up.weight.requires_grad_(False),
    "a new parameter": lambda expert: setattr(expert.up, "weight", nn.Parameter(torch.zeros(1))),
    "a registered parameter": lambda expert: expert.up.register_parameter("weight", None),
    "a deleted parameter": lambda expert: delattr(expert.up, "weight"),
    "a gradient": lambda expert: setattr(expert.up.weight, "grad", None),
    "data": lambda expert: setattr(expert.up.weight, "data", torch.zeros(1)),
}


@pytest.mark.parametrize("attempt", REFUSED)
def test_what_a_view_can_not_do_is_refused(attempt):
    plain, model = build(engine="looped"), stacked()
    with pytest.raises(StackedError, match=r"(?s)'\w.*' must .* 'e1'"):
        REFUSED[attempt](expert_of(model, "e1"))
    assert_alike(plain, model)


def test_a_view_is_written_into_in_place():
    plain, model = build(engine="looped"), stacked()
    run(model)
    for each in (plain, model):
        with torch.no_grad():
            expert_of(each, "e2").up.weight.mul_(2.0)
            expert_of(each, "e2").up.bias.data.fill_(0.5)
            nn.init.zeros_(expert_of(each, "e0").down.weight)
    assert_alike(plain, model)
