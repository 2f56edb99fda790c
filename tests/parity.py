"""The one helper that compares a model, under any engine, with the oracle.

It compares all that a user can see. In the outputs: every level's hidden states, routes, losses, their weights and aux,
the fused hidden states, dtypes, shapes and memory layout. In the state: every gradient (a gradient of `None` must be
`None` in both), every buffer, the caller's own tensors after the call, and the parameters and optimizer state after
training steps.

It also proves that it compared something: the engine under test ran once a level over every row, and gradients existed
if the objective had any. A difference is a `ParityError` whose message begins with the quantity that differs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import nn

from celmoe import CELMoELossAPI, CELMoEOutput, ExpertBatch, HierarchicalCELMoE
from celmoe.engines.registry import ENGINES
from celmoe.reference import reference_forward
from tests.strategies import Inputs

# Relative to the largest value of the tensor. Never to be loosened.
TOLERANCES = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 1e-5}

# Some steps magnify rounding by themselves: a softmax over large scores, a normalization of rows that hardly differ.
# There the oracle's own distance from its float64 run is the measure, as long as that distance is rounding's.
ROUNDINGS = 4
LARGEST_ROUNDING = 1e-3

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

# SGD shows a gradient's size, to which Adam is blind. Adam's epsilon is far above rounding errors, which a parameter
# with no other gradient would otherwise turn into whole steps; AdamW's effect on absent experts is the same.
OPTIMIZERS: dict[str, MakeOptimizer] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1, eps=1e-3),
}


class ParityError(AssertionError):
    """An engine and the oracle disagree."""


class _ValuesDifferError(ParityError):
    """They disagree by more than the tolerance, in a value: perhaps by rounding."""


@dataclass
class Evidence:
    """What was compared."""

    rows: int = 0
    engine_calls: int = 0
    gradients: int = 0
    missing_gradients: int = 0
    losses: int = 0
    steps: int = 0


def assert_parity(
    model: HierarchicalCELMoE,
    make_inputs: Callable[[int], Inputs],
    *,
    objective: str = "all",
    per_sample: bool = False,
    optimizers: Sequence[str] = ("SGD", "AdamW"),
    steps: int = 2,
    seed: int = 0,
    in_float64: Callable[[], tuple[HierarchicalCELMoE, Callable[[int], Inputs]]] | None = None,
    elsewhere: tuple[torch.device, Callable[[int], Inputs]] | None = None,
) -> Evidence:
    """Compare a model with the oracle on a copy of it.

    Args:
        model: The model; not changed.
        make_inputs: Makes batch 0, 1, … anew, the same ones every time. Training steps take them in turn.
        objective: The outputs to differentiate: ``"all"``, ``"fused"``, ``"last"`` or ``"losses"``.
        per_sample: True to run the oracle on every sample alone. Needs row-wise experts without randomness.
        optimizers: Names in `OPTIMIZERS`.
        steps: Training steps with each.
        seed: Set before each call, so that dropout draws the same numbers.
        in_float64: Makes the same model and inputs in float64, to tell rounding from error if a float32 model's values
            differ by more than the tolerance.
        elsewhere: Another device, and a function that makes the same inputs on it: the model runs there, the oracle on
            the CPU.

    Raises:
        ParityError: They disagree, or there was nothing to compare.
    """

    options = (objective, per_sample, seed)

    def compare(close: Closeness) -> Evidence:
        def make_run(evidence: Evidence) -> _Comparison:
            if elsewhere is not None:
                return _Elsewhere(model, elsewhere, close, evidence, *options)
            return _Comparison(model, model, close, evidence, *options)

        return _compare(make_run, make_inputs, optimizers, steps)

    try:
        return compare(Closeness())
    except _ValuesDifferError:
        if in_float64 is None:
            raise
    wide_model, make_wide_inputs = in_float64()
    rounding = _Rounding()
    _compare(
        lambda evidence: _OracleTwice(model, wide_model, make_wide_inputs, rounding, evidence, *options),
        *(make_inputs, optimizers, steps),
    )
    return compare(Closeness(rounding.seen))


def _compare(
    make_run: Callable[[Evidence], _Comparison],
    make_inputs: Callable[[int], Inputs],
    optimizers: Sequence[str],
    steps: int,
) -> Evidence:
    """One call without an optimizer, and some steps with each, all from the same start."""
    evidence = Evidence()
    run = make_run(evidence)
    run.compare_step(make_inputs, 0, None)
    for name in optimizers:
        run = make_run(evidence)
        subject_optimizer = OPTIMIZERS[name](list(run.subject.parameters())) if _trains(run.subject) else None
        oracle_optimizer = OPTIMIZERS[name](list(run.oracle.parameters())) if _trains(run.oracle) else None
        before = {key: value.detach().clone() for key, value in run.subject.named_parameters()}
        ever_had_gradient: set[str] = set()
        for step in range(steps):
            run.compare_step(make_inputs, step, (subject_optimizer, oracle_optimizer))
            ever_had_gradient |= {key for key, value in run.oracle.named_parameters() if value.grad is not None}
            where = f"after {step + 1} steps of {name}"
            run.compare_parameters(where)
            for key, value in run.subject.named_parameters():
                if key not in ever_had_gradient and not torch.equal(value, before[key]):
                    raise ParityError(f"parameter {key!r} {where}: changed, though it never had a gradient")
            if subject_optimizer is not None and oracle_optimizer is not None:
                run.compare_optimizers(subject_optimizer, oracle_optimizer, where)
            evidence.steps += 1
    return evidence


def _experts_of(route: Any) -> int:
    return 0 if route is None else len(route) if isinstance(route, dict) else 1


class _Comparison:
    """Copies of two models, as a rule of one: the subject, which its engine runs, and the oracle's."""

    def __init__(
        self,
        subject: HierarchicalCELMoE,
        oracle: HierarchicalCELMoE,
        close: Closeness,
        evidence: Evidence,
        objective: str,
        per_sample: bool,
        seed: int,
    ) -> None:
        self.subject = copy.deepcopy(subject)
        self.oracle = copy.deepcopy(oracle)
        self.close = close
        self.evidence = evidence
        self.objective = objective
        self.per_sample = per_sample
        self.seed = seed

    def compare_step(
        self,
        make_inputs: Callable[[int], Inputs],
        step: int,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.Optimizer | None] | None,
    ) -> None:
        """One forward and backward of both, and an optimizer step of both if there are optimizers."""
        given, wanted = self._make_both(make_inputs, step)
        output, expected = self._run_both(given, wanted, self.seed + step)
        self.evidence.rows += given.hidden.shape[0] * len(output.levels)
        for each in (output, expected):
            for level in each.levels.values():
                if level.hidden.requires_grad:
                    level.hidden.retain_grad()
        self._compare_outputs(output, expected)
        self._compare_gradients(output, expected, given, wanted, optimizers)
        _compare_callers(given, self._make_both(make_inputs, step)[0])
        buffers = dict(self.oracle.named_buffers())
        for key, value in self.subject.named_buffers():
            self.close(f"buffer {key!r}", value, buffers[key])

    def compare_parameters(self, where: str) -> None:
        """All parameters, after training steps."""
        parameters = dict(self.oracle.named_parameters())
        for key, value in self.subject.named_parameters():
            self.close(f"parameter {key!r} {where}", value, parameters[key])

    def compare_optimizers(self, subject: torch.optim.Optimizer, oracle: torch.optim.Optimizer, where: str) -> None:
        """Both hold state for the same parameters, and the same state."""
        theirs_by_key = dict(self.oracle.named_parameters())
        for key, value in self.subject.named_parameters():
            mine, theirs = subject.state.get(value, {}), oracle.state.get(theirs_by_key[key], {})
            compare_values(self.close, f"optimizer state of {key!r} {where}", mine, theirs)

    def _make_both(self, make_inputs: Callable[[int], Inputs], step: int) -> tuple[Inputs, Inputs]:
        return make_inputs(step), make_inputs(step)

    def _run_both(self, given: Inputs, wanted: Inputs, seed: int) -> tuple[CELMoEOutput, CELMoEOutput]:
        with spied_engine(self.subject.engine) as spy:
            torch.manual_seed(seed)
            output = self.subject(given.hidden, given.routing, given.context, given.mask)
            random_state = torch.get_rng_state()
            self._prove_engine_ran(spy, output)
            spy.calls = 0
            expected = self._run_oracle(self.oracle, wanted, seed)
            if spy.calls:
                raise ParityError("engine: the oracle ran it, and so would agree with anything")
        if (
            self.subject.engine == "looped"
            and not self.per_sample
            and not torch.equal(random_state, torch.get_rng_state())
        ):
            raise ParityError("random stream: another number of draws than the oracle's")
        return output, expected

    def _run_oracle(self, model: HierarchicalCELMoE, inputs: Inputs, seed: int) -> CELMoEOutput:
        torch.manual_seed(seed)
        return reference_forward(
            model, inputs.hidden, inputs.routing, inputs.context, inputs.mask, per_sample=self.per_sample
        )

    def _prove_engine_ran(self, spy: EngineSpy, output: CELMoEOutput) -> None:
        # A sample with several experts is a row of each, one without is nobody's.
        by_level = [sum(map(_experts_of, level.routes)) for level in output.levels.values()]
        calls, rows = sum(map(bool, by_level)), sum(by_level)
        if (spy.calls, spy.rows) != (calls, rows):
            raise ParityError(
                f"engine: {self.subject.engine!r} ran {spy.calls} times over {spy.rows} rows, "
                f"should be {calls} times over {rows}"
            )
        self.evidence.engine_calls += spy.calls

    def _compare_outputs(self, output: CELMoEOutput, expected: CELMoEOutput) -> None:
        equal("levels", list(output.levels), list(expected.levels))
        for name, level in output.levels.items():
            wanted = expected.levels[name]
            where = f"levels[{name!r}]"
            equal(f"{where}.name", level.name, wanted.name)
            equal(f"{where}.routes", level.routes, wanted.routes)
            self.close(f"{where}.hidden", level.hidden, wanted.hidden)
            if self.per_sample:
                continue
            self._compare_losses(where, level, wanted)
            compare_values(self.close, f"{where}.aux", level.aux, wanted.aux)
        self.close("fused_hidden", output.fused_hidden, expected.fused_hidden)
        if not self.per_sample:
            self._compare_losses("output", output, expected)
            compare_values(self.close, "output.aux", output.aux, expected.aux)

    def _compare_losses(self, where: str, output: Any, expected: Any) -> None:
        equal(f"{where}.losses", list(output.losses), list(expected.losses))
        for key, value in output.losses.items():
            self.close(f"{where}.losses[{key!r}]", value, expected.losses[key])
        equal(f"{where}.loss_weights", output.loss_weights, expected.loss_weights)
        equal(f"{where}.loss_shares", output.loss_shares, expected.loss_shares)
        self.evidence.losses += len(output.losses)

    def _compare_gradients(
        self,
        output: CELMoEOutput,
        expected: CELMoEOutput,
        given: Inputs,
        wanted: Inputs,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.Optimizer | None] | None,
    ) -> None:
        losses = [objective_of(each, self.objective, self.per_sample) for each in (output, expected)]
        equal("objective.requires_grad", losses[0].requires_grad, losses[1].requires_grad)
        if not losses[1].requires_grad:
            return
        for optimizer in optimizers or ():
            if optimizer is not None:
                optimizer.zero_grad(set_to_none=True)
        for loss in losses:
            loss.backward()
        found = 0
        pairs = [(f"gradient of {key!r}", leaf, wanted.leaves[key]) for key, leaf in given.leaves.items()]
        parameters = dict(self.oracle.named_parameters())
        pairs += [(f"gradient of {key!r}", value, parameters[key]) for key, value in self.subject.named_parameters()]
        # Each level's output is the next level's input, in the graph too: hooks and penalties count on it.
        pairs += [
            (f"gradient of levels[{name!r}].hidden", level.hidden, expected.levels[name].hidden)
            for name, level in output.levels.items()
            if level.hidden.requires_grad
        ]
        for where, mine, theirs in pairs:
            if (mine.grad is None) != (theirs.grad is None):
                raise ParityError(f"{where}: is {_present(mine.grad)}, should be {_present(theirs.grad)}")
            if mine.grad is None or theirs.grad is None:
                self.evidence.missing_gradients += 1
                continue
            self.close(where, mine.grad, theirs.grad, layout=False)
            found += 1
        if not found:
            raise ParityError("gradients: none to compare, though the objective has some")
        self.evidence.gradients += found
        for optimizer in optimizers or ():
            if optimizer is not None:
                optimizer.step()


class _Elsewhere(_Comparison):
    """The model on another device beside the oracle on the CPU."""

    def __init__(
        self, model: HierarchicalCELMoE, elsewhere: tuple[torch.device, Callable[[int], Inputs]], *rest: Any
    ) -> None:
        super().__init__(model, model, *rest)
        device, self.make_inputs_there = elsewhere
        self.subject.to(device)

    def _make_both(self, make_inputs: Callable[[int], Inputs], step: int) -> tuple[Inputs, Inputs]:
        return self.make_inputs_there(step), make_inputs(step)


class _OracleTwice(_Comparison):
    """The oracle in the model's dtype beside the oracle in float64."""

    def __init__(
        self,
        subject: HierarchicalCELMoE,
        oracle: HierarchicalCELMoE,
        make_wide_inputs: Callable[[int], Inputs],
        *rest: Any,
    ) -> None:
        super().__init__(subject, oracle, *rest)
        self.make_wide_inputs = make_wide_inputs

    def _make_both(self, make_inputs: Callable[[int], Inputs], step: int) -> tuple[Inputs, Inputs]:
        return make_inputs(step), self.make_wide_inputs(step)

    def _run_both(self, given: Inputs, wanted: Inputs, seed: int) -> tuple[CELMoEOutput, CELMoEOutput]:
        return self._run_oracle(self.subject, given, seed), self._run_oracle(self.oracle, wanted, seed)


@dataclass
class EngineSpy:
    """The number of an engine's runs, and of their rows."""

    calls: int = 0
    rows: int = 0


@contextmanager
def spied_engine(name: str) -> Iterator[EngineSpy]:
    """Count the calls and rows of an engine of the registry."""
    spy = EngineSpy()
    engine = ENGINES[name]

    def spied(experts: Sequence[nn.Module], batches: Iterator[ExpertBatch], *rest: Any, **options: Any) -> Any:
        spy.calls += 1

        def counted() -> Iterator[ExpertBatch]:
            for batch in batches:
                spy.rows += batch.hidden.shape[0]
                yield batch

        return engine(experts, counted(), *rest, **options)

    with mock.patch.dict(ENGINES, {name: spied}):
        yield spy


def _trains(model: nn.Module) -> bool:
    return next(model.parameters(), None) is not None


def objective_of(output: CELMoEOutput, objective: str, per_sample: bool) -> torch.Tensor:
    """A number that depends on every element of the chosen outputs, each with a weight of its own."""
    hiddens = [level.hidden for level in output.levels.values()]
    match objective:
        case "fused":
            parts = [output.fused_hidden]
        case "last":
            parts = hiddens[-1:]
        case "losses":
            parts = []
        case _:
            parts = [output.fused_hidden, *hiddens]
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros((), dtype=torch.float64)
    for part in parts:
        if part.is_floating_point():
            weights = torch.randn(part.shape, generator=generator, dtype=torch.float64)
            total = total + (part.cpu() * weights.to(part.dtype)).sum()
    if objective in {"all", "losses"} and not per_sample and output.losses:
        total = total + CELMoELossAPI().compute(output).total.cpu()
    return total


def equal(where: str, mine: Any, theirs: Any) -> None:
    """Hold two values to be of one type and equal."""
    if type(mine) is not type(theirs) or mine != theirs:
        raise ParityError(f"{where}: is {mine!r}, should be {theirs!r}")


def compare_values(close: Closeness, where: str, mine: Any, theirs: Any) -> None:
    """Compare tensors in containers of any kind."""
    if isinstance(mine, torch.Tensor) and isinstance(theirs, torch.Tensor):
        close(where, mine, theirs, layout=False)
    elif isinstance(mine, Mapping) and isinstance(theirs, Mapping):
        equal(where, list(mine), list(theirs))
        for key in mine:
            compare_values(close, f"{where}[{key!r}]", mine[key], theirs[key])
    else:
        equal(where, mine, theirs)


class Closeness:
    """Requires two values to be equal up to rounding.

    Args:
        rounding: The oracle's own error, by quantity, if it's known.
    """

    def __init__(self, rounding: Mapping[str, float] | None = None) -> None:
        self.rounding = rounding or {}

    def __call__(self, where: str, mine: torch.Tensor, theirs: torch.Tensor, *, layout: bool = True) -> None:
        equal(f"{where}.shape", tuple(mine.shape), tuple(theirs.shape))
        equal(f"{where}.dtype", mine.dtype, theirs.dtype)
        if layout:
            equal(f"{where}.is_contiguous()", mine.is_contiguous(), theirs.is_contiguous())
            equal(f"{where}.requires_grad", mine.requires_grad, theirs.requires_grad)
        if not mine.is_floating_point():
            if not torch.equal(mine.cpu(), theirs):
                raise ParityError(f"{where}: values differ")
            return
        if not mine.numel():
            return
        difference, largest = _difference(where, mine, theirs)
        rounding = min(ROUNDINGS * self.rounding.get(where, 0.0), LARGEST_ROUNDING * largest)
        if not difference <= max(TOLERANCES[mine.dtype] * largest, rounding):
            raise _ValuesDifferError(f"{where}: values differ by {difference:.3e}, the largest is {largest:.3e}")


class _Rounding(Closeness):
    """Only notes how far two values are apart."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, float] = {}

    def __call__(self, where: str, mine: torch.Tensor, theirs: torch.Tensor, *, layout: bool = True) -> None:
        if mine.is_floating_point() and mine.numel():
            self.seen[where] = max(self.seen.get(where, 0.0), _difference(where, mine, theirs)[0])


def _difference(where: str, mine: torch.Tensor, theirs: torch.Tensor) -> tuple[float, float]:
    wide_mine, wide_theirs = mine.detach().cpu().double(), theirs.detach().double()
    if not bool(wide_theirs.isfinite().all()):
        raise ParityError(f"{where}: the oracle's values are not finite, and compare with nothing")
    return (wide_mine - wide_theirs).abs().max().item(), wide_theirs.abs().max().item()


def _compare_callers(given: Inputs, untouched: Inputs) -> None:
    """The call left the caller's arguments unchanged, even with experts that work in place."""
    for name in ("hidden", "mask", "context", "leaves"):
        before, after = _tensors(getattr(untouched, name)), _tensors(getattr(given, name))
        if len(before) != len(after) or not all(map(torch.equal, before, after)):
            raise ParityError(f"caller's {name}: changed by the call")
    before_routing, after_routing = repr(untouched.routing), repr(given.routing)
    if before_routing != after_routing:
        raise ParityError(f"caller's routing: is {after_routing}, was {before_routing}")


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in _tensors(item)]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    return [tensor for item in vars(value).values() for tensor in _tensors(item)] if hasattr(value, "__dict__") else []


def _present(gradient: torch.Tensor | None) -> str:
    return "None" if gradient is None else "a tensor"
