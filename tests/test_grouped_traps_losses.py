"""Losses that experts return: each keeps the meaning that it has for its expert alone, or its class is looped."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from celmoe import EngineRefusedError, ExpertResult
from tests.traps import (
    BATCHES,
    GROUPED,
    LEVEL,
    Batch,
    Traps,
    assert_like_oracle,
    assert_same,
    build,
    experts_of,
    oracle_of,
)

LOSSES = Traps()


def loss(function):
    """Add experts that return the function's losses for their rows, the batch and the expert."""

    def spring(self, batch):
        rows = torch.tanh(self.linear(batch.hidden))
        return ExpertResult(rows, losses=function(self, rows, batch))

    spring.__name__ = function.__name__
    # Exact or refused, and the refusal says that it was about losses.
    return LOSSES.add(r"loss|mixed samples|read|called|took a norm|passed", method="spring", may_run=True)(spring)


@loss
def the_sum_over_rows(self, rows, batch):
    return {"loss": rows.pow(2).sum()}


@loss
def the_mean_over_rows(self, rows, batch):
    return {"loss": rows.pow(2).mean()}


@loss
def of_each_row(self, rows, batch):
    return {"loss": rows.pow(2).sum(-1)}


@loss
def of_each_element(self, rows, batch):
    return {"loss": rows.pow(2)}


@loss
def a_mean_squared(self, rows, batch):
    return {"loss": rows.mean(0).pow(2).sum()}


@loss
def the_largest(self, rows, batch):
    return {"loss": rows.abs().max()}


@loss
def the_log_of_a_sum(self, rows, batch):
    return {"loss": rows.flatten().logsumexp(0) + rows.sum().exp().log1p()}


@loss
def a_product_of_sums(self, rows, batch):
    return {"loss": rows.sum() * batch.hidden.sum()}


@loss
def a_ratio_of_sums(self, rows, batch):
    return {"loss": rows.sum() / (1 + batch.hidden.abs().sum())}


@loss
def with_the_number_of_rows(self, rows, batch):
    return {"loss": rows.sum() / len(rows)}


@loss
def entropy_to_the_context(self, rows, batch):
    return {"loss": F.cross_entropy(rows, batch.context["lengths"])}


@loss
def entropy_that_leaves_rows_out(self, rows, batch):
    targets = batch.context["lengths"].masked_fill(~batch.mask, -100)
    return {"loss": F.cross_entropy(rows, targets, ignore_index=-100, reduction="sum") / batch.mask.sum().clamp(min=1)}


@loss
def the_mean_over_masked_rows(self, rows, batch):
    return {"loss": (rows.pow(2).sum(1) * batch.mask).sum() / batch.mask.sum().clamp(min=1)}


@loss
def of_weights_alone(self, rows, batch):
    return {"loss": self.linear.weight.pow(2).sum()}


@loss
def of_weights_and_rows(self, rows, batch):
    return {"loss": self.linear.weight.norm() * rows.mean()}


@loss
def of_context_alone(self, rows, batch):
    return {"loss": batch.context["scale"].mean()}


@loss
def of_what_all_share(self, rows, batch):
    return {"loss": batch.context["table"].sum()}


@loss
def a_constant(self, rows, batch):
    return {"loss": torch.tensor(3.0)}


@loss
def detached(self, rows, batch):
    return {"loss": rows.detach().mean()}


@loss
def several(self, rows, batch):
    return {"sum": rows.sum(), "weights": self.linear.bias.sum(), "zero": rows.sum() * 0}


@loss
def a_distance_between_rows(self, rows, batch):
    return {"loss": torch.pdist(rows).sum() if len(rows) > 1 else rows.sum() * 0}


@loss
def a_contrast_within_the_batch(self, rows, batch):
    return {"loss": F.cross_entropy(rows @ rows.T, torch.arange(len(rows)))}


@loss
def named_by_the_batch(self, rows, batch):
    return {f"of {len(rows)} rows": rows.sum()}


@loss
def only_where_rows_are_many(self, rows, batch):
    return {"loss": rows.sum()} if len(rows) > 4 else {}


@loss
def in_another_dtype(self, rows, batch):
    return {"loss": rows.double().mean()}


@loss
def of_one_element(self, rows, batch):
    return {"loss": rows.pow(2).mean().reshape(1)}


@loss
def the_variance(self, rows, batch):
    return {"loss": rows.var(0, correction=0).sum()}


@loss
def a_norm(self, rows, batch):
    return {"loss": rows.norm() + torch.linalg.vector_norm(batch.hidden)}


@loss
def a_mean_by_hand(self, rows, batch):
    return {"loss": torch.stack([row.sum() for row in rows.unbind()]).mean()}


@pytest.mark.parametrize("name", list(LOSSES))
def test_grouped_is_exact_or_refuses(name: str):
    LOSSES.check_refusal(name)


@pytest.mark.parametrize("name", list(LOSSES))
def test_armed_after_a_grouped_call(name: str):
    LOSSES.check_arming(name)


@pytest.mark.parametrize("engine", [GROUPED, "auto"])
@pytest.mark.parametrize(
    "name",
    [
        *("the_sum_over_rows", "the_mean_over_rows", "of_weights_alone", "of_each_row", "several", "the_largest"),
        *("entropy_to_the_context", "entropy_that_leaves_rows_out", "the_mean_over_masked_rows"),
    ],
)
def test_only_some_losses_in_the_objective(name: str, engine: str):
    """An unused loss gives no gradient: `None` if the loop would leave `None`."""
    grads = []
    for is_oracle in (False, True):
        model = build(lambda: LOSSES.classes[name]().arm(), engine)
        batch = Batch()
        output = batch(oracle_of(model) if is_oracle else model)
        chosen = [value for key, value in output.losses.items() if key.startswith((f"{LEVEL}.b.", f"{LEVEL}.d."))]
        sum(value.sum() for value in chosen).backward()
        grads.append({key: value.grad for key, value in [*model.named_parameters(), *batch.leaves.items()]})
    assert any(value is None for value in grads[1].values())
    assert_same(
        {f"gradient of {key}": value for key, value in grads[0].items()},
        {f"gradient of {key}": value for key, value in grads[1].items()},
    )


@pytest.mark.parametrize("engine", [GROUPED, "auto"])
@pytest.mark.parametrize("name", ["the_mean_over_rows", "of_weights_alone"])
def test_losses_without_the_rows(name: str, engine: str):
    """An objective of losses alone: rows that lead to none of them have a gradient of zero or none, as in the loop."""
    models = [build(lambda: LOSSES.classes[name]().arm(), engine) for _ in range(2)]
    found = []
    for model, forward in zip(models, (models[0], oracle_of(models[1])), strict=True):
        batch = Batch()
        try:
            sum(value.sum() for value in batch(forward).losses.values()).backward()
        except EngineRefusedError:
            assert engine == GROUPED
            return
        grads = {**dict(model.named_parameters()), **batch.leaves}
        found.append({f"gradient of {key}": value.grad for key, value in grads.items()})
    assert_same(*found)


@pytest.mark.parametrize("engine", [GROUPED, "auto"])
def test_some_experts_return_losses_and_others_none(engine: str):
    """By an attribute, so that they are two classes."""
    subject, twin = (build(LOSSES.classes["the_mean_over_rows"], engine) for _ in range(2))
    for model in (subject, twin):
        for expert in experts_of(model)[:2]:
            expert.arm()
    for make_batch in BATCHES:
        try:
            assert_like_oracle(subject, twin, make_batch)
        except EngineRefusedError as error:
            assert "loss" in str(error)  # noqa: PT017  # any refusal is legal, for this reason alone
