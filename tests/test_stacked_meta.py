"""Wrong stacks and wrong optimizers, each of which the tests must catch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import celmoe.engines.grouped
from celmoe import norms
from celmoe.grouped.classes import LevelClasses
from celmoe.optim import by_name, per_expert
from celmoe.stacked import member, presence
from celmoe.stacked.stack import Stack
from tests import stacks
from tests import test_freezing as freezing
from tests import test_gradient_norms as gradients
from tests import test_optim as optimizers
from tests import test_optim_by_name as names
from tests import test_parameter_groups as groups
from tests import test_stacked as stacked
from tests import test_stacked_changes as changes

Patch = pytest.MonkeyPatch


def rows_of_the_neighbour(patch: Patch) -> None:
    right = Stack.entry
    patch.setattr(
        Stack, "entry", lambda self, path, index, **options: right(self, path, (index + 1) % len(self.names), **options)
    )


def stack_of_the_neighbour(patch: Patch) -> None:
    right = celmoe.engines.grouped._stacked

    def wrong(*args):
        own, counts = right(*args)
        return [each.roll(1, 0) if isinstance(each, torch.Tensor) else each for each in own], counts

    patch.setattr(celmoe.engines.grouped, "_stacked", wrong)


def counts_of_the_first(patch: Patch) -> None:
    right = celmoe.engines.grouped._stacked

    def wrong(*args):
        own, counts = right(*args)
        return own, sorted(counts, reverse=True)

    patch.setattr(celmoe.engines.grouped, "_stacked", wrong)


def changes_unnoted(patch: Patch) -> None:
    patch.setattr(member.StackedModule, "_changes", lambda *_: None)


def a_stale_state(patch: Patch) -> None:
    patch.setattr(Stack, "state", property(lambda self: self.keys))


def all_stacks_fixed(patch: Patch) -> None:
    patch.setattr(Stack, "is_fixed", property(lambda _: True))


def all_members_intact(patch: Patch) -> None:
    patch.setattr(Stack, "intact", property(lambda self: frozenset(range(len(self.names)))))


def any_members_settled(patch: Patch) -> None:
    right = LevelClasses.settle
    patch.setattr(
        LevelClasses,
        "settle",
        lambda self, stack, names, unit, members: right(self, stack, names, unit, range(len(stack.names))),
    )


def a_gradient_of_the_first_only(patch: Patch) -> None:
    right = Stack.entry

    def wrong(self, path, index, **options):
        found = right(self, path, index, **options)
        return found.detach() if index else found

    patch.setattr(Stack, "entry", wrong)


def all_are_reached(patch: Patch) -> None:
    patch.setattr(per_expert, "reached", lambda _: None)


def reached_since_ever(patch: Patch) -> None:
    patch.setattr(presence, "current_backward", lambda: 0)


def steps_of_all(patch: Patch) -> None:
    right = per_expert.Runs

    class Wrong(right):
        def __init__(self, present, steps):
            super().__init__(present, steps)
            self.steps = self.steps * 0 + self.steps.max(initial=0)

    patch.setattr(per_expert, "Runs", Wrong)


def moments_of_the_neighbour(patch: Patch) -> None:
    right = by_name.joined

    def wrong(parts, given, current, optimizer):
        members = [part.member for part in parts]
        turned = [part._replace(member=member) for part, member in zip(parts, members[1:] + members[:1], strict=True)]
        return right(turned, given, current, optimizer)

    patch.setattr(by_name, "joined", wrong)


def steps_of_the_first(patch: Patch) -> None:
    right = by_name.cut

    def wrong(own, part, optimizer, group):
        found = right(own, part, optimizer, group)
        return found | {"step": own["step"].flatten()[0]} if "step" in found else found

    patch.setattr(by_name, "cut", wrong)


def states_of_the_absent(patch: Patch) -> None:
    right = by_name.cut
    patch.setattr(
        by_name,
        "cut",
        lambda own, part, *rest: right({key: value for key, value in own.items() if key != "step"}, part, *rest),
    )


def options_of_the_neighbour(patch: Patch) -> None:
    right = per_expert.PerExpert._runs_of

    def wrong(self, share, known, **options):
        if share.members is not None:
            share = share._replace(members=[(member + 1) % len(share.parameter) for member in share.members])
        return right(self, share, known, **options)

    patch.setattr(per_expert.PerExpert, "_runs_of", wrong)


def frozen_members_moved(patch: Patch) -> None:
    patch.setattr(per_expert.Share, "without", lambda self, _: self)


def frozen_members_reached(patch: Patch) -> None:
    right = Stack.entry

    def wrong(self, path, index, **options):
        frozen, self.frozen = self.frozen, frozenset()
        try:
            return right(self, path, index, **options)
        finally:
            self.frozen = frozen

    patch.setattr(Stack, "entry", wrong)


def frozen_unnoted(patch: Patch) -> None:
    right = Stack.freeze

    def wrong(self, members):
        mark = self.mark
        right(self, members)
        self.mark = mark

    patch.setattr(Stack, "freeze", wrong)


def all_trained_again(patch: Patch) -> None:
    right = Stack.unfreeze
    patch.setattr(Stack, "unfreeze", lambda self, _: right(self, range(len(self.names))))


def norms_of_the_neighbour(patch: Patch) -> None:
    right = norms._norm
    patch.setattr(norms, "_norm", lambda grad, num_axes: right(grad, num_axes).roll(num_axes))


def _compute(**options) -> None:
    stacked.test_stacked_experts_compute_the_same(**options)


WRONG: dict[str, tuple[Callable[[Patch], None], Callable[[], None]]] = {
    "rows of the neighbour": (rows_of_the_neighbour, lambda: _compute(kind=stacks.MLP, engine="looped")),
    "stack of the neighbour": (stack_of_the_neighbour, lambda: _compute(kind=stacks.MLP, engine="grouped")),
    "counts of the first": (counts_of_the_first, lambda: _compute(kind=stacks.MLP, engine="grouped")),
    "gradient of the first only": (a_gradient_of_the_first_only, lambda: _compute(kind=stacks.MLP, engine="looped")),
    "changes unnoted": (changes_unnoted, lambda: changes.test_a_change_of_one_expert_is_seen("an attribute", "auto")),
    "a stale state": (a_stale_state, lambda: changes.test_a_change_of_one_expert_is_seen("a module", "auto")),
    "all stacks fixed": (all_stacks_fixed, changes.test_a_list_that_changes_is_seen),
    "all members intact": (all_members_intact, lambda: changes.test_parts_that_are_replaced_are_read(["e2"], "auto")),
    "any members settled": (any_members_settled, changes.test_members_that_come_later_are_asked),
    "all are reached": (
        all_are_reached,
        lambda: optimizers.test_absent_experts_stay_as_with_parameters_of_their_own(
            "AdamW", {}, torch.float64, "grouped"
        ),
    ),
    "reached since ever": (
        reached_since_ever,
        lambda: optimizers.test_absent_experts_stay_as_with_parameters_of_their_own(
            "SGD", optimizers.OPTIONS["SGD"][1], torch.float64, "looped"
        ),
    ),
    "steps of all": (
        steps_of_all,
        lambda: optimizers.test_absent_experts_stay_as_with_parameters_of_their_own(
            "Adam", {}, torch.float64, "grouped"
        ),
    ),
    "moments of the neighbour": (
        moments_of_the_neighbour,
        lambda: names.test_a_state_goes_to_a_stack_and_back("AdamW", {}, torch.float64),
    ),
    "steps of the first": (
        steps_of_the_first,
        lambda: names.test_a_state_goes_to_a_stack_and_back("Adam", {}, torch.float64),
    ),
    "states of the absent": (
        states_of_the_absent,
        lambda: names.test_an_expert_that_was_never_stepped_has_no_state("AdamW"),
    ),
    "options of the neighbour": (
        options_of_the_neighbour,
        lambda: groups.test_each_expert_has_the_options_of_its_group("SGD", "looped"),
    ),
    "frozen members moved": (
        frozen_members_moved,
        freezing.test_gradients_that_someone_sets_do_not_move_a_frozen_expert,
    ),
    "frozen members reached": (
        frozen_members_reached,
        lambda: freezing.test_frozen_experts_run_as_before_and_get_no_gradients(stacks.MLP, True, "looped"),
    ),
    "frozen unnoted": (
        frozen_unnoted,
        lambda: freezing.test_an_expert_sees_that_it_is_frozen("auto"),
    ),
    "all trained again": (
        all_trained_again,
        lambda: freezing.test_frozen_experts_run_as_before_and_get_no_gradients(stacks.MLP, True, "looped"),
    ),
    "norms of the neighbour": (
        norms_of_the_neighbour,
        lambda: gradients.test_each_present_expert_has_its_norm(stacks.MLP, True, ["e0", "e2", "e2"]),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_one_is_caught(name, monkeypatch):
    wrong, test = WRONG[name]
    test()
    wrong(monkeypatch)
    with pytest.raises(AssertionError):
        test()
