"""Fusions of the levels' hidden states into one. Parameter names and order are those of celmoe-vp's checkpoints.

Axes: B samples, S positions, D hidden size, L levels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .config import CELMoEConfig
from .directml import is_directml
from .errors import ConfigTypeError, InputError


class LearnedFusion(nn.Module):
    """``dropout(norm(sum_i gate_i(h_i) / L))`` with bias-free linear gates.

    Args:
        hidden_size: Width D.
        num_levels: Levels L.
        dropout: Dropout rate.
    """

    def __init__(self, hidden_size: int, num_levels: int, dropout: float) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.gates = nn.ModuleList([nn.Linear(hidden_size, hidden_size, bias=False) for _ in range(num_levels)])
        self.norm = nn.LayerNorm(hidden_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, level_hiddens: Sequence[torch.Tensor]) -> torch.Tensor:
        """Fuse L tensors ``[..., D]`` into one of the same shape.

        Raises:
            InputError: There is no tensor, or there are more tensors than gates.
        """
        gates = list(self.gates)
        if not 0 < len(level_hiddens) <= len(gates):
            raise _wrong_number(len(gates), len(level_hiddens))
        gated = [gate(hidden) for gate, hidden in zip(gates, level_hiddens, strict=False)]
        fused: torch.Tensor = self.dropout(self.norm(_mean(gated)))
        return fused

    def check_hidden(self, hidden: torch.Tensor) -> None:
        """Check that hidden states like these can be fused, before any expert runs.

        Raises:
            InputError: The hidden states have another width or device than the fusion.
        """
        _check_width_and_device(hidden, self.hidden_size, self.norm)


class PositionAwareFusion(nn.Module):
    """The levels' sum, weighted at every position by a softmax of linear scores plus a learned bias.

    Args:
        hidden_size: Width D.
        num_levels: Levels L.
        max_positions: Positions with a bias of their own; later positions use the last bias.
        dropout: Dropout rate.
    """

    def __init__(self, hidden_size: int, num_levels: int, max_positions: int = 512, dropout: float = 0.1) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.num_levels = num_levels
        self.max_positions = max_positions
        self.level_gates = nn.ModuleList([nn.Linear(hidden_size, 1, bias=True) for _ in range(num_levels)])
        self.position_bias = nn.Embedding(max_positions, num_levels)
        self.norm = nn.LayerNorm(hidden_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, level_hiddens: Sequence[torch.Tensor]) -> torch.Tensor:
        """Fuse L tensors ``[B, S, D]``, or ``[B, D]`` for one position, into one of the same shape.

        Raises:
            InputError: There are not L tensors, or the tensors have neither two nor three axes.
        """
        if len(level_hiddens) != self.num_levels:
            raise _wrong_number(self.num_levels, len(level_hiddens))
        self.check_hidden(level_hiddens[0])
        dim = level_hiddens[0].dim()
        num_positions = level_hiddens[0].shape[1] if dim == 3 else 1
        scores = [gate(hidden) for gate, hidden in zip(self.level_gates, level_hiddens, strict=True)]
        bias = self._bias(num_positions, scores[0].device)
        weights = torch.softmax(torch.cat(scores, dim=-1) + (bias if dim == 3 else bias[0]), dim=-1)
        # Add one level at a time: stacking the levels would hold the hidden states twice.
        fused = level_hiddens[0] * weights[..., 0:1]
        for level in range(1, len(level_hiddens)):
            fused = fused + level_hiddens[level] * weights[..., level : level + 1]
        result: torch.Tensor = self.dropout(self.norm(fused))
        return result

    def _bias(self, num_positions: int, device: torch.device) -> torch.Tensor:
        """``[S, L]``; positions past the maximum repeat the last bias."""
        if is_directml(device):
            # On DirectML an embedding's gradient goes through the CPU.
            weight: torch.Tensor = self.position_bias.weight
            more = num_positions - self.max_positions
            return weight[:num_positions] if more <= 0 else torch.cat([weight, weight[-1:].expand(more, -1)])
        positions = torch.arange(num_positions, device=device).clamp_max(self.max_positions - 1)
        bias: torch.Tensor = self.position_bias(positions)
        return bias

    def check_hidden(self, hidden: torch.Tensor) -> None:
        """Check that hidden states like these can be fused, before any expert runs.

        Raises:
            InputError: The hidden states have more than three axes, or another width or device than the fusion.
        """
        _check_width_and_device(hidden, self.hidden_size, self.norm)
        if hidden.dim() > 3:
            raise InputError(
                f"'hidden' must be [B, D] or [B, S, D] for the position-aware fusion (got shape {tuple(hidden.shape)})"
            )


class MeanFusion(nn.Module):
    """The plain mean of the levels: no parameters, norm or dropout."""

    def forward(self, level_hiddens: Sequence[torch.Tensor]) -> torch.Tensor:
        """Fuse L tensors of one shape into one of the same shape.

        Raises:
            InputError: There is no tensor.
        """
        if not level_hiddens:
            raise InputError("'level_hiddens' must hold one tensor a level (got none)")
        return _mean(level_hiddens)


def build_fusion(config: CELMoEConfig, num_levels: int, fusion_module: nn.Module | None) -> nn.Module:
    """The fusion of a model: the user's own, else the mean if the config asks for it, else the config's type.

    Raises:
        ConfigTypeError: The user's own fusion can't be called, or is a class.
    """
    if fusion_module is not None:
        if isinstance(fusion_module, type) or not callable(fusion_module):
            raise ConfigTypeError(
                f"'fusion_module' must be a torch.nn.Module, or a callable that is no class (got {fusion_module!r})"
            )
        return fusion_module
    if not config.use_learned_fusion:
        return MeanFusion()
    if config.fusion_type == "position_aware":
        return PositionAwareFusion(config.hidden_size, num_levels, config.fusion_max_positions, config.fusion_dropout)
    return LearnedFusion(config.hidden_size, num_levels, config.fusion_dropout)


def _check_width_and_device(hidden: torch.Tensor, width: int, norm: nn.Module) -> None:
    shape = hidden.shape
    if len(shape) < 2 or shape[-1] != width:
        raise InputError(f"'hidden' must be [B, ..., {width}], as wide as the fusion (got shape {tuple(shape)})")
    weight = norm._parameters.get("weight")
    # Until the fusion is called, parameters of other classes may be sharded, and parameters on meta offloaded.
    if type(weight) is nn.Parameter and weight.device != hidden.device and not weight.is_meta:
        raise InputError(f"'hidden' must be on {weight.device}, where the model is (got {hidden.device})")


def _wrong_number(num_levels: int, got: int) -> InputError:
    return InputError(f"'level_hiddens' must hold one tensor for each of the {num_levels} levels (got {got})")


def _mean(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total / len(tensors)
