"""A recomputed part of a host follows the plan of its own forward pass, whatever plan is at hand then."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import celmoe
from celmoe.attached import runs
from tests.hosts import ROUTES, WIDTH, Bottleneck, Encoder, Penalized, config, plan_of, tokens

KINDS = ["reentrant", "non-reentrant"]
PLANS = [plan_of(ROUTES), plan_of(ROUTES[::-1])]


def host(kind=None, expert=Bottleneck, engine="auto"):
    torch.manual_seed(0)
    return celmoe.attach(Encoder("tuple", kind), config(), lambda *_: expert(), "blocks.*", engine=engine)


def gradients(model, passes):
    """The gradients after a training step that makes its passes in some order."""
    model.zero_grad()
    passes(model)
    return [None if each.grad is None else each.grad.clone() for each in model.parameters()]


def assert_same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs)


def loss_of(model, plan, *, keyword=False):
    if keyword:
        return model(tokens(), plan=plan).square().mean()
    with celmoe.routed(model, plan):
        return model(tokens()).square().mean()


def within(model):
    for plan in PLANS:
        with celmoe.routed(model, plan):
            model(tokens()).square().mean().backward()


def afterwards(model):
    (loss_of(model, PLANS[0]) + loss_of(model, PLANS[1])).backward()


def by_keyword(model):
    (loss_of(model, PLANS[0], keyword=True) + loss_of(model, PLANS[1], keyword=True)).backward()


def first_last(model):
    losses = [loss_of(model, plan) for plan in PLANS]
    for loss in reversed(losses):
        loss.backward()


def within_the_others(model):
    first = loss_of(model, PLANS[0])
    with celmoe.routed(model, PLANS[1]):
        second = model(tokens()).square().mean()
        first.backward()
        third = 0 * model(tokens()).square().mean()
        (second + third).backward()


def with_parts_called(model):
    """The host itself is never called."""

    def run(plan):
        with celmoe.routed(model.blocks, plan):
            hidden = model.embed(tokens())
            for block in model.blocks:
                hidden = checkpoint(block, hidden, use_reentrant=model.checkpointed == "reentrant")[0]
        return model.head(hidden).square().mean()

    (run(PLANS[0]) + run(PLANS[1])).backward()


def in_a_hook(model):
    """A backward pass calls the model with a plan that it gives there."""
    first = loss_of(model, PLANS[0])
    first.register_hook(torch.enable_grad()(lambda grad: loss_of(model, PLANS[1]).backward()))
    first.backward()


PASSES = [within, afterwards, by_keyword, first_last, within_the_others, with_parts_called, in_a_hook]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("passes", PASSES, ids=lambda each: each.__name__)
def test_gradients_are_those_without_checkpoints(kind, passes):
    expected = gradients(host(), within)
    assert any(each is not None and each.abs().max() > 0 for each in expected)
    assert_same(gradients(host(kind), passes), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_inner_of_two_nested_plans_is_the_passes_own(kind):
    """Parts of the host are called, so that both plans are at hand for as long as the other."""

    def passes(model):
        total = 0.0
        for outer, inner in (PLANS, PLANS[::-1]):
            with celmoe.routed(model.blocks, outer):
                hidden = model.embed(tokens())
                with celmoe.routed(model.blocks, inner):
                    for block in model.blocks:
                        hidden = checkpoint(block, hidden, use_reentrant=kind == "reentrant")[0]
                total = total + model.head(hidden).square().mean()
        total.backward()

    assert_same(gradients(host(kind), passes), gradients(host(), within))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("passes", [afterwards, within_the_others], ids=lambda each: each.__name__)
def test_gradients_of_experts_that_run_as_one(kind, passes):
    assert_same(gradients(host(kind, engine="grouped"), passes), gradients(host(engine="looped"), within))


def test_the_comparison_sees_a_wrong_plan():
    def wrong(model):
        (loss_of(model, PLANS[0]) + loss_of(model, PLANS[0])).backward()

    with pytest.raises(AssertionError):
        assert_same(gradients(host(), wrong), gradients(host(), within))


@pytest.mark.parametrize("kind", KINDS)
def test_with_no_spans_the_plan_at_hand_would_be_taken(kind, monkeypatch):
    """The mend is what makes the difference: without it, a plan at hand is silently taken for another pass's."""
    expected = gradients(host(), within)
    monkeypatch.setattr(runs, "number_in_backward", lambda: None)
    with pytest.raises(AssertionError):
        assert_same(gradients(host(kind), within_the_others), expected)


class Nested(nn.Module):
    """Three places: one outside, one within a checkpoint within a checkpoint, one behind it."""

    def __init__(self, outer=None, inner=None):
        super().__init__()
        self.encoder, self.last = Encoder("tensor"), nn.Linear(WIDTH, WIDTH)
        self.outer, self.inner = outer, inner

    def _again(self, kind, function, hidden):
        if kind is None:
            return function(hidden)
        return checkpoint(function, hidden, use_reentrant=kind == "reentrant")

    def _middle(self, hidden):
        hidden = self._again(self.inner, self.encoder.blocks[1], torch.sin(hidden))
        return self._again(self.inner, lambda rows: torch.tanh(self.last(rows)), hidden)

    def forward(self, given):
        hidden = self.encoder.blocks[0](self.encoder.embed(given))
        return self.encoder.head(self._again(self.outer, self._middle, hidden))


# The outer forward pass runs without gradients.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
@pytest.mark.parametrize("outer", KINDS)
@pytest.mark.parametrize("inner", KINDS)
@pytest.mark.parametrize("passes", [afterwards, by_keyword, within_the_others], ids=lambda each: each.__name__)
def test_checkpoints_within_checkpoints(outer, inner, passes):
    def nested(*kinds):
        torch.manual_seed(0)
        return celmoe.attach(Nested(*kinds), config(), lambda *_: Bottleneck(), ["encoder.blocks.*", "last"])

    assert_same(gradients(nested(outer, inner), passes), gradients(nested(), within))


def test_after_a_backward_pass_that_failed():
    """The failed pass's notes must not be taken for those of the next one."""
    model = host("reentrant")
    expected = gradients(host(), within)

    def fail(_):
        raise ValueError("failed on purpose")

    loss = loss_of(model, PLANS[1])
    handle = model.embed.weight.register_hook(fail)
    with pytest.raises(ValueError, match="on purpose"):
        loss.backward()
    handle.remove()
    assert_same(gradients(model, afterwards), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_pass_is_refused(kind, monkeypatch):
    monkeypatch.setattr(runs, "_NUM_SPANS", 1)
    monkeypatch.setattr(runs, "here", threading.local())
    model = host(kind)
    first = loss_of(model, PLANS[0])
    loss_of(model, PLANS[1])
    with pytest.raises(celmoe.MissingRouteError) as caught:
        first.backward()
    assert str(caught.value) == (
        "'plan' must be known for the recomputed forward pass at 'blocks.1' (got runs of none, or too long ago; run "
        "the backward pass inside of 'with celmoe.routed(model, plan):', in the only thread that trains)"
    )


def test_two_threads_with_one_model_are_told_apart_or_refused():
    """Numbers of two threads overlap: a call that could be of either is refused, and never guessed."""
    model, losses = host("non-reentrant"), {}
    done, ready = threading.Event(), threading.Barrier(3, timeout=60)

    def run(number):
        losses[number] = loss_of(model, PLANS[number])
        ready.wait()
        done.wait(60)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    ready.wait()
    try:
        with pytest.raises(celmoe.MissingRouteError, match="several threads"):
            losses[0].backward()
    finally:
        done.set()
        for thread in threads:
            thread.join(60)


def test_losses_within_checkpoints():
    expected = host(expert=Penalized)
    for kind in (None, "non-reentrant"):
        model = host(kind, Penalized)
        with celmoe.routed(model, PLANS[0]) as run:
            loss = model(tokens()).square().mean() + sum(run.losses.values())
            loss.backward()
        if kind is None:
            expected = model
        assert len(run.losses) == 2 * 6
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    model = host("reentrant", Penalized)
    with (
        celmoe.routed(model, PLANS[0]),
        pytest.raises(celmoe.ResultError, match="must return no losses within a reentrant checkpoint"),
    ):
        model(tokens())
