"""Whose training has ended: early stopping, for each expert by itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from celmoe.errors import ConfigError, ConfigTypeError, listed

from .experts import experts_of, freeze

_MODES = ("min", "max")


class Patience:
    """Freezes each expert whose own figure has not improved for some evaluations.

    Args:
        level: The level of the experts.
        monitor: The key of an expert's figure, with ``{expert}`` in its name's place: ``"val_loss/{expert}"``.
        patience: Evaluations without improvement after which an expert is frozen, from 1 on.
        min_delta: The smallest improvement that counts, from 0 on.
        mode: ``"min"`` if less is better, or ``"max"``.

    Attributes:
        frozen: The experts that are frozen, in the order in which that happened.

    Raises:
        ConfigError, ConfigTypeError: An argument is of the wrong kind, or out of range.
    """

    def __init__(
        self, level: str, monitor: str, *, patience: int = 3, min_delta: float = 0.0, mode: str = "min"
    ) -> None:
        if not isinstance(level, str):
            raise ConfigTypeError(f"'level' must be a level's name (got {level!r})")
        if not isinstance(monitor, str) or "{expert}" not in monitor:
            raise ConfigError(f"'monitor' must be a key with {{expert}} in it (got {monitor!r})")
        if isinstance(patience, bool) or not isinstance(patience, int) or patience < 1:
            raise ConfigError(f"'patience' must be an integer from 1 on (got {patience!r})")
        if isinstance(min_delta, bool) or not isinstance(min_delta, (int, float)) or not 0 <= min_delta < math.inf:
            raise ConfigError(f"'min_delta' must be a number from 0 on (got {min_delta!r})")
        if mode not in _MODES:
            raise ConfigError(f"'mode' must be 'min' or 'max' (got {mode!r})")
        self.level = level
        self.monitor = monitor
        self.patience = patience
        self.min_delta = float(min_delta)
        self.mode = mode
        self.frozen: list[str] = []
        self._best: dict[str, float] = {}
        self._waited: dict[str, int] = {}

    def update(self, model: nn.Module, figures: Mapping[str, Any]) -> bool:
        """Take an evaluation's figures in, and freeze whoever has waited long enough.

        An expert without a figure has not been evaluated, and waits no longer for that.

        Args:
            model: The model of the experts.
            figures: Figures by key: numbers, or tensors of one.

        Returns:
            True if all experts of the level are frozen.

        Raises:
            ConfigError: No expert has a figure.
            CELMoEError: See `experts_of`.
        """
        names = experts_of(model, self.level)
        keys = {name: self.monitor.replace("{expert}", name) for name in names}
        found = {name: float(figures[key]) for name, key in keys.items() if key in figures}
        if not found:
            raise ConfigError(
                f"'monitor' must be the key of some expert's figure (got {self.monitor!r}; figures {listed(figures)})"
            )
        for name, figure in found.items():
            if name in self.frozen:
                continue
            value = -figure if self.mode == "max" else figure
            # A figure that is no number is no improvement.
            if value < self._best.get(name, math.inf) - self.min_delta:
                self._best[name], self._waited[name] = value, 0
                continue
            self._waited[name] = self._waited.get(name, 0) + 1
            if self._waited[name] >= self.patience:
                freeze(model, self.level, name)
                self.frozen.append(name)
        return set(names) <= set(self.frozen)

    def restore(self, model: nn.Module) -> None:
        """Freeze those experts again that a loaded state says are frozen."""
        for name in set(self.frozen).intersection(experts_of(model, self.level)):
            freeze(model, self.level, name)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, of Python's own kinds."""
        return {"frozen": list(self.frozen), "best": dict(self._best), "waited": dict(self._waited)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave; `restore` freezes the experts."""
        self.frozen = list(state["frozen"])
        self._best, self._waited = dict(state["best"]), dict(state["waited"])
