"""Wrong trackers of loads, each of which the tests must catch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from celmoe import InputError, LoadTracker, load_tracker
from celmoe.load_tracker import _Count
from tests import test_load_tracker as loads

Patch = pytest.MonkeyPatch


def around(method: str, change: Callable[..., Any]) -> Callable[[Patch], None]:
    """A mutant whose method is another one around the right one."""

    def apply(patch: Patch) -> None:
        right = getattr(LoadTracker, method)
        patch.setattr(LoadTracker, method, lambda self, *rest: change(right, self, *rest))

    return apply


def by_position(right: Any, self: LoadTracker, layout: Any) -> None:
    """Counts stay at the positions of experts, though these have new names."""
    before = {level: list(names) for level, names in self._experts.items()}
    right(self, layout)
    for level, names in self._experts.items():
        own = self._counts[level]
        old = [own[name] for name in before.get(level, [])]
        own.update(zip(names, old, strict=False))


def forget_the_absent(right: Any, self: LoadTracker, layout: Any) -> None:
    right(self, layout)
    for level, names in self._experts.items():
        self._counts[level] = {name: self._counts[level][name] for name in names}


def a_step_for_each_plan(right: Any, self: LoadTracker, plans: Any) -> None:
    for plan in plans:
        right(self, [plan])


def last_plan_only(right: Any, self: LoadTracker, plans: Any) -> None:
    right(self, plans[-1:])


def rename_the_shown_only(right: Any, self: LoadTracker, level: str, name: str, new_name: str) -> None:
    kept = self._counts[level][name]
    right(self, level, name, new_name)
    self._counts[level][new_name] = _Count(0, 0.0, self.steps)
    self._counts[level][name] = kept


def age_by_calls(right: Any, self: LoadTracker, count: _Count, step: int) -> float:
    """Rows age once for each step that the expert takes part in."""
    return right(self, _Count(count.rows, count.recent, max(count.step, step - 1)), step)


def never_age(right: Any, self: LoadTracker, count: _Count, step: int) -> float:
    return count.recent


def age_twice(right: Any, self: LoadTracker, count: _Count, step: int) -> float:
    return right(self, _Count(count.rows, right(self, count, step), count.step), step)


def merge(change: Callable[[list[LoadTracker], LoadTracker], None]) -> Callable[[Patch], None]:
    """A mutant that changes the merged tracker."""

    def apply(patch: Patch) -> None:
        right = LoadTracker.merged

        def wrong(trackers: Any) -> LoadTracker:
            given = list(trackers)
            made = right(given)
            change(given, made)
            return made

        patch.setattr(LoadTracker, "merged", staticmethod(wrong))

    return apply


def first_steps(given: list[LoadTracker], made: LoadTracker) -> None:
    for level, counts in made._counts.items():
        for name, count in counts.items():
            count.step = min(each._counts[level][name].step for each in given if name in each._counts.get(level, {}))


def unaged_sums(given: list[LoadTracker], made: LoadTracker) -> None:
    for level, counts in made._counts.items():
        for name, count in counts.items():
            count.recent = sum(
                each._counts[level][name].recent for each in given if name in each._counts.get(level, {})
            )


def largest(given: list[LoadTracker], made: LoadTracker) -> None:
    for level, counts in made._counts.items():
        for name, count in counts.items():
            count.rows = max(each._counts[level][name].rows for each in given if name in each._counts.get(level, {}))


def shares_of_the_present(patch: Patch) -> None:
    patch.setattr(
        load_tracker, "imbalance_of", lambda own: max(own) * sum(map(bool, own)) / sum(own) if sum(own) else 0.0
    )


def slashes_as_they_are(patch: Patch) -> None:
    patch.setattr(load_tracker, "path_key", lambda *names: "/".join(names))


def forget_the_recent(right: Any, self: LoadTracker, state: Any) -> None:
    right(self, state)
    for counts in self._counts.values():
        for count in counts.values():
            count.recent = 0.0


def keep_the_half_life(right: Any, self: LoadTracker, state: Any) -> None:
    half_life = self._half_life
    right(self, state)
    self._half_life = half_life


def off_by_one(right: Any, self: LoadTracker) -> Any:
    return {level: {name: steps + 1 for name, steps in own.items()} for level, own in right(self).items()}


MUTANTS: dict[str, Callable[[Patch], None]] = {
    "counts by position": around("_meet", by_position),
    "removed experts forgotten": around("_meet", forget_the_absent),
    "newcomers never met": around("_meet", lambda right, self, layout: right(self, layout) if not self.steps else None),
    "a step for each plan": around("_update", a_step_for_each_plan),
    "the last plan only": around("_update", last_plan_only),
    "counts left at the old name": around("rename", rename_the_shown_only),
    "rows age with calls": around("_aged", age_by_calls),
    "rows never age": around("_aged", never_age),
    "rows age twice": around("_aged", age_twice),
    "merged absence of the first": merge(first_steps),
    "merged before ageing": merge(unaged_sums),
    "merged by the largest": merge(largest),
    "imbalance of the present": shares_of_the_present,
    "recent rows lost in a restart": around("load_state_dict", forget_the_recent),
    "half-life lost in a restart": around("load_state_dict", keep_the_half_life),
    "absence off by one": around("absent", off_by_one),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_random_lives_catch_a_wrong_tracker(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTANTS[name](monkeypatch)

    def is_caught(seed: int) -> bool:
        try:
            loads.live(seed)
        except (AssertionError, KeyError, InputError):
            return True
        return False

    assert any(map(is_caught, range(40)))


def test_keys_with_bare_slashes_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    slashes_as_they_are(monkeypatch)
    with pytest.raises(AssertionError):
        loads.test_no_two_experts_share_a_key()
