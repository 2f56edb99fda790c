"""Folds linear experts into the host's layers, for serving at the host's own cost."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, TypeVar, cast

import torch
from torch import nn

from celmoe.errors import ConfigError, ConfigTypeError
from celmoe.experts import ExpertBatch
from celmoe.names import NamedModules

from .attaching import detach
from .hosts import hierarchy_of, hosts_in
from .place import LastLevel

Host = TypeVar("Host", bound=nn.Module)

#: Rows ``[N, O]`` and a layer's input ``[N, I]`` to rows ``[N, O]``.
Linear: TypeAlias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# Rows that an expert is compared on with the layer that it gives, and how near both must be.
_FEW, _TOLERANCE = 3, 1e-3


@torch.inference_mode(False)
@torch.no_grad()
def merge_adapters(model: Host, experts: Mapping[str, str] | None = None) -> Host:
    """Fold the experts of one route into the layers that they stand behind, in place, and detach all experts.

    The places must be ``nn.Linear`` layers, from width I to O, and the experts linear. An expert that reads its layer's
    input has a method ``weight_delta()``, which gives the change of the layer's weight ``[O, I]``: `celmoe.zoo.LoRA`.
    Any other has ``as_linear()``, which gives its weight ``[O, O]`` and bias ``[O]``: `celmoe.zoo.Linear`. Sums are
    made in float64, by copies of the experts in float64, and each expert is compared with what it gives on a few rows.

    Args:
        model: The host.
        experts: By level, the name of the expert; parents may be left out. By default each level's only expert.

    Returns:
        ``model``, without experts.

    Raises:
        InputTypeError, ConfigError: No experts are attached, a place is no linear layer of its own, the levels are
            fused, or an expert is not linear; then nothing has changed.
        ConfigTypeError: ``experts`` does not map levels to names.
        CELMoEError: See `HierarchicalCELMoE.compile_routing`.
    """
    for level, name in (experts or {}).items():
        if not isinstance(name, str):
            raise ConfigTypeError(f"'experts' must map levels to names of experts (got {name!r} for level {level!r})")
    merged: list[tuple[nn.Linear, torch.Tensor, torch.Tensor | None]] = []
    for place, host in hosts_in(model).items():
        attached = hierarchy_of(host)
        if not isinstance(attached.fusion, LastLevel):
            raise ConfigError(
                f"places must give their last level's output for experts to be merged (got the fusion "
                f"{type(attached.fusion).__name__} at {place!r}; experts attached with fusion='last' can be)"
            )
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
    if fault := _fault(host):
        raise ConfigError(
            f"places must be plain linear layers with weights that can be written for experts to be merged (got "
            f"{place!r}: {fault})"
        )
    for kind, tensor in host._parameters.items():
        users = [
            name
            for name, module in model.named_modules()
            if tensor is not None and any(tensor is each for each in module._parameters.values())
        ]
        if len(users) > 1:
            raise ConfigError(
                f"places must have weights of their own for experts to be merged (got {place!r}, which shares its "
                f"{kind} with {next(name for name in users if name != place)!r})"
            )
    return host


def _fault(layer: nn.Linear) -> str:
    """The reason that a layer's result is not its weight times its rows, or that nobody can write into it."""
    if type(layer).forward is not nn.Linear.forward:
        return f"a {type(layer).__name__} with a forward pass of its own"
    tensors = [layer._parameters.get(name, layer) for name in ("weight", "bias")]
    if any(each is layer for each in tensors):
        # Parametrizations and pruning make it anew for each call.
        return "a weight that is computed from others; make it a parameter first"
    for each in tensors:
        if isinstance(each, torch.Tensor):
            if not each.is_floating_point() or each.is_meta:
                return f"a tensor of {each.dtype} on {each.device}"
            if each.is_inference():
                return "a tensor made in inference mode"
    return ""


def _after(
    expert: Any, weight: torch.Tensor, bias: torch.Tensor | None, where: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A linear layer's weight and bias in float64 with an expert behind it."""
    reads_input = bool(getattr(expert, "reads_input", False)) and hasattr(expert, "weight_delta")
    if not reads_input and not hasattr(expert, "as_linear"):
        raise ConfigError(
            f"experts must be linear to be merged, with weight_delta() or as_linear() (got a {type(expert).__name__}: "
            f"{where})"
        )
    # The identity and a small change have no sum in bfloat16.
    exact: Any = copy.deepcopy(expert).double().eval()
    if reads_input:
        delta = exact.weight_delta().to(weight)
        _require_equal(exact, weight.shape, lambda rows, given: rows + given @ delta.mT, where)
        return weight + delta, bias
    own, shift = (each.to(weight) for each in exact.as_linear())
    _require_equal(exact, weight.shape, lambda rows, _: rows @ own.mT + shift, where)
    shift = shift if bias is None else own @ bias + shift
    return own @ weight, shift if bias is not None or bool(shift.any()) else None


def _require_equal(expert: nn.Module, shape: torch.Size, linear: Linear, where: str) -> None:
    """Require that an expert's result on a few rows is that of the layer which it says it is."""
    device = next((each.device for each in expert.parameters()), None)
    drawn = torch.Generator().manual_seed(0)
    rows, given = (torch.randn(_FEW, width, generator=drawn, dtype=torch.float64).to(device) for width in shape)
    wanted = linear(rows.clone(), given.clone())
    found = expert(ExpertBatch(rows, {"input": given}, None, {"level": "", "expert": ""})).hidden
    if not torch.allclose(found.to(wanted), wanted, rtol=_TOLERANCE, atol=_TOLERANCE * float(wanted.abs().max())):
        raise ConfigError(
            f"experts must be the linear layers that they give to be merged (got a {type(expert).__name__} with "
            f"another result: {where})"
        )
