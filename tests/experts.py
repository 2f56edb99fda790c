"""The expert zoo: many kinds of experts that a user may write for the contract, small and seeded.

Every kind takes hidden rows ``[N, ..., D]`` of any rank from 2 up. `KINDS` is the list; each `Kind` states its kind's
limits and side effects. Experts get no help from the library: all of their code is their own.

Axes: N rows of one expert, S positions (all middle axes together), D width.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from celmoe import ExpertBatch, ExpertModule, ExpertResult
from tests import architectures
from tests.architectures import NUM_TOKENS, context_leaves, positions


class Pair(NamedTuple):
    """A named tuple for contexts."""

    row_left: Any
    all_right: Any


@dataclass
class Features:
    """A dataclass for contexts."""

    row_scale: Any
    all_table: Any
    label: str = "features"


class Encoding(UserDict[str, Any]):
    """A mapping that is no dict, for contexts."""


class Plain:
    """An object of no declared kind, for contexts."""

    names_of_fields = ("row_scale", "all_table")

    def __init__(self, row_scale: Any, all_table: Any) -> None:
        self.row_scale = row_scale
        self.all_table = all_table


def per_row(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The mean of each row along a ramp, shaped to broadcast against ``like``: ``[N, 1, ..., D]``."""
    mean = rows.to(like.dtype).reshape(rows.shape[0], -1).mean(1) if rows.numel() else rows.new_zeros(rows.shape[0])
    return mean.to(like.dtype).reshape(-1, *[1] * (like.dim() - 1)) * ramp(like)


def ramp(like: torch.Tensor) -> torch.Tensor:
    """Numbers around 1, one a feature.

    A layer norm undoes a shift that is the same for all features, and leaves rounding for its gradient.
    """
    return torch.linspace(0.5, 1.5, like.shape[-1], device=like.device).to(like.dtype)


class Linear(ExpertModule):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        return ExpertResult(self.linear(batch.hidden))


class Frozen(Linear):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.linear.weight.requires_grad_(False)


class ResidualMLP(ExpertModule):
    """Norm, two layers, residual. Its inner width and depth are drawn, so that siblings differ."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = width * int(torch.randint(1, 4, ()))
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, inner)
        self.between = nn.ModuleList(nn.Linear(inner, inner) for _ in range(int(torch.randint(0, 3, ()))))
        self.down = nn.Linear(inner, width)

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        inner = torch.nn.functional.gelu(self.up(self.norm(batch.hidden)))
        for layer in self.between:
            inner = torch.tanh(layer(inner))
        return ExpertResult(batch.hidden + self.down(inner))


class TransformerBlock(ExpertModule):
    """Attention over positions, two heads; a mask ``[N, ...]`` of the rows' positions keeps keys out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        rows_NSD = positions(batch.hidden)
        num_rows, num_positions, width = rows_NSD.shape
        heads = self.qkv(self.norm(rows_NSD)).reshape(num_rows, num_positions, 3, 2, width // 2)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        keep = None
        if batch.mask is not None and batch.mask.shape == batch.hidden.shape[:-1]:
            keep = batch.mask.reshape(num_rows, -1) > 0
            # Position 0 is never masked: a softmax over nothing is not a number.
            keep = keep.index_fill(1, torch.tensor([0]), True)[:, None, None, :]
        attended = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=keep)
        attended = attended.transpose(1, 2).reshape(num_rows, num_positions, width)
        return ExpertResult((rows_NSD + self.out(attended)).reshape(batch.hidden.shape))


class Recurrent(ExpertModule):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gru = nn.GRU(width, width, batch_first=True)

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        return ExpertResult(self.gru(positions(batch.hidden))[0].reshape(batch.hidden.shape))


class Convolution(ExpertModule):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, 3, padding=1)

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        out = self.conv(positions(batch.hidden).transpose(1, 2)).transpose(1, 2)
        return ExpertResult(out.reshape(batch.hidden.shape))


class Identity(ExpertModule):
    """No parameters, and its result is the very object that it was given."""

    def __init__(self, width: int) -> None:
        super().__init__()

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        return ExpertResult(batch.hidden)


class Scale(ExpertModule):
    """Elementwise, so that it takes any dtype and promotes as its operands do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(width))

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        return ExpertResult(batch.hidden * self.scale)


class InPlace(ExpertModule):
    """Works in the rows that it was given, and returns them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(width))
        self.shift = nn.Parameter(torch.randn(width))

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        batch.hidden.mul_(self.scale.to(batch.hidden.dtype)).add_(self.shift.to(batch.hidden.dtype))
        return ExpertResult(batch.hidden.mul_(0.5))


class InPlaceDiscarded(ExpertModule):
    """Ruins the rows that it was given, and returns something else."""

    def __init__(self, width: int) -> None:
        super().__init__()

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        out = batch.hidden * 3
        batch.hidden.fill_(1e6)
        return ExpertResult(out)


class InPlaceRelu(Linear):
    def forward(self, batch: ExpertBatch) -> ExpertResult:
        return ExpertResult(self.linear(batch.hidden.relu_()).relu_())


class InPlaceSurroundings(ExpertModule):
    """Ruins its mask's and its context's rows, after it has read them."""

    def __init__(self, width: int) -> None:
        super().__init__()

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        out = batch.hidden * 1.5
        if batch.mask is not None:
            out = out + per_row(batch.mask, batch.hidden)
            batch.mask.zero_()
        rows = [leaf for leaf, rowwise in context_leaves(batch.context) if rowwise and isinstance(leaf, torch.Tensor)]
        for leaf in rows:
            if leaf.is_floating_point():
                out = out + 0.5 * per_row(leaf, batch.hidden)
        for leaf in rows:
            leaf.zero_()
        if isinstance(batch.context, dict):
            batch.context.clear()
        batch.state.clear()
        return ExpertResult(out)


class ReadsMask(ExpertModule):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(width))

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        weight = 0.5 if batch.mask is None else per_row(batch.mask, batch.hidden)
        return ExpertResult(batch.hidden * self.scale + weight)


class ReadsContext(ExpertModule):
    """Reads every leaf of its context: rows one by one, shared values as a sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(width))

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        out = batch.hidden * self.scale
        for index, (leaf, rowwise) in enumerate(context_leaves(batch.context), start=1):
            match leaf:
                case torch.Tensor() if rowwise:
                    assert leaf.shape[0] == batch.hidden.shape[0], "a batch-aligned tensor was not cut to the rows"
                    out = out + per_row(leaf, batch.hidden) * (0.3 * index)
                case torch.Tensor():
                    out = out + leaf.to(out.dtype).sum() * ramp(out) * (0.01 * index)
                case bool() | int() | float():
                    out = out + float(leaf) * (0.1 * index)
                case str():
                    out = out + len(leaf) * 0.01
        return ExpertResult(out)


class ContextView(ExpertModule):
    """Returns a view of a context tensor of the rows' shape, if there is one."""

    def __init__(self, width: int) -> None:
        super().__init__()

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        for leaf, rowwise in context_leaves(batch.context):
            if rowwise and isinstance(leaf, torch.Tensor) and leaf.shape == batch.hidden.shape:
                return ExpertResult(leaf[:])
        return ExpertResult(batch.hidden.view(batch.hidden.shape))


class TokenEmbedding(ExpertModule):
    """Looks integer ids of the context up."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_TOKENS, width)

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        out = batch.hidden
        for leaf, rowwise in context_leaves(batch.context):
            if rowwise and isinstance(leaf, torch.Tensor) and leaf.dtype == torch.int64:
                out = out + self.embedding(leaf).reshape(-1, *[1] * (out.dim() - 2), out.shape[-1])
        return ExpertResult(out)


class Lookup(ExpertModule):
    """Integer rows become floating-point rows of the same shape; floating-point rows are scaled."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(NUM_TOKENS))

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        if batch.hidden.is_floating_point():
            return ExpertResult(batch.hidden * self.table.mean())
        return ExpertResult(self.table[batch.hidden])


class WithLosses(Linear):
    def forward(self, batch: ExpertBatch) -> ExpertResult:
        out = self.linear(batch.hidden)
        return ExpertResult(out, losses={"square": out.pow(2).sum(), "weight.decay": self.linear.weight.pow(2).sum()})


class WithAux(Linear):
    def forward(self, batch: ExpertBatch) -> ExpertResult:
        out = self.linear(batch.hidden)
        return ExpertResult(out, aux={"rows": out.shape[0], "scores": out * 2, "who": dict(batch.state)})


class ReadsState(ExpertModule):
    def __init__(self, width: int) -> None:
        super().__init__()

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        number = sum(map(ord, batch.state["level"])) + 3 * sum(map(ord, batch.state["expert"]))
        return ExpertResult(batch.hidden + 0.001 * number)


class BatchMean(ExpertModule):
    """Mixes its samples."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(width))

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        return ExpertResult(batch.hidden * self.scale + batch.hidden.mean(0, keepdim=True))


class BatchNorm(ExpertModule):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        if self.training and batch.hidden.shape[:-1].numel() < 2:
            return ExpertResult(batch.hidden * 2)
        out = self.norm(batch.hidden.reshape(-1, batch.hidden.shape[-1])).reshape(batch.hidden.shape)
        return ExpertResult(batch.hidden + 0.1 * out)


class CountsRows(ExpertModule):
    """Computes with the number of its rows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(width))

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        factor = 2.0 if batch.hidden.shape[0] < 3 else 0.5
        return ExpertResult(batch.hidden * self.scale * factor)


class Branches(ExpertModule):
    """A branch on values that few inputs take."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(width))

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        out = batch.hidden * self.scale
        return ExpertResult(out.tanh() if bool(batch.hidden.detach().abs().max() > 2.5) else out)


class Dropped(Linear):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.dropout = nn.Dropout(0.4)

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        return ExpertResult(self.dropout(self.linear(self.dropout(batch.hidden))))


class Counts(Linear):
    """Keeps count of its calls and rows in buffers."""

    calls: torch.Tensor
    running: torch.Tensor

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("running", torch.zeros(width))

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        out = self.linear(batch.hidden) + self.running + self.calls
        with torch.no_grad():
            self.calls.add_(batch.hidden.shape[0])
            self.running.lerp_(batch.hidden.reshape(-1, batch.hidden.shape[-1]).sum(0).to(self.running.dtype), 0.1)
        return ExpertResult(out)


class OwnParameter(ExpertModule):
    """Ignores its input: the result is its own parameter, expanded to the rows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.row = nn.Parameter(torch.randn(width))

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        return ExpertResult(self.row.expand(batch.hidden.shape))


class OwnBuffer(ExpertModule):
    row: torch.Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("row", torch.randn(width))

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        return ExpertResult(self.row.expand(batch.hidden.shape))


class NonContiguous(Linear):
    def forward(self, batch: ExpertBatch) -> ExpertResult:
        out = self.linear(batch.hidden)
        return ExpertResult(out.transpose(0, -1).contiguous().transpose(0, -1))


class DetachedInside(Linear):
    def forward(self, batch: ExpertBatch) -> ExpertResult:
        return ExpertResult(self.linear(batch.hidden.detach()))


class Checkpointed(ResidualMLP):
    def forward(self, batch: ExpertBatch) -> ExpertResult:
        def run(rows: torch.Tensor) -> torch.Tensor:
            return super(Checkpointed, self).forward(ExpertBatch(rows)).hidden

        return ExpertResult(checkpoint(run, batch.hidden, use_reentrant=False))


class WeightNormed(ExpertModule):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = weight_norm(nn.Linear(width, width))

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        return ExpertResult(self.linear(batch.hidden))


class Remembers(Linear):
    """Writes a Python attribute, and reads a tensor that is registered nowhere."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.calls = 0
        self.hidden_away = [torch.randn(width)]

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        self.calls += 1
        away = self.hidden_away[0].to(batch.hidden.dtype)
        return ExpertResult(self.linear(batch.hidden) + away * self.calls)


class Double(Scale):
    """Returns float64 for rows of any dtype."""

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        return ExpertResult(batch.hidden.double() * self.scale)


class Brain(Scale):
    """Returns bfloat16 for rows of any dtype."""

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        return ExpertResult((batch.hidden * self.scale).to(torch.bfloat16))


class SharedWeight(ExpertModule):
    """Its weight is another expert's too."""

    def __init__(self, width: int, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight
        self.bias = nn.Parameter(torch.randn(width))

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        return ExpertResult(torch.nn.functional.linear(batch.hidden, self.weight, self.bias))


class Raises(ExpertModule):
    """Raises once armed, after it has worked."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.armed = False

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        out = self.linear(batch.hidden.mul_(2))
        if self.armed:
            raise RuntimeError("this expert was armed")
        return ExpertResult(out)


class Registry:
    """The modules and parameters that experts of one model share."""

    def __init__(self, width: int) -> None:
        self.width = width
        self._weight: nn.Parameter | None = None
        self._module: nn.Module | None = None

    def weight(self) -> nn.Parameter:
        if self._weight is None:
            self._weight = nn.Parameter(torch.randn(self.width, self.width))
        return self._weight

    def module(self) -> nn.Module:
        if self._module is None:
            self._module = ResidualMLP(self.width)
        return self._module


@dataclass(frozen=True)
class Kind:
    """One kind of expert.

    Attributes:
        make: Makes one of a width, for a model with a registry.
        row_wise: True if each row depends on that row alone, so that one sample at a time gives the same.
        stochastic: True if it draws random numbers in training.
        any_dtype: True if rows may have another floating-point dtype than its parameters.
        changes_dtype: True if its rows come back in another dtype than they had.
        takes_integers: True if it makes floating-point rows of integer ones.
        needs_positions: True if it refuses rows without any position.
        is_refused: True if several of it can't always run as one.
    """

    make: Callable[[int, Registry], nn.Module]
    row_wise: bool = True
    stochastic: bool = False
    any_dtype: bool = False
    changes_dtype: bool = False
    takes_integers: bool = False
    needs_positions: bool = False
    is_refused: bool = False


def _kind(module: Callable[[int], nn.Module], **flags: bool) -> Kind:
    return Kind(lambda width, _: module(width), **flags)


KINDS: dict[str, Kind] = {
    "linear": _kind(Linear),
    "frozen": _kind(Frozen),
    "mlp": _kind(ResidualMLP),
    "transformer": _kind(TransformerBlock, needs_positions=True),
    "gru": _kind(Recurrent, needs_positions=True),
    "conv": _kind(Convolution, needs_positions=True),
    "identity": _kind(Identity, any_dtype=True),
    "scale": _kind(Scale, any_dtype=True),
    "in_place": _kind(InPlace, any_dtype=True),
    "in_place_discarded": _kind(InPlaceDiscarded, any_dtype=True),
    "in_place_relu": _kind(InPlaceRelu),
    "in_place_surroundings": _kind(InPlaceSurroundings, any_dtype=True, is_refused=True),
    "reads_mask": _kind(ReadsMask, any_dtype=True),
    "reads_context": _kind(ReadsContext, any_dtype=True),
    "context_view": _kind(ContextView, any_dtype=True),
    "embedding": _kind(TokenEmbedding, any_dtype=True),
    "lookup": _kind(Lookup, any_dtype=True, takes_integers=True),
    "losses": _kind(WithLosses),
    "aux": _kind(WithAux, is_refused=True),
    "reads_state": _kind(ReadsState, any_dtype=True, is_refused=True),
    "batch_mean": _kind(BatchMean, row_wise=False, any_dtype=True, is_refused=True),
    "batch_norm": _kind(BatchNorm, row_wise=False, needs_positions=True, is_refused=True),
    "counts_rows": _kind(CountsRows, row_wise=False, any_dtype=True, is_refused=True),
    "branches": _kind(Branches, row_wise=False, any_dtype=True, needs_positions=True, is_refused=True),
    "dropout": _kind(Dropped, stochastic=True),
    "counts": _kind(Counts, row_wise=False, is_refused=True),
    "own_parameter": _kind(OwnParameter, any_dtype=True),
    "own_buffer": _kind(OwnBuffer, any_dtype=True),
    "non_contiguous": _kind(NonContiguous),
    "detached_inside": _kind(DetachedInside),
    "checkpointed": _kind(Checkpointed, is_refused=True),
    "weight_norm": _kind(WeightNormed),
    "remembers": _kind(Remembers, row_wise=False, is_refused=True),
    "double": _kind(Double, any_dtype=True, changes_dtype=True),
    # The next level's gradients are sums of its rows in bfloat16, so they depend on how many are summed at a time.
    "brain": _kind(Brain, row_wise=False, any_dtype=True, changes_dtype=True),
    "shared_weight": Kind(lambda width, registry: SharedWeight(width, registry.weight()), is_refused=True),
    "shared_module": Kind(lambda _, registry: registry.module(), is_refused=True),
    "layer_norm": _kind(architectures.NormMLP),
    "rms_norm": _kind(lambda width: architectures.NormMLP(width, lambda width: nn.RMSNorm(width, 1e-3))),
    "group_norm": _kind(architectures.GroupNormMLP, needs_positions=True),
    "functional_norms": _kind(architectures.FunctionalNorms),
    "gated": _kind(architectures.GatedMLP),
    "sequential": _kind(architectures.Sequence),
    "module_list": _kind(architectures.Stack),
    "tied_inside": _kind(architectures.TiedInside),
    "einsum": _kind(architectures.Einsum),
    "matmul": _kind(architectures.Matmul),
    "matmul_left": _kind(architectures.MatmulLeft),
    "addmm": _kind(architectures.Addmm),
    "bmm": _kind(architectures.Bmm),
    "expanded": _kind(architectures.Expanded),
    "scale_shift": _kind(architectures.ScaleShift, any_dtype=True),
    "views": _kind(architectures.Views),
    "embeddings": _kind(architectures.Embeddings, any_dtype=True),
    "id_arithmetic": _kind(architectures.IdArithmetic, any_dtype=True),
    "conv1d": _kind(architectures.Convolution1d, needs_positions=True),
    "conv2d": _kind(architectures.Convolution2d, needs_positions=True),
    "attention": _kind(architectures.Attention, needs_positions=True),
    "attention_weights": _kind(architectures.AttentionWeights, needs_positions=True),
    "encoder_layer": _kind(architectures.EncoderLayer, needs_positions=True),
    "encoder_norm_first": _kind(lambda width: architectures.EncoderLayer(width, norm_first=True), needs_positions=True),
    "encoder_dropout": _kind(
        lambda width: architectures.EncoderLayer(width, dropout=0.2), needs_positions=True, stochastic=True
    ),
    "packed_attention": _kind(architectures.PackedAttention, needs_positions=True),
    "softmax_attention": _kind(architectures.SoftmaxAttention, needs_positions=True),
    "rnn": _kind(lambda width: architectures.Recurrence(width, nn.RNN), needs_positions=True),
    "lstm": _kind(lambda width: architectures.Recurrence(width, nn.LSTM), needs_positions=True),
    "lstm_two_layers": _kind(
        lambda width: architectures.Recurrence(width, nn.LSTM, num_layers=2), needs_positions=True
    ),
    "lstm_two_ways": _kind(
        lambda width: architectures.Recurrence(width, nn.LSTM, bidirectional=True), needs_positions=True
    ),
    "gru_two_ways": _kind(
        lambda width: architectures.Recurrence(width, nn.GRU, num_layers=2, bidirectional=True), needs_positions=True
    ),
    "lstm_learned_start": _kind(architectures.LearnedStart, needs_positions=True),
    "gru_cell": _kind(architectures.Cell, needs_positions=True),
    "lstm_cell": _kind(lambda width: architectures.Cell(width, nn.LSTMCell), needs_positions=True),
    "rnn_cell": _kind(lambda width: architectures.Cell(width, nn.RNNCell), needs_positions=True),
    "flattened": _kind(architectures.Flattened),
    "positions_first": _kind(architectures.PositionsFirst, needs_positions=True),
    "buffers": _kind(architectures.ReadsBuffers),
    "batch_norm_eval": _kind(architectures.BatchNormInEval, needs_positions=True),
    "widths": _kind(architectures.WidthsInAList),
    "split_widths": _kind(architectures.SplitWidths),
    "row_losses": _kind(architectures.RowLosses),
    "mean_losses": _kind(architectures.MeanLosses, needs_positions=True),
    "parameter_losses": _kind(architectures.ParameterLosses, is_refused=True),
    "masked_losses": _kind(architectures.MaskedLosses),
}
