"""Wrong life cycles that the random lives must find."""

from __future__ import annotations

import pytest
import torch

from celmoe.lifecycle import changes, newcomer, places
from celmoe.lifecycle.structure import Structure
from celmoe.routing.plan import RoutingPlan
from celmoe.stacked import assembly
from tests.lifecycle import live


def lives(*, is_stacked: bool, optimizer: str = "AdamW") -> None:
    for seed in range(6):
        live(seed, optimizer, is_stacked=is_stacked)


def test_state_by_position(monkeypatch):
    move = places.Places.move

    def by_position(self, *arguments):
        before = [self.optimizer.state.get(each) for group in self.optimizer.param_groups for each in group["params"]]
        move(self, *arguments)
        after = [each for group in self.optimizer.param_groups for each in group["params"]]
        self.optimizer.state.clear()
        for parameter, state in zip(after, before, strict=False):
            # Fused kernels write past the end of moments of other shapes.
            if state and state["exp_avg"].shape == parameter.shape:
                self.optimizer.state[parameter] = state

    monkeypatch.setattr(places.Places, "move", by_position)
    with pytest.raises(AssertionError):
        lives(is_stacked=False)


def test_ids_that_shift(monkeypatch):
    rename = Structure.rename

    def to_the_end(self, name, new):
        rename(self, name, new)
        experts, fallback = self._new[id(self.level)]
        self._new[id(self.level)] = (
            {**{key: each for key, each in experts.items() if key != new}, new: experts[new]},
            fallback,
        )

    monkeypatch.setattr(Structure, "rename", to_the_end)
    with pytest.raises(AssertionError):
        lives(is_stacked=False)


def test_moments_left_behind(monkeypatch):
    monkeypatch.setattr(places.Places, "_take_states", lambda *_: None)
    with pytest.raises(AssertionError, match=r"Tensor-likes|level_modules"):
        lives(is_stacked=True)


def test_momentum_left_behind(monkeypatch):
    monkeypatch.setattr(places.Places, "_take_states", lambda *_: None)
    with pytest.raises(AssertionError, match=r"Tensor-likes|level_modules"):
        lives(is_stacked=True, optimizer="SGD")


def test_a_neighbours_moments(monkeypatch):
    cut = places.cut

    def of_the_next(own, part, *others):
        return cut(own, part._replace(member=(part.member + 1) % len(part.parameter)), *others)

    monkeypatch.setattr(places, "cut", of_the_next)
    with pytest.raises(AssertionError):
        lives(is_stacked=True)


def test_a_neighbours_values(monkeypatch):
    stack_members = changes.stack_members

    def rolled(registry, names, number):
        stack = stack_members(registry, names, number)
        with torch.no_grad():
            for path in stack.keys:
                stack.whole(path).copy_(stack.whole(path).roll(1, 0))
        return stack

    monkeypatch.setattr(changes, "stack_members", rolled)
    with pytest.raises(AssertionError, match=r"Scalars|Tensor-likes"):
        lives(is_stacked=True)


def test_a_stale_plan_taken(monkeypatch):
    monkeypatch.setattr(RoutingPlan, "require_layout", lambda *_: None)
    with pytest.raises(AssertionError, match="stale plan"):
        lives(is_stacked=False)


def test_absent_experts_stepped(monkeypatch):
    monkeypatch.setattr(changes._Opened, "give_back", lambda *_: None)
    with pytest.raises(AssertionError):
        lives(is_stacked=True)


def test_gradients_lost(monkeypatch):
    give_back = changes._Opened.give_back

    def without(self, stack, *others):
        give_back(self, stack, *others)
        for path in stack.keys:
            stack.whole(path).grad = None

    monkeypatch.setattr(changes._Opened, "give_back", without)
    with pytest.raises(AssertionError):
        lives(is_stacked=True)


def test_frozen_experts_trained(monkeypatch):
    monkeypatch.setattr(assembly, "is_frozen", lambda _: False)
    with pytest.raises(AssertionError):
        lives(is_stacked=True)


def test_parameters_shared_with_the_source(monkeypatch):
    warm_start = newcomer._warm_start

    def shared(expert, source, *others):
        warm_start(expert, source, *others)
        for mine, theirs in zip(expert.parameters(), source.parameters(), strict=True):
            mine.data = theirs.data

    monkeypatch.setattr(newcomer, "_warm_start", shared)
    with pytest.raises(AssertionError):
        lives(is_stacked=False)


def test_parameters_that_stay_in_the_optimizer(monkeypatch):
    monkeypatch.setattr(changes, "_dropped", lambda *_: set())
    with pytest.raises(AssertionError, match="parameters of the optimizer"):
        lives(is_stacked=False)


def test_parameters_at_the_end_of_the_group(monkeypatch):
    monkeypatch.setattr(places, "sort", lambda *_: None)
    monkeypatch.setattr(places, "insert", lambda shares, share, _: shares.append(share))
    with pytest.raises(AssertionError, match="parameters of the optimizer"):
        lives(is_stacked=False)
