"""Losses that an objective leaves out: nothing of theirs comes back, not even a zero that is none.

Run alone, an expert whose loss is not chosen has no part in the backward pass by it. In a class, a gradient of zero
goes its way: behind a derivative that is not finite it is no number, and must reach nothing that the expert's rows do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from celmoe import EngineRefusedError, ExpertResult
from tests.traps import (
    GROUPED,
    LEVEL,
    WIDTH,
    Batch,
    Losing,
    Loss,
    Plain,
    Trapped,
    assert_ran_grouped,
    assert_same,
    auto_groups_all,
    build,
    experts_of,
    oracle_of,
    with_an_empty_mask,
)


def squares(self: Any, rows: torch.Tensor, batch: Any) -> torch.Tensor:
    return rows.square().mean()


def masked_mean(self: Any, rows: torch.Tensor, batch: Any) -> torch.Tensor:
    """Is NaN if a mask is empty."""
    return (rows.square().sum(1) * batch.mask).sum() / batch.mask.sum()


def masked(rows: torch.Tensor, batch: Any) -> torch.Tensor:
    return rows * batch.mask.unsqueeze(1)


def of_rows_in_place(self: Any, rows: torch.Tensor, batch: Any) -> torch.Tensor:
    found = masked(rows, batch)
    found.abs_()
    found.sqrt_()
    return found.mean()


def of_weights(self: Any, rows: torch.Tensor, batch: Any) -> torch.Tensor:
    """The rows come by the same tensor."""
    return (self.linear.bias * batch.mask.sum()).abs().sum().sqrt()


def of_weights_by_row(self: Any, rows: torch.Tensor, batch: Any) -> torch.Tensor:
    return masked(self.linear.bias.expand(rows.shape[0], WIDTH).abs(), batch).sqrt().sum()


def of_a_product(self: Any, rows: torch.Tensor, batch: Any) -> torch.Tensor:
    """Infinite before a mask, with the very weights that the rows come by."""
    found = self.linear(batch.hidden / batch.mask.unsqueeze(1))
    return torch.where(batch.mask.unsqueeze(1), found, 0.0).mean()


def of_a_norm(self: Any, rows: torch.Tensor, batch: Any) -> torch.Tensor:
    found = self.norm(rows) / batch.mask.unsqueeze(1)
    return torch.where(batch.mask.unsqueeze(1), self.norm(found), 0.0).pow(3).mean()


# With an empty mask each loss is finite or not, and its derivative is not.
SINGULAR: dict[str, Loss] = {
    "mean over nothing": masked_mean,
    "mean over nothing, masked again": lambda s, r, b: torch.where(b.mask.sum() > 0, masked_mean(s, r, b), 0.0),
    "root of a sum": lambda s, r, b: masked(r, b).square().sum().sqrt(),
    "root of rows": lambda s, r, b: masked(F.softplus(r), b).sqrt().mean(),
    "power of sums of rows": lambda s, r, b: masked(r, b).square().sum(1).pow(0.5).mean(),
    "loss of each row": lambda s, r, b: masked(r, b).square().sum(1).sqrt(),
    "logarithm": lambda s, r, b: -masked(r, b).square().sum().log(),
    "rows in place": of_rows_in_place,
    "weights": of_weights,
    "weights by row": of_weights_by_row,
    "product": of_a_product,
    "norm": of_a_norm,
}


def chosen(output: Any) -> Any:
    """All losses but that of the expert whose mask is empty."""
    return sum(loss.sum() for name, loss in output.losses.items() if name != f"{LEVEL}.b.loss")


def everything_and_chosen(output: Any) -> Any:
    return output.fused_hidden.square().sum() + chosen(output)


def the_one_left_out(output: Any) -> Any:
    return output.losses[f"{LEVEL}.b.loss"].sum()


def gradients(model: Any, forward: Any, batch: Batch, objective: Callable[[Any], Any]) -> dict[str, Any]:
    model.zero_grad()
    objective(batch(forward)).backward()
    return {f"gradient of {key}": each.grad for key, each in [*model.named_parameters(), *batch.leaves.items()]}


def unmasked() -> Batch:
    batch = Batch(dtype=torch.float64)
    batch.mask = torch.ones_like(batch.mask)
    return batch


def are_finite(found: dict[str, Any]) -> bool:
    return all(bool(each.isfinite().all()) for each in found.values() if each is not None)


@pytest.mark.parametrize("engine", [GROUPED, "auto"])
@pytest.mark.parametrize("objective", [chosen, everything_and_chosen])
@pytest.mark.parametrize("name", SINGULAR)
def test_a_loss_that_the_objective_leaves_out(name: str, objective: Callable[[Any], Any], engine: str):
    model = build(lambda: Losing(SINGULAR[name]), engine, dtype=torch.float64)
    with auto_groups_all():
        Batch(dtype=torch.float64)(model)
        found = gradients(model, model, with_an_empty_mask(), objective)
        assert_ran_grouped(model, with_an_empty_mask())
    oracle = oracle_of(model)
    expected = gradients(model, oracle, with_an_empty_mask(), objective)
    assert are_finite(expected)
    assert not are_finite(gradients(model, oracle, with_an_empty_mask(), the_one_left_out))
    assert_same(found, expected)


@pytest.mark.parametrize("name", ["root of a sum", "weights", "product"])
def test_what_is_chosen_is_as_singular_as_alone(name: str):
    """Nothing is held back of an expert that is reached."""
    model = build(lambda: Losing(SINGULAR[name]), dtype=torch.float64)
    found, expected = (
        gradients(model, forward, with_an_empty_mask(), the_one_left_out) for forward in (model, oracle_of(model))
    )
    assert not are_finite(expected)
    for name, wanted in expected.items():
        torch.testing.assert_close(found[name], wanted, equal_nan=True)


def test_a_loss_left_out_of_a_second_derivative():
    found = []
    model = build(lambda: Losing(SINGULAR["root of a sum"]), dtype=torch.float64)
    for forward in (model, oracle_of(model)):
        model.zero_grad()
        batch = with_an_empty_mask()
        output = batch(forward)
        (slope,) = torch.autograd.grad(everything_and_chosen(output), batch.leaves["hidden"], create_graph=True)
        (slope.square().sum() + chosen(output)).backward()
        found.append({f"gradient of {key}": each.grad for key, each in model.named_parameters()})
    assert_ran_grouped(model, with_an_empty_mask())
    assert are_finite(found[1])
    assert_same(*found)


def by_what_all_share(self: Any, rows: torch.Tensor, batch: Any) -> torch.Tensor:
    return (rows * batch.context["table"][0]).square().mean()


def test_gradients_of_what_all_share():
    """A shared tensor is no member's: its gradient is a sum over all, and no member's part could be held back."""
    model = build(lambda: Losing(by_what_all_share))
    batch = Batch()
    batch(model)
    batch.context["table"].requires_grad_()
    with pytest.raises(EngineRefusedError, match=r"return losses, and give gradients to a tensor that is shared"):
        batch(model)


class Given(Trapped):
    """A loss that is one of its tensors as it is."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.price = nn.Parameter(torch.rand(sizes))

    def forward(self, batch):
        return ExpertResult(torch.tanh(self.linear(batch.hidden)), {"loss": self.price})


@pytest.mark.parametrize("sizes", [(), (3,)])
@pytest.mark.parametrize("engine", [GROUPED, "auto"])
def test_a_parameter_for_a_loss(engine: str, sizes: tuple[int, ...]):
    model = build(lambda: Given(*sizes), engine)
    with auto_groups_all():
        Batch()(model)
        found = gradients(model, model, Batch(), the_one_left_out)
        assert_ran_grouped(model, Batch())
    assert_same(found, gradients(model, oracle_of(model), Batch(), the_one_left_out))


class Aliased(Trapped):
    """Writes into a view of a tensor that had no gradient until then."""

    def forward(self, batch):
        whole = batch.hidden.detach() * 1
        part = torch.einsum("bi->bi", whole)
        part.add_(self.linear(batch.hidden))
        return ExpertResult(torch.tanh(batch.hidden), {"loss": whole.square().mean()})


class Expanding(Trapped):
    """A weight for each row: as it is in the rows, and squared in a loss."""

    def forward(self, batch):
        expanded = self.linear.bias.expand(batch.hidden.shape[0], WIDTH)
        loss = expanded.square().sum(1)
        return ExpertResult(torch.tanh(batch.hidden) + expanded, {"loss": loss})


class Layers(Trapped):
    """Layers that write into the rows of the ones before."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), *layers)

    def forward(self, batch):
        rows = self.layers(batch.hidden)
        return ExpertResult(rows.view(batch.hidden.shape), {"loss": rows.square().mean()})


def written_after_use(self: Any, rows: torch.Tensor, batch: Any) -> torch.Tensor:
    found = rows * 2
    total = found.sum()
    return total + found.add_(batch.hidden).square().mean()


def a_repeated_weight(self: Any, rows: torch.Tensor, batch: Any) -> torch.Tensor:
    found = self.linear.bias.repeat(rows.shape[0], 1)
    part = found[:, :4]
    part += rows[:, :4]
    return found.square().mean()


def the_same_without_gradients(self: Any, rows: torch.Tensor, batch: Any) -> torch.Tensor:
    found = batch.hidden.detach() * 1
    with torch.no_grad():
        same = found.contiguous()
    same += rows
    return found.square().mean()


def beside_a_likeness(self: Any, rows: torch.Tensor, batch: Any) -> torch.Tensor:
    found = batch.hidden.detach() * 1
    likeness = found.detach()
    found.view_as(likeness).add_(rows)
    return found.square().mean()


def divided_in_place(self: Any, rows: torch.Tensor, batch: Any) -> torch.Tensor:
    loss = masked(rows, batch).sum()
    loss /= batch.mask.sum()
    return loss


def rooted_in_place(self: Any, rows: torch.Tensor, batch: Any) -> torch.Tensor:
    found = masked(rows, batch).abs() - 0
    found.sqrt_()
    return found.mean()


def gated(self: Any, rows: torch.Tensor, batch: Any) -> torch.Tensor:
    """A value without a gradient, computed from one whose gradient is not finite."""
    lengths = masked(self.norm(rows), batch).square().sum(1).sqrt()
    return (rows.square().mean(1) * (lengths > 0).to(rows.dtype) * torch.ones_like(lengths)).mean()


WRITTEN: dict[str, Callable[[], nn.Module]] = {
    "after it was used": lambda: Losing(written_after_use),
    "a weight repeated": lambda: Losing(a_repeated_weight),
    "a weight expanded": Expanding,
    "the same without gradients": lambda: Losing(the_same_without_gradients),
    "beside a likeness": lambda: Losing(beside_a_likeness),
    "a number divided": lambda: Losing(divided_in_place),
    "a root": lambda: Losing(rooted_in_place),
    "a gate": lambda: Losing(gated),
    "a view by einsum": Aliased,
    "behind dropout": lambda: Layers(nn.Dropout(0.0), nn.ReLU(inplace=True), nn.Linear(WIDTH, WIDTH)),
    "behind a view": lambda: Layers(nn.Unflatten(1, (2, WIDTH // 2)), nn.ReLU(inplace=True)),
    "behind a norm": lambda: Layers(nn.LayerNorm(WIDTH), nn.ReLU(inplace=True)),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_written_into_and_still_known(name: str):
    model = build(WRITTEN[name], dtype=torch.float64)
    Batch(dtype=torch.float64)(model)
    for objective, make_batch in ((the_one_left_out, unmasked), (everything_and_chosen, with_an_empty_mask)):
        batches = (Batch(dtype=torch.float64) if make_batch is Batch else make_batch() for _ in range(2))
        found, expected = (gradients(model, forward, next(batches), objective) for forward in (model, oracle_of(model)))
        assert_same(found, expected)
    assert_ran_grouped(model, Batch())


class Insisting(Trapped):
    """Has gradients even if the caller turned them off."""

    def forward(self, batch):
        with torch.enable_grad():
            loss = self.linear(batch.hidden).square().mean()
        return ExpertResult(batch.hidden * 2, {"loss": loss})


def test_a_loss_with_gradients_of_its_own_accord():
    model = build(Insisting)
    found = []
    for forward in (model, oracle_of(model)):
        model.zero_grad()
        with torch.no_grad():
            output = Batch()(forward)
        the_one_left_out(output).backward()
        found.append({f"gradient of {key}": each.grad for key, each in model.named_parameters()})
    assert_ran_grouped(model, Batch())
    assert_same(*found)


def test_while_anomalies_are_looked_for():
    """A zero that is none is held back, but it would be taken for one."""
    model = build(lambda: Losing(SINGULAR["root of a sum"]), "auto", dtype=torch.float64)
    oracle = oracle_of(model)
    with auto_groups_all():
        with torch.autograd.set_detect_anomaly(True):
            found = gradients(model, model, with_an_empty_mask(), everything_and_chosen)
        assert_same(found, gradients(model, oracle, with_an_empty_mask(), everything_and_chosen))
        assert_ran_grouped(model, with_an_empty_mask())


class TwoHeads(Trapped):
    """A loss of the layer and one of a head, whose names the context may swap."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, batch):
        first, second = self.linear(batch.hidden), self.head(batch.hidden.detach())
        if batch.context.get("swaps"):
            first, second = second, first
        return ExpertResult(first - batch.hidden, {"first": first.square().mean(), "second": second.square().mean()})


@pytest.mark.parametrize("swaps", [False, True])
@pytest.mark.parametrize("has_rows", [False, True])
def test_tensors_that_only_some_losses_depend_on(swaps: bool, has_rows: bool):
    """None and zero differ to an optimizer: tensors that an expert's chosen losses do not need have no gradient."""

    def objective(output: Any) -> Any:
        chosen = output.losses[f"{LEVEL}.a.first"] + output.losses[f"{LEVEL}.b.second"]
        return chosen + output.fused_hidden.square().sum() if has_rows else chosen

    model = build(TwoHeads)
    Batch()(model)
    found = []
    for forward in (model, oracle_of(model)):
        batch = Batch()
        batch.context["swaps"] = swaps
        found.append(gradients(model, forward, batch, objective))
    assert_ran_grouped(model, Batch())
    names = [f"gradient of level_modules.{LEVEL}.{name}.{layer}.bias" for name in "ab" for layer in ("linear", "head")]
    assert len([name for name in names if found[1][name] is None]) == (1 if has_rows else 2)
    assert_same(*found)


def test_losses_may_be_added_up_in_place():
    def objective(output: Any) -> Any:
        total, *others = output.losses.values()
        for loss in others:
            total += loss
        return total

    model = build(lambda: Losing(squares))
    assert_same(*(gradients(model, forward, Batch(), objective) for forward in (model, oracle_of(model))))


def test_a_loss_of_one_expert_beside_the_gradients_of_another():
    """Gradients of gradients reach an expert's weights, and not by its loss."""
    found = []
    model = build(lambda: Losing(squares), dtype=torch.float64)
    for forward in (model, oracle_of(model)):
        model.zero_grad()
        losses = Batch(dtype=torch.float64)(forward).losses
        wanted = list(experts_of(model)[1].linear.parameters())
        grads = torch.autograd.grad(losses[f"{LEVEL}.b.loss"], wanted, create_graph=True)
        (losses[f"{LEVEL}.a.loss"] + sum(each.square().sum() for each in grads)).backward()
        of_pair = [each for expert in experts_of(model)[:2] for each in expert.linear.parameters()]
        found.append({f"gradient of {index}": each.grad for index, each in enumerate(of_pair)})
    assert_ran_grouped(model, Batch())
    assert_same(*found)


def _disabled(self: Any, rows: torch.Tensor, batch: Any) -> torch.Tensor:
    torch.set_grad_enabled(False)
    return rows * 2


def _enabled(self: Any, rows: torch.Tensor, batch: Any) -> torch.Tensor:
    torch.set_grad_enabled(True)
    return rows * 2


def _disabled_for_a_while(self: Any, rows: torch.Tensor, batch: Any) -> torch.Tensor:
    torch.set_grad_enabled(False)
    half = rows / 2
    torch.set_grad_enabled(True)
    return rows * 2 + half


def _within(self: Any, rows: torch.Tensor, batch: Any) -> torch.Tensor:
    with torch.no_grad():
        half = rows / 2
    return rows * 2 + half


class Moded(Plain):
    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, batch):
        return ExpertResult(self.function(self, self.linear(batch.hidden), batch))


@pytest.mark.parametrize("is_enabled", [True, False])
@pytest.mark.parametrize("function", [_disabled, _enabled, _disabled_for_a_while, _within])
def test_a_grad_mode_that_experts_leave_behind(function: Callable[..., torch.Tensor], is_enabled: bool):
    found = []
    for engine in ("auto", "looped"):
        model = build(lambda: Moded(function), engine)
        with torch.set_grad_enabled(is_enabled), auto_groups_all():
            output = Batch()(model)
            found.append((torch.is_grad_enabled(), output.fused_hidden.requires_grad))
    assert found[0] == found[1]
