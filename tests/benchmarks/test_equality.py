"""Whether contenders that differ are refused."""

import dataclasses
from collections import Counter

import pytest
import torch

from benchmarks.bodies import EXPERTS
from benchmarks.contenders.stack import STACKED
from benchmarks.equality import UnequalError, require_equal
from benchmarks.grouped import contest
from benchmarks.grouped.contest import INFERENCE, OURS, PEER, TRAINING, compare, rivals_of
from benchmarks.steps import string_routed
from benchmarks.workloads import Workload
from tests.features import needs_grouped_mm
from tests.peer import FIRST, peer


def evidence(**changes):
    return {
        "output": torch.tensor([1.0, -2.0]),
        "gradient of body": torch.tensor([0.0]),
        "gradient of absent": None,
    } | {name.replace("_", " "): value for name, value in changes.items()}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"output": torch.tensor([1.0, -2.001])}, "the output differs by 1.0e-03"),
        ({"output": torch.tensor([1.0, float("nan")])}, "the output differs by nan"),
        ({"gradient_of_body": torch.tensor([1e-12])}, "the gradient of body differs"),
        ({"gradient_of_body": None}, "the gradient of body is None for one"),
        ({"gradient_of_absent": torch.zeros(1)}, "the gradient of absent is None for one"),
    ],
)
def test_differences_are_refused(changes, words):
    for pair in ((evidence(), evidence(**changes)), (evidence(**changes), evidence())):
        with pytest.raises(UnequalError, match=words):
            require_equal(*pair)


def test_rounding_is_not():
    require_equal(evidence(), evidence(output=torch.tensor([1.0001, -2.0])))


@pytest.mark.parametrize(
    "expert", [pytest.param(name, marks=needs_grouped_mm if name in STACKED else ()) for name in EXPERTS]
)
def test_equal_contenders_are_compared(expert):
    workload = Workload(expert, 8, 24, 5, "zipf")
    found = compare(workload, peer(FIRST), "looped", 0.0, rivals_of(workload), (TRAINING, INFERENCE))
    assert Counter(each.measure for each in found) == {TRAINING: len(rivals_of(workload)), INFERENCE: 1}
    assert all(each.ratio > 0 and each.low <= each.ratio <= each.high for each in found)


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
