"""The plan at hand: one for each thread, and for a recomputation the plan of its own forward pass.

[Note: Recomputed with its own plan] Activation checkpointing calls a part of the host a second time, in the backward
pass, when another plan may be at hand, or none. Autograd numbers the nodes that a thread makes, in ascending order. So
a run notes the numbers that its forward pass began and ended with; and a call in the backward pass belongs to the run
within whose numbers the node lies that is differentiated just then. Both kinds of checkpoints have such a node: the
checkpoint's own, or one of the recomputed part's. If runs of several threads have that number, and different plans, the
call is refused. A checkpoint within a checkpoint may have a node that a backward pass made: its run is that pass's.
"""

from __future__ import annotations

import copy
import sys
import threading
import weakref
from collections import deque
from typing import NamedTuple

import torch

from celmoe.errors import MissingRouteError, PlanError
from celmoe.experts import ExpertContext
from celmoe.routing.plan import RoutingPlan
from celmoe.rows.context import ContextRows
from celmoe.torch_internals import after_backward, current_backward, node_number, number_in_backward

# Forward passes whose recomputation may still come, for each thread.
_NUM_SPANS = 64


class Group:
    """The places that one call of `attach` made: one plan serves all of them."""


class Run:
    """A plan at work.

    Attributes:
        plan: The plan.
        groups: The places that it is for.
        context, mask: The experts' context and mask.
        num_beams: Rows of each sample in generation, one after another.
        losses: The experts' losses of the last forward pass, by ``<place>.<level>.<expert>.<loss>``; ``None`` if nobody
            can read them. A place that the host runs several times, as layers that share weights, has their sum.
        loss_weights, loss_shares: See `LevelOutput`, under the keys of `losses`.
        wants_gradients: True if gradients were on when the run began.
        whole: The span of all that is called while the run is at hand, until the host itself is called.
    """

    def __init__(
        self,
        plan: RoutingPlan,
        groups: list[Group],
        context: ExpertContext = None,
        mask: torch.Tensor | None = None,
        num_beams: int = 1,
    ) -> None:
        self.plan = plan
        self.groups = groups
        self.context = context
        self.mask = mask
        self.num_beams = num_beams
        self.losses: dict[str, torch.Tensor] | None = None
        self.loss_weights: dict[str, float] = {}
        self.loss_shares: dict[str, float] = {}
        # True while a host is called; and the losses that this call has noted.
        self.is_called = False
        self.noted: set[str] = set()
        self.wants_gradients = torch.is_grad_enabled()
        self.whole: Span | None = None
        # The node that was differentiated when the run began: a hook may call the host in a backward pass.
        self.begun_in: int | None = None
        # The asyncio task in which the run began.
        self.task: object = None
        self._expanded: RoutingPlan | None = None
        # By whether the plan is the batch's own, and by device.
        self._moved: dict[tuple[bool, torch.device], RoutingPlan] = {}

    def of_rows(self, rows: torch.Tensor, place: str) -> tuple[RoutingPlan, ExpertContext, torch.Tensor | None]:
        """The plan, context and mask for a place's rows ``[B, ...]``.

        Raises:
            PlanError: The place has neither a row for each sample, nor one for each beam.
        """
        num_rows, size = rows.shape[0], self.plan.indices[0][2].shape[0]
        if num_rows == size:
            return self._on(self.plan, rows.device), self.context, self.mask
        if self.num_beams == 1 or num_rows != size * self.num_beams:
            beams = f", or {self.num_beams} for each" if self.num_beams > 1 else ""
            raise PlanError(
                f"'plan' must have one sample for each row at {place!r}{beams} (got {size} samples for {num_rows} "
                f"rows; beams of generation want num_beams=)"
            )
        if self._expanded is None:
            self._expanded = self.plan.repeat_interleave(self.num_beams)

        context = ContextRows(self.context, size, rows.device).repeated(self.num_beams)
        mask = self.mask
        if mask is not None and mask.dim() and mask.shape[0] == size:
            mask = mask.repeat_interleave(self.num_beams, 0)
        return self._on(self._expanded, rows.device), context, mask

    def forget_losses(self) -> None:
        """Forget the losses of the pass before: this one may skip a place."""
        if self.losses:
            # New ones: somebody may hold the losses of the pass before.
            self.losses, self.loss_weights, self.loss_shares = {}, {}, {}

    def without_losses(self) -> Run:
        """The run as a recomputation needs it: losses would keep the forward pass's graph alive, a task its result."""
        kept = copy.copy(self)
        kept.losses, kept.whole, kept.task = None, None, None
        return kept

    def _on(self, plan: RoutingPlan, device: torch.device) -> RoutingPlan:
        """A plan where the rows are, moved once for all places."""
        if torch.compiler.is_compiling() or plan.device == device:
            return plan
        key = plan is self.plan, device
        if key not in self._moved:
            self._moved[key] = plan.to(device, non_blocking=device.type != "cpu")
        return self._moved[key]


class Span:
    """The numbers of autograd's nodes from the start of a run's forward pass to its end, or on and on before that."""

    def __init__(self, run: Run, first: int) -> None:
        self.run = run.without_losses()
        self.first = first
        self.last: int | None = None

    def has(self, number: int) -> bool:
        """True if a node of this number was made within."""
        return self.first <= number and (self.last is None or number <= self.last)


class _Spans:
    """The spans of one thread."""

    def __init__(self) -> None:
        self.recent: deque[Span] = deque(maxlen=_NUM_SPANS)


#: What belongs to a thread: its runs at hand, its calls of hosts, and its spans.
here = threading.local()
_all_spans: weakref.WeakSet[_Spans] = weakref.WeakSet()
_lock = threading.Lock()


class _Begun:
    """Counts the forward passes that have begun in this process."""

    def __init__(self) -> None:
        self.passes = 0


_begun = _Begun()


def begin(run: Run) -> None:
    """Let a run be the one at hand in this thread, until its `end`."""
    here.runs = (*getattr(here, "runs", ()), run)
    if not torch.compiler.is_compiling():
        run.begun_in, run.task = number_in_backward(), _task()


def end(run: Run) -> None:
    """Let the run before be at hand again."""
    here.runs = tuple(each for each in getattr(here, "runs", ()) if each is not run)


def begin_span(run: Run) -> Span:
    """Note that a forward pass of the run begins; see [Note: Recomputed with its own plan]."""
    spans: _Spans | None = getattr(here, "spans", None)
    if spans is None:
        spans = here.spans = _Spans()
        with _lock:
            _all_spans.add(spans)
    with _lock:
        _begun.passes += number_in_backward() is None
    span = Span(run, node_number())
    spans.recent.append(span)
    return span


def end_span(span: Span) -> None:
    """Note that the forward pass is over; one that made no node, as without gradients, is not recomputed."""
    span.last = node_number()
    if span.last == span.first + 1:
        forget_span(span)


def forget_span(span: Span) -> None:
    """Forget a span of this thread, if many later ones have not put it out already."""
    if span in here.spans.recent:
        here.spans.recent.remove(span)


def at_hand(group: Group) -> Run | None:
    """The run at hand for a group's places, if there is one."""
    # A compiler follows this loop, and no lookup by an object.
    found, is_compiling = None, torch.compiler.is_compiling()
    task = None if is_compiling else _task()
    for run in getattr(here, "runs", ()):
        for each in run.groups:
            if each is group and (is_compiling or run.task is task):
                found = run
    return found


def _task() -> object:
    """The asyncio task that runs in this thread: a plan at hand is the task's, for tasks of a thread take turns."""
    asyncio = sys.modules.get("asyncio")
    try:
        return None if asyncio is None else asyncio.current_task()
    except RuntimeError:
        # No event loop runs.
        return None


def run_of(group: Group, place: str) -> tuple[Run | None, bool]:
    """The run that a call of a place belongs to, and whether the call is a recomputation.

    Raises:
        MissingRouteError: The call recomputes a forward pass that is not known, or known to several threads.
    """
    run = at_hand(group)
    number = None if torch.compiler.is_compiling() else number_in_backward()
    if number is None or (run is not None and run.begun_in == number):
        return run, False
    recomputed = _of_outer(group, number) or _of_span(group, place, number)
    _note(recomputed, number)
    return recomputed, True


def _of_span(group: Group, place: str, number: int) -> Run:
    """The run within whose span a node was made."""
    with _lock:
        threads = [list(spans.recent) for spans in _all_spans]
    found = []
    for spans in threads:
        own = [span for span in spans if span.has(number) and group in span.run.groups]
        if own:
            found.append(max(own, key=lambda span: span.first).run)
    if len({id(each.plan) for each in found}) != 1:
        several = "several threads" if found else "none, or too long ago"
        raise MissingRouteError(
            f"'plan' must be known for the recomputed forward pass at {place!r} (got runs of {several}; run the "
            f"backward pass inside of 'with celmoe.routed(model, plan):', in the only thread that trains)"
        )
    return found[0]


class _Recomputation(NamedTuple):
    """A part that a backward pass recomputes.

    Attributes:
        backward: The number of the backward pass.
        node: The number of the node that is differentiated.
        first: The number of the first node known to be made for it.
        run: The run that is recomputed.
        passes: The forward passes that had begun. A backward pass that raised an error is over when the next begins.
    """

    backward: int
    node: int
    first: int
    run: Run
    passes: int


def _of_outer(group: Group, number: int) -> Run | None:
    """The run of the recomputation that made a node: a checkpoint within a checkpoint."""
    this = current_backward()
    for each in reversed(_recomputations()):
        # A node of the forward pass has a lower number than all that the backward pass makes.
        is_around = each.backward != this and each.passes == _begun.passes
        if is_around and number >= each.first - 1 and group in each.run.groups:
            return each.run
    return None


def _note(run: Run, number: int) -> None:
    """Note that the backward pass of this thread makes nodes for the run, until it ends."""
    known, this = _recomputations(), current_backward()
    if not any((each.backward, each.node) == (this, number) for each in known):
        made = _Recomputation(this, number, node_number(), run, _begun.passes)
        known[:] = [*(each for each in known if each.passes == made.passes), made]
        after_backward(lambda: known.remove(made) if made in known else None)


def _recomputations() -> list[_Recomputation]:
    """This thread's, in the order in which they began."""
    found: list[_Recomputation] | None = getattr(here, "recomputations", None)
    if found is None:
        found = here.recomputations = []
    return found
