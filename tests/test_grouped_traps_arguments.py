"""Arguments that an operation's grouped form could take for others, though a first batch does not show it."""

from __future__ import annotations

from collections import ChainMap, defaultdict
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from celmoe import EngineRefusedError, ExpertResult
from tests.traps import (
    WIDTH,
    Batch,
    Trapped,
    assert_like_oracle,
    assert_ran_grouped,
    auto_groups_all,
    build,
    experts_of,
)


class Given(Trapped):
    """A function of the expert, the rows and the batch."""

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.function = function
        self.table = torch.nn.Embedding(WIDTH, WIDTH)

    def forward(self, batch):
        return ExpertResult(self.function(self, batch.hidden, batch))


ARGUMENTS: dict[str, Callable[[Any, torch.Tensor, Any], torch.Tensor]] = {
    "unbiased variance by place": lambda s, r, b: s.linear(r) * 0 + r.var(-1, False).unsqueeze(-1),
    "unbiased deviation by place": lambda s, r, b: s.linear(r) * 0 + (r + s.linear.bias).std(-1, False, True),
    "the largest singular value": lambda s, r, b: (
        s.linear(r) * 0 + torch.linalg.norm(r.detach().view(-1, 2, 4), 2, (1, 2)).unsqueeze(1)
    ),
}


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("engine", ["grouped", "auto"])
def test_after_a_first_batch_of_zeros(name: str, engine: str):
    subject, twin = (build(lambda: Given(ARGUMENTS[name]), engine) for _ in range(2))

    def zeros() -> Batch:
        batch = Batch()
        with torch.no_grad():
            batch.leaves["hidden"].zero_()
        return batch

    for make_batch in (zeros, Batch):
        try:
            assert_like_oracle(subject, twin, make_batch)
        except EngineRefusedError:
            assert engine == "grouped"


def embedded(self, rows, batch):
    return self.linear(rows) + self.table(batch.context["lengths"])


def test_negative_ids_have_no_embedding():
    """A negative index would count from the end of the table."""
    model = build(lambda: Given(embedded))
    Batch()(model)
    assert_ran_grouped(model, Batch())
    batch = Batch()
    batch.context["lengths"][3] = -1
    with pytest.raises(IndexError, match="out of range"):
        batch(model)


IN_PLACE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "by place": lambda rows: F.leaky_relu(rows, 0.5, True),
    "by name": lambda rows: F.leaky_relu(rows, 0.5, inplace=True),
    "dropout": lambda rows: F.dropout(rows, 0.5, True, True),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_rows_written_into_before_what_cannot_be_grouped(name: str):
    """The loop begins with the rows as the caller passed them, and not as a failed attempt left them."""

    write = IN_PLACE[name]

    def written_into(self: Any, rows: torch.Tensor, batch: Any) -> torch.Tensor:
        if not batch.context.get("writes"):
            return self.linear(rows)
        written = self.linear(write(rows))
        return written + rows.sort(0).values

    def forward(model: Any, **flags: bool) -> torch.Tensor:
        batch = Batch()
        batch.context |= flags
        torch.manual_seed(0)
        return batch(model).fused_hidden

    subject, twin = (build(lambda: Given(written_into), engine) for engine in ("auto", "looped"))
    with auto_groups_all():
        torch.testing.assert_close(forward(subject), forward(twin))
        assert_ran_grouped(subject, Batch())
        torch.testing.assert_close(forward(subject, writes=True), forward(twin, writes=True))


def no_part_of_a_bias(self: Any, rows: torch.Tensor, batch: Any) -> torch.Tensor:
    return torch.addmm(self.linear.bias, rows, self.linear.weight.T, beta=0)


def test_a_bias_that_takes_no_part_may_hold_anything():
    """And has a gradient of zero, not none."""
    found = []
    for engine in ("grouped", "looped"):
        model = build(lambda: Given(no_part_of_a_bias), engine)
        with torch.no_grad():
            experts_of(model)[1].linear.bias.fill_(torch.nan)
        hidden = Batch()(model).fused_hidden
        hidden.sum().backward()
        found.append([hidden, *(each.grad for each in model.parameters())])
    assert bool(found[1][0].isfinite().all())
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


def normed_by_itself(self: Any, rows: torch.Tensor, batch: Any) -> torch.Tensor:
    return self.linear(F.group_norm(rows, WIDTH))


def test_a_group_of_one_value_is_an_error_for_an_expert_of_one_row():
    for engine in ("grouped", "auto", "looped"):
        model = build(lambda: Given(normed_by_itself), engine)
        with auto_groups_all(), pytest.raises(ValueError, match="more than 1 value per channel"):
            Batch((7, 3, 1))(model)


class ReadsWhatThereIs(Trapped):
    """Scales its rows by a number in the context, if there is one."""

    def forward(self, batch):
        context = batch.context
        if isinstance(context, Mapping):
            inner = context.get("inner", context)
            scale = inner.get("table", 1.0)
        elif isinstance(context, list):
            scale = context[0]
        else:
            scale = 2.0 if context is None else context.table
        return ExpertResult(self.linear(batch.hidden) * scale)


def _contexts() -> dict[str, Any]:
    table = torch.tensor(3.0)
    return {
        "a dict": {"table": table},
        "a dict in a dict": {"inner": {"table": table}},
        "a chain of dicts": ChainMap({"other": table}, {}),
        "a dict that makes what it lacks": defaultdict(lambda: torch.tensor(5.0)),
        "such a dict in a dict": {"inner": defaultdict(lambda: torch.tensor(5.0))},
        "a list": [table],
        "a longer list": [table * 2, table],
        "an object": SimpleNamespace(table=table),
        "nothing": None,
        "an empty dict": {},
    }


@pytest.mark.parametrize("engine", ["auto", "grouped"])
@pytest.mark.parametrize("first", _contexts())
def test_a_context_that_lacks_what_a_graph_reads(first: str, engine: str):
    """Asking whether a graph holds for a context reads nothing that isn't there, and makes nothing there."""
    contexts = _contexts()
    subject, twin = (build(ReadsWhatThereIs, engine) for _ in range(2))
    for name in (first, *contexts, first):

        def make_batch(name: str = name) -> Batch:
            batch = Batch()
            batch.context = contexts[name]
            return batch

        try:
            assert_like_oracle(subject, twin, make_batch)
        except EngineRefusedError:
            assert engine == "grouped"
    assert not contexts["a dict that makes what it lacks"]
    assert not contexts["such a dict in a dict"]["inner"]
