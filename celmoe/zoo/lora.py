"""A low-rank change of a linear layer that all experts share.

Axes: N samples, I width of the layer's input, O width of its result.
"""

from __future__ import annotations

import torch
from torch import nn

from celmoe.based import BasedExpert
from celmoe.config import require_finite
from celmoe.errors import ConfigError, ConfigTypeError, InputError
from celmoe.experts import ExpertBatch, ExpertResult

from .arguments import require_rate, require_size
from .layers import zeroed


class LoRA(BasedExpert):
    """A low-rank change of a frozen layer: ``base(x) + (alpha / rank) B A x``.

    Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv:2106.09685, section 4.1): ``A`` begins
    at random, ``B`` at zero, so the expert begins as the layer alone. There are two ways to use it.

    *With a base*, the expert is the layer and its change: ``x`` is the rows. Many experts may have one module as base::

        base = nn.Linear(512, 512)
        model = HierarchicalCELMoE(
            config, lambda level, name, metadata: LoRA(512, rank=metadata["rank"], alpha=16, base=base)
        )

    The base is frozen. Experts that run as one run it once, on the rows of all of them. It is no child of the expert:
    it moves with the expert (``to``, ``half``), but neither ``state_dict`` nor ``parameters`` has it, and it stays in
    the mode (``train``, ``eval``) that it is in. A checkpoint of the experts would else hold it once an expert. Whoever
    made it keeps it.

    *Without a base*, the expert stands behind a linear layer of somebody else's network, as `celmoe.attach` places it:
    its rows are the layer's results, and ``context["input"]`` holds the layer's inputs, ``x``.

    Experts of one rank run as one, whatever their alphas, and experts of several ranks as one for each rank. The factor
    is a parameter without gradients for that reason, and is in checkpoints: what it scales depends on it.

    Args:
        in_features: The width I of ``x``.
        out_features: The width O of the rows; ``in_features`` by default, and always with a base.
        rank: The rank of the change.
        alpha: The change is multiplied by ``alpha / rank``; by default ``alpha`` is the rank, and the factor 1.
        dropout: Dropout rate of ``x`` in front of ``A``.
        base: The frozen layer, from ``[..., I]`` to ``[..., I]``; ``None`` behind somebody else's layer.

    Attributes:
        reads_input: True without a base: the expert wants a layer's inputs as ``context["input"]``.

    Raises:
        ConfigTypeError, ConfigError: An argument is of the wrong kind, or out of range.
    """

    scaling: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int | None = None,
        *,
        rank: int,
        alpha: float | None = None,
        dropout: float = 0.0,
        base: nn.Module | None = None,
    ) -> None:
        super().__init__()
        require_size("in_features", in_features)
        out_features = in_features if out_features is None else out_features
        require_size("out_features", out_features)
        require_size("rank", rank)
        alpha = rank if alpha is None else alpha
        require_finite("alpha", alpha)
        require_rate("dropout", dropout)
        if base is not None:
            if not isinstance(base, nn.Module):
                raise ConfigTypeError(f"'base' must be a torch.nn.Module or None (got {base!r})")
            if out_features != in_features:
                raise ConfigError(
                    f"'out_features' must equal 'in_features' with a base, because experts give rows as wide as they "
                    f"take (got {out_features!r} and {in_features!r})"
                )
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = zeroed(nn.Linear(rank, out_features, bias=False))
        self.scaling = nn.Parameter(torch.full((1,), float(alpha) / rank), requires_grad=False)
        self.base = base

    @property
    def reads_input(self) -> bool:
        """True without a base: the expert wants a layer's inputs as ``context["input"]``."""
        return self.base is None

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        """``[N, ..., I]`` to ``[N, ..., I]``; without a base ``[N, ..., O]`` to ``[N, ..., O]``.

        Raises:
            InputError: There is no base, and no ``context["input"]``.
        """
        if self.base is None:
            context = batch.context
            if not isinstance(context, dict) or "input" not in context:
                raise InputError(
                    "'context' must be a dict whose 'input' holds the inputs of the linear layer in front of a LoRA "
                    "without a base (got none; celmoe.attach gives it, or build LoRA(..., base=layer))"
                )
            given, rows = context["input"], batch.hidden
        else:
            given, rows = batch.hidden, self.base(batch.hidden)
        # Scaled where it is narrowest.
        return ExpertResult(rows + self.up(self.down(self.dropout(given)) * self.scaling))

    @torch.no_grad()
    def weight_delta(self) -> torch.Tensor:
        """The change of the layer's weight, ``[O, I]``: ``(alpha / rank) B A``, a tensor of its own without gradients.

        ``F.linear(x, layer.weight + expert.weight_delta(), layer.bias)`` is the expert's result in evaluation.
        """
        return self.up.weight @ (self.down.weight * self.scaling)
