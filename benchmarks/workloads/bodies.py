"""The modules that make up the workloads' experts.

Axes: B samples, S positions, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

# Inner width of the low-rank experts.
RANK = 8


class MLP(nn.Module):
    """Norm, two linear layers with the inner width between them, and a residual."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[..., H]`` to the same shape."""
        inner = nn.functional.gelu(self.up(self.norm(hidden)))
        result: torch.Tensor = hidden + self.down(inner)
        return result


class LowRank(nn.Module):
    """A residual change of low rank, as a LoRA adapter makes it; no biases."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, width, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[..., H]`` to the same shape."""
        result: torch.Tensor = hidden + self.up(self.down(hidden))
        return result


class Recurrent(nn.Module):
    """One GRU layer over the positions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gru = nn.GRU(width, width, batch_first=True)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[B, S, H]`` to the same shape."""
        result: torch.Tensor = self.gru(hidden)[0]
        return result


def _block(width: int, _place: int) -> nn.Module:
    return nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)


LOW_RANK = "low-rank"
# Experts that return their rows, so that only routing and moving are left to time.
UNTOUCHED = "untouched"
# Linear experts whose rows stand in expert order already, so that only their products are left to time.
PRODUCT = "product"
# The experts' bodies, made from width H and the expert's place in its level.
EXPERTS: dict[str, Callable[[int, int], nn.Module]] = {
    "linear": lambda width, _: nn.Linear(width, width),
    "mlp": lambda width, _: MLP(width, 2 * width),
    "block": _block,
    "masked-block": _block,
    "gru": lambda width, _: Recurrent(width),
    "two-widths": lambda width, place: MLP(width, (2, 4)[place % 2] * width),
    LOW_RANK: lambda width, _: LowRank(width, RANK),
    UNTOUCHED: lambda *_: nn.Identity(),
    PRODUCT: lambda width, _: nn.Linear(width, width),
}
# The looped engine's grid takes the first kinds, the grouped engine's grid the second.
LOOPED_EXPERTS = ("linear", "mlp", "block", "gru")
GROUPED_EXPERTS = ("linear", "mlp", "block", "masked-block", "gru", "two-widths")
WITH_POSITIONS = ("block", "masked-block", "gru")
