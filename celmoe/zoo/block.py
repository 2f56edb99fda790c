"""A transformer block.

Axes: N samples, S positions, D width, H heads, F inner width.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from celmoe.experts import ExpertBatch, ExpertModule, ExpertResult

from .arguments import require_heads, require_rate, require_size
from .layers import activation_of, zeroed
from .positions import real_positions, require_positions


class Block(ExpertModule):
    """A transformer block: self-attention and two layers, each behind a norm and added to the rows.

    Vaswani et al. 2017, "Attention Is All You Need" (arXiv:1706.03762, sections 3.1 to 3.3), with the norms in front,
    as in Xiong et al. 2020, "On Layer Normalization in the Transformer Architecture" (arXiv:2002.04745, table 1). There
    is no norm at the end, and no encoding of positions.

    With a mask, no position attends to padding, and the padding passes unchanged. Both output layers begin at zero, so
    the expert begins as the identity.

    Args:
        hidden_size: The width D.
        heads: The heads H, which divide the width.
        inner_size: The inner width F; ``4 * hidden_size`` by default.
        activation: The name of the activation: ``"gelu"``, ``"relu"``, ``"silu"`` or ``"tanh"``.
        dropout: Dropout rate of the attention's weights, behind the activation, and of both results.

    Raises:
        ConfigTypeError, ConfigError: An argument is of the wrong kind, or out of range.
    """

    def __init__(
        self,
        hidden_size: int,
        heads: int = 4,
        *,
        inner_size: int | None = None,
        activation: str = "gelu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        require_size("hidden_size", hidden_size)
        require_heads("hidden_size", hidden_size, heads)
        inner_size = 4 * hidden_size if inner_size is None else inner_size
        require_size("inner_size", inner_size)
        require_rate("dropout", dropout)
        self.heads = int(heads)
        self.dropout_rate = float(dropout)
        self.attention_norm = nn.LayerNorm(hidden_size)
        self.attention_in = nn.Linear(hidden_size, 3 * hidden_size)
        self.attention_out = zeroed(nn.Linear(hidden_size, hidden_size))
        self.norm = nn.LayerNorm(hidden_size)
        self.up = nn.Linear(hidden_size, inner_size)
        self.activation = activation_of(activation)
        self.down = zeroed(nn.Linear(inner_size, hidden_size))
        self.dropout = nn.Dropout(dropout)

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        """``[N, S, D]``, and a mask ``[N, S]`` or none, to ``[N, S, D]``.

        Raises:
            InputError: The rows have no positions, or the mask has others.
        """
        require_positions(self, batch)
        real = real_positions(batch)
        hidden = batch.hidden + self.dropout(self._attended(self.attention_norm(batch.hidden), real))
        inner = self.dropout(self.activation(self.up(self.norm(hidden))))
        hidden = hidden + self.dropout(self.down(inner))
        return ExpertResult(hidden if real is None else torch.where(real.unsqueeze(-1), hidden, batch.hidden))

    def _attended(self, normed_NSD: torch.Tensor, real_NS: torch.Tensor | None) -> torch.Tensor:
        # [N, S, 3 D] -> three of [N, H, S, D / H]
        queries, keys, values = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.attention_in(normed_NSD).chunk(3, -1)
        )
        seen = None
        if real_NS is not None:
            # A sample of nothing but padding sees all of it: a softmax over no position is not a number.
            seen = (real_NS | ~real_NS.any(-1, keepdim=True))[:, None, None, :]
        rate = self.dropout_rate if self.training else 0.0
        out = F.scaled_dot_product_attention(queries, keys, values, seen, rate)
        attended: torch.Tensor = self.attention_out(out.transpose(1, 2).flatten(2))
        return attended
