"""Kinds of experts that the grouped engine must reach: sizes, settings, tables, attention, recurrence, products."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from tests.reach import kind, layer
from tests.traps import (
    WIDTH,
)


@kind()
def counted_rows(expert, rows, batch):
    assert len(batch.hidden) > 0
    return torch.cat([rows.reshape(len(batch.hidden), -1), torch.zeros(len(rows), 2)], -1)[:, :WIDTH]


SCALE = 0.5
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"gelu": F.gelu, "square": lambda rows: rows * rows}


@kind(prepare=lambda expert: setattr(expert, "activation", "square"))
def constants_and_tables_of_the_module(expert, rows, batch):
    return ACTIVATIONS[expert.activation](rows) * SCALE


@kind(prepare=lambda expert: setattr(expert, "activation", lambda rows: rows * torch.sigmoid(rows)))
def a_lambda(expert, rows, batch):
    return expert.activation(rows)


@kind(prepare=lambda expert: setattr(expert, "activation", partial(F.leaky_relu, negative_slope=0.3)))
def a_partial(expert, rows, batch):
    return expert.activation(rows)


@dataclasses.dataclass
class Settings:
    scale: float = 0.5
    activation: str = "gelu"


@kind(prepare=lambda expert: setattr(expert, "settings", Settings()))
def a_dataclass_of_settings(expert, rows, batch):
    return getattr(F, expert.settings.activation)(rows) * expert.settings.scale


@kind(prepare=lambda expert: setattr(expert, "settings", {"scale": 0.5, "inner": {"activation": "gelu"}}))
def a_dict_of_settings(expert, rows, batch):
    return getattr(F, expert.settings["inner"]["activation"])(rows) * expert.settings["scale"]


@kind(3)
def padded(expert, rows, batch):
    return F.pad(rows, (0, 0, 1, 1))[:, 2:] * F.pad(rows, (1, 1), value=0.5)[..., 2:]


@kind(3)
def a_linear_layer_that_is_everybody_s(expert, rows, batch):
    weight = torch.arange(2.0 * WIDTH, dtype=rows.dtype).view(2, WIDTH) / WIDTH
    return torch.cat([F.linear(rows, weight, weight[:, 1]), F.linear(rows[..., 1:], weight[:, 1:]), rows[..., 4:]], -1)


layer("group_norm", lambda: nn.GroupNorm(2, WIDTH))
layer("layer_norm", lambda: nn.LayerNorm(WIDTH))
layer("rms_norm", lambda: nn.RMSNorm(WIDTH))
layer("convolution", lambda: nn.Conv1d(3, 3, 3, padding=1), 3)
layer("convolution in groups", lambda: nn.Conv1d(3, 3, 3, padding=1, groups=3), 3)
layer("prelu", lambda: nn.PReLU(WIDTH))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.attention(rows, rows, rows)[0]


layer("attention", Attention, 3)


class Recurrent(nn.Module):
    """Its outputs and its last state, which may be of another dtype."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layer = make()

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        out, state = self.layer(rows)
        last = state[-1] if isinstance(state, tuple) else state
        return out + last.mean(0)[:, None, :1]


class OneStep(nn.Module):
    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.cell = make()

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        state = torch.sin(rows)
        return self.cell(rows, (state, state))[1] if isinstance(self.cell, nn.LSTMCell) else self.cell(rows, state)


for _name, _make in {"gru": nn.GRU, "lstm": nn.LSTM, "rnn": nn.RNN}.items():
    layer(_name, partial(Recurrent, partial(_make, WIDTH, WIDTH, batch_first=True)), 3)
    deep = partial(_make, WIDTH, WIDTH // 2, 2, batch_first=True, bidirectional=True)
    layer(f"{_name} both ways", partial(Recurrent, deep), 3)
for _name, _cell in {"gru cell": nn.GRUCell, "lstm cell": nn.LSTMCell, "rnn cell": nn.RNNCell}.items():
    layer(_name, partial(OneStep, partial(_cell, WIDTH, WIDTH)))


@kind()
def softmax(expert, rows, batch):
    return rows.softmax(-1) + F.log_softmax(batch.hidden, -1) + rows.sum(-1, keepdim=True)


@kind(3)
def products(expert, rows, batch):
    scores = torch.einsum("nsd,ntd->nst", rows, batch.hidden.to(rows.dtype)).softmax(-1).to(rows.dtype)
    return (scores @ rows) @ expert.layer.weight


@kind()
def a_product_and_a_sum(expert, rows, batch):
    return torch.addmm(expert.layer.bias, rows, expert.layer.weight)
