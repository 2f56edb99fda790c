"""The hooks of a host itself: they take the plan out of its keywords, and tell where its forward pass begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from celmoe.errors import ConfigError, InputTypeError
from celmoe.experts import ExpertContext
from celmoe.routing.plan import RoutingPlan

from .hosts import hierarchy_of, seat_of
from .place import SEAT, arguments_of
from .runs import Group, Run, Span, at_hand, begin, begin_span, end, end_span, forget_span, here


def run_for(
    hosts: Sequence[nn.Module],
    plan: Any,
    context: ExpertContext = None,
    mask: torch.Tensor | None = None,
    num_beams: int = 1,
) -> Run:
    """The run of a plan, or of a routing, for the groups of those modules whose config it was made for.

    Args:
        hosts: Modules with experts behind them.
        plan: See `routed`.
        context: See `routed`.
        mask: See `routed`.
        num_beams: See `routed`.

    Raises:
        InputTypeError, PlanError: See `routed`.
    """
    if isinstance(plan, Mapping):
        plan = hierarchy_of(hosts[0]).compile_routing(plan)
    if not isinstance(plan, RoutingPlan):
        raise InputTypeError(
            f"'plan' must be a RoutingPlan (got {type(plan).__name__}; "
            f"celmoe.adapters(model).compile_routing(routing) makes one)"
        )
    groups: list[Group] = []
    for host in hosts:
        group, is_new = seat_of(host).group, True
        for each in groups:
            is_new = is_new and each is not group
        if is_new and hierarchy_of(host).layout.packed == plan.layout.packed:
            groups.append(group)
    if not groups:
        plan.require_layout(hierarchy_of(hosts[0]).layout, "plan")
    return Run(plan, groups, context, mask, num_beams)


class Root:
    """The hooks of a host: they take ``plan=`` out of its keywords, and tell where its forward pass begins and ends.

    Attributes:
        places: The host's modules with experts behind them, by call of `attach`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.places: list[tuple[Group, list[nn.Module]]] = []
        self._takes_plan = "plan" in arguments_of(model)
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._afterwards, with_kwargs=True, always_call=True),
        ]

    def leads(self) -> list[nn.Module]:
        """A module of each call of `attach`, of those that still have experts behind them."""
        found = []
        for group, hosts in self.places:
            lead = None
            for host in hosts:
                if lead is None and SEAT in host.__dict__ and seat_of(host).group is group:
                    lead = host
            if lead is not None:
                found.append(lead)
        return found

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def _before(
        self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # An interrupted call, unlike one that raised an error, could not end its run.
        for root, run, _, begun in _calls():
            if root is self:
                _end_calls(begun)
                if run is not None:
                    end(run)
        here.calls = tuple(call for call in _calls() if call[0] is not self)
        call: tuple[Root, Run | None, list[Span], list[Run]] = (self, None, [], [])
        result = None
        if not self._takes_plan and kwargs.get("plan") is not None:
            kwargs = dict(kwargs)
            leads = self.leads()
            if not leads:
                raise ConfigError("'plan' must be left out of a model without attached experts (got one)")
            run = run_for(leads, kwargs.pop("plan"))
            begin(run)
            call = (self, run, [], [])
            result = args, kwargs
        here.calls = (*_calls(), call)
        for each in self._runs():
            if not each.is_called:
                each.forget_losses()
                each.is_called = True
                call[3].append(each)
            if not torch.compiler.is_compiling():
                call[2].append(_begin_call(each))
        return result

    def _afterwards(self, *_: Any) -> None:
        for root, run, spans, begun in _calls():
            if root is self:
                _end_calls(begun)
                if run is not None:
                    end(run)
                for span in spans:
                    end_span(span)
        here.calls = tuple(call for call in _calls() if call[0] is not self)

    def _runs(self) -> list[Run]:
        """The runs at hand for the host's places, each once."""
        found: list[Run] = []
        for group, _ in self.places:
            run = at_hand(group)
            if run is not None and not any(run is each for each in found):
                found.append(run)
        return found


def _end_calls(begun: list[Run]) -> None:
    """Note that the outermost calls of hosts are over for some runs: later losses are another pass's."""
    for run in begun:
        run.is_called = False
        run.noted.clear()


def _calls() -> tuple[tuple[Root, Run | None, list[Span], list[Run]], ...]:
    """This thread's calls of hosts that are under way, with its run, its spans, and the runs it is first of."""
    calls: tuple[tuple[Root, Run | None, list[Span], list[Run]], ...] = getattr(here, "calls", ())
    return calls


def _begin_call(run: Run) -> Span:
    """Note that a host is called: from now on, only its calls are the run's forward passes."""
    if run.whole is not None:
        forget_span(run.whole)
        run.whole = None
    return begin_span(run)
