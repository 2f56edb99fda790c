"""Bottleneck adapters: a narrow layer down and one up, added to the rows of a pretrained network.

Axes: N samples, D width, F bottleneck.
"""

from __future__ import annotations

from torch import nn

from celmoe.experts import ExpertBatch, ExpertModule, ExpertResult

from .arguments import require_rate, require_size
from .layers import activation_of, zeroed


class _Bottleneck(ExpertModule):
    def __init__(self, hidden_size: int, bottleneck: int, activation: str, dropout: float) -> None:
        super().__init__()
        require_size("hidden_size", hidden_size)
        require_size("bottleneck", bottleneck)
        require_rate("dropout", dropout)
        self.down = nn.Linear(hidden_size, bottleneck)
        self.activation = activation_of(activation)
        self.dropout = nn.Dropout(dropout)
        self.up = zeroed(nn.Linear(bottleneck, hidden_size))


class Houlsby(_Bottleneck):
    """The adapter of Houlsby et al. 2019: ``h + W2 f(W1 h + b1) + b2``.

    "Parameter-Efficient Transfer Learning for NLP" (arXiv:1902.00751, section 2.1, figure 2). In the paper, two of them
    stand in a layer: one behind the projection at the end of the attention, one behind that at the end of the
    feed-forward network, both before the skip connection is added and the norm follows. This expert is one of the two;
    in a BERT of `transformers` the places are ``encoder.layer.*.attention.output.dense`` and
    ``encoder.layer.*.output.dense``. The paper begins near the identity (weights of 0.01), this expert at it. The paper
    also trains the network's norms, by task: that is up to the host.

    Args:
        hidden_size: The width D.
        bottleneck: The inner width F; the paper tries 8, 64 and 256 on GLUE.
        activation: The name of ``f``: ``"gelu"``, ``"relu"``, ``"silu"`` or ``"tanh"``; the paper does not fix it.
        dropout: Dropout rate behind ``f``; the paper has none.

    Raises:
        ConfigTypeError, ConfigError: An argument is of the wrong kind, or out of range.
    """

    def __init__(
        self, hidden_size: int, bottleneck: int = 64, *, activation: str = "gelu", dropout: float = 0.0
    ) -> None:
        super().__init__(hidden_size, bottleneck, activation, dropout)

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        """``[N, ..., D]`` to ``[N, ..., D]``."""
        inner = self.dropout(self.activation(self.down(batch.hidden)))
        return ExpertResult(batch.hidden + self.up(inner))


class Pfeiffer(_Bottleneck):
    """The adapter of Pfeiffer et al. 2020 and 2021: ``h + W2 f(W1 norm(h) + b1) + b2``.

    "MAD-X: An Adapter-Based Framework for Multi-Task Cross-Lingual Transfer" (arXiv:2005.00052, language adapters,
    equation 1), which is the reference for one adapter a language, and "AdapterFusion: Non-Destructive Task Composition
    for Transfer Learning" (arXiv:2005.00247). One of them stands in a layer, behind the feed-forward network: in a BERT
    of `transformers`, ``encoder.layer.*.output.dense``. That is half of Houlsby's parameters.

    In MAD-X the adapter reads the rows behind the network's own norm, and adds its result to those before the norm.
    This expert sees one tensor, the rows before the norm. It has a norm of its own, and does not share the network's.
    Nor does it see the skip connection that the network's norm sees. MAD-X's invertible adapters at the embeddings are
    not here.

    Args:
        hidden_size: The width D.
        bottleneck: The inner width F; MAD-X has ``hidden_size / 2`` for languages, AdapterFusion ``hidden_size / 16``.
        activation: The name of ``f``: ``"relu"`` as in the papers, ``"gelu"``, ``"silu"`` or ``"tanh"``.
        dropout: Dropout rate behind ``f``; the papers have none.

    Raises:
        ConfigTypeError, ConfigError: An argument is of the wrong kind, or out of range.
    """

    def __init__(
        self, hidden_size: int, bottleneck: int = 64, *, activation: str = "relu", dropout: float = 0.0
    ) -> None:
        super().__init__(hidden_size, bottleneck, activation, dropout)
        self.norm = nn.LayerNorm(hidden_size)

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        """``[N, ..., D]`` to ``[N, ..., D]``."""
        inner = self.dropout(self.activation(self.down(self.norm(batch.hidden))))
        return ExpertResult(batch.hidden + self.up(inner))
