"""Experts that look at each position alone: an affine map, two layers, a gated MLP.

Axes: N samples, D width, F inner width.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from celmoe.experts import ExpertBatch, ExpertModule, ExpertResult

from .arguments import require_flag, require_rate, require_size
from .layers import activation_of, zeroed


class Linear(ExpertModule):
    """An affine map of each position: ``h + W h + b``, or ``W h + b`` if not residual.

    The residual form is the adapter of Rebuffi, Bilen and Vedaldi 2017, "Learning multiple visual domains with residual
    adapters" (arXiv:1705.08045), for a width instead of channels, and without its normalization. It can be folded into
    a linear layer in front of it: see `as_linear`.

    Args:
        hidden_size: The width D.
        bias: If true, ``b`` is added.
        residual: If true, the rows are added, and ``W`` and ``b`` begin at zero: the expert begins as the identity.

    Raises:
        ConfigTypeError, ConfigError: An argument is of the wrong kind, or out of range.
    """

    def __init__(self, hidden_size: int, *, bias: bool = True, residual: bool = True) -> None:
        super().__init__()
        require_size("hidden_size", hidden_size)
        require_flag("bias", bias)
        require_flag("residual", residual)
        self.residual = bool(residual)
        self.linear = nn.Linear(hidden_size, hidden_size, bias=bool(bias))
        if residual:
            zeroed(self.linear)

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        """``[N, ..., D]`` to ``[N, ..., D]``."""
        mapped = self.linear(batch.hidden)
        return ExpertResult(batch.hidden + mapped if self.residual else mapped)

    @torch.no_grad()
    def as_linear(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The expert as one linear layer: ``F.linear(hidden, weight, bias)`` is its result.

        Returns:
            The weight ``[D, D]``, to which a residual expert adds the identity, and the bias ``[D]``: tensors of their
            own, without gradients.
        """
        weight = self.linear.weight.detach().clone()
        if self.residual:
            weight += torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
        bias = self.linear.bias
        return weight, weight.new_zeros(len(weight)) if bias is None else bias.detach().clone()


class MLP(ExpertModule):
    """Two layers at each position: ``h + W2 f(W1 h + b1) + b2``, or without ``h`` if not residual.

    The feed-forward network of Vaswani et al. 2017, "Attention Is All You Need" (arXiv:1706.03762, equation 2), whose
    ``f`` is ReLU; the GELU that stands here by default is of Hendrycks and Gimpel 2016 (arXiv:1606.08415).

    Args:
        hidden_size: The width D.
        inner_size: The inner width F; ``4 * hidden_size`` by default, as in the paper.
        activation: The name of ``f``: ``"gelu"``, ``"relu"``, ``"silu"`` or ``"tanh"``.
        dropout: Dropout rate behind ``f``.
        residual: If true, the rows are added, and the last layer begins at zero: the expert begins as the identity.

    Raises:
        ConfigTypeError, ConfigError: An argument is of the wrong kind, or out of range.
    """

    def __init__(
        self,
        hidden_size: int,
        inner_size: int | None = None,
        *,
        activation: str = "gelu",
        dropout: float = 0.0,
        residual: bool = True,
    ) -> None:
        super().__init__()
        require_size("hidden_size", hidden_size)
        inner_size = 4 * hidden_size if inner_size is None else inner_size
        require_size("inner_size", inner_size)
        require_rate("dropout", dropout)
        require_flag("residual", residual)
        self.residual = bool(residual)
        self.up = nn.Linear(hidden_size, inner_size)
        self.activation = activation_of(activation)
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(inner_size, hidden_size)
        if residual:
            zeroed(self.down)

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        """``[N, ..., D]`` to ``[N, ..., D]``."""
        mapped = self.down(self.dropout(self.activation(self.up(batch.hidden))))
        return ExpertResult(batch.hidden + mapped if self.residual else mapped)


class GLU(ExpertModule):
    """A gated MLP at each position: ``h + W2 (silu(V h) * W h)``, or without ``h`` if not residual.

    SwiGLU of Shazeer 2020, "GLU Variants Improve Transformer" (arXiv:2002.05202), without biases, as there.

    Args:
        hidden_size: The width D.
        inner_size: The inner width F; by default ``8 * hidden_size / 3``, rounded up, with which three matrices have as
            many parameters as an MLP's two, as in the paper.
        dropout: Dropout rate behind the gate.
        residual: If true, the rows are added, and the last layer begins at zero: the expert begins as the identity.

    Raises:
        ConfigTypeError, ConfigError: An argument is of the wrong kind, or out of range.
    """

    def __init__(
        self, hidden_size: int, inner_size: int | None = None, *, dropout: float = 0.0, residual: bool = True
    ) -> None:
        super().__init__()
        require_size("hidden_size", hidden_size)
        inner_size = -(-8 * hidden_size // 3) if inner_size is None else inner_size
        require_size("inner_size", inner_size)
        require_rate("dropout", dropout)
        require_flag("residual", residual)
        self.residual = bool(residual)
        self.gate = nn.Linear(hidden_size, inner_size, bias=False)
        self.up = nn.Linear(hidden_size, inner_size, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(inner_size, hidden_size, bias=False)
        if residual:
            zeroed(self.down)

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        """``[N, ..., D]`` to ``[N, ..., D]``."""
        mapped = self.down(self.dropout(F.silu(self.gate(batch.hidden)) * self.up(batch.hidden)))
        return ExpertResult(batch.hidden + mapped if self.residual else mapped)
