"""The parts of the tests of the grouped engine's promises: experts with a trap in them, batches, and one comparison.

A *trap* is an expert that looks as if its siblings could run as one module over all their rows, and can't: the rows of
an ordinary batch would not show it. Unarmed it is a plain layer, so that a first call can be grouped; `Trapped.arm`
sets the trap, by an attribute alone if that is enough.

Every trap is checked in two ways: armed from the start (`check_refusal`), and later (`check_arming`). The oracle runs
on a second model, built in the same way and led through the same calls. The second model also has the values that
`copy.deepcopy` misses: closures, tables keyed by `id`, hooks.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn

from celmoe import (
    CELMoEConfig,
    CELMoEOutput,
    EngineRefusedError,
    ExpertBatch,
    ExpertConfig,
    ExpertModule,
    ExpertResult,
    HierarchicalCELMoE,
    HierarchyLevelConfig,
)
from celmoe.engines import cost
from celmoe.reference import reference_forward
from tests import parity
from tests.parity import ParityError

# The engine under test, by its name in the registry.
GROUPED = "grouped"

WIDTH = 8
NAMES = ("a", "b", "c", "d", "e", "absent")
LEVEL = "language"

Make = Callable[[], nn.Module]
Loss = Callable[[Any, torch.Tensor, Any], torch.Tensor]
Change = Callable[[HierarchicalCELMoE], HierarchicalCELMoE | None]


class Batch:
    """One batch: the number of each expert's rows, and the kind of their numbers.

    Args:
        counts: Rows of the experts in the order of `NAMES`.
        seed: Of the numbers.
        large: An expert, one of whose rows is a hundred times as large, in hidden and context.
        trailing: Axes between samples and width.
        dtype: Of the floating-point tensors.
    """

    def __init__(
        self,
        counts: tuple[int, ...] = (7, 3, 5, 1, 9),
        seed: int = 0,
        *,
        large: int | None = None,
        trailing: tuple[int, ...] = (),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.tensor([expert for expert, count in enumerate(counts) for _ in range(count)])
        ids = ids[torch.randperm(len(ids), generator=generator)]
        self.routing = {LEVEL: [NAMES[each] for each in ids.tolist()]}
        size = len(ids)
        hidden = torch.randn(size, *trailing, WIDTH, generator=generator)
        scale = torch.rand(size, 2, generator=generator) + 0.5
        if large is not None:
            row = ids.tolist().index(large)
            hidden[row] *= 100
            scale[row] *= 100
        self.leaves = {"hidden": hidden.to(dtype).requires_grad_(), "scale": scale.to(dtype).requires_grad_()}
        # One more than any expert has rows of, and than the batch has.
        lengths = torch.randint(1, 5, (size,), generator=generator)
        lengths[0] = 5
        self.context = {"scale": self.leaves["scale"], "lengths": lengths, "table": torch.ones(3, WIDTH, dtype=dtype)}
        self.mask = torch.rand((size, *trailing), generator=generator) < 0.7

    def __call__(self, forward: Callable[..., CELMoEOutput]) -> CELMoEOutput:
        return forward(self.leaves["hidden"], self.routing, self.context, self.mask)


# An ordinary batch; one with a value that ordinary ones don't have; one with few rows, and most experts absent.
BATCHES = (
    Batch,
    partial(Batch, (5, 8, 1, 4, 3), 1, large=1),
    partial(Batch, (1, 2), 2),
    partial(Batch, (10, 12, 9, 11, 10), 3, large=4),
)


def with_an_empty_mask() -> Batch:
    """A batch in which the mask leaves out all rows of one expert, "b"."""
    batch = Batch(dtype=torch.float64)
    batch.mask = torch.tensor([route != "b" for route in batch.routing[LEVEL]])
    return batch


class Trapped(ExpertModule):
    """A layer, until it is armed.

    Subclasses define the trap. A subclass whose trap needs objects of its own makes them in `prepare`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.armed = False

    def arm(self) -> Trapped:
        """Set the trap."""
        self.prepare()
        self.armed = True
        return self

    def prepare(self) -> None:
        """Make the objects that the trap needs."""

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        if self.armed:
            return self.spring(batch)
        return ExpertResult(torch.tanh(self.linear(batch.hidden)))

    def spring(self, batch: ExpertBatch) -> ExpertResult:
        """The forward pass of an armed expert; by default, `change` of the layer's rows."""
        return ExpertResult(self.change(torch.tanh(self.linear(batch.hidden)), batch))

    def change(self, rows: torch.Tensor, batch: ExpertBatch) -> torch.Tensor:
        """The rows that an armed one gives."""
        raise NotImplementedError


class Plain(Trapped):
    """No trap."""

    def arm(self) -> Trapped:
        raise AssertionError("there is no trap to set")


class Losing(Trapped):
    """A layer whose rows are scores, and a loss that a function makes of itself, those and the batch."""

    def __init__(self, function: Loss) -> None:
        super().__init__()
        self.function = function
        self.ignored = 2
        self.entropy = nn.CrossEntropyLoss(torch.rand(WIDTH) + 0.5)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, batch):
        rows = torch.tanh(self.linear(batch.hidden))
        return ExpertResult(rows, {"loss": self.function(self, rows, batch)})


def build(
    make: Make, engine: str = GROUPED, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> HierarchicalCELMoE:
    """A model of one level with such experts, the same one every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = CELMoEConfig(
            WIDTH,
            [HierarchyLevelConfig(LEVEL, {name: ExpertConfig(name) for name in NAMES})],
            use_learned_fusion=False,
        )
        model = HierarchicalCELMoE(config, lambda *_: make(), engine=engine)
    return model if dtype == torch.float32 else model.to(dtype)


def experts_of(model: HierarchicalCELMoE) -> list[Any]:
    """The experts, in the order of `NAMES`."""
    return [model.level_modules[LEVEL][name] for name in NAMES]


def second(model: HierarchicalCELMoE) -> Any:
    return experts_of(model)[1]


def arm_all(model: HierarchicalCELMoE) -> None:
    """Set every expert's trap."""
    for expert in experts_of(model):
        expert.arm()


def arm_one(model: HierarchicalCELMoE) -> None:
    """Set the second expert's trap."""
    experts_of(model)[1].arm()


def oracle_of(model: HierarchicalCELMoE) -> Callable[..., CELMoEOutput]:
    """The model's naive forward."""
    return partial(reference_forward, model)


def seed_all(seed: int = 0) -> None:
    """All streams of random numbers begin anew."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  # experts draw from the global stream


def observe(model: HierarchicalCELMoE, forward: Callable[..., CELMoEOutput], batch: Batch) -> dict[str, Any]:
    """All that a call and its backward pass do that a user can see, by name."""
    model.zero_grad(set_to_none=True)
    before = {name: leaf.detach().clone() for name, leaf in batch.leaves.items()}
    seed_all()
    output = batch(forward)
    found: dict[str, Any] = {f"levels[{name!r}].hidden": level.hidden for name, level in output.levels.items()}
    found |= {f"losses[{name!r}]": loss for name, loss in output.losses.items()}
    found |= {"fused_hidden": output.fused_hidden, "aux": output.levels[LEVEL].aux}
    objective = parity.objective_of(output, "fused", False)
    for index, loss in enumerate(output.losses.values(), start=1):
        if loss.requires_grad:
            objective = objective + loss.double().sum() * (0.3 + 0.1 * index)
    if objective.requires_grad:
        objective.backward()
    for name, leaf in batch.leaves.items():
        if not torch.equal(leaf, before[name]):
            raise ParityError(f"caller's {name}: changed by the call")
    grads = {**batch.leaves, **dict(model.named_parameters())}
    found |= {f"gradient of {name!r}": tensor.grad for name, tensor in grads.items()}
    found |= {f"buffer {name!r}": buffer.clone() for name, buffer in model.named_buffers()}
    found |= {f"parameter {name!r}": parameter.detach().clone() for name, parameter in model.named_parameters()}
    return found


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Both saw the same, as strictly as `assert_parity` compares.

    Raises:
        ParityError: They did not.
    """
    close = parity.Closeness()
    parity.equal("what there is", list(found), list(expected))
    for name, mine in found.items():
        theirs = expected[name]
        if isinstance(mine, torch.Tensor) and isinstance(theirs, torch.Tensor):
            close(name, mine, theirs, layout=not name.startswith("gradient"))
        elif mine is None or theirs is None:
            parity.equal(name, mine, theirs)
        else:
            parity.compare_values(close, name, mine, theirs)


@contextmanager
def auto_groups_all() -> Iterator[None]:
    """``"auto"`` groups all that can be grouped, even a few experts."""
    with mock.patch("celmoe.engines.choice.estimate", return_value=cost.Cost(1, 0)):
        yield


def assert_like_oracle(subject: HierarchicalCELMoE, twin: HierarchicalCELMoE, make_batch: Callable[[], Batch]) -> None:
    """The model gives the oracle's results on its twin.

    Raises:
        EngineRefusedError: The model is told to run grouped, and will not.
    """
    # Experts that "auto" would loop, since that is cheaper for a few of them, are grouped here.
    with auto_groups_all():
        mine = observe(subject, subject, make_batch())
    assert_same(mine, observe(twin, oracle_of(twin), make_batch()))


def changed(model: HierarchicalCELMoE, change: Change) -> HierarchicalCELMoE:
    """The model after a change that draws the same numbers every time."""
    seed_all(1)
    return change(model) or model


def engines_of(model: HierarchicalCELMoE, batch: Batch) -> dict[str, str]:
    """By expert present, the engine that ran it at the last call."""
    (level,) = model.explain(batch.routing).levels
    return {name: each.engine for each in level.classes for name in each.experts}


def assert_ran_grouped(model: HierarchicalCELMoE, batch: Batch) -> None:
    """The last call ran all experts that were present as one.

    Without this check, the tests that follow would prove nothing about a grouped call.
    """
    (level,) = model.explain(batch.routing).levels
    for each in level.classes:
        assert len(each.experts) == 1 or each.engine == "grouped", f"{each.experts} ran {each.engine}: {each.reason}"
    assert any(len(each.experts) > 1 for each in level.classes), "each expert stands alone"


def check_refusal(make: Make, reason: str, *, may_run: bool = False) -> None:
    """``engine="grouped"`` refuses the experts for this reason; if it may run them, it gives the oracle's numbers.

    A refusal holds for another batch, too, and leaves the model as it was: ``"auto"`` gives the oracle's numbers then.
    """
    subject, twin = build(make), build(make)
    for make_batch in BATCHES[:2]:
        before = {name: value.clone() for name, value in subject.state_dict().items()}
        refusal = None
        try:
            assert_like_oracle(subject, twin, make_batch)
        except EngineRefusedError as error:
            refusal = str(error)
        if refusal is None:
            assert may_run, "it was run"
            continue
        # The first fault is reported: an operation that mixes samples, say, before the value that is read of it.
        also = r"mixed samples|called requires_grad_|can't be compared|followed by PyTorch's tracer"
        assert re.search(f"{reason}|{also}", refusal, re.IGNORECASE), f"no {reason!r} in {refusal}"
        after = subject.state_dict()
        assert all(torch.equal(value, after[name]) for name, value in before.items()), "it was no clean refusal"
    subject.engine = "auto"
    for make_batch in (*BATCHES, BATCHES[0]):
        assert_like_oracle(subject, twin, make_batch)


def check_auto(make: Make) -> None:
    """``engine="auto"`` gives the oracle's numbers, on one batch after another."""
    subject, twin = build(make, "auto"), build(make)
    for make_batch in (*BATCHES, BATCHES[0]):
        assert_like_oracle(subject, twin, make_batch)


def check_change(
    make: Make,
    *changes: Change,
    make_batch: Callable[[], Batch] = Batch,
    grouped_first: bool = True,
) -> None:
    """After a first call that was grouped comes a change, and the next calls are still right.

    After the first change ``"grouped"`` runs the calls, and then ``"auto"``; after the second ``"auto"`` comes first:
    each is once the one to find a change out. ``"grouped"`` may refuse, but not be wrong.

    Args:
        make: Makes an expert.
        changes: Each changes a model, or returns another one for it.
        make_batch: Makes the first batch.
        grouped_first: True to insist that the first call was grouped.
    """
    subject, twin = build(make), build(make)
    try:
        assert_like_oracle(subject, twin, make_batch)
    except EngineRefusedError as refused:
        # The trap is seen in the code before it springs; then nothing was ever grouped.
        if grouped_first and not re.search(r"its experts .*(used|called|read|wrote) ", str(refused)):
            raise
        grouped_first = False
    if grouped_first:
        assert_ran_grouped(subject, make_batch())
    engines = [GROUPED, "auto"]
    for change in changes:
        subject, twin = changed(subject, change), changed(twin, change)
        for engine in engines:
            subject.engine = engine
            assert_right_or_refused(subject, twin, (make_batch, *BATCHES[1:3]))
        engines.reverse()


def assert_right_or_refused(
    subject: HierarchicalCELMoE, twin: HierarchicalCELMoE, batches: Sequence[Callable[[], Batch]]
) -> None:
    """On each batch the model gives the oracle's results on its twin, up to the first that it refuses as told to."""
    for make_batch in batches:
        try:
            assert_like_oracle(subject, twin, make_batch)
        except EngineRefusedError:
            assert subject.engine == GROUPED
            # The refused call did nothing, so the oracle's must not run either.
            return


def shows(make: Callable[[], Trapped]) -> bool:
    """True if an armed expert, run once over the rows of siblings with equal weights, gives something else than they.

    A trap that no batch can spring would pass under any engine.
    """
    for make_batch in BATCHES:
        twin = build(lambda: make().arm())
        for expert in experts_of(twin):
            expert.load_state_dict(experts_of(twin)[0].state_dict())
        batch = make_batch()
        expected = batch(oracle_of(twin)).levels[LEVEL].hidden
        batch.routing[LEVEL].sort()
        order = sorted(range(len(expected)), key=make_batch().routing[LEVEL].__getitem__)
        rows = ExpertBatch(
            batch.leaves["hidden"][order],
            {key: value if key == "table" else value[order] for key, value in batch.context.items()},
            batch.mask[order],
            {"level": LEVEL, "expert": "a"},
        )
        if not torch.allclose(experts_of(twin)[0](rows).hidden, expected[order], atol=1e-4):
            return True
    return False


class Traps:
    """A table of traps, each from a function that computes an armed expert's rows.

    Example::

        TRAPS = Traps()

        @TRAPS.add("mean")
        def batch_mean(self, rows, batch):
            return rows + batch.hidden.mean(0)
    """

    def __init__(self) -> None:
        self.classes: dict[str, type[Trapped]] = {}
        self.reasons: dict[str, str] = {}
        self.may_run: set[str] = set()

    def add(self, reason: str, *, method: str = "change", may_run: bool = False, **others: Any) -> Callable[[Any], Any]:
        """Add the trap of a function.

        Args:
            reason: Words of the refusal; a regular expression.
            method: The method of `Trapped` that the function stands for.
            may_run: True if the engine may as well run it, and be right.
            others: Further methods and class attributes.
        """

        def add(function: Any) -> Any:
            name = function.__name__
            self.classes[name] = type(name, (Trapped,), {method: function, "__module__": __name__, **others})
            self.reasons[name] = reason
            if may_run:
                self.may_run.add(name)
            return function

        return add

    def __iter__(self) -> Iterator[str]:
        return iter(self.classes)

    def check_refusal(self, name: str) -> None:
        """See `check_refusal`."""
        make = self.classes[name]
        check_refusal(lambda: make().arm(), self.reasons[name], may_run=name in self.may_run)

    def check_arming(self, name: str) -> None:
        """Experts are clean at first, and armed after a call that was grouped: one, then all.

        The clean siblings of the one that is armed may still be grouped.
        """
        check_change(self.classes[name], arm_one, arm_all)
