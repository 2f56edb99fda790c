"""Training several networks side by side on the same batches, in as many steps as the clock allows.

Every step trains every contender on the same words. All contenders are therefore trained equally long, one loader feeds
them all, and an interrupted run leaves them at the same step.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

import celmoe
from benchmarks.harness.devices import finish
from benchmarks.multilingual.learning.batches import Batch, Collator, TrainingSteps
from benchmarks.multilingual.learning.losses import Losses
from benchmarks.multilingual.learning.network import Lemmatizer, rule_targets
from benchmarks.multilingual.learning.schedule import FURTHER_PEAK, LEARNING_RATE, Deadline, learning_rate
from celmoe.names import STACKED

WEIGHT_DECAY = 0.01
CLIP_NORM = 1.0
BETAS = (0.9, 0.98)
# Steps between two checks of the plan against the clock.
REVISION_INTERVAL = 10


@dataclass(frozen=True)
class StepResult:
    """One contender's step: ``loss`` is the weighted total, ``terms`` its parts, ``accuracy`` on the batch."""

    loss: float
    terms: dict[str, float]
    accuracy: float


@dataclass
class Contender:
    """One network in training. ``seconds`` are those of its share of the steps, ``words`` the number of its words.

    A contender whose steps cost ``stride`` times as much as the experts' takes one step in so many, so that all train
    for about as long. Its methods hold all that differs between several ranks and one process.
    """

    name: str
    network: Lemmatizer
    losses: Losses
    optimizer: torch.optim.Optimizer
    seconds: float = 0.0
    words: int = 0
    stride: int = 1

    def takes(self, step: int) -> bool:
        """True if the contender takes this step, counted from 0."""
        return step % self.stride == 0

    def backward(self, batch: Batch) -> celmoe.LossBundle:
        """Forward and backward pass: the losses, and their gradients, clipped."""
        bundle = self.losses(self.network(batch), batch)
        bundle.total.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), CLIP_NORM)
        return bundle

    def read(self, bundle: celmoe.LossBundle, batch: Batch) -> StepResult:
        """The step's result, read from the device."""
        right = count_right(self.losses.logits, batch)
        return StepResult(bundle.total.item(), bundle.as_dict(), right / len(batch))

    def whole(self) -> Contender:
        """The contender as one process has it: to save, and to predict with."""
        return self


def make_contender(name: str, network: Lemmatizer, losses: Losses, stride: int = 1) -> Contender:
    """A network with its optimizer: AdamW, weight decay on the matrices alone; experts may be stacked."""
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for path, parameter in network.named_parameters():
        axes = parameter.ndim - is_stacked(path)
        (matrices if axes > 1 else vectors).append(parameter)
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    # One kernel for all parameters, if the device has it: a language expert's are too small for one each.
    fused = matrices[0].device.type in {"cpu", "cuda"}
    return Contender(
        name, network, losses, celmoe.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, fused=fused), stride=stride
    )


def is_stacked(path: str) -> bool:
    """True if a parameter with this path is a stack, whose first axis is the experts."""
    return path.rpartition(".")[2].startswith(STACKED)


@dataclass(frozen=True)
class CurvePoint:
    """A point of the curves: one contender at one step."""

    step: int
    contender: str
    loss: float
    accuracy: float
    words_per_second: float
    validation_accuracy: float | None = None
    terms: dict[str, float] = field(default_factory=dict)


@dataclass
class Progress:
    """The step that training has reached, and its words and curve so far.

    ``planned_steps`` are the options' steps. ``total_steps`` are those that the clock leaves, or all unless
    ``clocked``. ``expert_load`` counts words by ``level/expert``. A finished run may go on by a new plan: ``ended`` are
    the steps at which earlier plans ended.
    """

    planned_steps: int
    total_steps: int
    clocked: bool = True
    step: int = 0
    curve: list[CurvePoint] = field(default_factory=list)
    expert_load: Counter[str] = field(default_factory=Counter)
    ended: list[int] = field(default_factory=list)

    @property
    def begun(self) -> int:
        """The step at which the plan began."""
        return self.ended[-1] if self.ended else 0

    @property
    def done(self) -> float:
        """The share of the plan that is done; 1 for a run that goes on, whose beginning is long past."""
        return 1.0 if self.ended else self.step / self.total_steps

    @property
    def learning_rate(self) -> float:
        """The next step's rate: each plan has a schedule of its own, a later one with a lower peak."""
        peak = LEARNING_RATE * (FURTHER_PEAK if self.ended else 1.0)
        return learning_rate(self.step - self.begun, self.total_steps - self.begun, peak)

    def go_on(self, steps: int, *, clocked: bool) -> None:
        """Plan so many more steps for a finished run."""
        self.ended.append(self.step)
        self.planned_steps = self.total_steps = self.step + steps
        self.clocked = clocked

    @property
    def finished(self) -> bool:
        """True if no step is left."""
        return self.step >= self.total_steps

    def state_dict(self) -> dict[str, Any]:
        """Plain values only, so that checkpoints load with ``weights_only=True``."""
        return {
            "planned_steps": self.planned_steps,
            "total_steps": self.total_steps,
            "clocked": self.clocked,
            "step": self.step,
            "curve": [asdict(point) for point in self.curve],
            "expert_load": dict(self.expert_load),
            "ended": self.ended,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Progress:
        """What `state_dict` wrote."""
        return cls(
            planned_steps=state["planned_steps"],
            total_steps=state["total_steps"],
            clocked=state["clocked"],
            step=state["step"],
            curve=[CurvePoint(**point) for point in state["curve"]],
            expert_load=Counter(state["expert_load"]),
            # A run that never went on may not have noted that.
            ended=list(state.get("ended", ())),
        )


def count_right(logits: list[torch.Tensor], batch: Batch) -> int:
    """Words of the batch whose highest score is the right rule."""
    right = [scores.argmax(-1).eq(wanted) for scores, wanted in zip(logits, rule_targets(batch), strict=True)]
    return int(torch.cat(right).sum())


def train_step(contender: Contender, batch: Batch, rate: float, *, done: float, read: bool) -> StepResult | None:
    """One optimizer step, with this share of the schedule ``done``; its result is read from the device on request."""
    contender.losses.fade(done)
    for group in contender.optimizer.param_groups:
        group["lr"] = rate
    contender.optimizer.zero_grad(set_to_none=True)
    bundle = contender.backward(batch)
    contender.optimizer.step()
    return contender.read(bundle, batch) if read else None


def take_steps(contender: Contender, rows: TrainingSteps, collator: Collator, steps: int) -> None:
    """Train alone for so many steps of a run's schedule, with nobody to watch or stop it."""
    contender.network.train()
    for step in range(steps):
        train_step(contender, collator(rows[step]), learning_rate(step, steps), done=step / steps, read=False)


def seconds_to_compile(contender: Contender, batch: Batch) -> float:
    """Seconds of a forward and a backward pass that train nothing, so that all compiling is done in them."""
    contender.network.train()
    started = time.perf_counter()
    contender.backward(batch)
    contender.optimizer.zero_grad(set_to_none=True)
    finish(batch.targets.device)
    return time.perf_counter() - started


@dataclass(frozen=True, kw_only=True)
class Watchers:
    """The callbacks of a training: they hear of its steps, and may stop it.

    ``on_milestone`` comes after every validation but the last, when all contenders stand at the same step.
    """

    on_step: Callable[[int, Mapping[str, StepResult], Mapping[str, float]], None]
    validate: Callable[[Contender], float]
    on_validated: Callable[[CurvePoint], None]
    on_milestone: Callable[[], None]
    stop_requested: Callable[[], bool]


def train(
    contenders: list[Contender],
    batches: Iterator[Batch],
    progress: Progress,
    deadline: Deadline | None,
    watchers: Watchers,
    *,
    read_every: int = 5,
    validations: int = 10,
) -> bool:
    """Train until the schedule's end; returns False if the user asked to stop before the end.

    The number of steps is planned before the first one, and follows from options alone. Only a machine that is too slow
    for the plan takes the deadline's word: then the schedule gets shorter, so that the learning rate still comes down
    to its end in time.
    """
    # When the latest steps began. The first batch is not waited for in here: starting the loader's processes says
    # nothing about the steps to come.
    begun: deque[float] = deque(maxlen=2 * REVISION_INTERVAL)
    latest: dict[str, StepResult] = {}
    validate_every = max(1, (progress.planned_steps - progress.begun) // validations)
    for batch in batches:
        begun.append(time.monotonic())
        # One step is always taken: an untrained network has no figures.
        if progress.step > progress.begun and deadline is not None and deadline.passed():
            # Nothing is left for a resumed run either.
            progress.total_steps = progress.step
        if progress.finished:
            break
        if watchers.stop_requested():
            return False
        rate = progress.learning_rate
        last = progress.step + 1 == progress.total_steps
        validate = last or (progress.step + 1 - progress.begun) % validate_every == 0
        # A step that costs much is read whenever it is taken.
        results: dict[str, StepResult] = {}
        speeds: dict[str, float] = {}
        for contender in contenders:
            if not contender.takes(progress.step):
                continue
            contender.network.train()
            finish(batch.targets.device)
            started = time.perf_counter()
            read = validate or contender.stride > 1 or progress.step % read_every == 0
            result = train_step(contender, batch, rate, done=progress.done, read=read)
            finish(batch.targets.device)
            spent = time.perf_counter() - started
            contender.seconds += spent
            contender.words += batch.joined_size
            speeds[contender.name] = batch.joined_size / spent
            if result is not None:
                results[contender.name] = latest[contender.name] = result
        progress.step += 1
        progress.expert_load.update(batch.words_by_expert)
        _record(contenders, progress, latest if validate else results, speeds, watchers, validate=validate)
        watchers.on_step(progress.step, results, speeds)
        if deadline is not None and len(begun) >= REVISION_INTERVAL and progress.step % REVISION_INTERVAL == 0:
            fitting = progress.step + deadline.steps_that_fit((time.monotonic() - begun[0]) / len(begun))
            progress.total_steps = min(progress.planned_steps, fitting)
        if validate and not last:
            watchers.on_milestone()
    return True


def _record(
    contenders: list[Contender],
    progress: Progress,
    results: Mapping[str, StepResult],
    speeds: Mapping[str, float],
    watchers: Watchers,
    *,
    validate: bool,
) -> None:
    for contender in contenders:
        if contender.name not in results:
            continue
        result = results[contender.name]
        point = CurvePoint(
            step=progress.step,
            contender=contender.name,
            loss=result.loss,
            accuracy=result.accuracy,
            words_per_second=speeds.get(contender.name, contender.words / max(contender.seconds, 1e-9)),
            validation_accuracy=watchers.validate(contender) if validate else None,
            terms=result.terms,
        )
        progress.curve.append(point)
        if validate:
            watchers.on_validated(point)
