"""Kinds of experts that call functions and operators declared by their users."""

from __future__ import annotations

import torch

import celmoe
from tests import reach_of_code  # noqa: F401  # registers
from tests.reach import kind


@celmoe.rowwise
def clipped(rows: torch.Tensor, largest: float) -> torch.Tensor:
    return rows * (largest / rows.norm(dim=-1, keepdim=True)).clamp(max=1)


@celmoe.rowwise
def scaled(rows: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return rows * scale, rows + scale


def _shifted_grouped(rows: torch.Tensor, shift: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
    return rows + shift[members].view(len(rows), *(1,) * (rows.dim() - 2), -1)


@celmoe.rowwise(grouped=_shifted_grouped)
def shifted(rows: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    return rows + shift


@celmoe.rowwise
@torch.library.custom_op("celmoe_tests::sorted_values", mutates_args=())
def sorted_values(rows: torch.Tensor) -> torch.Tensor:
    # Not what the tracer could follow: it reads values.
    return torch.tensor([sorted(row) for row in rows.tolist()], dtype=rows.dtype)


@sorted_values.register_fake
def _(rows):
    return torch.empty_like(rows)


def _keep_rows(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _unsorted(ctx, grad):
    (rows,) = ctx.saved_tensors
    return torch.zeros_like(grad).scatter(-1, rows.argsort(-1), grad)


sorted_values.register_autograd(_unsorted, setup_context=_keep_rows)


@kind()
def a_declared_function(expert, rows, batch):
    return clipped(rows, 0.5) + clipped(rows, largest=0.25)


@kind()
def a_declared_function_of_parameters(expert, rows, batch):
    more, less = scaled(rows, expert.layer.bias)
    return more * less


@kind(3)
def a_declared_function_with_a_grouped_form(expert, rows, batch):
    return shifted(rows, expert.layer.bias) + shifted(rows.flatten(0, 1), expert.layer.bias).view_as(rows)


@kind()
def a_declared_operator(expert, rows, batch):
    return sorted_values(rows) * rows
