"""Small layers of the experts."""

from __future__ import annotations

from torch import nn

from celmoe.errors import ConfigError, ConfigTypeError, listed, nearest

ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU, "tanh": nn.Tanh}


def activation_of(name: object) -> nn.Module:
    """The activation of a name.

    Raises:
        ConfigTypeError, ConfigError: The name is no string, or not in `ACTIVATIONS`.
    """
    if not isinstance(name, str):
        raise ConfigTypeError(f"'activation' must be a string (got {name!r})")
    if name not in ACTIVATIONS:
        raise ConfigError(
            f"'activation' must be one of {listed(ACTIVATIONS)} (got {name!r}; {nearest(name, ACTIVATIONS)})"
        )
    return ACTIVATIONS[name]()


def zeroed(layer: nn.Linear) -> nn.Linear:
    """The layer with zeros for weights and bias, so that what adds its result adds nothing."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
