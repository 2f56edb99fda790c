"""Experts of unlike or unusual structure, and code in them that goes round the operations on their own weights.

Experts that can run as one may: then the numbers must be the oracle's. All others must be refused.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from celmoe import (
    EngineRefusedError,
    ExpertResult,
)
from tests.traps import (
    BATCHES,
    GROUPED,
    WIDTH,
    Trapped,
    Traps,
    assert_like_oracle,
    build,
)

ANY = r"\w"  # The engine may give any of several good reasons.

CODE = Traps()


class Doubled(torch.autograd.Function):
    """Each row alone, with a gradient other than the derivative of its values."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        return rows * 2

    @staticmethod
    def backward(ctx: Any, grads: torch.Tensor) -> torch.Tensor:
        return grads * 3


class Centred(torch.autograd.Function):
    """Values of each row alone; only the gradient mixes the rows."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        return rows.clone()

    @staticmethod
    def backward(ctx: Any, grads: torch.Tensor) -> torch.Tensor:
        return grads - grads.mean(0)


class Clipped(torch.autograd.Function):
    """Does the same as `Centred`, but only for large gradients."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        return rows.clone()

    @staticmethod
    def backward(ctx: Any, grads: torch.Tensor) -> torch.Tensor:
        return grads / max(1.0, float(grads.norm()) / 2)


class Product(torch.autograd.Function):
    """With a parameter."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows, weight)
        return rows @ weight.T

    @staticmethod
    def backward(ctx: Any, grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows, weight = ctx.saved_tensors
        return grads @ weight, grads.T @ rows


@CODE.add(r"function|Doubled", may_run=True)
def a_function_of_each_row(self, rows, batch):
    return Doubled.apply(rows)


@CODE.add(r"function|Centred|mix|batch|rows|gradient")
def a_function_whose_gradient_mixes_rows(self, rows, batch):
    return Centred.apply(rows)


@CODE.add(r"function|Clipped|mix|batch|rows|gradient")
def a_function_that_clips_the_gradient(self, rows, batch):
    return Clipped.apply(rows)


@CODE.add(r"function|Product", may_run=True)
def a_function_of_a_parameter(self, rows, batch):
    return Product.apply(rows, self.linear.weight)


@CODE.add(r"hook|gradient")
def a_hook_on_the_rows_that_mixes_them(self, rows, batch):
    if rows.requires_grad:
        rows.register_hook(lambda grads: grads - grads.mean(0))
    return rows * 1


@CODE.add(r"checkpoint|function", may_run=True)
def a_checkpoint_inside(self, rows, batch):
    return checkpoint(lambda given: torch.sin(self.linear(given)), rows, use_reentrant=False)


@CODE.add(r"checkpoint|function", may_run=True)
def a_reentrant_checkpoint_inside(self, rows, batch):
    return checkpoint(lambda given: torch.sin(self.linear(given)), rows, use_reentrant=True)


@CODE.add(ANY, may_run=True)
def a_gradient_inside(self, rows, batch):
    with torch.enable_grad():
        given = rows if rows.requires_grad else rows.detach().requires_grad_()
        return torch.autograd.grad(self.linear(given).sin().sum(), given, create_graph=True)[0]


@CODE.add(ANY, may_run=True)
def a_vmap_inside(self, rows, batch):
    return vmap(lambda row: torch.sin(self.linear(row)))(rows)


@CODE.add(ANY, may_run=True)
def a_functional_gradient_inside(self, rows, batch):
    return grad(lambda given: self.linear(given).sin().sum())(rows)


@CODE.add(ANY, may_run=True)
def a_functional_call_inside(self, rows, batch):
    parameters = {name: value * 2 for name, value in self.linear.named_parameters()}
    return functional_call(self.linear, parameters, (rows,))


@CODE.add(ANY, may_run=True)
def without_gradients_inside(self, rows, batch):
    with torch.no_grad():
        gate = torch.sigmoid(self.linear(rows))
    return rows * gate


@CODE.add(ANY, may_run=True)
def autocast_inside(self, rows, batch):
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        return self.linear(rows)


@CODE.add(ANY, may_run=True)
def a_detached_parameter(self, rows, batch):
    return rows @ self.linear.weight.detach() + self.linear.bias.data


@CODE.add(ANY, may_run=True)
def all_of_its_parameters(self, rows, batch):
    return rows + sum(parameter.pow(2).sum() for parameter in self.parameters())


@CODE.add(ANY, may_run=True)
def its_state_dict(self, rows, batch):
    return rows @ self.state_dict()["linear.weight"]


@CODE.add(ANY, may_run=True)
def a_gradient_that_is_there(self, rows, batch):
    grads = self.linear.weight.grad
    return rows if grads is None else rows @ grads.detach()


@CODE.add(ANY, may_run=True)
def identity_of_a_parameter(self, rows, batch):
    return rows * (2 if self.linear.weight is dict(self.named_parameters())["linear.weight"] else 1)


@CODE.add(ANY, may_run=True)
def whether_a_parameter_is_trained(self, rows, batch):
    return rows * 2 if self.linear.weight.requires_grad else rows


@CODE.add(ANY, may_run=True)
def rows_of_a_parameter_in_a_loop(self, rows, batch):
    return rows + sum(row * (1 + index) for index, row in enumerate(self.linear.weight))


@CODE.add(ANY, may_run=True)
def a_result_that_is_its_own_weight(self, rows, batch):
    return self.linear.bias.expand_as(rows)


@pytest.mark.parametrize("trap", list(CODE))
def test_grouped_refuses_or_is_right(trap: str):
    CODE.check_refusal(trap)


@pytest.mark.parametrize("trap", list(CODE))
def test_armed_after_a_grouped_call(trap: str):
    CODE.check_arming(trap)


class Operation(Trapped):
    """A function of the rows and two parameters, ``[D, D]`` and ``[D]``."""

    def __init__(self, name: str) -> None:
        super().__init__()
        # Its own: a table that all could write into would be reason enough to loop them.
        self.function = OPERATIONS[name]
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 3)
        self.scale = nn.Parameter(torch.randn(WIDTH))

    def spring(self, batch):
        return ExpertResult(self.function(batch.hidden, self.weight, self.scale))


# Operations on parameters alone: a reduction, a sort or a transpose of the stack is not that of its members.
OPERATIONS = {
    "norm": lambda x, w, s: x @ (w / w.norm()),
    "row norms": lambda x, w, s: F.linear(x, F.normalize(w, dim=1)),
    "column norms": lambda x, w, s: F.linear(x, F.normalize(w, dim=0)),
    "mean": lambda x, w, s: x * s.mean(),
    "sum over -1": lambda x, w, s: x + w.sum(-1),
    "sum over 0": lambda x, w, s: x + w.sum(0),
    "softmax over 0": lambda x, w, s: x @ w.softmax(0),
    "softmax over -1": lambda x, w, s: x * s.softmax(-1),
    "max": lambda x, w, s: x + w.max(),
    "max over 0": lambda x, w, s: x + w.max(0).values,
    "sort": lambda x, w, s: x * s.sort().values,
    "argsort": lambda x, w, s: x[..., s.argsort()],
    "cumsum": lambda x, w, s: x + s.cumsum(0),
    "flip": lambda x, w, s: x * s.flip(0),
    "roll": lambda x, w, s: x @ w.roll(1, 0),
    "outer": lambda x, w, s: x @ torch.outer(s, s),
    "gram": lambda x, w, s: x @ (w.T @ w),
    "dot": lambda x, w, s: x * (s @ s),
    "matrix and vector": lambda x, w, s: x + w @ s,
    "rows and vector": lambda x, w, s: x * (x @ s).unsqueeze(-1),
    "vector and rows": lambda x, w, s: x + (s @ x.T).unsqueeze(-1),
    "einsum of weights": lambda x, w, s: x @ torch.einsum("ij,j,jk->ik", w, s, w),
    "weight on the left": lambda x, w, s: (w @ x.T).T,
    "one row": lambda x, w, s: x * w[2],
    "one column": lambda x, w, s: x * w[:, 2],
    "one number": lambda x, w, s: x * w[1, 2],
    "rows by index": lambda x, w, s: x @ w[[0, 0, 3, 2, 1, 7, 5, 6]],
    "every second": lambda x, w, s: x + w[::2].sum(0),
    "index of the rows": lambda x, w, s: x + w[(x.detach() > 0).sum(-1) % WIDTH],
    "diagonal": lambda x, w, s: x * w.diagonal(),
    "triangle": lambda x, w, s: x @ w.tril(),
    "flattened": lambda x, w, s: x * w.view(-1)[:WIDTH],
    "unbound": lambda x, w, s: sum(F.relu(x * row) for row in w.unbind()),
    "split": lambda x, w, s: x @ torch.cat(w.split([3, 5])[::-1]),
    "transposed": lambda x, w, s: x @ w.mT + x @ w.transpose(0, 1),
    "permuted": lambda x, w, s: x @ w.permute(1, 0),
    "cat": lambda x, w, s: F.linear(x, torch.cat([w, w * 2])).chunk(2, -1)[1],
    "stack": lambda x, w, s: torch.einsum("...d,kde->...ke", x, torch.stack([w, w.T])).sum(-2),
    "repeat": lambda x, w, s: x @ w.repeat(1, 2)[:, :WIDTH],
    "zeros like": lambda x, w, s: x + torch.zeros_like(w)[0] + w.new_ones(WIDTH),
    "where": lambda x, w, s: x @ torch.where(w > 0, w, -w),
    "clamp": lambda x, w, s: x * s.clamp(-0.5, 0.5),
    "exponential": lambda x, w, s: x * s.exp().log1p(),
    "power": lambda x, w, s: x.abs().pow(s.abs()),
    "inverse": lambda x, w, s: x @ torch.linalg.inv(w + 3 * torch.eye(WIDTH)),
    "solve": lambda x, w, s: torch.linalg.solve(w + 3 * torch.eye(WIDTH), x.T).T,
    "matrix exponential": lambda x, w, s: x @ torch.linalg.matrix_exp(w),
    "determinant": lambda x, w, s: x * torch.linalg.slogdet(w)[1],
    "kron": lambda x, w, s: x * torch.kron(s[:2], s[:4]),
    "low rank": lambda x, w, s: x @ w[:, :2] @ w[:2],
    "copy in place": lambda x, w, s: x @ w.clone().mul_(2).fill_diagonal_(0),
    "other dtype": lambda x, w, s: (x.double() @ w.double()).to(x.dtype),
    "bilinear": lambda x, w, s: F.bilinear(x, x, w.unsqueeze(0)) * s,
    "prelu": lambda x, w, s: F.prelu(x, s.abs()),
    "rms norm": lambda x, w, s: F.rms_norm(x, (WIDTH,), s, 1e-3),
    "layer norm": lambda x, w, s: F.layer_norm(x, (WIDTH,), s, w[0], 1e-3),
    "group norm": lambda x, w, s: F.group_norm(x, 2, s, w[0]),
    "instance statistics": lambda x, w, s: F.batch_norm(
        x, w[0].detach(), s.detach().abs() + 1, s, None, training=False
    ),
    "cross distances": lambda x, w, s: torch.cdist(x, w),
    "cosines": lambda x, w, s: F.cosine_similarity(x.unsqueeze(1), w, dim=-1),
    "attention to a memory": lambda x, w, s: F.scaled_dot_product_attention(x, w, w * s),
    "convolution": lambda x, w, s: F.conv1d(x.unsqueeze(1), w[:1, None, :3], padding=1).squeeze(1),
    "table": lambda x, w, s: x + F.embedding((x.detach() > 0).sum(-1) % WIDTH, w),
    "bag": lambda x, w, s: x + F.embedding_bag((x.detach() > 0).long(), w),
    "in place on own rows": lambda x, w, s: (x @ w).mul_(s).add_(s).relu_(),
    "out of place index": lambda x, w, s: x.index_fill(-1, torch.tensor([0]), 0.0) * s,
    "lerp": lambda x, w, s: torch.lerp(x, x @ w, s.sigmoid()),
    "baddbmm": lambda x, w, s: torch.baddbmm(w.unsqueeze(0), x.unsqueeze(2), x.unsqueeze(1)).sum(1),
    "outer of rows": lambda x, w, s: (x.unsqueeze(2) * x.unsqueeze(1) * w).sum(1),
    "frozen copy": lambda x, w, s: x @ w.detach() + s.detach(),
    "scalar of a weight": lambda x, w, s: x * s[0] + s[1:2],
    "unused": lambda x, w, s: x * 2,
    # Products with each row's matrix, which is its member's.
    "expanded": lambda x, w, s: torch.bmm(x.view(-1, 1, WIDTH), w.expand(x.shape[0], -1, -1)).squeeze(1),
    "expanded on the left": lambda x, w, s: torch.bmm(w.expand(len_of(x), WIDTH, WIDTH), x.unsqueeze(2)).squeeze(2),
    "unsqueezed and expanded": lambda x, w, s: (x.unsqueeze(1) @ w.unsqueeze(0).expand(len_of(x), -1, -1)).squeeze(1),
    "repeated": lambda x, w, s: torch.bmm(x.unsqueeze(1), w.repeat(x.size(0), 1, 1)).squeeze(1),
    "expanded, for more than a product": lambda x, w, s: both_ways(x, w.expand(x.shape[0], -1, -1)),
    "expanded without gradients": lambda x, w, s: torch.bmm(x.unsqueeze(1), expanded_without(x, w)).squeeze(1),
    "read without gradients first": lambda x, w, s: x * norm_without(w) + (w * w).sum(0) * x,
    "expanded, summed without gradients": lambda x, w, s: x @ w + sum_without(x, w),
    "repeated and written into": lambda x, w, s: torch.bmm(
        x.unsqueeze(1), w.repeat(x.shape[0], 1, 1).masked_fill_(x.detach().unsqueeze(1) > 9, 0.0)
    ).squeeze(1),
    "repeated, a view written into": lambda x, w, s: torch.bmm(x.unsqueeze(1), with_a_view_written(x, w)).squeeze(1),
    "expanded to heads": lambda x, w, s: (x.view(-1, 2, 1, 4) @ w[:4, :4].expand(len_of(x), 2, -1, -1)).flatten(1),
    "expanded and added": lambda x, w, s: torch.baddbmm(
        s, x.unsqueeze(1), w.expand(x.shape[0], -1, -1), beta=0.5, alpha=2
    ).squeeze(1),
    "heads": lambda x, w, s: (
        torch.bmm(x.view(-1, 2, 4).transpose(0, 1), w.view(4, 4, 4)[:2]).transpose(0, 1).reshape(x.shape)
    ),
    "heads, batch first": lambda x, w, s: (x.view(-1, 2, 1, 4) @ w.view(4, 4, 4)[:2]).reshape(x.shape),
    "heads on the left": lambda x, w, s: (w.view(4, 4, 4)[:2] @ x.view(-1, 2, 4, 1)).reshape(x.shape),
    "an axis in front": lambda x, w, s: (x.view(-1, 1, WIDTH) @ w[None]).reshape(x.shape),
    "addmv": lambda x, w, s: x * torch.addmv(x[:, 0], x, s, beta=0.5).unsqueeze(-1),
    "addmv by name": lambda x, w, s: x * torch.addmv(input=x[:, 0], mat=x, vec=s, alpha=2).unsqueeze(-1),
    "addmv of weights": lambda x, w, s: x + torch.addmv(s, w, s),
    "addbmm": lambda x, w, s: torch.addbmm(s, torch.stack([x, x * 2]), torch.stack([w, w.T])),
    "weights on the left, positions": lambda x, w, s: (
        (w[:4, :4] @ x.view(-1, 2, 4).permute(1, 2, 0)).permute(2, 0, 1).reshape(x.shape)
    ),
    "bag, largest": lambda x, w, s: x + F.embedding_bag((x.detach() > 0).long(), w, mode="max"),
    "bag, weighted": lambda x, w, s: (
        x + F.embedding_bag((x.detach() > 0).long(), w, mode="sum", per_sample_weights=x, padding_idx=1)
    ),
    "bags of unlike length": lambda x, w, s: x + F.embedding_bag((x.detach() > 0).long()[:, 0], w, torch.tensor([0])),
    "one hot": lambda x, w, s: x + F.one_hot((x.detach() > 0).long()[:, 0], WIDTH) * s,
    "one hot by name": lambda x, w, s: x + F.one_hot((x.detach() > 0).long(), num_classes=3).sum(-1) * s,
    "one hot of as many as there are": lambda x, w, s: x + F.one_hot((x.detach() > 0).long()).sum((-2, -1))[:, None],
    "GRU cell": lambda x, w, s: torch.gru_cell(x[:, :4], x[:, 4:], *gates(w, s, 3)).repeat(1, 2),
    "LSTM cell": lambda x, w, s: torch.cat(torch.lstm_cell(x[:, :4], (x[:, 4:], x[:, :4]), *gates(w, s, 4)), 1),
    "RNN cell": lambda x, w, s: torch.rnn_tanh_cell(x[:, :4], x[:, 4:], *gates(w, s, 1)).repeat(1, 2),
    "RNN cell, rectified": lambda x, w, s: torch.rnn_relu_cell(x[:, :4], x[:, 4:], *gates(w, s, 1)).repeat(1, 2),
    "GRU cell of a reduced state": lambda x, w, s: torch.gru_cell(
        x[:, :4], x[:, 4:].mean(0, keepdim=True).expand(x.shape[0], -1), *gates(w, s, 3)
    ).repeat(1, 2),
}
# Operations that are looped as a whole, and the reason.
REFUSED = {
    "solve": "called solve on their rows",
    "copy in place": "called fill_diagonal_",
    "cross distances": "read the number of their rows",
    "attention to a memory": "called scaled_dot_product_attention",
    "bags of unlike length": "bags of ids that are not one a row",
    "one hot of as many as there are": "followed by PyTorch's tracer",
    "GRU cell of a reduced state": "mixed samples",
}
# Operations that loop themselves alone.
LOOPED = {
    "argsort": "__getitem__",
    **{name: name for name in ("max", "outer", "diagonal", "repeat", "kron", "bilinear")},
    **dict.fromkeys(("dot", "matrix and vector", "heads, batch first", "heads on the left"), "matmul"),
    **dict.fromkeys(("bag", "bag, largest", "bag, weighted"), "embedding_bag"),
    "inverse": "inv",
    "matrix exponential": "matrix_exp",
    "determinant": "slogdet",
    "heads": "bmm",
    "addmv of weights": "addmv",
    "addbmm": "addbmm",
}


def len_of(rows: torch.Tensor) -> int:
    return rows.shape[0]


def both_ways(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return torch.bmm(rows.unsqueeze(1), weights).squeeze(1) + (weights * rows.unsqueeze(1)).sum(-1)


def expanded_without(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return weight.expand(rows.shape[0], -1, -1)


def norm_without(weight: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return weight.norm()


def sum_without(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    weights = weight.expand(rows.shape[0], -1, -1)
    with torch.no_grad():
        total = weights.sum((1, 2)).unsqueeze(-1)
    return total + weights[:, 0]


def with_a_view_written(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    weights = weight.repeat(rows.shape[0], 1, 1)
    weights.transpose(1, 2)[:, 0].masked_fill_(rows.detach() > 9, 0.0)
    return weights


def gates(weight: torch.Tensor, scale: torch.Tensor, number: int) -> list[torch.Tensor]:
    """Weights and biases of a cell from 4 features to 4."""
    weights = torch.cat([weight, weight.T])[:, :4]
    return [weights[: 4 * number], weights.flip(0)[: 4 * number], *torch.cat([scale] * 4).split(4 * number)[:2]]


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_on_parameters(name: str):
    """Grouped, looped for that operation alone, or refused; and never wrong."""
    for engine in (GROUPED, "auto"):
        subject, twin = (build(lambda: Operation(name).arm(), engine) for _ in range(2))
        for make_batch in BATCHES[:2]:
            refusal = None
            try:
                assert_like_oracle(subject, twin, make_batch)
            except EngineRefusedError as error:
                refusal = str(error)
            if engine == GROUPED:
                assert (refusal is None) == (name not in REFUSED), refusal
                assert REFUSED.get(name, "") in (refusal or "")
    if name not in REFUSED:
        subject = build(lambda: Operation(name).arm())
        BATCHES[0]()(subject)
        (level,) = subject.explain(BATCHES[0]().routing).levels
        assert [list(each.operations_looped) for each in level.classes] == [[LOOPED[name]] if name in LOOPED else []]
