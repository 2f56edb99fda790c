"""The grouped engine's contest: its contenders, its refusals, its ratios."""

import dataclasses
from collections import Counter

import pytest
import torch

from benchmarks.contenders import stack as stacks
from benchmarks.contenders.layouts import Padded, Ragged
from benchmarks.contenders.stack import HAND_STACKED, Stack, fastest_stack
from benchmarks.grouped import contest
from benchmarks.grouped.contest import INFERENCE, OURS, PEER, STACK, TRAINING, Compared, compare
from benchmarks.harness.equality import UnequalError
from benchmarks.harness.interleaved import Timings
from benchmarks.harness.steps import string_routed
from benchmarks.workloads.bodies import EXPERTS
from benchmarks.workloads.workload import Workload
from tests.benchmarks.clockwork import HIGH, LOW, RATIO, Rounds, Spied
from tests.benchmarks.wrong import GRADIENTS, two_alike, with_another_input_gradient
from tests.features import needs_grouped_mm
from tests.peer import FIRST, peer

SECONDS = {OURS: "one", PEER: "three", STACK: "half"}


@pytest.fixture
def rounds(monkeypatch):
    stand_in = Rounds(SECONDS)
    monkeypatch.setattr(contest, "interleave", stand_in)
    return stand_in


@pytest.mark.parametrize(
    "expert", [pytest.param(name, marks=needs_grouped_mm if name in HAND_STACKED else ()) for name in EXPERTS]
)
@pytest.mark.parametrize("is_stacked", [False, True])
def test_equal_contenders_are_compared(expert, is_stacked):
    workload = Workload(expert, 8, 24, 5, "zipf")
    rivals = [PEER, STACK] if expert in HAND_STACKED else [PEER]
    found = compare(workload, peer(FIRST), "looped", 0.0, rivals, (TRAINING, INFERENCE), is_stacked=is_stacked)
    assert Counter(each.measure for each in found) == {TRAINING: len(rivals), INFERENCE: 1}
    assert [each.rounds for each in found] == [5] * len(found)


@needs_grouped_mm
def test_ratios_are_the_others_by_ours(rounds, monkeypatch):
    workload = Workload("linear", 8, 24, 5)
    right, made = contest._make_contenders, {}
    monkeypatch.setattr(contest, "_make_contenders", lambda *given, **more: made.update(right(*given, **more)) or made)
    rounds.watched = lambda: [each.module for each in made.values()]
    found = compare(workload, peer(FIRST), "looped", 0.0, [PEER, STACK], (TRAINING, INFERENCE))
    slower = (1000.0, 5000.0, RATIO, LOW, HIGH, 5)
    assert found == [
        Compared(workload, TRAINING, PEER, *slower),
        Compared(workload, TRAINING, STACK, 1000.0, 500.0, 0.5, 0.5, 0.5, 5),
        Compared(workload, INFERENCE, PEER, *slower),
    ]
    # All weights move before each step.
    assert rounds.runs == [(name, True) for name in (STACK, OURS, PEER, OURS, PEER)]


def wrong_peer(monkeypatch, spoil):
    """The peer's contender, spoiled once it is made."""
    right = contest._make_contenders

    def make(*arguments, **options):
        contenders = right(*arguments, **options)
        (rival,) = contenders.keys() - {OURS}
        contenders[rival] = spoil(contenders[rival]) or contenders[rival]
        return contenders

    monkeypatch.setattr(contest, "_make_contenders", make)


@pytest.mark.parametrize("rival", [PEER, pytest.param(STACK, marks=needs_grouped_mm)])
@pytest.mark.parametrize("kind", GRADIENTS)
def test_a_wrong_gradient_in_any_rival_is_refused_before_anything_is_timed(kind, rival, rounds, monkeypatch):
    def spoil(contender):
        # The level's every expert has samples.
        names = [name for name in contender.weights if name.startswith("level_modules.")]
        GRADIENTS[kind](contender.weights, *two_alike(contender.weights, names))

    wrong_peer(monkeypatch, spoil)
    with pytest.raises(UnequalError, match=f"^{rival} is not equal to .*: the gradient of level_modules"):
        compare(Workload("mlp", 8, 40, 3), peer(FIRST), "looped", 0.0, [rival])
    assert rounds.runs == []


@pytest.mark.parametrize("rival", [PEER, pytest.param(STACK, marks=needs_grouped_mm)])
def test_a_wrong_gradient_of_the_input_is_refused(rival, rounds, monkeypatch):
    wrong_peer(monkeypatch, with_another_input_gradient)
    with pytest.raises(UnequalError, match="the gradient of the input differs"):
        compare(Workload("linear", 8, 24, 3), peer(FIRST), "looped", 0.0, [rival])
    assert rounds.runs == []


def test_another_output_in_inference_is_refused(rounds, monkeypatch):
    def only_in_inference(contender):
        right = contender.forward
        return dataclasses.replace(
            contender, forward=lambda hidden: right(hidden) * (1.0 if torch.is_grad_enabled() else 1.01)
        )

    wrong_peer(monkeypatch, only_in_inference)
    workload = Workload("linear", 8, 24, 3)
    compare(workload, peer(FIRST), "looped", 0.0, [PEER], [TRAINING])
    rounds.runs.clear()
    with pytest.raises(UnequalError, match="celmoe-vp is not equal to celmoe: the output in inference differs"):
        compare(workload, peer(FIRST), "looped", 0.0, [PEER], [INFERENCE])
    assert rounds.runs == []


def test_inference_is_of_models_in_evaluation_mode(rounds):
    workload = Spied("linear", 8, 24, 3)
    compare(workload, peer(FIRST), "looped", 0.0, [PEER], [INFERENCE])
    assert [model.training for model in workload.built] == [False, False]


@pytest.mark.parametrize("rival", [PEER, pytest.param("stack", marks=needs_grouped_mm)])
def test_weights_that_are_kept_over_a_step_are_refused(rival, monkeypatch):
    def stale(model, workload):
        forward = string_routed(model, workload)
        kept = [parameter.detach().clone() for parameter in model.parameters()]

        def forward_with_kept(hidden):
            with torch.no_grad():
                for parameter, value in zip(model.parameters(), kept, strict=True):
                    parameter.copy_(value)
            return forward(hidden)

        return forward_with_kept if type(model).__module__.split(".")[0] == OURS else forward

    monkeypatch.setattr(contest, "string_routed", stale)
    with pytest.raises(UnequalError):
        compare(Workload("linear", 8, 24, 5), peer(FIRST), "looped", 0.0, [rival])


def test_another_mask_is_refused(monkeypatch):
    def unmasked(model, workload):
        seen = (
            workload if type(model).__module__.split(".")[0] == OURS else dataclasses.replace(workload, expert="block")
        )
        return string_routed(model, seen)

    monkeypatch.setattr(contest, "string_routed", unmasked)
    with pytest.raises(UnequalError, match=r"the output differs|the gradient of"):
        compare(Workload("masked-block", 8, 24, 5), peer(FIRST), "looped", 0.0)


@needs_grouped_mm
@pytest.mark.parametrize("best", [(Ragged, Padded), (Padded, Ragged), (Padded, Padded)])
def test_the_fastest_stack_is_the_rival(best, monkeypatch):
    """By its median: one lucky round decides nothing."""
    workload = Workload("linear", 8, 40, 9)
    model = workload.build(contest.celmoe)
    seen = []

    def interleave(steps, seconds):
        found = {}
        for name, step in steps.items():
            seen.clear()
            step()
            kinds = tuple(seen)
            found[name] = [1.0, 1.0, 9.0] if kinds == best else [0.1, 2.0, 2.0]
        return Timings(found)

    right = Stack.run_level

    def run_level(self, index, hidden, plan):
        if index:
            seen.append(self.kinds[index - 1])
        return right(self, index, hidden, plan)

    monkeypatch.setattr(stacks, "interleave", interleave)
    monkeypatch.setattr(Stack, "run_level", run_level)
    assert fastest_stack(model, workload).kinds == best
