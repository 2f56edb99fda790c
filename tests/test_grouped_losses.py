"""Losses of `torch.nn.functional` over rows, and hand-written ones in their place: of each expert's rows alone.

Experts have unlike numbers of rows, and of targets that are left out: a mean over all of them would show.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from celmoe import EngineRefusedError
from tests.features import needs_weighted_losses
from tests.traps import (
    BATCHES,
    LEVEL,
    NAMES,
    WIDTH,
    Batch,
    Losing,
    Loss,
    assert_like_oracle,
    assert_ran_grouped,
    assert_same,
    build,
    check_change,
    experts_of,
    oracle_of,
)


def signs(rows: torch.Tensor) -> torch.Tensor:
    return torch.where(rows > 0, 1.0, -1.0)


def added_up(expert: Any, rows: torch.Tensor, batch: Any) -> torch.Tensor:
    loss = F.mse_loss(rows, batch.hidden)
    loss += 0.1 * expert.linear.weight.square().sum()
    loss *= 0.5
    return loss.add_(F.cross_entropy(rows, batch.context["lengths"]))


def added_to_decay(expert: Any, rows: torch.Tensor, batch: Any) -> torch.Tensor:
    loss = expert.linear.weight.square().sum()
    loss += rows.square().sum()
    return loss


def written_into_after_a_look(expert: Any, rows: torch.Tensor, batch: Any) -> torch.Tensor:
    """A look at the sum sees a later write into it."""
    loss = rows.square().sum()
    seen = loss.detach()
    loss += 1
    return loss * seen


def a_weight_written_into(expert: Any, rows: torch.Tensor, batch: Any) -> torch.Tensor:
    loss = rows.square().sum()
    with torch.no_grad():
        expert.linear.bias.type_as(loss).mul_(1.5)
    return loss


def written_into_under_a_view(expert: Any, rows: torch.Tensor, batch: Any) -> torch.Tensor:
    """The write changes the total for large rows alone; a few rows would not show it."""
    total = expert.linear.bias.square().sum()
    each = total.view(1).expand(rows.shape[0])
    total += F.relu(batch.hidden.detach().max() - 9)
    return (rows.sum(1) * each).sum()


def written_into_and_back_to_rows(expert: Any, rows: torch.Tensor, batch: Any) -> torch.Tensor:
    total = expert.linear.bias.square().sum()
    total += rows.sum()
    return (rows * total).sum()


def twice_summed(value: torch.Tensor) -> torch.Tensor:
    return value.sum() + value.sum()


def two_targets(batch: Any) -> torch.Tensor:
    """Two positions for each row, of four classes; of some rows one is left out below."""
    lengths = batch.context["lengths"]
    return torch.stack([lengths % 4, lengths * 0 + 3], 1)


# Written without a grouped form: these run member by member, for that operation alone.
LOOPED: dict[str, tuple[Loss, str]] = {
    "class weights": (lambda s, r, b: s.entropy(r, b.context["lengths"]), "cross_entropy"),
    "class weights, each": (
        lambda s, r, b: F.cross_entropy(r, b.context["lengths"], s.entropy.weight, reduction="none"),
        "cross_entropy",
    ),
    "class weights, some left out": (
        lambda s, r, b: F.nll_loss(r.log_softmax(-1), b.context["lengths"], s.entropy.weight, ignore_index=2),
        "nll_loss",
    ),
    "class weights, the same for all": (
        lambda s, r, b: F.cross_entropy(r, b.context["lengths"], torch.tensor([1.0, 2, 0, 0.5, 1, 1, 3, 1])),
        "cross_entropy",
    ),
    "of weights": (lambda s, r, b: F.cross_entropy(s.linear.weight, torch.arange(8)), "cross_entropy"),
    "cosine": (lambda s, r, b: F.cosine_embedding_loss(r, b.hidden, signs(b.hidden[:, 0])), "cosine_embedding_loss"),
    "triplet, each": (
        lambda s, r, b: F.triplet_margin_loss(r, b.hidden, r * 2 + 1, reduction="none"),
        "triplet_margin_loss",
    ),
    "multi margin": (lambda s, r, b: F.multi_margin_loss(r, b.context["lengths"]), "multi_margin_loss"),
    "largest": (lambda s, r, b: r.abs().max(), "max"),
    "largest of each feature": (lambda s, r, b: r.max(0).values.sum(), "max"),
    "logsumexp": (lambda s, r, b: r.logsumexp((0, 1)), "logsumexp"),
    "deviation": (lambda s, r, b: (r.std(0, correction=0) + 0.1).sum(), "std"),
    "norm": (lambda s, r, b: r.norm(), "norm"),
    "truth values, summed": (lambda s, r, b: r.mean() * twice_summed(b.mask.any()), "any"),
    "any": (lambda s, r, b: torch.where(b.mask.any(), r.sum(), r.mean()), "any"),
}
LOSSES: dict[str, Loss] = {
    "entropy": lambda s, r, b: F.cross_entropy(r, b.context["lengths"]),
    "entropy, summed": lambda s, r, b: F.cross_entropy(r, b.context["lengths"], reduction="sum"),
    "entropy, each": lambda s, r, b: F.cross_entropy(r, b.context["lengths"], reduction="none"),
    "entropy, some left out": lambda s, r, b: F.cross_entropy(r, b.context["lengths"], ignore_index=5),
    "entropy, smoothed": lambda s, r, b: F.cross_entropy(r, b.context["lengths"], ignore_index=5, label_smoothing=0.1),
    "entropy to shares": lambda s, r, b: F.cross_entropy(r, b.hidden.softmax(-1), label_smoothing=0.1),
    "entropy of positions": lambda s, r, b: F.cross_entropy(r.view(-1, 4, 2), two_targets(b), ignore_index=1),
    "entropy of folded positions": lambda s, r, b: F.cross_entropy(
        r.reshape(-1, 4), two_targets(b).flatten(), ignore_index=1
    ),
    "entropy, rows last": lambda s, r, b: F.cross_entropy(r.T.reshape(2, 4, -1), two_targets(b).T, ignore_index=1),
    "likelihood": lambda s, r, b: F.nll_loss(r.log_softmax(-1), b.context["lengths"]),
    "likelihood by hand": lambda s, r, b: (
        -r.log_softmax(-1).gather(1, b.context["lengths"].unsqueeze(1)).squeeze(1).mean()
    ),
    "squares": lambda s, r, b: F.mse_loss(r, b.hidden),
    "squares to a weight": lambda s, r, b: F.mse_loss(r, s.linear.bias.expand_as(r)),
    "squares of weights": lambda s, r, b: F.mse_loss(s.linear.weight, torch.zeros(8, 8)),
    "distances": lambda s, r, b: F.l1_loss(r, b.hidden, reduction="sum"),
    "smooth distances": lambda s, r, b: F.smooth_l1_loss(r, b.hidden, beta=0.5),
    "huber": lambda s, r, b: F.huber_loss(r, b.hidden, "mean", 0.5),
    "binary": lambda s, r, b: F.binary_cross_entropy(r.sigmoid(), b.hidden.sigmoid().detach()),
    "binary, weighted": lambda s, r, b: F.binary_cross_entropy_with_logits(
        r, b.hidden.sigmoid(), b.mask.unsqueeze(-1).float(), pos_weight=s.norm.weight.detach()
    ),
    "divergence": lambda s, r, b: F.kl_div(
        (r * 0.1).log_softmax(-1), (b.hidden * 0.01).softmax(-1), reduction="batchmean"
    ),
    "divergence, rows last": lambda s, r, b: F.kl_div(
        (r * 3).T.log_softmax(0), (b.hidden * 0.01).T.softmax(0), reduction="batchmean"
    ),
    "divergence, in logs": lambda s, r, b: F.kl_div(
        r.log_softmax(-1), b.hidden.log_softmax(-1), reduction="sum", log_target=True
    ),
    "poisson": lambda s, r, b: F.poisson_nll_loss(r, b.context["lengths"].float().unsqueeze(1).expand_as(r)),
    "hinge": lambda s, r, b: F.hinge_embedding_loss(r, signs(b.hidden)),
    "soft margin": lambda s, r, b: F.soft_margin_loss(r, signs(b.hidden)),
    "ranking": lambda s, r, b: F.margin_ranking_loss(r, b.hidden, signs(b.hidden), margin=0.2),
    "added up in place": added_up,
    "decay added to in place": added_to_decay,
    "written into after a look": written_into_after_a_look,
    "module": lambda s, r, b: nn.CrossEntropyLoss()(r, b.context["lengths"]),
    "masked mean": lambda s, r, b: (r.square().sum(1) * b.mask).sum() / b.mask.sum().clamp(min=1),
    "masked mean of entropies": lambda s, r, b: (
        (F.cross_entropy(r, b.context["lengths"], reduction="none") * b.mask).sum() / b.mask.long().sum().clamp(min=1)
    ),
    "masked mean, counted": lambda s, r, b: (
        torch.where(b.mask.unsqueeze(1), r, 0.0).sum() / (1 + b.mask.count_nonzero())
    ),
    "mean of the right ones": lambda s, r, b: (
        (r.argmax(-1) == b.context["lengths"]).sum() / (1 + r.square().sum(0).detach().sum())
    ),
    **{name: function for name, (function, _) in LOOPED.items()},
}


@pytest.mark.parametrize("name", LOSSES)
def test_of_each_experts_own_rows(name: str):
    subject, twin = (build(lambda: Losing(LOSSES[name])) for _ in range(2))
    for make_batch in (BATCHES[1], BATCHES[3]):
        assert_like_oracle(subject, twin, make_batch)
    batch = BATCHES[1]()
    assert_ran_grouped(subject, batch)
    explanation = subject.explain(batch.routing)
    (level,) = explanation.levels
    assert ("member by member" in str(explanation)) == (name in LOOPED)
    expected = {LOOPED[name][1]: 1} if name in LOOPED else {}
    assert [each.operations_looped for each in level.classes if len(each.experts) > 1] == [expected]


REFUSED: dict[str, tuple[Loss, str]] = {
    "a weight written into": (a_weight_written_into, "wrote into a parameter"),
    "written into under a view": (written_into_under_a_view, "wrote into"),
    "written into and back to rows": (written_into_and_back_to_rows, "mixed samples"),
    "rows by other rows": (lambda s, r, b: r.gather(0, b.context["lengths"].unsqueeze(1) * 0).sum(), "mixed samples"),
    "gaussian": (lambda s, r, b: F.gaussian_nll_loss(r, b.hidden, r.detach().square() + 0.1), "data-dependent"),
    "some rows": (lambda s, r, b: r[b.mask].mean(), "indexed by values"),
    "weighted squares": (
        lambda s, r, b: F.mse_loss(r, b.hidden, weight=b.hidden.abs()),
        "called mse_loss with weights",
    ),
    "old names": (lambda s, r, b: F.mse_loss(r, b.hidden, size_average=False), "in place of 'reduction'"),
    "the batch for classes": (lambda s, r, b: F.cross_entropy(r.T, torch.zeros(WIDTH).long()), "batch for classes"),
    "to what was reduced": (lambda s, r, b: F.mse_loss(r, r.mean(0, keepdim=True)), "reduced over the batch"),
    "by the number of rows": (lambda s, r, b: F.huber_loss(r, b.hidden, delta=r.shape[0]), "number of their rows"),
    "first rows": (lambda s, r, b: F.cross_entropy(r[:1], b.context["lengths"][:1]), "some of their samples"),
    "a contrast": (
        lambda s, r, b: F.cross_entropy(r @ r.T, torch.arange(len(r))),
        "mixed samples|number of their rows",
    ),
}


@pytest.mark.filterwarnings("ignore:size_average and reduce args", "ignore:Using a target size")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs_weighted_losses if name == "weighted squares" else ()) for name in REFUSED]
)
def test_what_is_refused_says_why(name: str):
    function, reason = REFUSED[name]
    model = build(lambda: Losing(function))
    with pytest.raises(EngineRefusedError, match=reason):
        BATCHES[1]()(model)
    subject, twin = (build(lambda: Losing(function), "auto") for _ in range(2))
    assert_like_oracle(subject, twin, BATCHES[1])


def test_an_expert_all_of_whose_targets_are_left_out():
    """PyTorch's mean over nothing is not a number, and has no gradient: for this expert alone."""

    def own_entropy(self: Any, rows: torch.Tensor, batch: Any) -> torch.Tensor:
        return F.cross_entropy(rows, batch.context["lengths"], ignore_index=self.ignored)

    found = []
    model = build(lambda: Losing(own_entropy), dtype=torch.float64)
    for forward in (model, oracle_of(model)):
        model.zero_grad()
        batch = Batch(dtype=torch.float64)
        targets, routes = batch.context["lengths"], batch.routing[LEVEL]
        for place, name in enumerate(routes):
            targets[place] = 2 if name == "b" else 3 + place % 2
        losses = batch(forward).losses
        sum(losses.values()).backward()
        found.append((losses, {name: each.grad for name, each in model.named_parameters()}))
    assert_ran_grouped(model, Batch())
    for name in NAMES[:-1]:
        mine, theirs = (losses[f"{LEVEL}.{name}.loss"] for losses, _ in found)
        assert bool(theirs.isnan()) == (name == "b")
        torch.testing.assert_close(mine, theirs, equal_nan=True)
    assert_same(found[0][1], found[1][1])
    assert all(bool(each.isfinite().all()) for each in found[1][1].values() if each is not None)


def own_entropy(self: Any, rows: torch.Tensor, batch: Any) -> torch.Tensor:
    return F.cross_entropy(rows, batch.context["lengths"], ignore_index=self.ignored)


def test_one_expert_leaves_out_other_targets_from_now_on():
    def change(model: Any) -> None:
        experts_of(model)[1].ignored = 1

    check_change(lambda: Losing(own_entropy), change, make_batch=BATCHES[1])


def test_a_mean_of_many_halves():
    """Their sum is beyond float16, their mean is not."""

    def large(self: Any, rows: torch.Tensor, batch: Any) -> torch.Tensor:
        return (rows + 200).square().mean()

    model = build(lambda: Losing(large), dtype=torch.float16)
    batch = Batch((64, 48), dtype=torch.float16)
    losses = [batch(forward).losses for forward in (model, oracle_of(model))]
    assert all(bool(each.isfinite()) for each in losses[1].values())
    assert_ran_grouped(model, batch)
    torch.testing.assert_close(*losses, rtol=2e-3, atol=0)
