"""Wrong graphs, each of which the tests of compiled models must catch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import celmoe
from celmoe.stacked.stack import Stack
from celmoe.traced import forward, inside, opaque
from tests import test_compiled as compiled
from tests import test_compiled_changes as changes

Patch = pytest.MonkeyPatch
Test = Callable[[], None]


def members_of_the_neighbour(patch: Patch) -> None:
    right = inside.DeviceSegments
    patch.setattr(inside, "DeviceSegments", lambda members, num: right((members + 1).clamp(max=num - 1), num))


def unnoted_members(patch: Patch) -> None:
    patch.setattr(inside, "follow", lambda _: None)


def a_stale_mark(patch: Patch) -> None:
    patch.setattr(Stack, "changed", lambda self: setattr(self, "version", self.version + 1))


def gradients_of_the_input_only(patch: Patch) -> None:
    right = opaque.run_opaque

    def wrong(place: Any, hidden: Any, packed: Any, indices: Any, anchor: torch.Tensor, way: Any) -> torch.Tensor:
        return right(place, hidden, packed, indices, anchor.detach(), way)

    patch.setattr(forward, "run_opaque", wrong)


def rows_in_their_order(patch: Patch) -> None:
    right = inside.permuted
    patch.setattr(inside, "permuted", lambda rows, order, inverse: right(rows, order.sort().values, inverse))


WRONG: dict[str, tuple[Callable[[Patch], None], Test]] = {
    "members of the neighbour": (members_of_the_neighbour, lambda: compiled.test_kinds_of_experts(compiled.Scaling)),
    "rows in their order": (rows_in_their_order, lambda: compiled.test_kinds_of_experts(compiled.Scaling)),
    "unnoted members": (unnoted_members, lambda: changes.test_absent_experts_stay_as_they_are("SGD")),
    "a stale mark": (a_stale_mark, lambda: changes.TestChanges().test_an_attribute_of_one_expert()),
    "gradients of the input only": (
        gradients_of_the_input_only,
        lambda: changes.test_calls_of_calls_and_checkpoints(is_stacked=False),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_one_is_caught(name: str, monkeypatch: Patch) -> None:
    wrong, test = WRONG[name]
    wrong(monkeypatch)
    torch._dynamo.reset()
    with pytest.raises((AssertionError, celmoe.ChangedError)):
        test()
