"""Optimizers' states by name."""

from __future__ import annotations

import torch
from torch import nn

import celmoe
from celmoe import (
    optim,
)
from tests.stacks import MLP, build

UP = "level_modules.language.{}.up.weight"


def made(
    name: str, options: dict, kind: type[nn.Module] = MLP, *, is_stacked: bool, dtype: torch.dtype = torch.float64
):
    """A model of its own, with `torch.optim`'s optimizer, or `celmoe.optim`'s for a stacked model."""
    model = build(kind, "looped").to(dtype)
    if is_stacked:
        celmoe.stack_experts(model)
    elif name == "SGD":
        # PyTorch's fused SGD can't take a first momentum beside others.
        options = options | {"fused": None}
    return model, getattr(optim if is_stacked else torch.optim, name)(model.parameters(), **options)


def assert_same_states(found: dict, expected: dict, tolerance: float = 1e-12) -> None:
    assert found["state"].keys() == expected["state"].keys()
    for name, own in expected["state"].items():
        assert list(found["state"][name]) == list(own), name
        for key, value in own.items():
            mine = found["state"][name][key]
            if not isinstance(value, torch.Tensor):
                assert mine == value
                continue
            torch.testing.assert_close(
                mine,
                value,
                rtol=0,
                atol=tolerance,
                # PyTorch's optimizers load these in the parameter's dtype.
                check_dtype=key not in ("step", "eta", "mu", "mu_product"),
                msg=lambda text, at=(name, key): f"{at}: {text}",
            )
    assert [group["params"] for group in found["param_groups"]] == [
        group["params"] for group in expected["param_groups"]
    ]
