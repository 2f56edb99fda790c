"""The outputs of a forward pass: one for each level, and the fusion of all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, ClassVar

import torch

from .experts import ExpertAux
from .torch_internals import register_container

# The attribute that makes an output's routes.
_MAKE_ROUTES = "_make_routes"


@dataclass
class LevelOutput:
    """One level's output for the batch.

    Attributes:
        name: The level's name.
        hidden: ``[B, ...]``, in batch order.
        routes: The expert's name for each sample; a dict of several names with their weights; or ``None``.
        losses: The experts' losses as returned, keyed ``<level>.<expert>.<loss>`` with names as in
            `celmoe.names.name_key`.
        aux: The experts' `ExpertResult.aux` by expert, without empty ones.
        loss_weights: The `ExpertConfig.loss_weight` of each of `losses`, under the same keys, times the mean weight of
            the expert's samples: 1, unless some have several experts.
        loss_shares: The expert's share of the batch's samples for each of `losses`, under the same keys.
    """

    name: str
    hidden: torch.Tensor
    routes: list[Any]
    losses: dict[str, torch.Tensor] = field(default_factory=dict)
    aux: ExpertAux = field(default_factory=dict)
    _: KW_ONLY
    loss_weights: dict[str, float] = field(default_factory=dict)
    loss_shares: dict[str, float] = field(default_factory=dict)
    # A sentence on experts that changed the dtype of their rows, which errors of later levels carry.
    _recast: ClassVar[str] = ""

    @classmethod
    def with_deferred_routes(
        cls, name: str, hidden: torch.Tensor, make_routes: Callable[[str], list[Any]]
    ) -> LevelOutput:
        """An output whose `routes` are made when first read: writing B names costs more than planning.

        Args:
            name: The level's name.
            hidden: ``[B, ...]``, in batch order.
            make_routes: Returns the route of each sample, given the level's name.
        """
        # Compilers can't follow `__new__`, nor a `__dict__` that is set.
        output = cls(name, hidden, [])
        del output.routes
        setattr(output, _MAKE_ROUTES, make_routes)
        return output

    def __getattr__(self, attribute: str) -> list[Any]:
        # Python calls this only for unset attributes, so once for deferred routes.
        if attribute != "routes" or _MAKE_ROUTES not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {attribute!r}")
        self.routes = self.__dict__[_MAKE_ROUTES](self.name)
        return self.routes


@dataclass
class CELMoEOutput:
    """The hierarchy's output for the batch.

    Attributes:
        levels: One output a level, in the config's order.
        fused_hidden: ``[B, ...]``, the fusion of the levels' hidden states.
        losses: The losses of all levels.
        aux: For the caller to fill; the levels' outputs carry the experts' aux.
        loss_weights: The weights of `losses`, under the same keys.
        loss_shares: The shares of `losses`, under the same keys; see `LevelOutput`.
    """

    levels: dict[str, LevelOutput]
    fused_hidden: torch.Tensor
    losses: dict[str, torch.Tensor] = field(default_factory=dict)
    aux: ExpertAux = field(default_factory=dict)
    _: KW_ONLY
    loss_weights: dict[str, float] = field(default_factory=dict)
    loss_shares: dict[str, float] = field(default_factory=dict)


class _Rest:
    """An output's parts that are no tensors; shares and routes are not compared, for every batch has others."""

    def __init__(
        self, name: str, loss_weights: dict[str, float], loss_shares: dict[str, float], routes: dict[str, Any]
    ) -> None:
        self.name = name
        self.loss_weights = loss_weights
        self.loss_shares = loss_shares
        self.routes = routes

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Rest) and (self.name, self.loss_weights) == (other.name, other.loss_weights)

    def __hash__(self) -> int:
        return hash(self.name)


def _no_routes(level: str) -> list[Any]:
    raise AttributeError(f"'routes' of level {level!r} must be read from the plan (got an exported program's output)")


def _flatten_level(output: LevelOutput) -> tuple[list[Any], _Rest]:
    kept = {name: value for name, value in output.__dict__.items() if name in ("routes", _MAKE_ROUTES)}
    return [output.hidden, output.losses, output.aux], _Rest(output.name, output.loss_weights, output.loss_shares, kept)


def _unflatten_level(parts: Iterable[Any], rest: _Rest) -> LevelOutput:
    hidden, losses, aux = parts
    output = LevelOutput.with_deferred_routes(rest.name, hidden, _no_routes)
    output.losses, output.aux = losses, aux
    output.loss_weights, output.loss_shares = dict(rest.loss_weights), dict(rest.loss_shares)
    output.__dict__.update(rest.routes)
    return output


def _flatten_output(output: CELMoEOutput) -> tuple[list[Any], _Rest]:
    parts = [output.levels, output.fused_hidden, output.losses, output.aux]
    return parts, _Rest("", output.loss_weights, output.loss_shares, {})


def _unflatten_output(parts: Iterable[Any], rest: _Rest) -> CELMoEOutput:
    return CELMoEOutput(*parts, loss_weights=dict(rest.loss_weights), loss_shares=dict(rest.loss_shares))


for _kind, _flatten, _unflatten in (
    (LevelOutput, _flatten_level, _unflatten_level),
    (CELMoEOutput, _flatten_output, _unflatten_output),
):
    register_container(
        _kind,
        _flatten,
        _unflatten,
        lambda rest: [rest.name, rest.loss_weights, rest.loss_shares],
        lambda saved: _Rest(saved[0], saved[1], saved[2], {}),
    )
