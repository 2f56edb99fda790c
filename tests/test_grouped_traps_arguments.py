"""Arguments that an operation's grouped form could take for others, where a first batch does not show it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from celmoe import EngineRefusedError, ExpertResult
from tests.traps import WIDTH, Batch, Trapped, assert_like_oracle, assert_ran_grouped, build


class Given(Trapped):
    """What a function makes of itself, the rows and the batch."""

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
    """As an index they would count from the end of the table."""
    model = build(lambda: Given(embedded))
    Batch()(model)
    assert_ran_grouped(model, Batch())
    batch = Batch()
    batch.context["lengths"][3] = -1
    with pytest.raises(IndexError, match="out of range"):
        batch(model)
