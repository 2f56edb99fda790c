"""Prefix tuning as an adapter: each position attends to learned keys and values.

Axes: N samples, D width, H heads, L keys of a head.
"""

from __future__ import annotations

import torch
from torch import nn

from celmoe.experts import ExpertBatch, ExpertModule, ExpertResult

from .arguments import require_rate, require_size
from .layers import zeroed


class Prefix(ExpertModule):
    """Attention of each position to L learned keys and values a head, added to the rows.

    The prefix of Li and Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation" (arXiv:2101.00190),
    in the form of He et al. 2022, "Towards a Unified View of Parameter-Efficient Transfer Learning" (arXiv:2110.04366,
    section 3.1): ``h + sum over heads of softmax(h K) V``. There ``K`` is the query projection times the keys, and is
    one matrix here; so is ``V``, the values times the output projection. A prefix in a network shares one softmax with
    the network's keys, which an expert does not see: the gate between both is left out. No second network makes keys
    and values, as one does in training in the first paper.

    Each position attends alone, so it may be ``[N, D]`` or have any axes of positions. The values begin at zero, so the
    expert begins as the identity. It belongs behind an attention's output: ``encoder.layer.*.attention.output.dense``.

    Args:
        hidden_size: The width D.
        length: The keys L of each head.
        heads: The heads H, each with a softmax of its own over keys as wide as the rows.
        dropout: Dropout rate of the attention's weights.

    Raises:
        ConfigTypeError, ConfigError: An argument is of the wrong kind, or out of range.
    """

    def __init__(self, hidden_size: int, length: int = 16, *, heads: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        require_size("hidden_size", hidden_size)
        require_size("length", length)
        require_size("heads", heads)
        require_rate("dropout", dropout)
        self.heads = int(heads)
        self.keys = nn.Linear(hidden_size, heads * length, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.values = zeroed(nn.Linear(heads * length, hidden_size, bias=False))

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        """``[N, ..., D]`` to ``[N, ..., D]``."""
        scores = self.keys(batch.hidden).unflatten(-1, (self.heads, -1))
        # One product with the values of all heads adds up the heads.
        weights = self.dropout(torch.softmax(scores, -1)).flatten(-2)
        return ExpertResult(batch.hidden + self.values(weights))
