"""Wrong life cycles that random lives must find, each within a bounded number of steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import celmoe.optim.by_name
from celmoe import CELMoEError, loading
from celmoe.lifecycle import changes, newcomer, places, subsets
from celmoe.lifecycle.structure import Structure
from celmoe.optim import members
from celmoe.routing.plan import RoutingPlan
from celmoe.stacked import assembly, freezing
from celmoe.stacked.stack import Stack
from tests.lives import Lives, live
from tests.test_experts_loading import test_a_refused_load_changes_nothing as refused_loads_change_nothing

# A fault must be found within so many steps. Most are within 150.
MOST_STEPS = 6000
Patch = pytest.MonkeyPatch
STACKED = {"is_stacked": True}
ORDINARY = {"is_stacked": False, "has_groups": False}


def by_position(patch: Patch) -> None:
    move = places.Places.move

    def wrong(self, *arguments):
        before = [self.optimizer.state.get(each) for group in self.optimizer.param_groups for each in group["params"]]
        move(self, *arguments)
        after = [each for group in self.optimizer.param_groups for each in group["params"]]
        self.optimizer.state.clear()
        for parameter, state in zip(after, before, strict=False):
            # Fused kernels write past the end of moments of other shapes.
            if state and all(each.shape == parameter.shape for each in state.values() if getattr(each, "ndim", 0)):
                self.optimizer.state[parameter] = state

    patch.setattr(places.Places, "move", wrong)


def ids_that_shift(patch: Patch) -> None:
    rename = Structure.rename

    def wrong(self, name, new):
        rename(self, name, new)
        experts, fallback = self._new[id(self.level)]
        self._new[id(self.level)] = (
            {**{key: each for key, each in experts.items() if key != new}, new: experts[new]},
            fallback,
        )

    patch.setattr(Structure, "rename", wrong)


def children_left_behind(patch: Patch) -> None:
    edited = Structure._edited
    patch.setattr(
        Structure,
        "_edited",
        lambda self, expert, **fields: edited(self, expert, **{"parent": None} if "parent" in fields else fields),
    )


def a_fallback_left_behind(patch: Patch) -> None:
    rename = Structure.rename

    def wrong(self, name, new):
        rename(self, name, new)
        self._new[id(self.level)] = self._new[id(self.level)][0], None

    patch.setattr(Structure, "rename", wrong)


def moments_left_behind(patch: Patch) -> None:
    patch.setattr(places.Places, "_take_states", lambda *_: None)


def an_optimizer_that_a_rename_forgets(patch: Patch) -> None:
    move = places.Places.move
    patch.setattr(
        places.Places,
        "move",
        lambda self, made, renamed, *others: None if renamed else move(self, made, renamed, *others),
    )


def a_neighbours_moments(patch: Patch) -> None:
    cut = places.cut
    patch.setattr(
        places,
        "cut",
        lambda own, part, *others: cut(own, part._replace(member=(part.member + 1) % len(part.parameter)), *others),
    )


def a_stack_in_another_order(patch: Patch) -> None:
    stacked = assembly._stacked

    def wrong(tensors, **options):
        whole = stacked(tensors, **options)
        whole.data = whole.data.flip(0)
        return whole

    patch.setattr(assembly, "_stacked", wrong)


def gradients_lost(patch: Patch) -> None:
    stack_members = changes.stack_members

    def wrong(*arguments):
        stack = stack_members(*arguments)
        for path in stack.keys:
            stack.whole(path).grad = None
        return stack

    patch.setattr(changes, "stack_members", wrong)


def absent_experts_stepped(patch: Patch) -> None:
    patch.setattr(assembly, "set_reached", lambda *_: None)


def stale_plans_taken(patch: Patch) -> None:
    patch.setattr(RoutingPlan, "require_layout", lambda *_: None)


def frozen_experts_trained(patch: Patch) -> None:
    patch.setattr(assembly, "is_frozen", lambda _: False)


def a_base_that_unfreeze_trains(patch: Patch) -> None:
    unfreeze = freezing.unfreeze

    def wrong(experts, everyone):
        unfreeze(experts, everyone)
        for expert in experts:
            for each in expert.parameters():
                if isinstance(each, torch.nn.Parameter):
                    each.requires_grad_()

    patch.setattr("celmoe.hierarchy.unfreeze", wrong)


def a_freeze_that_clears_the_neighbours(patch: Patch) -> None:
    freeze = Stack.freeze

    def wrong(self, members):
        freeze(self, members)
        for path in self.keys:
            if self.whole(path).grad is not None:
                self.whole(path).grad.zero_()

    patch.setattr(Stack, "freeze", wrong)


def parameters_shared_with_the_source(patch: Patch) -> None:
    warm_start = newcomer._warm_start

    def wrong(expert, source, *others):
        warm_start(expert, source, *others)
        for mine, theirs in zip(expert.parameters(), source.parameters(), strict=True):
            mine.data = theirs.data

    patch.setattr(newcomer, "_warm_start", wrong)


def buffers_without_a_warm_start(patch: Patch) -> None:
    warm_start = newcomer._warm_start

    def wrong(expert, *others):
        kept = {name: each.clone() for name, each in expert.named_buffers()}
        warm_start(expert, *others)
        for name, each in expert.named_buffers():
            each.copy_(kept[name])

    patch.setattr(newcomer, "_warm_start", wrong)


def parameters_that_stay_in_the_optimizer(patch: Patch) -> None:
    patch.setattr(changes, "_dropped", lambda *_: set())


def parameters_at_the_end_of_the_group(patch: Patch) -> None:
    patch.setattr(places, "sort", lambda *_: None)
    patch.setattr(places, "insert", lambda shares, share, _: shares.append(share))


def the_first_group_for_all(patch: Patch) -> None:
    patch.setattr(changes, "groups_for", lambda places, rows, *_: [dict.fromkeys(rows, 0) for _ in places])


def replaced_members_stepped_twice(patch: Patch) -> None:
    followed = places.Places._followed

    def wrong(self, number, after, gone):
        found = followed(self, number, after, gone)
        own = [each for each, members in found if members is None and each.dim() == 1]
        return found + [places.GroupShare(each, None) for each in own[:1]]

    patch.setattr(places.Places, "_followed", wrong)


def a_refused_call_that_leaves_a_key(patch: Patch) -> None:
    add = Structure.add

    def wrong(self, name, expert):
        has_name = name in self.level.experts
        self.level.experts.setdefault(name, expert)
        if not has_name:
            self._check()
            del self.level.experts[name]
        add(self, name, expert)

    patch.setattr(Structure, "add", wrong)


def a_refused_call_that_draws_numbers(patch: Patch) -> None:
    patch.setattr(changes, "random_numbers_given_back", torch.enable_grad)


def a_refused_load_that_has_loaded(patch: Patch) -> None:
    fit = loading._require_fit

    def wrong(module, state, where):
        own = module.state_dict()
        if own.keys() == state.keys():
            module.load_state_dict(
                {key: own[key] if own[key].shape != each.shape else each for key, each in state.items()}
            )
        fit(module, state, where)

    patch.setattr(loading, "_require_fit", wrong)


def names_that_loading_ignores(patch: Patch) -> None:
    renamed = loading._renamed
    patch.setattr(loading, "_renamed", lambda saved, experts, rename: renamed(saved, experts, {}))


def a_subset_without_parents(patch: Patch) -> None:
    kept = subsets._kept
    patch.setattr(subsets, "_kept", lambda config, named: kept(config, {level: [*named[level]][:1] for level in named}))


def a_subset_that_shares_tensors(patch: Patch) -> None:
    copied = subsets._copied

    def wrong(registry, level, memo):
        made = copied(registry, level, memo)
        for name in made:
            for mine, theirs in zip(made[name].parameters(), registry[name].parameters(), strict=True):
                mine.data = theirs.data
        return made

    patch.setattr(subsets, "_copied", wrong)


def steps_counted_for_all(patch: Patch) -> None:
    cut = members.cut

    def wrong(own, part, *others):
        found = cut(own, part, *others)
        return found | {"step": own["step"].max().clone()} if "step" in found and part.member is not None else found

    for module in (places, celmoe.optim.by_name):
        patch.setattr(module, "cut", wrong)


# By fault, the seed to begin the search with, and the beginning of the lives.
FAULTS: dict[Callable[[Patch], None], tuple[int, dict[str, Any]]] = {
    by_position: (0, ORDINARY),
    ids_that_shift: (0, {}),
    children_left_behind: (1, {}),
    a_fallback_left_behind: (0, {"shape": "alone"}),
    moments_left_behind: (0, STACKED),
    an_optimizer_that_a_rename_forgets: (1, STACKED),
    a_neighbours_moments: (0, STACKED),
    a_stack_in_another_order: (0, {}),
    gradients_lost: (0, STACKED),
    absent_experts_stepped: (1, STACKED),
    stale_plans_taken: (0, {}),
    frozen_experts_trained: (0, {}),
    a_base_that_unfreeze_trains: (2, ORDINARY),
    a_freeze_that_clears_the_neighbours: (0, STACKED),
    parameters_shared_with_the_source: (2, ORDINARY),
    buffers_without_a_warm_start: (2, {}),
    parameters_that_stay_in_the_optimizer: (0, ORDINARY),
    parameters_at_the_end_of_the_group: (2, ORDINARY),
    the_first_group_for_all: (2, {"has_groups": True}),
    replaced_members_stepped_twice: (0, ORDINARY),
    a_refused_call_that_leaves_a_key: (2, {}),
    a_refused_call_that_draws_numbers: (2, {}),
    names_that_loading_ignores: (2, {}),
    a_subset_without_parents: (1, {}),
    a_subset_that_shares_tensors: (1, ORDINARY),
    steps_counted_for_all: (0, STACKED),
}


def find(number: int, begins: dict[str, Any]) -> None:
    """Live until a fault is found, or for so many steps."""
    before = Lives.steps
    while Lives.steps - before < MOST_STEPS:
        # Looped: the faults are none of the engine's.
        live(number, lives=12, length=30, shortens=False, engine="looped", **begins)
        number += 1


@pytest.mark.parametrize("fault", FAULTS, ids=lambda each: each.__name__)
def test_lives_find(fault, monkeypatch):
    fault(monkeypatch)
    with pytest.raises((AssertionError, CELMoEError, KeyError)) as error:
        find(*FAULTS[fault])
    assert str(error.value) or error.type is AssertionError


def test_a_load_that_was_refused_too_late_is_found(monkeypatch):
    """Seldom in random lives: half of a checkpoint must fit."""
    a_refused_load_that_has_loaded(monkeypatch)
    with pytest.raises(AssertionError):
        refused_loads_change_nothing("another shape", False)
