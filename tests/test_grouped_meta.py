"""The comparison can fail for the grouped engine: wrong ones are each caught, and for their own reason.

`test_parity_meta` does the same for the library as a whole. Verifying also has to find some of the mutants. With it,
they are refused or looped; without it, the comparison catches them too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn

import celmoe.engines.grouped
import celmoe.grouped.classes
import celmoe.grouped.segments
import celmoe.level
from celmoe import CELMoEOutput, EngineRefusedError, HierarchicalCELMoE
from celmoe.engines.arrangement import Arrangement
from celmoe.engines.grouped import UnitBatch, UnitResult
from celmoe.experts import ExpertBatch, ExpertResult
from celmoe.grouped.boundary import _Way
from celmoe.grouped.classes import LevelClasses, Unit
from celmoe.grouped.kernels import members
from celmoe.grouped.program import Bound, Program
from celmoe.grouped.segments import Run, Segments
from celmoe.grouped.values import CannotGroupError
from celmoe.routing.plan import LevelPlan
from tests import parity, traps
from tests.parity import ParityError, assert_parity
from tests.strategies import Case, Expert, Level, Routes, of_siblings, pool
from tests.test_properties import assert_equal as check_property

Patch = pytest.MonkeyPatch
RESULT = r"(levels\[.*\]\.hidden|fused_hidden): values differ"
GRADIENT = r"gradient of '.*': values differ"
ZEROS = r"gradient of 'level_modules\..*': is a tensor, should be None"

# Two classes of equal experts, one with an expert that no sample comes to. In the second step half of the samples are
# left, so that more stay away, and counts change.
CASE = Case(
    levels=(
        Level("family", tuple(Expert(name, "linear") for name in ("slavic", "romance", "baltic", "absent"))),
        Level("language", tuple(Expert(name, "linear") for name in ("ru", "fr", "it", "lt", "lv"))),
    ),
    batch_size=14,
    routing={
        "family": Routes((0, 1, 2, 1, 0, 2, 1, 1, 0, 0, 2, 1, 1, 2)),
        "language": Routes((4, 0, 3, 0, 3, 4, 0, 1, 4, 3, 3, 0, 2, 1)),
    },
    trailing=(2,),
    dtype=torch.float64,
    fusion="learned",
    seed=1,
)


def of_kind(kind: str) -> Case:
    """`CASE` with every expert of one kind."""
    levels = tuple(
        replace(level, experts=tuple(replace(expert, kind=kind) for expert in level.experts)) for level in CASE.levels
    )
    return replace(CASE, levels=levels)


SCALED = replace(
    CASE,
    levels=tuple(
        replace(
            level,
            experts=tuple(replace(each, scale=(0.25, 0.5)[number % 2]) for number, each in enumerate(level.experts)),
        )
        for level in CASE.levels
    ),
)


def boundaries_off_by_one(patch: Patch) -> None:
    """A row of the second member is counted as the first one's, if members have different weights in one product."""
    right = celmoe.grouped.segments._runs

    def wrong(counts: Sequence[int]) -> list[Run]:
        moved = list(counts)
        for member in range(len(moved) - 1):
            if moved[member + 1] > 1:
                moved[member : member + 2] = moved[member] + 1, moved[member + 1] - 1
                break
        return right(moved)

    patch.setattr(celmoe.grouped.segments, "_runs", wrong)


def rows_of_the_neighbour(patch: Patch) -> None:
    """Each row takes the entry of the member of the row before it, if members' parameters are spread over rows."""
    right = Segments.member_of_row
    patch.setattr(Segments, "member_of_row", lambda self, factor=1: right(self, factor).roll(1))


def turned(values: Sequence[Any]) -> Sequence[Any]:
    return [*values[1:], *values[:1]]


def bias_of_the_neighbour(patch: Patch) -> None:
    right = members._multiply
    patch.setattr(
        members,
        "_multiply",
        lambda x, weights, biases, *rest: right(x, weights, turned(biases), *rest),
    )


def weight_of_the_neighbour_in_the_backward_pass(patch: Patch) -> None:
    right = members._gradients
    patch.setattr(
        members,
        "_gradients",
        lambda grad, x, weights, *rest: right(grad, x, turned(weights), *rest),
    )


def gradients_to_the_neighbour(what: str) -> Callable[[Patch], None]:
    """The right gradients of weights, or of biases, and each for the wrong expert."""

    def apply(patch: Patch) -> None:
        right = members._gradients

        def wrong(*args: Any) -> Any:
            found = right(*args)
            return found._replace(**{what: turned(getattr(found, what))})

        patch.setattr(members, "_gradients", wrong)

    return apply


def remember_the_stack(patch: Patch) -> None:
    """The values of each parameter at its first call are used again; gradients flow to the parameter as it is now."""
    right = celmoe.engines.grouped.run_program
    first: dict[torch.Tensor, torch.Tensor] = {}

    def wrong(program: Program, bound: Bound, *rest: Any, **options: Any) -> Any:
        stale = [
            [first.setdefault(each, each.detach().clone()) + (each - each.detach()) for each in leaf]
            for leaf in bound.tensors
        ]
        return right(program, bound._replace(tensors=stale), *rest, **options)

    patch.setattr(celmoe.engines.grouped, "run_program", wrong)


def change_results(change: Callable[[Unit, UnitResult], None]) -> Callable[[Patch], None]:
    """A mutant that changes the results of a class of experts."""

    def apply(patch: Patch) -> None:
        right = celmoe.engines.grouped._run_unit

        def wrong(unit: Unit, *rest: Any) -> ExpertResult:
            result = right(unit, *rest)
            assert isinstance(result, UnitResult)
            change(unit, result)
            return result

        patch.setattr(celmoe.engines.grouped, "_run_unit", wrong)

    return apply


def losses_of_the_neighbour(unit: Unit, result: UnitResult) -> None:
    result.by_expert = list(turned(result.by_expert))


def add_zeros(rows: torch.Tensor, modules: Sequence[nn.Module]) -> torch.Tensor:
    parameters = [each for module in modules for each in module.parameters() if each.requires_grad]
    return rows + sum(0 * each.sum() for each in parameters)


def zeros_for_those_that_were_here_before(patch: Patch) -> None:
    """A stack of all experts that a class has ever seen gives zeros to those that stay away this time."""
    seen: dict[nn.Module, set[nn.Module]] = {}
    right = LevelClasses.units

    def units(self: LevelClasses, names: Any, experts: Sequence[nn.Module], *args: Any, **options: Any) -> list[Unit]:
        for module in experts:
            everyone = next((seen[each] for each in experts if each in seen), set())
            everyone.update(experts)
            seen[module] = everyone
        return right(self, names, experts, *args, **options)

    def change(unit: Unit, result: UnitResult) -> None:
        absent = [module for module in seen[unit.modules[0]] if module not in unit.modules]
        result.blocks = [add_zeros(block, absent) for block in result.blocks]

    patch.setattr(LevelClasses, "units", units)
    change_results(change)(patch)


def zeros_for_all_others(patch: Patch) -> None:
    """A stack of all experts of a model gives zeros to those that no sample ever came to."""
    right = HierarchicalCELMoE.forward

    def wrong(self: HierarchicalCELMoE, *args: Any, **options: Any) -> CELMoEOutput:
        output = right(self, *args, **options)
        output.fused_hidden = add_zeros(output.fused_hidden, [self.level_modules])
        return output

    patch.setattr(HierarchicalCELMoE, "forward", wrong)


def zeros_for_losses_not_used(patch: Patch) -> None:
    """No boundary: a backward pass that starts from one expert's loss reaches all of its class."""
    patch.setattr(celmoe.engines.grouped, "leave", lambda results, *_: list(results))


def scale_of_the_first(patch: Patch) -> None:
    """One class takes experts with different scales of their input's gradient."""
    right = LevelClasses.units
    patch.setattr(
        LevelClasses,
        "units",
        lambda self, names, experts, scales, *rest, **options: right(
            self, names, experts, [scales[0]] * len(scales), *rest, **options
        ),
    )


def rows_left_in_the_engines_order(patch: Patch) -> None:
    """Members stand by their numbers of rows, and nobody puts their results back in order."""
    right = celmoe.level.arrange

    def wrong(units: Sequence[Unit], plan: LevelPlan) -> Arrangement:
        arranged = right(units, plan)
        return arranged._replace(plan=arranged.plan._replace(inverse=plan.inverse))

    patch.setattr(celmoe.level, "arrange", wrong)


def mask_rows_of_the_neighbour(patch: Patch) -> None:
    """A class's mask slips by a row."""
    right = celmoe.level._unit_batches

    def wrong(*args: Any) -> tuple[list[ExpertBatch], Any]:
        batches, passed = right(*args)
        for batch in batches:
            if isinstance(batch, UnitBatch) and batch.mask is not None:
                batch.mask = batch.mask.roll(1, 0)
        return batches, passed

    patch.setattr(celmoe.level, "_unit_batches", wrong)


@dataclass(frozen=True)
class Mutant:
    """A wrong engine.

    Attributes:
        apply: Makes it wrong.
        message: The comparison's message.
        case: A case made for it.
        proof: The words of the engine's own verifying, if that sees it.
        drawn_as: Changes the drawn cases of the property tests, to see it.
        shows: True for the drawn cases that may show it.
    """

    apply: Callable[[Patch], None]
    message: str
    case: Case = CASE
    proof: str | None = None
    drawn_as: Callable[[Case], Case] = of_siblings
    shows: Callable[[Case], bool] = lambda case: True


MUTANTS = {
    "boundaries off by one": Mutant(boundaries_off_by_one, RESULT, proof="results"),
    "rows of the neighbour": Mutant(rows_of_the_neighbour, RESULT, of_kind("scale"), "results"),
    "bias of the neighbour": Mutant(bias_of_the_neighbour, RESULT, proof="results"),
    "weight of the neighbour in the backward pass": Mutant(
        weight_of_the_neighbour_in_the_backward_pass,
        r"gradient of 'hidden': values differ",
        proof="gradient of their hidden states",
    ),
    "weights' gradients to the neighbour": Mutant(
        gradients_to_the_neighbour("weights"),
        r"gradient of 'level_modules\..*\.weight': values differ",
        proof="gradient of 'linear.weight'",
    ),
    "biases' gradients to the neighbour": Mutant(
        gradients_to_the_neighbour("biases"),
        r"gradient of 'level_modules\..*\.bias': values differ",
        proof="gradient of 'linear.bias'",
    ),
    "stack remembered": Mutant(remember_the_stack, RESULT),
    "losses of the neighbour": Mutant(
        change_results(losses_of_the_neighbour),
        r"levels\[.*\]\.losses\[.*\]: values differ",
        of_kind("losses"),
        shows=lambda case: "losses" in case.kinds,
    ),
    "zeros for those that were here before": Mutant(zeros_for_those_that_were_here_before, ZEROS),
    "zeros for all others": Mutant(zeros_for_all_others, ZEROS),
    "gradient scale of the first": Mutant(scale_of_the_first, GRADIENT, SCALED, drawn_as=lambda case: case),
    "mask rows of the neighbour": Mutant(
        mask_rows_of_the_neighbour,
        RESULT,
        replace(of_kind("reads_mask"), mask="float"),
        shows=lambda case: case.mask == "float" and "reads_mask" in case.kinds,
    ),
    "rows left in the engine's order": Mutant(rows_left_in_the_engines_order, RESULT),
}
PROVEN_WRONG = {name: mutant for name, mutant in MUTANTS.items() if mutant.proof is not None}


@pytest.fixture
def without_proof(monkeypatch: Patch) -> None:
    """The engine believes in itself."""
    monkeypatch.setattr(celmoe.grouped.classes, "verify", lambda record, members, few: [None] * len(members))


@pytest.mark.usefixtures("without_proof")
@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught(name: str, monkeypatch: Patch):
    mutant = MUTANTS[name]
    assert_parity(mutant.case.model("grouped"), mutant.case.inputs)
    mutant.apply(monkeypatch)
    with pytest.raises(ParityError, match=f"^{mutant.message}"):
        assert_parity(mutant.case.model("grouped"), mutant.case.inputs)


@pytest.mark.usefixtures("without_proof")
@pytest.mark.parametrize("name", MUTANTS)
def test_the_property_tests_catch_a_mutant(name: str, monkeypatch: Patch):
    mutant = MUTANTS[name]
    mutant.apply(monkeypatch)
    cases = (case for case in map(mutant.drawn_as, pool()) if case.batch_size > 1 and mutant.shows(case))
    assert any(_catches(mutant, case) for case in cases)


def _catches(mutant: Mutant, case: Case) -> bool:
    try:
        assert_parity(case.model("grouped"), case.inputs, objective=case.objective, seed=case.seed)
    except ParityError as error:
        return re.match(mutant.message, str(error)) is not None
    except Exception:  # noqa: BLE001  # refused, or crashed, which proves nothing about the comparison
        return False
    return False


@pytest.mark.parametrize("name", PROVEN_WRONG)
def test_the_proof_catches_it_first(name: str, monkeypatch: Patch):
    """``"grouped"`` is refused, by the difference; under ``"auto"`` the loop steps in and is right."""
    mutant = MUTANTS[name]
    mutant.apply(monkeypatch)
    with pytest.raises(EngineRefusedError, match=f"differ in (their|the) {mutant.proof}, run as one"):
        assert_parity(mutant.case.model("grouped"), mutant.case.inputs)
    model = mutant.case.model("auto")
    with traps.auto_groups_all():
        assert_parity(model, mutant.case.inputs)


@pytest.mark.parametrize("name", [name for name in MUTANTS if name not in PROVEN_WRONG])
def test_what_the_proof_does_not_see(name: str, monkeypatch: Patch):
    """Beyond a few rows of two members, once: only a comparison of whole calls can."""
    mutant = MUTANTS[name]
    mutant.apply(monkeypatch)
    with pytest.raises(ParityError, match=f"^{mutant.message}"):
        assert_parity(mutant.case.model("grouped"), mutant.case.inputs)


def refuse(*_: Any) -> None:
    raise CannotGroupError("will not")


def test_a_grouped_engine_that_only_refuses_is_no_engine(monkeypatch: Patch):
    """The property tests take a refusal of experts that can run as one for a fault."""
    check_property("grouped", CASE, optimizers=())
    monkeypatch.setattr(celmoe.engines.grouped, "_run", refuse)
    with pytest.raises(AssertionError):
        check_property("grouped", CASE, optimizers=())


def test_zeros_for_losses_that_were_not_used(monkeypatch: Patch):
    """The objective is one expert's loss alone."""
    case = of_kind("losses")
    monkeypatch.setattr(parity, "objective_of", lambda output, *_: next(iter(output.losses.values())).sum())
    evidence = assert_parity(case.model("grouped"), case.inputs)
    assert evidence.missing_gradients > evidence.gradients
    zeros_for_losses_not_used(monkeypatch)
    with pytest.raises(ParityError, match=f"^{ZEROS}"):
        assert_parity(case.model("grouped"), case.inputs)


def test_gradients_held_back_that_flow_in_a_loop(monkeypatch: Patch):
    """A boundary keeps gradients of tensors that are members' own, if losses are all that is differentiated."""
    case = of_kind("losses")
    monkeypatch.setattr(parity, "objective_of", lambda output, *_: sum(each.sum() for each in output.losses.values()))
    assert_parity(case.model("grouped"), case.inputs)
    right = _Way.chosen
    monkeypatch.setattr(_Way, "chosen", lambda self, grads: ([], right(self, grads)[1]))
    with pytest.raises(ParityError, match="gradient"):
        assert_parity(case.model("grouped"), case.inputs)


@pytest.mark.parametrize("what", ["rows", "own"])
def test_shares_of_members_that_are_left_out(what: str, monkeypatch: Patch):
    """A boundary knows the members left out, and lets through gradients of rows, or of their tensors."""
    case = of_kind("losses")
    monkeypatch.setattr(parity, "objective_of", lambda output, *_: next(iter(output.losses.values())).sum())
    assert_parity(case.model("grouped"), case.inputs)
    if what == "rows":
        monkeypatch.setattr(_Way, "_share", lambda self, grad, members: grad + 1)
    else:
        monkeypatch.setattr(_Way, "members_of", lambda self, places: frozenset(range(len(self.counts))))
    with pytest.raises(ParityError, match="gradient" if what == "rows" else f"^{ZEROS}|gradient"):
        assert_parity(case.model("grouped"), case.inputs)


def replace_a_weight(model: HierarchicalCELMoE) -> None:
    linear = traps.experts_of(model)[1].linear
    linear.weight = nn.Parameter(linear.weight.detach() * 2)


def compare_after_replacing_a_weight() -> None:
    subject, twin = traps.build(traps.Plain), traps.build(traps.Plain)
    traps.assert_like_oracle(subject, twin, traps.Batch)
    traps.assert_ran_grouped(subject, traps.Batch())
    for model in (subject, twin):
        replace_a_weight(model)
    traps.assert_like_oracle(subject, twin, traps.Batch)


def test_a_replaced_parameter_that_is_not_seen(monkeypatch: Patch):
    compare_after_replacing_a_weight()
    right, kept = celmoe.engines.grouped.run_program, {}

    def stale(program: Program, bound: Bound, *rest: Any, **options: Any) -> Any:
        tensors = kept.setdefault(program, bound.tensors)
        return right(program, bound._replace(tensors=tensors), *rest, **options)

    monkeypatch.setattr(celmoe.engines.grouped, "run_program", stale)
    with pytest.raises(ParityError, match=r"^levels\['language'\]\.hidden: values differ"):
        compare_after_replacing_a_weight()


def test_the_cases_run_grouped():
    """A case that is looped would show nothing."""
    for case in (mutant.case for mutant in MUTANTS.values()):
        model, inputs = case.model("grouped"), case.inputs()
        model(inputs.hidden, inputs.routing, inputs.context, inputs.mask)
        for level in model.explain(inputs.routing).levels:
            together = [each for each in level.classes if len(each.experts) > 1]
            assert together
            assert all(each.engine == "grouped" for each in together)
