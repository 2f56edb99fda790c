"""The outputs of a forward pass: one for each level, and the fusion of all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from typing import ClassVar

import torch

from .experts import ExpertAux


@dataclass
class LevelOutput:
    """One level's output for the batch.

    Attributes:
        name: The level's name.
        hidden: ``[B, ...]``, in batch order.
        routes: The expert's name for each sample.
        losses: The experts' losses as returned, keyed ``<level>.<expert>.<loss>`` with names as in
            `celmoe.names.name_key`.
        aux: The experts' `ExpertResult.aux` by expert, without empty ones.
        loss_weights: The `ExpertConfig.loss_weight` of each of `losses`, under the same keys.
    """

    name: str
    hidden: torch.Tensor
    routes: list[str]
    losses: dict[str, torch.Tensor] = field(default_factory=dict)
    aux: ExpertAux = field(default_factory=dict)
    _: KW_ONLY
    loss_weights: dict[str, float] = field(default_factory=dict)
    # A sentence on experts that changed the dtype of their rows, which errors of later levels carry.
    _recast: ClassVar[str] = ""
    _make_routes: ClassVar[Callable[[str], list[str]]]

    @classmethod
    def with_deferred_routes(
        cls, name: str, hidden: torch.Tensor, make_routes: Callable[[str], list[str]]
    ) -> LevelOutput:
        """An output whose `routes` are made when first read: writing B names costs more than planning.

        Args:
            name: The level's name.
            hidden: ``[B, ...]``, in batch order.
            make_routes: Returns the expert's name for each sample, given the level's name.
        """
        # Compilers can't follow `__new__`, nor a `__dict__` that is set.
        output = cls(name, hidden, [])
        del output.routes
        output._make_routes = make_routes
        return output

    def __getattr__(self, attribute: str) -> list[str]:
        # Python calls this only for unset attributes, so once for deferred routes.
        if attribute != "routes" or "_make_routes" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {attribute!r}")
        self.routes = self.__dict__["_make_routes"](self.name)
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
    """

    levels: dict[str, LevelOutput]
    fused_hidden: torch.Tensor
    losses: dict[str, torch.Tensor] = field(default_factory=dict)
    aux: ExpertAux = field(default_factory=dict)
    _: KW_ONLY
    loss_weights: dict[str, float] = field(default_factory=dict)
