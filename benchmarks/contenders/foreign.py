"""Experts run by other packages: transformers' grouped experts, and mixed batches of peft's adapters.

Both packages are optional, and imported when a contender is made.

Axes: B samples, H hidden size, F inner width, E experts of a level.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional

import celmoe
from benchmarks.contenders.planned import Planned, Stacked, bodies_of
from benchmarks.workloads.bodies import MLP, RANK, LowRank


class TransformersMLP(Planned):
    """The hierarchy of MLPs with the products of transformers' ``grouped_mm`` experts.

    Transformers' experts have neither the norm before nor the residual: this class adds both by rows, as the stack
    does.

    Args:
        model: A model of a workload of MLPs.
    """

    def __init__(self, model: celmoe.HierarchicalCELMoE) -> None:
        super().__init__(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its warnings at import are not ours to fix
            from transformers.integrations.moe import use_experts_implementation  # noqa: PLC0415  # may be absent

        self.kind: Any = use_experts_implementation(_Projections, has_bias=True, has_gate=False)
        bodies = cast(list[list[MLP]], bodies_of(model))
        self.scales = nn.ParameterList(_stacked([body.norm.weight for body in level]) for level in bodies)
        self.shifts = nn.ParameterList(_stacked([body.norm.bias for body in level]) for level in bodies)
        config = SimpleNamespace(_experts_implementation="grouped_mm")
        self.levels = nn.ModuleList(self.kind(config, level) for level in bodies)

    def run_level(self, index: int, hidden: torch.Tensor, plan: celmoe.LevelPlan) -> torch.Tensor:
        """``[B, H]`` to the same shape."""
        ids = plan.expert_ids
        normed = functional.layer_norm(hidden, hidden.shape[-1:])
        spread = self.shifts[index].index_select(0, ids), self.scales[index].index_select(0, ids)
        chosen = torch.addcmul(spread[0], normed, spread[1])
        weights = hidden.new_ones(len(ids), 1)
        change: torch.Tensor = self.levels[index](chosen, ids.unsqueeze(1), weights)
        return hidden + change

    def stacks(self, index: int) -> Mapping[str, Stacked]:
        """All as the bodies have them."""
        level = self.levels[index]
        norms = {"norm.weight": Stacked(self.scales[index]), "norm.bias": Stacked(self.shifts[index])}
        products = {
            f"{part}.{name}": Stacked(level.get_parameter(f"{part}_proj{ending}"))
            for part in ("up", "down")
            for name, ending in (("weight", ""), ("bias", "_bias"))
        }
        return norms | products


class _Projections(nn.Module):
    """Both products of E experts, under the names that transformers looks for."""

    def __init__(self, _config: object, bodies: Sequence[MLP]) -> None:
        super().__init__()
        self.num_experts = len(bodies)
        self.act_fn = functional.gelu
        self.up_proj = _stacked([body.up.weight for body in bodies])
        self.up_proj_bias = _stacked([body.up.bias for body in bodies])
        self.down_proj = _stacked([body.down.weight for body in bodies])
        self.down_proj_bias = _stacked([body.down.bias for body in bodies])

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """``[B, H]``, ids int64 ``[B, 1]`` and weights ``[B, 1]`` to ``[B, H]``; the decorator puts its own here."""
        raise NotImplementedError


class PeftAdapters(nn.Module):
    """The hierarchy of low-rank experts as adapters of one layer a level that returns its input, in mixed batches.

    Peft mixes adapters in inference alone, and takes a name for each sample.

    Args:
        model: A model of a workload of low-rank experts.
    """

    def __init__(self, model: celmoe.HierarchicalCELMoE) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as above
            from peft import LoraConfig  # noqa: PLC0415  # may be absent
            from peft.tuners.lora import Linear  # noqa: PLC0415  # as above

        self.level_names = [level.name for level in model.levels]
        self.layers = nn.ModuleList()
        width = model.config.hidden_size
        config = LoraConfig(r=RANK, lora_alpha=RANK, inference_mode=True)
        for level, bodies in zip(model.levels, cast(list[list[LowRank]], bodies_of(model)), strict=True):
            first, *rest = level.experts
            layer: Any = Linear(_Same(width, width, bias=False), first, config, r=RANK, lora_alpha=RANK)
            for name in rest:
                layer.update_layer(name, RANK, RANK, config)
            for name, body in zip(level.experts, bodies, strict=True):
                layer.lora_A[name].load_state_dict(body.down.state_dict())
                layer.lora_B[name].load_state_dict(body.up.state_dict())
            self.layers.append(layer)
        self.fusion = model.fusion

    def forward(self, hidden: torch.Tensor, names: Mapping[str, Sequence[str]]) -> torch.Tensor:
        """``[B, H]`` to the fused ``[B, H]``."""
        level_hiddens = []
        for level, layer in zip(self.level_names, self.layers, strict=True):
            hidden = layer(hidden, adapter_names=names[level])
            level_hiddens.append(hidden)
        fused: torch.Tensor = self.fusion(level_hiddens)
        return fused


class _Same(nn.Linear):
    """The layer that the adapters change; its weight is never read, so that no product is timed that others lack."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        # A copy: peft adds to it in place.
        return hidden.clone()


def _stacked(tensors: Sequence[torch.Tensor]) -> nn.Parameter:
    return nn.Parameter(torch.stack([tensor.detach() for tensor in tensors]))
