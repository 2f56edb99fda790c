"""A separable convolution over positions.

Axes: N samples, S positions, D width, F inner width.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from celmoe.errors import ConfigError
from celmoe.experts import ExpertBatch, ExpertModule, ExpertResult

from .arguments import require_rate, require_size
from .layers import zeroed
from .positions import real_positions, require_positions


class Convolution(ExpertModule):
    """A look at the neighbouring positions: ``h + W2 silu(conv(glu(W1 norm(h))))``.

    The convolution module of Gulati et al. 2020, "Conformer: Convolution-augmented Transformer for Speech Recognition"
    (arXiv:2005.08100, section 2.2, figure 2): a pointwise layer, a gated linear unit, a depthwise convolution, and a
    pointwise layer. The paper's batch norm, which would mix samples, is left out; the norm in front is not.

    With a mask, nothing of the padding reaches a real position, and the padding passes unchanged. The last layer begins
    at zero, so the expert begins as the identity.

    Args:
        hidden_size: The width D.
        kernel_size: The number of neighbouring positions that a position sees, itself in the middle: an odd number.
        inner_size: The inner width F; by default ``hidden_size``, as in the paper.
        dropout: Dropout rate at the end.

    Raises:
        ConfigTypeError, ConfigError: An argument is of the wrong kind, or out of range.
    """

    def __init__(
        self, hidden_size: int, kernel_size: int = 7, *, inner_size: int | None = None, dropout: float = 0.0
    ) -> None:
        super().__init__()
        require_size("hidden_size", hidden_size)
        require_size("kernel_size", kernel_size)
        if kernel_size % 2 == 0:
            raise ConfigError(f"'kernel_size' must be odd (got {kernel_size!r})")
        inner_size = hidden_size if inner_size is None else inner_size
        require_size("inner_size", inner_size)
        require_rate("dropout", dropout)
        self.norm = nn.LayerNorm(hidden_size)
        self.spread = nn.Linear(hidden_size, 2 * inner_size)
        # [kernel, F]: a parameter for each place and channel, as of nn.Conv1d(F, F, kernel, groups=F).
        self.kernel = nn.Parameter(torch.empty(kernel_size, inner_size).uniform_(-1, 1) * kernel_size**-0.5)
        self.gather = zeroed(nn.Linear(inner_size, hidden_size))
        self.dropout = nn.Dropout(dropout)

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        """``[N, S, D]``, and a mask ``[N, S]`` or none, to ``[N, S, D]``.

        Raises:
            InputError: The rows have no positions, or the mask has others.
        """
        require_positions(self, batch)
        real = real_positions(batch)
        inner = F.glu(self.spread(self.norm(batch.hidden)), -1)
        if real is not None:
            inner = inner.masked_fill(~real.unsqueeze(-1), 0.0)
        mapped = self.dropout(self.gather(F.silu(self._convolved(inner))))
        if real is not None:
            mapped = mapped.masked_fill(~real.unsqueeze(-1), 0.0)
        return ExpertResult(batch.hidden + mapped)

    def _convolved(self, inner_NSF: torch.Tensor) -> torch.Tensor:
        """Each channel's sum over neighbours: shifted rows times weights, which all experts do at once."""
        size, num_positions = self.kernel.shape[0], inner_NSF.shape[1]
        padded = F.pad(inner_NSF, (0, 0, size // 2, size // 2))
        total = padded[:, :num_positions] * self.kernel[0]
        for place in range(1, size):
            total = total + padded[:, place : place + num_positions] * self.kernel[place]
        return total
