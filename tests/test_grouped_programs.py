"""Drawn programs of experts that return losses, and drawn objectives over those: gradients are the naive oracle's.

Programs are made of operations that send gradients other ways: views, writes, roots of zero, weights that are used
twice, values without gradients. An objective leaves out some losses, in one pass or in two, with gradients of
gradients or without.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from celmoe import ExpertResult
from tests.strategies import examples
from tests.traps import NAMES, WIDTH, Trapped, auto_groups_all, build, engines_of, oracle_of, with_an_empty_mask

Step = tuple[str, int, int]


class Programmed(Trapped):
    """Follows a program.

    Args:
        steps: For each step its name, and the places of its arguments among the values so far.
    """

    def __init__(self, steps: tuple[Step, ...]) -> None:
        super().__init__()
        self.steps = steps
        self.price = nn.Parameter(torch.rand(()) + 0.5)

    def forward(self, batch):  # noqa: C901  # a case a step
        mask = batch.mask.unsqueeze(1)
        rows = [batch.hidden * 1]
        losses = [self.price * 1.0]
        for name, first, second in self.steps:
            x, y = rows[first % len(rows)], rows[second % len(rows)]
            loss, other = losses[first % len(losses)], losses[second % len(losses)]
            match name:
                case "linear":
                    rows.append(self.linear(x))
                case "masked":
                    rows.append(x * mask)
                case "root":
                    rows.append((x * mask).abs().sqrt())
                case "added":
                    rows.append(x + y)
                case "multiplied":
                    rows.append(x * y)
                case "weight":
                    rows.append(self.linear.bias.expand(x.shape[0], WIDTH))
                case "detached":
                    rows.append(x.detach() * y)
                case "without gradients":
                    with torch.no_grad():
                        rows.append(x * 2)
                case "turned":
                    rows.append(x.view(-1, 2, WIDTH // 2).transpose(1, 2).reshape(-1, WIDTH))
                case "swapped":
                    left, right = x.chunk(2, 1)
                    rows.append(torch.cat([right, left], 1))
                case "written into":
                    x.add_(y)
                case "bent in place":
                    rows.append(x.tanh_())
                case "mean":
                    losses.append(x.square().mean())
                case "length":
                    losses.append((x * mask).square().sum().sqrt())
                case "by row":
                    losses.append(x.square().sum(1))
                case "masked mean":
                    losses.append((x * mask).sum() / mask.sum())
                case "of two":
                    losses.append(loss * other)
        return ExpertResult(torch.tanh(rows[-1]), {"first": losses[-1], "second": losses[len(losses) // 2]})


_ROWS = (
    *(
        "linear",
        "masked",
        "root",
        "added",
        "multiplied",
        "weight",
        "detached",
        "without gradients",
        "turned",
        "swapped",
    ),
    *("written into", "bent in place"),
)
_LOSSES = ("mean", "length", "by row", "masked mean", "of two")
_PLACES = st.integers(-2, 5)


class Objective(NamedTuple):
    """The outputs that are differentiated.

    Attributes:
        chosen: Losses, by their place among all.
        has_rows: True if the rows are differentiated, too.
        before: Losses that a pass of their own goes back from first.
        has_graph: True if that pass has a graph, which the other then goes through.
    """

    chosen: frozenset[int]
    has_rows: bool
    before: frozenset[int]
    has_graph: bool


def programs() -> st.SearchStrategy[tuple[Step, ...]]:
    rows = st.lists(st.tuples(st.sampled_from(_ROWS), _PLACES, _PLACES), min_size=1, max_size=6)
    losses = st.lists(st.tuples(st.sampled_from(_LOSSES), _PLACES, _PLACES), min_size=1, max_size=3)
    more = st.lists(st.tuples(st.sampled_from(_ROWS), _PLACES, _PLACES), max_size=2)
    return st.tuples(rows, losses, more).map(lambda parts: tuple(step for part in parts for step in part))


def objectives() -> st.SearchStrategy[Objective]:
    some = st.frozensets(st.integers(0, 2 * len(NAMES) - 3), max_size=6)
    plain = st.builds(Objective, some, st.booleans(), st.one_of(st.just(frozenset()), some), st.just(False))
    # The graph of a gradient that is no number is nobody's to go through.
    finite = some.map(lambda places: places - {2 * NAMES.index("b"), 2 * NAMES.index("b") + 1})
    return st.one_of(plain, st.builds(Objective, some, st.booleans(), finite, st.just(True)))


def go_back(output: Any, hidden: torch.Tensor, objective: Objective) -> None:
    losses = list(output.losses.values())

    def total(places: frozenset[int]) -> torch.Tensor:
        chosen = [losses[place].sum() * (1 + 0.1 * place) for place in sorted(places)]
        return sum(chosen, torch.zeros((), dtype=hidden.dtype))

    whole = total(objective.chosen)
    if objective.has_rows:
        whole = whole + output.fused_hidden.square().sum()
    first = total(objective.before)
    if first.requires_grad:
        (slope,) = torch.autograd.grad(
            first, hidden, allow_unused=True, retain_graph=True, create_graph=objective.has_graph
        )
        if objective.has_graph and slope is not None and slope.requires_grad:
            whole = whole + slope.tanh().sum()
    if whole.requires_grad:
        whole.backward()


def gradients(model: Any, forward: Any, objective: Objective) -> dict[str, Any]:
    """The gradients by name; or the reason why a pass can't be made."""
    model.zero_grad()
    batch = with_an_empty_mask()
    try:
        go_back(batch(forward), batch.leaves["hidden"], objective)
    except RuntimeError as error:
        return {"error": type(error)}
    leaves = {**dict(model.named_parameters()), **batch.leaves}
    return {name: each.grad for name, each in leaves.items()}


@examples(50)
@given(programs(), objectives())
def test_gradients_are_the_oracles(steps: tuple[Step, ...], objective: Objective):
    model = build(lambda: Programmed(steps), "auto", dtype=torch.float64)
    expected = gradients(model, oracle_of(model), objective)
    assume("error" not in expected)
    with auto_groups_all():
        # At first it is proven, and then known.
        with_an_empty_mask()(model)
        found = gradients(model, model, objective)
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        assert (found[name] is None) == (wanted is None), name
        torch.testing.assert_close(found[name], wanted, equal_nan=True)


@pytest.mark.parametrize("name", [*_ROWS, *_LOSSES])
def test_its_steps_run_grouped(name: str):
    """A program that is looped would show nothing."""
    model = build(lambda: Programmed((("linear", 0, 0), (name, -1, 0), ("mean", -1, 0))), "auto", dtype=torch.float64)
    with auto_groups_all():
        with_an_empty_mask()(model)
        assert engines_of(model, with_an_empty_mask())["a"] == "grouped"
