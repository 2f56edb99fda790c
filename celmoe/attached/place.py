"""A hierarchy behind a module of the host, and what it does to the module's output."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from celmoe.config import CELMoEConfig
from celmoe.errors import ConfigTypeError, InputError, InputTypeError, MissingRouteError, ResultError
from celmoe.experts import ExpertBatch, ExpertContext, ExpertMetadata, Rows
from celmoe.hierarchy import HierarchicalCELMoE
from celmoe.lifecycle.newcomer import Factory
from celmoe.names import NamedModules
from celmoe.outputs import CELMoEOutput

from .runs import Group, Run, run_of

#: The name of the hierarchy among the children of its module, and of the seat among the module's attributes.
CHILD, SEAT = "celmoe", "_celmoe_seat"
#: Experts with this attribute set read their module's input: ``batch.context["input"]``.
READS_INPUT = "reads_input"
# transformers leaves modules with this attribute as they are when it initializes a model.
_INITIALIZED = "_is_hf_initialized"


class LastLevel(nn.Module):
    """The fusion that takes the last level: experts that start as zero start as nothing."""

    def forward(self, level_hiddens: list[torch.Tensor]) -> torch.Tensor:
        """The last of L tensors."""
        return level_hiddens[-1]


class Seat:
    """The part of a place that stays if its hierarchy is replaced.

    Attributes:
        place: The module's dotted name in the host.
        group: The places with one plan.
        handle: The module's hook.
        arguments: The names of the arguments of the module's forward pass, in order; none if nobody knows.
    """

    def __init__(self, place: str, group: Group, handle: RemovableHandle, arguments: tuple[str, ...]) -> None:
        self.place = place
        self.group = group
        self.handle = handle
        self.arguments = arguments

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The first argument of a call, in the order of the forward pass and not of the keywords."""
        if args:
            return args[0]
        for name in self.arguments:
            if name in kwargs:
                return kwargs[name]
        return next(iter(kwargs.values()), None)


def arguments_of(module: nn.Module) -> tuple[str, ...]:
    """The names of the arguments of a module's forward pass, in order; none for one of C code."""
    try:
        return tuple(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):
        return ()


class Attached(HierarchicalCELMoE):
    """The hierarchy behind one module of a host. `attach` makes it."""

    def __init__(
        self,
        config: CELMoEConfig,
        factory: Factory,
        fusion: nn.Module | None,
        *,
        engine: str,
    ) -> None:
        super().__init__(_copied(config), _Shielded(factory), fusion, engine=engine)
        floats = [each.dtype for each in self.parameters() if each.is_floating_point()]
        # Empty; casts and moves follow those of the experts, which a compiler need not look at.
        self.register_buffer("_like", torch.empty(0, dtype=floats[0] if floats else None), persistent=False)
        self._casts = bool(floats)
        self.reads_input = any(getattr(each, READS_INPUT, False) for each in self.modules() if each is not self)

    def apply(self, fn: Callable[[nn.Module], None]) -> Attached:  # noqa: ARG002  # torch's own name
        """Leave the experts as they are: ``host.apply(initialize)`` initializes the host, which they are no part of."""
        return self

    def add_expert(self, level: str, name: str, *args: Any, **kwargs: Any) -> None:
        """See `HierarchicalCELMoE.add_expert`."""
        if kwargs.get("factory") is not None:
            kwargs["factory"] = _Shielded(kwargs["factory"])
        super().add_expert(level, name, *args, **kwargs)
        new = cast(NamedModules, self.level_modules[level])[name]
        self.reads_input = self.reads_input or any(getattr(each, READS_INPUT, False) for each in new.modules())

    @property
    def is_path(self) -> bool:
        """True if each level has one expert, so that no plan is needed."""
        return all(len(level.experts) == 1 for level in self.layout.levels)

    def changed(self, hidden: torch.Tensor, given: Any, seat: Seat) -> torch.Tensor:
        """The host's hidden states after the experts.

        Args:
            hidden: ``[B, ...]``, the output of the host's module.
            given: The first argument of the host's module.
            seat: The module's seat.

        Returns:
            ``[B, ...]``, of the host's dtype.

        Raises:
            MissingRouteError: No plan is at hand.
            PlanError: The plan is one of another batch or config.
            ResultError: Experts return losses that nobody could read, or that have no gradient.
        """
        run, is_again = run_of(seat.group, seat.place)
        if run is None and not self.is_path:
            raise MissingRouteError(
                f"'plan' must be given to a model with experts at {seat.place!r} (got none; call the model within "
                f"'with celmoe.routed(model, plan):', or pass it plan=plan)"
            )
        rows = self._cast(hidden)
        plan, context, mask = (None, None, None) if run is None else run.of_rows(rows, seat.place)
        if self.reads_input:
            context = self._with_input(context, given, hidden, seat.place)
        if plan is None and torch.compiler.is_exporting():
            return self._along_path(rows, context).to(hidden.dtype)
        output = self(rows, plan, context, mask)
        if output.losses and not is_again:
            _note_losses(output, run, seat.place)
        result: torch.Tensor = output.fused_hidden
        return result.to(hidden.dtype)

    def _cast(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows in the experts' dtype; under autocast as they are."""
        like = cast(torch.Tensor, self._like)
        if not self._casts or not rows.is_floating_point() or torch.is_autocast_enabled(rows.device.type):
            return rows
        return rows.to(like.dtype)

    def _with_input(self, context: ExpertContext, given: Any, hidden: torch.Tensor, place: str) -> ExpertContext:
        if not isinstance(given, torch.Tensor) or given.dim() == 0 or given.shape[0] != hidden.shape[0]:
            got = f"shape {tuple(given.shape)}" if isinstance(given, torch.Tensor) else type(given).__name__
            raise InputError(
                f"the first argument of {place!r} must have a row for each of its output's {hidden.shape[0]}, for "
                f"its experts read it (got {got})"
            )
        if context is not None and not isinstance(context, Mapping):
            raise InputTypeError(
                f"'context' must be a mapping for experts that read the input of their module (got "
                f"{type(context).__name__} at {place!r})"
            )
        return {**(context or {}), "input": Rows(self._cast(given))}

    def _along_path(self, hidden: torch.Tensor, context: ExpertContext) -> torch.Tensor:
        """The only experts of all levels, one after another: all that an exported program needs."""
        whole = None
        if isinstance(context, Mapping):
            whole = {name: each.value if isinstance(each, Rows) else each for name, each in context.items()}
        levels = []
        for level in self.layout.levels:
            name = level.experts[0]
            expert = cast(NamedModules, self.level_modules[level.name])[name]
            hidden = expert(ExpertBatch(hidden, whole, None, {"level": level.name, "expert": name})).hidden
            levels.append(hidden)
        fused: torch.Tensor = self.fusion(levels)
        return fused


def _note_losses(output: CELMoEOutput, run: Run | None, place: str) -> None:
    if run is None or run.losses is None:
        raise ResultError(
            f"experts at {place!r} must return no losses unless they are read (got {next(iter(output.losses))!r};"
            f" call the model within 'with celmoe.routed(model, plan) as run:', and add run.losses)"
        )
    if run.wants_gradients and not torch.is_grad_enabled():
        raise ResultError(
            f"experts at {place!r} must return no losses within a reentrant checkpoint, which has no gradients "
            f"for them (got {next(iter(output.losses))!r}; checkpoint with use_reentrant=False)"
        )
    for name, value in output.losses.items():
        key = f"{place}.{name}"
        # A module that the host's call runs several times has as many losses of one name.
        run.losses[key] = run.losses[key] + value if key in run.noted else value
        if run.is_called:
            run.noted.add(key)
        run.loss_weights[key] = output.loss_weights[name]
        run.loss_shares[key] = output.loss_shares[name]


class _Shielded:
    """A factory whose experts the host's initializers leave alone."""

    def __init__(self, factory: Factory) -> None:
        if not callable(factory):
            raise ConfigTypeError(f"'factory' must be callable (got {factory!r})")
        self.factory = factory

    def __call__(self, level: str, expert: str, metadata: ExpertMetadata) -> nn.Module:
        made = self.factory(level, expert, metadata)
        if isinstance(made, nn.Module):
            for module in made.modules():
                module.__dict__[_INITIALIZED] = True
        return made


def _copied(config: CELMoEConfig) -> CELMoEConfig:
    """A config of a place's own: experts are added to each place by itself."""
    return replace(
        config,
        levels=[
            replace(level, experts={name: replace(each) for name, each in level.experts.items()})
            for level in config.levels
        ],
    )


def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """The forward hook of a module with experts behind it."""
    attached, seat = cast(Attached, module._modules[CHILD]), cast(Seat, getattr(module, SEAT))
    given = seat.given(args, kwargs)
    if isinstance(output, torch.Tensor):
        return attached.changed(_tensor(output, seat), given, seat)
    if isinstance(output, Mapping) and output:
        first = next(iter(output))
        changed: Any = copy.copy(output)
        changed[first] = attached.changed(_tensor(output[first], seat), given, seat)
        return changed
    if isinstance(output, (tuple, list)) and output:
        hidden = attached.changed(_tensor(output[0], seat), given, seat)
        if hasattr(output, "_fields"):
            return type(output)(hidden, *output[1:])
        return type(output)([hidden, *output[1:]])
    return attached.changed(_tensor(output, seat), given, seat)


def _tensor(value: Any, seat: Seat) -> torch.Tensor:
    if not isinstance(value, torch.Tensor) or value.dim() == 0:
        raise InputTypeError(
            f"the output of {seat.place!r} must be a tensor of rows by sample, or begin with one (got "
            f"{type(value).__name__})"
        )
    if value.is_nested:
        raise InputTypeError(
            f"the output of {seat.place!r} must be a dense tensor (got a nested one; build nn.TransformerEncoder with "
            f"enable_nested_tensor=False)"
        )
    return value
