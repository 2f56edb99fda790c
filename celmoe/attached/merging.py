"""Folds linear experts into the host's layers, for serving at the host's own cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, cast

import torch
from torch import nn

from celmoe.errors import ConfigError
from celmoe.names import NamedModules

from .attaching import detach
from .hosts import hierarchy_of, hosts_in

Host = TypeVar("Host", bound=nn.Module)


@torch.no_grad()
def merge_adapters(model: Host, experts: Mapping[str, str] | None = None) -> Host:
    """Fold the experts of one route into the layers that they stand behind, in place, and detach all experts.

    The places must be ``nn.Linear`` layers, from width I to O, and the experts linear. An expert that reads its layer's
    input has a method ``weight_delta()``, which gives the change of the layer's weight ``[O, I]``: `celmoe.zoo.LoRA`.
    Any other has ``as_linear()``, which gives its weight ``[O, O]`` and bias ``[O]``: `celmoe.zoo.Linear`. Sums are
    made in float64.

    Args:
        model: The host.
        experts: By level, the name of the expert; parents may be left out. By default each level's only expert.

    Returns:
        ``model``, without experts.

    Raises:
        InputTypeError, ConfigError: No experts are attached, a place is no linear layer of its own, or an expert is not
            linear; then nothing has changed.
        CELMoEError: See `HierarchicalCELMoE.compile_routing`.
    """
    merged: list[tuple[nn.Linear, torch.Tensor, torch.Tensor | None]] = []
    for place, host in hosts_in(model).items():
        attached = hierarchy_of(host)
        layer = _layer(model, place, host)
        weight = layer.weight.double()
        bias = cast("torch.Tensor | None", layer.bias)
        bias = None if bias is None else bias.double()
        plan = attached.compile_routing({level: [name] for level, name in (experts or {}).items()}, 1)
        for level, planned in plan.levels.items():
            name = planned.present[0]
            expert = cast(NamedModules, attached.level_modules[level])[name]
            weight, bias = _after(expert, weight, bias, f"expert {name!r} of level {level!r} at {place!r}")
        merged.append((layer, weight, bias))
    detach(model)
    for layer, weight, bias in merged:
        layer.weight.copy_(weight)
        if bias is not None and layer.bias is None:
            layer.bias = nn.Parameter(bias.to(layer.weight.dtype), layer.weight.requires_grad)
        elif bias is not None:
            layer.bias.copy_(bias)
    return model


def _layer(model: nn.Module, place: str, host: nn.Module) -> nn.Linear:
    if not isinstance(host, nn.Linear):
        raise ConfigError(
            f"places must be linear layers for experts to be merged (got a {type(host).__name__} at {place!r})"
        )
    users = [
        name
        for name, module in model.named_modules()
        if any(host.weight is each for each in module._parameters.values())
    ]
    if len(users) > 1:
        raise ConfigError(
            f"places must have weights of their own for experts to be merged (got {place!r}, which shares its weight "
            f"with {next(name for name in users if name != place)!r})"
        )
    return host


def _after(
    expert: Any, weight: torch.Tensor, bias: torch.Tensor | None, where: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A linear layer's weight and bias in float64 with an expert behind it."""
    if getattr(expert, "reads_input", False) and hasattr(expert, "weight_delta"):
        return weight + expert.weight_delta().to(weight), bias
    if not hasattr(expert, "as_linear"):
        raise ConfigError(
            f"experts must be linear to be merged, with weight_delta() or as_linear() (got a {type(expert).__name__}: "
            f"{where})"
        )
    own, shift = (each.to(weight) for each in expert.as_linear())
    shift = shift if bias is None else own @ bias + shift
    return own @ weight, shift if bias is not None or bool(shift.any()) else None
