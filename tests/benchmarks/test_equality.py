"""Contenders that differ are refused before anything is timed: kinds of differences, in every contender."""

import pytest
import torch
from torch import nn

from benchmarks.contenders import models, moving, products
from benchmarks.contenders.contender import (
    AUTO,
    BARE,
    DENSE,
    FLOORS,
    GROUPED,
    LOOK_UPS,
    LOOPED,
    ORACLE,
    PEERS,
    PEFT,
    STACK,
    STACKED,
    TRANSFORMERS,
    VMAP,
    Terms,
)
from benchmarks.harness.equality import Claimed, Part, UnequalError, require_all_equal, require_equal
from benchmarks.suite.rounds import gather
from benchmarks.suite.stages import DISPATCH, EXPERTS, INFERENCE, PLAN, WHOLE_STEP, tasks_of
from benchmarks.workloads.bodies import PRODUCT, UNTOUCHED
from benchmarks.workloads.hierarchies import ONE_LEVEL
from benchmarks.workloads.workload import Workload
from tests.benchmarks.wrong import GRADIENTS, two_alike, with_another_input_gradient, with_gradients
from tests.features import needs_grouped_mm

CPU = torch.device("cpu")


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
        ({"output": torch.tensor([[1.0], [-2.0]])}, r"the output is \[(2|2, 1)\] for one"),
        ({"gradient_of_body": torch.tensor([1e-12])}, "the gradient of body differs"),
        ({"gradient_of_body": None}, "the gradient of body is None for one"),
        ({"gradient_of_absent": torch.zeros(1)}, "the gradient of absent is None for one"),
        ({"gradient_of_more": torch.zeros(1)}, "only one of the two has gradient of more"),
    ],
)
def test_differences_are_refused(changes, words):
    for pair in ((evidence(), evidence(**changes)), (evidence(**changes), evidence())):
        with pytest.raises(UnequalError, match=words):
            require_equal(*pair)


def test_rounding_is_not():
    require_equal(evidence(), evidence(output=torch.tensor([1.0001, -2.0])))


def test_every_claim_is_held_against_ours_or_against_its_own():
    def claim(scale, expected=None):
        found = evidence(output=torch.tensor([scale]))
        return Claimed(lambda: found, expected and (lambda: evidence(output=torch.tensor([expected]))))

    right = {"ours": claim(1.0), "other": claim(1.0), "floor": claim(3.0, expected=3.0)}
    require_all_equal(right, "ours")
    with pytest.raises(UnequalError, match=r"^other is not equal to ours: the output differs by 1\.0e"):
        require_all_equal(right | {"other": claim(2.0)}, "ours")
    with pytest.raises(UnequalError, match=r"^floor is not equal to what it must compute: the output differs by 2\.0e"):
        require_all_equal(right | {"floor": claim(1.0, expected=3.0)}, "ours")


def test_a_part_has_its_experts_gradient():
    whole = nn.Parameter(torch.zeros(3, 2, 4))
    parts = [Part(whole, place, is_transposed=place == 1) for place in range(3)]
    assert [part.grad for part in parts] == [None] * 3
    whole.grad = torch.zeros(3, 2, 4)
    whole.grad[0] = torch.arange(8.0).view(2, 4)
    whole.grad[1, 0, 3] = 5.0
    assert torch.equal(parts[0].grad, torch.arange(8.0).view(2, 4))
    assert parts[1].grad.shape == (4, 2)
    assert parts[1].grad[3, 0] == 5.0
    # Absent: the step did not reach it.
    assert parts[2].grad is None


MAKERS = {WHOLE_STEP: models.MODELS, INFERENCE: models.MODELS, DISPATCH: moving.MOVERS, EXPERTS: products.PRODUCTS}
MLP = Workload("mlp", 8, 12, 3)
SORTED_ROWS = Workload(PRODUCT, 8, 12, 3, hierarchy=ONE_LEVEL)
MOVED = Workload(UNTOUCHED, 8, 12, 3, hierarchy=ONE_LEVEL)
WHOLE = [AUTO, STACKED, GROUPED, LOOPED, *PEERS, ORACLE, DENSE, BARE, STACK, VMAP, TRANSFORMERS]
TRAINED = [
    *((WHOLE_STEP, MLP, name) for name in WHOLE),
    *((EXPERTS, SORTED_ROWS, name) for name in (AUTO, LOOPED, DENSE, STACK, VMAP)),
]
NAMED = [pytest.param(*case, id=" ".join([case[0], case[2]])) for case in TRAINED]


def make(stage, workload, name):
    """The contender, or a skip with the reason why there is none here."""
    try:
        return MAKERS[stage][name](Terms(workload, CPU, is_training=stage != INFERENCE))
    except models.AbsentError as error:
        pytest.skip(str(error))


def hold(stage, workload, name, contender, monkeypatch):
    """Compare this contender with ours, and ours with the looped engine, as the suite does before it times them."""
    monkeypatch.setitem(MAKERS[stage], name, lambda _terms: contender)
    tasks = tasks_of(stage, workload, CPU)
    return gather({each: tasks[each] for each in dict.fromkeys((AUTO, LOOPED, name)) if each in tasks}, 60.0)


def test_every_contender_is_held_to_its_gradients():
    for stage in (WHOLE_STEP, EXPERTS):
        assert {name for where, _, name in TRAINED if where == stage} == MAKERS[stage].keys() - {PEFT}


@needs_grouped_mm
@pytest.mark.parametrize(("stage", "workload", "name"), NAMED)
@pytest.mark.parametrize("kind", GRADIENTS)
def test_a_wrong_gradient_in_any_contender_is_refused(kind, stage, workload, name, monkeypatch):
    if (kind, stage, name) == ("swapped", EXPERTS, DENSE):
        kind = "scaled"  # there are no two experts in it
    contender = make(stage, workload, name)
    task = tasks_of(stage, workload, CPU)[name]()
    reached = with_gradients(task.evidence())
    first, second = two_alike(contender.weights, [each for each in reached if not each.startswith("fusion.")])
    GRADIENTS[kind](contender.weights, first, second)
    with pytest.raises(UnequalError, match="gradient of "):
        hold(stage, workload, name, contender, monkeypatch)


@needs_grouped_mm
@pytest.mark.parametrize(
    ("stage", "workload", "name"),
    [*NAMED, *(pytest.param(DISPATCH, MOVED, name, id=f"dispatch {name}") for name in moving.MOVERS)],
)
def test_a_wrong_gradient_of_the_input_is_refused(stage, workload, name, monkeypatch):
    contender = with_another_input_gradient(make(stage, workload, name))
    with pytest.raises(UnequalError, match="the gradient of the input differs"):
        hold(stage, workload, name, contender, monkeypatch)


@needs_grouped_mm
@pytest.mark.parametrize("stage", [INFERENCE, WHOLE_STEP])
@pytest.mark.parametrize("name", WHOLE)
def test_another_weight_is_refused(name, stage, monkeypatch):
    contender = make(stage, MLP, name)
    with torch.no_grad():
        # A bias or shift moves the output directly: each row of the last level's experts has it.
        next(each for own, each in contender.module.named_parameters() if "bias" in own or "shift" in own).add_(0.01)
    if name in FLOORS:
        # A floor's reference copies its weights, so the check compares its use of them.
        hold(stage, MLP, name, contender, monkeypatch)
        return
    with pytest.raises(UnequalError, match="the output"):
        hold(stage, MLP, name, contender, monkeypatch)


def test_a_name_that_is_looked_up_wrongly_is_refused(monkeypatch):
    tasks = tasks_of(PLAN, Workload(UNTOUCHED, 1, 40, 6), CPU)
    gather(tasks, 60.0)
    right = tasks[LOOK_UPS]()
    wrong = Claimed(lambda: right.evidence() | {"family": right.evidence()["family"].roll(1)})
    with pytest.raises(UnequalError, match="look-ups is not equal to celmoe auto: the family differs"):
        require_all_equal({AUTO: tasks[AUTO](), LOOK_UPS: wrong}, AUTO)
