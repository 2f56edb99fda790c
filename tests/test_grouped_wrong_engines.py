"""Wrong engines of the kind that captures, verifies and runs programs: each is caught by name, with the proof on.

Every engine is first found right in its scenario, so that the test catches the fault put in. Scenarios are a few calls
with changes between them, beside the oracle's.
"""

from __future__ import annotations

import contextlib
import math
import re
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import celmoe.engines.grouped
import celmoe.grouped.capture
import celmoe.grouped.classes
import celmoe.grouped.guard
import celmoe.grouped.program
import celmoe.grouped.verify
from celmoe import ExpertModule, ExpertResult, HierarchicalCELMoE
from celmoe.grouped.classes import ClassRecord, LevelClasses, Unit
from celmoe.grouped.guard import Guard
from celmoe.grouped.kernels import members
from celmoe.grouped.segments import Segments
from celmoe.grouped.values import CannotGroupError
from tests import traps
from tests.parity import ParityError
from tests.traps import WIDTH, Batch, experts_of

Patch = pytest.MonkeyPatch
Change = Callable[[HierarchicalCELMoE], Any]

HIDDEN = r"levels\['language'\]\.hidden: values differ"
WEIGHTS = r"gradient of '.*': values differ"


def nothing(_: Any) -> None:
    """No change."""


def expert(forward: Callable[..., Any], prepare: Callable[[Any], Any] = nothing) -> type[ExpertModule]:
    """A class of experts of its own, with graphs of its own."""

    class Expert(ExpertModule):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)
            self.factor = 1.0
            prepare(self)

        def forward(self, batch):
            found = forward(self, batch)
            return found if isinstance(found, ExpertResult) else ExpertResult(found)

    return Expert


def calls(
    make: Callable[[], nn.Module],
    *changes: Change,
    batches: tuple[Callable[[], Batch], ...] = traps.BATCHES,
    setup: Change = nothing,
    groups: bool | None = True,
) -> None:
    """One call, and one after each change, under ``"auto"``, beside the oracle's on a twin.

    Args:
        make: Makes an expert.
        changes: Changes of both models, each before a further call.
        batches: The calls' batches, by turns.
        setup: A change of both models, before the first call.
        groups: True if the first call must be grouped, false if it must not; ``None`` for either.
    """
    subject, twin = traps.build(make, "auto"), traps.build(make)
    for number, change in enumerate((setup, *changes)):
        for model in (subject, twin):
            change(model)
        make_batch = batches[number % len(batches)]
        traps.assert_like_oracle(subject, twin, make_batch)
        if number == 0 and groups:
            with traps.auto_groups_all():
                traps.assert_ran_grouped(subject, make_batch())


def setting(place: int, **attributes: Any) -> Change:
    """A change of one expert's attributes."""

    def change(model: HierarchicalCELMoE) -> None:
        for name, value in attributes.items():
            setattr(experts_of(model)[place], name, value)

    return change


def two_set(factor: float) -> Change:
    """A change of two experts, which are a class of their own with it."""

    def change(model: HierarchicalCELMoE) -> None:
        for place in (1, 2):
            experts_of(model)[place].factor = factor

    return change


def plain(self: Any, batch: Any) -> Any:
    return torch.tanh(self.linear(batch.hidden))


def scaled(self: Any, batch: Any) -> Any:
    return self.linear(batch.hidden) * self.factor


# What is wrong.


def tolerance_too_wide(patch: Patch) -> None:
    wide = {dtype: 100 * each for dtype, each in celmoe.grouped.verify._TOLERANCES.items()}
    patch.setattr(celmoe.grouped.verify, "_TOLERANCES", wide)


def gradients_by_their_sum(patch: Patch) -> None:
    right = celmoe.grouped.verify._gradients
    patch.setattr(
        celmoe.grouped.verify,
        "_gradients",
        lambda *args: [each if each is None else each.sum() for each in right(*args)],
    )


def gradients_not_compared(patch: Patch) -> None:
    patch.setattr(celmoe.grouped.verify, "_gradients", lambda outputs, inputs: [None] * len(inputs))


def losses_not_compared(patch: Patch) -> None:
    right = celmoe.grouped.verify._Agreement.__call__
    patch.setattr(
        celmoe.grouped.verify._Agreement,
        "__call__",
        lambda self, mine, theirs: mine.dim() == 0 or right(self, mine, theirs),
    )


def complex_numbers_by_their_size(patch: Patch) -> None:
    right = celmoe.grouped.verify._Agreement.__call__

    def wrong(self: Any, mine: Any, theirs: Any) -> bool:
        return right(self, mine.abs(), theirs.abs()) if mine.is_complex() else right(self, mine, theirs)

    patch.setattr(celmoe.grouped.verify._Agreement, "__call__", wrong)


def first_kind_of_input_only(patch: Patch) -> None:
    known: dict[int, Any] = {}
    right = ClassRecord.note

    def note(self: ClassRecord, module: nn.Module, fault: str | None) -> None:
        right(self, module, fault)
        known[id(module)] = self.verified[id(module)]

    def fault_of(self: ClassRecord, module: nn.Module) -> tuple[bool, str | None]:
        found = known.get(id(module))
        return (False, None) if found is None or found[0]() is not module else (True, found[1])

    patch.setattr(ClassRecord, "note", note)
    patch.setattr(ClassRecord, "fault_of", fault_of)


def first_two_members_only(patch: Patch) -> None:
    right = celmoe.grouped.classes.verify
    patch.setattr(
        celmoe.grouped.classes,
        "verify",
        lambda record, members, few: right(record, members[:2], few) + [None] * (len(members) - 2),
    )


def one_row_not_verified(patch: Patch) -> None:
    def wrong(member: Any, part: Any, captured: Any, agree: Any) -> str | None:
        result, _ = celmoe.grouped.verify._called(member, part(slice(None)))
        alone = celmoe.grouped.verify._alone(captured, captured.bases(member), captured.own(member), part)
        return None if agree(alone[0], result.hidden) else "differ"

    patch.setattr(celmoe.grouped.verify, "_differs_from_expert", wrong)


def guards_not_asked_again(patch: Patch) -> None:
    right, for_all = Guard.holds, Guard.holds_for_all
    held: set[tuple[int, int]] = set()

    def wrong(self: Guard, arguments: dict[str, Any]) -> bool:
        key = id(self), id(arguments["expert"])
        if key not in held and right(self, arguments):
            held.add(key)
        return key in held

    def wrong_for_all(self: Guard, arguments: dict[str, Any], experts: Any) -> bool:
        keys = {(id(self), id(each)) for each in experts}
        if not keys <= held and for_all(self, arguments, experts):
            held.update(keys)
        return keys <= held

    patch.setattr(Guard, "holds", wrong)
    patch.setattr(Guard, "holds_for_all", wrong_for_all)


def guards_asked_of_the_first_only(patch: Patch) -> None:
    patch.setattr(Guard, "holds_for_all", lambda self, arguments, experts: True)


def state_that_comes_back(patch: Patch) -> None:
    """An expert that has been of two classes is taken to stay in the latter."""
    patch.setattr(celmoe.grouped.classes._Search, "as_before", lambda *_: None)
    right = celmoe.grouped.classes._Search._find
    history: dict[int, list[ClassRecord]] = {}

    def wrong(self: Any, name: str, module: nn.Module, scale: float) -> Any:
        past = history.setdefault(id(module), [])
        if len(set(map(id, past))) > 1:
            self._own[id(module)] = past[-1]
            return past[-1], None
        record, fault = right(self, name, module, scale)
        if record is not None:
            past.append(record)
        return record, fault

    patch.setattr(celmoe.grouped.classes._Search, "_find", wrong)


def no_sign_of_zero(patch: Patch) -> None:
    patch.setattr(Guard, "holds", lambda self, arguments, **_: self._manager.check(arguments))


def only_values_of_one_row(patch: Patch) -> None:
    right = celmoe.grouped.verify._called
    patch.setattr(celmoe.grouped.verify, "_called", lambda *given: (right(*given)[0], []))


def identities_not_guarded(patch: Patch) -> None:
    patch.setattr(celmoe.grouped.guard.Identities, "hold_for", lambda *_: True)


def replaced_method_not_seen(patch: Patch) -> None:
    patch.setattr(celmoe.grouped.guard._Methods, "are_as_before", lambda self: True)


def stale_tensors(patch: Patch) -> None:
    right = celmoe.grouped.capture._gatherer

    def wrong(own: Any) -> Any:
        gather, kept = right(own), {}
        return lambda module: kept.setdefault(id(module), (gather(module), module))[0]

    patch.setattr(celmoe.grouped.capture, "_gatherer", wrong)


def tensors_by_value(patch: Patch) -> None:
    right = celmoe.grouped.capture._gatherer

    def wrong(own: Any) -> Any:
        gather = right(own)

        def gathered(module: nn.Module) -> list[torch.Tensor]:
            found = gather(module)
            return [next(other for other in found if torch.equal(other, each)) for each in found]

        return gathered

    patch.setattr(celmoe.grouped.capture, "_gatherer", wrong)


def tensors_left_where_they_were(patch: Patch) -> None:
    right = Unit.taken
    patch.setattr(Unit, "taken", lambda self, places: right(self, places)._replace(tensors=self.tensors))


def samples_by_shape(patch: Patch) -> None:
    right, kept = celmoe.grouped.capture._made_few, {}
    patch.setattr(
        celmoe.grouped.capture,
        "_made_few",
        lambda place, shape, *rest: kept.setdefault((place, tuple(shape)), right(place, shape, *rest)),
    )


def equally_many_rows(patch: Patch) -> None:
    def wrong(counts: Any, device: Any, **options: Any) -> Segments:
        even = sum(counts) % len(counts) == 0
        return Segments([sum(counts) // len(counts)] * len(counts) if even else counts, device, **options)

    patch.setattr(celmoe.engines.grouped, "Segments", wrong)


def running(change: Callable[..., Any]) -> Callable[[Patch], None]:
    """A change of the values that a program is bound to: ``(bound) -> bound``."""

    def apply(patch: Patch) -> None:
        right = celmoe.engines.grouped.run_program
        patch.setattr(
            celmoe.engines.grouped,
            "run_program",
            lambda program, bound, *rest, **options: right(
                program, bound._replace(sample=change(bound.sample)), *rest, **options
            ),
        )

    return apply


def giving(change: Callable[..., Any]) -> Callable[[Patch], None]:
    """A change of a program's results: ``(outcome, unit) -> outcome``."""

    def apply(patch: Patch) -> None:
        right = celmoe.engines.grouped._run
        patch.setattr(celmoe.engines.grouped, "_run", lambda unit, batch: change(right(unit, batch), unit))

    return apply


def no_mask(sample: Any) -> Any:
    return sample._replace(mask=None if sample.mask is None else torch.ones_like(sample.mask))


def context_of_the_neighbour(sample: Any) -> Any:
    return sample._replace(context=sample.context | {"scale": sample.context["scale"].roll(1, 0)})


def first_table(patch: Patch) -> None:
    kept: dict[str, torch.Tensor] = {}

    def change(sample: Any) -> Any:
        return sample._replace(
            context=sample.context | {"table": kept.setdefault("table", sample.context["table"].clone())}
        )

    running(change)(patch)


def reversed_losses(outcome: Any, _: Unit) -> Any:
    return outcome._replace(losses={name: each[::-1] for name, each in outcome.losses.items()})


def detached_losses(outcome: Any, _: Unit) -> Any:
    return outcome._replace(
        losses={name: [each.detach().requires_grad_() for each in some] for name, some in outcome.losses.items()}
    )


def zeros_for_unused(outcome: Any, unit: Unit) -> Any:
    unused = sum(0 * each.sum() for module in unit.modules for each in module.parameters())
    return outcome._replace(hidden=outcome.hidden + unused)


def wider(outcome: Any, _: Unit) -> Any:
    return outcome._replace(hidden=outcome.hidden.double())


def draws_after(name: str) -> Callable[[Patch], None]:
    """A function that must leave the random stream unchanged draws from it."""

    def apply(patch: Patch) -> None:
        right = getattr(celmoe.grouped.classes, name)

        def wrong(*args: Any) -> Any:
            found = right(*args)
            torch.rand(1)
            return found

        patch.setattr(celmoe.grouped.classes, name, wrong)

    return apply


def draws_before_a_refusal(patch: Patch) -> None:
    patch.setattr(celmoe.engines.grouped, "_set_random_state", lambda *_: None)


def mixed_level_looped_later(patch: Patch) -> None:
    right, seen = LevelClasses.units, set()

    def wrong(self: LevelClasses, *args: Any, **options: Any) -> list[Unit]:
        units = right(self, *args, **options)
        is_new = id(self) not in seen
        seen.add(id(self))
        return units if is_new or len(units) == 1 else [unit._replace(fault="are mixed") for unit in units]

    patch.setattr(LevelClasses, "units", wrong)


def hooks_not_seen(patch: Patch) -> None:
    patch.setattr(celmoe.grouped.capture, "without_new_hooks", lambda _: contextlib.nullcontext([]))


# Where it shows.


def with_a_kernel(name: str, wrong: Callable[..., Any], module: Any = members) -> Callable[..., None]:
    """Calls that run while a kernel is wrong: a right engine finds out, and loops."""

    def scenario(make: Callable[[], nn.Module] = lambda: None, **options: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, name, partial(wrong, getattr(module, name)))
            calls(make, nothing, groups=None, **options)

    return scenario


def a_little_more(right: Any, *args: Any) -> Any:
    return right(*args) * 1.001


def rolled_gradients(right: Any, *args: Any) -> Any:
    found = right(*args)
    return found._replace(weights=[each if each is None else each.roll(1, 0) for each in found.weights])


def doubled_gradients(right: Any, *args: Any) -> Any:
    found = right(*args)
    return found._replace(weights=[each if each is None else each * 2 for each in found.weights])


def conjugate_gradients(right: Any, *args: Any) -> Any:
    found = right(*args)
    return found._replace(weights=[each if each is None else each.conj() for each in found.weights])


def turned_beyond_two(right: Any, x: Any, weights: Any, *rest: Any) -> Any:
    return right(x, weights if len(weights) < 3 else [*weights[1:], weights[0]], *rest)


def reversed_members(right: Any, *args: Any) -> Any:
    return right(*args)[::-1]


def of_complex_numbers(self: Any, batch: Any) -> Any:
    return self.complex(batch.hidden.to(torch.complex64) * (1 + 0.5j)).abs()


def losing(self: Any, batch: Any) -> Any:
    rows = plain(self, batch)
    return ExpertResult(rows, {"loss": rows.square().mean()})


def softer_in_evaluation(self: Any, batch: Any) -> Any:
    rows = plain(self, batch)
    return rows if self.training else torch.sin(rows)


def in_evaluation_with_a_wrong_operation() -> None:
    """The second kind of input has an operation that the first has not."""

    def wrong(handler: Any, run: Any, _: Any, *rest: Any) -> Any:
        return handler(run, torch.cos, *rest)

    with pytest.MonkeyPatch.context() as patch:
        name, handler = celmoe.grouped.program.OPERATIONS[torch.sin]
        patch.setitem(celmoe.grouped.program.OPERATIONS, torch.sin, (name, partial(wrong, handler)))
        calls(expert(softer_in_evaluation), lambda model: model.eval())


def on_one_row(self: Any, batch: Any) -> Any:
    rows = self.linear(batch.hidden)
    return rows * 2 if batch.hidden.shape[0] == 1 else rows


def scaled_but_for_one_row(self: Any, batch: Any) -> Any:
    rows = self.linear(batch.hidden)
    return rows * self.scale if batch.hidden.shape[0] > 1 else rows


def with_a_scale(self: Any) -> None:
    self.scale = nn.Parameter(torch.ones(WIDTH))


def if_it_is_the_best(self: Any, batch: Any) -> Any:
    return self.linear(batch.hidden) * (2.0 if self.key is self.owner.best else 1.0)


def with_an_owner(self: Any) -> None:
    self.key, self.owner = types.SimpleNamespace(), types.SimpleNamespace(best=types.SimpleNamespace())


def make_best(model: HierarchicalCELMoE) -> None:
    expert = experts_of(model)[2]
    expert.owner.best = expert.key


def with_a_sign(self: Any, batch: Any) -> Any:
    return self.linear(batch.hidden) * math.copysign(2.0, self.factor)


def replaced_method() -> None:
    class Bent(ExpertModule):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def bend(self, rows):
            return torch.tanh(rows)

        def forward(self, batch):
            return ExpertResult(self.bend(self.linear(batch.hidden)))

    calls(Bent, lambda model: setattr(Bent, "bend", lambda self, rows: torch.sin(rows)))


def replace_a_weight(model: HierarchicalCELMoE) -> None:
    linear = experts_of(model)[1].linear
    linear.weight = nn.Parameter(linear.weight.detach() * 2)


def two_equal(self: Any) -> None:
    self.one, self.other = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.ones(WIDTH))


def without_gradients() -> Batch:
    batch = Batch()
    batch.leaves["hidden"].requires_grad_(False)
    return batch


def if_it_requires(self: Any, batch: Any) -> Any:
    return self.linear(batch.hidden) * (2 if batch.hidden.requires_grad else 3)


def masked(self: Any, batch: Any) -> Any:
    return self.linear(batch.hidden) * batch.mask.unsqueeze(-1)


def of_context(self: Any, batch: Any) -> Any:
    return self.linear(batch.hidden) * batch.context["scale"][:, :1]


def of_table(self: Any, batch: Any) -> Any:
    return self.linear(batch.hidden) + batch.context["table"][0]


def with_another_table() -> Batch:
    batch = Batch()
    batch.context["table"] = torch.full((3, WIDTH), 5.0)
    return batch


def unused(self: Any) -> None:
    self.unused = nn.Parameter(torch.ones(WIDTH))


def beside_one_that_draws() -> None:
    """A class that runs as one, and before its first call an expert of another class that draws numbers of its own."""

    def odd(self: Any, batch: Any) -> Any:
        rows = self.linear(batch.hidden)
        return rows + torch.rand(WIDTH) if self.factor else rows

    calls(expert(odd, lambda self: setattr(self, "factor", 0)), nothing, setup=setting(4, factor=1))


def refused_after_a_draw() -> None:
    """A program that turns out not to run as one when it has drawn already; the loop then draws as ever."""

    def late(*_: Any, **__: Any) -> Any:
        torch.rand(3)
        raise CannotGroupError("will not")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(celmoe.engines.grouped, "run_program", late)
        calls(expert(lambda self, batch: F.dropout(self.linear(batch.hidden), 0.5)), groups=None)


def mixed() -> None:
    """Two classes, which run as one each at every call."""
    make = expert(scaled)
    subject, twin = traps.build(make, "auto"), traps.build(make)
    for model in (subject, twin):
        two_set(2.0)(model)
    for make_batch in (Batch, traps.BATCHES[3], Batch):
        with mock.patch.object(celmoe.engines.grouped, "run_program", wraps=celmoe.engines.grouped.run_program) as spy:
            traps.assert_like_oracle(subject, twin, make_batch)
        if spy.call_count != 2:
            raise ParityError(f"a mixed level: {spy.call_count} classes ran as one, should be 2")


def hooked(self: Any, batch: Any) -> Any:
    if batch.hidden.requires_grad:
        batch.hidden.register_hook(lambda grad: grad * 2)
    return self.linear(batch.hidden)


@dataclass(frozen=True)
class Wrong:
    """A wrong engine.

    Attributes:
        apply: Makes it wrong.
        scenario: Raises if the engine is wrong.
        message: The comparison's message.
    """

    apply: Callable[[Patch], None]
    scenario: Callable[[], None]
    message: str


def on(forward: Callable[..., Any], *changes: Change, prepare: Callable[[Any], Any] = nothing, **options: Any) -> Any:
    """A scenario of calls of fresh experts."""
    return lambda: calls(expert(forward, prepare), *changes, **options)


def kernel(name: str, wrong: Any, forward: Any = plain, prepare: Any = nothing, module: Any = members) -> Any:
    """A scenario with a wrong kernel."""
    return lambda: with_a_kernel(name, wrong, module)(expert(forward, prepare))


def make_complex(self: Any) -> None:
    self.complex = nn.Linear(WIDTH, WIDTH, dtype=torch.complex64)


ENGINES = {
    "a tolerance 100 times too wide": Wrong(tolerance_too_wide, kernel("_multiply", a_little_more), HIDDEN),
    "gradients compared by their sum": Wrong(gradients_by_their_sum, kernel("_gradients", rolled_gradients), WEIGHTS),
    "gradients not compared": Wrong(gradients_not_compared, kernel("_gradients", doubled_gradients), WEIGHTS),
    "losses not compared": Wrong(
        losses_not_compared,
        kernel("_of_members", reversed_members, losing, module=celmoe.grouped.program),
        "losses.*values differ",
    ),
    "complex numbers compared by their size": Wrong(
        complex_numbers_by_their_size,
        kernel("_differentiable", conjugate_gradients, of_complex_numbers, make_complex),
        r"gradient of '.*complex.*': values differ",
    ),
    "verified for the first kind of input only": Wrong(
        first_kind_of_input_only, in_evaluation_with_a_wrong_operation, HIDDEN
    ),
    "members beyond the first two not verified": Wrong(
        first_two_members_only, kernel("_multiply", turned_beyond_two), HIDDEN
    ),
    "one row not verified": Wrong(one_row_not_verified, on(on_one_row, groups=None), HIDDEN),
    "one row verified by its values only": Wrong(
        only_values_of_one_row, on(scaled_but_for_one_row, prepare=with_a_scale, groups=None), "gradient of '.*scale'"
    ),
    "identities not guarded": Wrong(
        identities_not_guarded, on(if_it_is_the_best, make_best, prepare=with_an_owner, batches=(Batch,)), HIDDEN
    ),
    "guards not asked again": Wrong(guards_not_asked_again, on(scaled, setting(2, factor=3.0)), HIDDEN),
    "guards asked of the first member only": Wrong(
        guards_asked_of_the_first_only, on(scaled, setting(4, factor=3.0), batches=(Batch,)), HIDDEN
    ),
    "a state that comes back after two calls": Wrong(
        state_that_comes_back, on(scaled, two_set(3.0), two_set(1.0), batches=(Batch,)), HIDDEN
    ),
    "guards asked without the sign of zero": Wrong(
        no_sign_of_zero,
        on(with_a_sign, setting(3, factor=-0.0), prepare=lambda self: setattr(self, "factor", 0.0), batches=(Batch,)),
        HIDDEN,
    ),
    "a replaced method not seen": Wrong(replaced_method_not_seen, replaced_method, HIDDEN),
    "members' tensors kept": Wrong(stale_tensors, on(plain, replace_a_weight, batches=(Batch,)), HIDDEN),
    "own tensors told by their values": Wrong(
        tensors_by_value,
        on(lambda self, batch: batch.hidden * self.one + self.other, prepare=two_equal),
        "gradient of '.*': ",
    ),
    "tensors left where they were": Wrong(tensors_left_where_they_were, on(plain), HIDDEN),
    "samples kept by their shape": Wrong(
        samples_by_shape, on(if_it_requires, nothing, batches=(Batch, without_gradients)), HIDDEN
    ),
    "members with equally many rows": Wrong(equally_many_rows, on(plain), HIDDEN),
    "mask rows dropped": Wrong(running(no_mask), on(masked), HIDDEN),
    "context rows of another member": Wrong(running(context_of_the_neighbour), on(of_context), HIDDEN),
    "a shared tensor of the first call": Wrong(
        first_table, on(of_table, nothing, batches=(Batch, with_another_table)), HIDDEN
    ),
    "losses for the wrong member": Wrong(giving(reversed_losses), on(losing), "losses.*values differ"),
    "losses without their history": Wrong(giving(detached_losses), on(losing), WEIGHTS),
    "zeros for parameters that are not used": Wrong(
        giving(zeros_for_unused), on(plain, prepare=unused), r"gradient of '.*unused': is "
    ),
    "another dtype": Wrong(giving(wider), on(plain), r"levels\['language'\]\.hidden.*dtype"),
    "a capture that draws": Wrong(draws_after("capture"), beside_one_that_draws, HIDDEN),
    "a verification that draws": Wrong(draws_after("verify"), beside_one_that_draws, HIDDEN),
    "random numbers drawn before a refusal": Wrong(draws_before_a_refusal, refused_after_a_draw, HIDDEN),
    "a mixed level looped from the second call on": Wrong(mixed_level_looped_later, mixed, "a mixed level"),
    "hooks on tensors not seen": Wrong(hooks_not_seen, on(hooked, groups=None), "gradient of 'hidden'"),
}


@pytest.mark.parametrize("name", ENGINES)
def test_a_wrong_engine_is_caught(name: str, monkeypatch: Patch):
    wrong = ENGINES[name]
    wrong.scenario()
    wrong.apply(monkeypatch)
    with pytest.raises(ParityError) as caught:
        wrong.scenario()
    assert re.search(wrong.message, str(caught.value)), str(caught.value)[:300]
