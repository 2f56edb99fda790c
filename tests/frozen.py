"""Frozen experts, and the oracle for them."""

from __future__ import annotations

import torch

from celmoe import (
    HierarchicalCELMoE,
)
from celmoe.reference import reference_forward
from tests.stacks import NAMES, ROUTES, WIDTH, by_expert


def by_the_oracle(model: HierarchicalCELMoE, routes=ROUTES, dtype=torch.float32):
    hidden = torch.randn(len(routes), WIDTH, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()
    model.zero_grad()
    output = reference_forward(model, hidden, {"language": routes})
    (output.fused_hidden.square().sum() + sum(output.losses.values())).backward()
    return output.fused_hidden.detach(), hidden.grad


def assert_same_gradients(plain: HierarchicalCELMoE, model: HierarchicalCELMoE, frozen: set[str]) -> None:
    theirs = by_expert(plain)
    for name, tensor in by_expert(model).items():
        wanted = theirs[name].grad
        assert tensor.requires_grad == theirs[name].requires_grad, name
        if name.split(".")[0] in frozen:
            assert tensor.grad is None
        elif tensor.grad is not None or wanted is not None:
            torch.testing.assert_close(tensor.grad, torch.zeros_like(tensor) if wanted is None else wanted)
    for parameter in model.parameters():
        if parameter.grad is not None and parameter.dim() and len(parameter) == len(NAMES):
            assert not any(parameter.grad[NAMES.index(name)].any() for name in frozen)
