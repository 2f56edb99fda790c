"""The zoo's plain architectures: experts that people build from torch's layers and operations, a few lines each.

All of them treat each row alone. `experts.KINDS` has them beside the experts that do odd things.

Axes: N rows of one expert, S positions (all middle axes together), D width, F inner width.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from celmoe import ExpertBatch, ExpertModule, ExpertResult

NUM_TOKENS = 7


def positions(rows: torch.Tensor) -> torch.Tensor:
    """``[N, ..., D]`` -> ``[N, S, D]``; rows without positions have one."""
    return rows.unsqueeze(1) if rows.dim() == 2 else rows.flatten(1, -2)


def context_leaves(value: Any, rowwise: bool = True) -> Iterator[tuple[Any, bool]]:
    """Yield all leaves of a context, each with a flag: true if its key says that its rows are the samples'.

    Keys and fields that begin with ``all_`` hold values that every expert shares, all others hold rows. A list or array
    below a key that begins with ``items_`` has numbers for each row, and counts as a tensor.
    """
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        items = list(zip(value._fields, value, strict=True))
    elif isinstance(value, list | tuple):
        items = [("", item) for item in value]
    elif dataclasses.is_dataclass(value):
        items = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    elif hasattr(value, "names_of_fields"):
        items = [(name, getattr(value, name)) for name in value.names_of_fields]
    else:
        yield value, rowwise
        return
    for key, item in items:
        if str(key).startswith("items_"):
            numbers = item.tolist() if hasattr(item, "tolist") else item
            yield torch.tensor(numbers, dtype=torch.float64), True
        else:
            yield from context_leaves(item, rowwise and not str(key).startswith("all_"))


def id_rows(context: Any) -> Iterator[torch.Tensor]:
    """The context's integer ids, one a sample."""
    for leaf, rowwise in context_leaves(context):
        if rowwise and isinstance(leaf, torch.Tensor) and leaf.dtype == torch.int64:
            yield leaf


def padding_of(batch: ExpertBatch) -> torch.Tensor | None:
    """True at positions to leave out, by a boolean mask over positions; the first position stays."""
    if batch.mask is None or batch.mask.dtype != torch.bool or batch.mask.shape != batch.hidden.shape[:-1]:
        return None
    keep_NS = batch.mask.reshape(batch.hidden.shape[0], -1)
    return ~torch.cat([torch.ones_like(keep_NS[:, :1]), keep_NS[:, 1:]], 1)


class Net(ExpertModule):
    """Rows in, rows out; a subclass computes the rows."""

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        return ExpertResult(self.rows(batch.hidden))

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class NormMLP(Net):
    """A norm, two layers, residual."""

    def __init__(self, width: int, norm: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.norm = norm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        return rows + self.down(F.silu(self.up(self.norm(rows))))


class GroupNormMLP(NormMLP):
    """A group norm wants its channels second."""

    def __init__(self, width: int) -> None:
        super().__init__(width, lambda width: nn.GroupNorm(2, width))

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        flat = rows.reshape(-1, rows.shape[-1])
        return rows + self.down(torch.relu(self.up(self.norm(flat)))).reshape(rows.shape)


class FunctionalNorms(Net):
    """Norms with weights of its own, one of them made on the way."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(width))
        self.shift = nn.Parameter(torch.randn(width))

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        rows = F.layer_norm(rows, rows.shape[-1:], 1 + self.gain, self.shift, 1e-3)
        return rows + F.rms_norm(rows, rows.shape[-1:], self.gain.exp(), 1e-3)


class GatedMLP(Net):
    """SwiGLU, its two halves in one matrix."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(2 * width, width)

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(rows).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Sequence(Net):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(width, 2 * width), nn.PReLU(), nn.LayerNorm(2 * width), nn.Linear(2 * width, width), nn.Tanh()
        )

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        return self.net(rows)


class Stack(Net):
    """A module list and a parameter list, gone through in a loop."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.scales = nn.ParameterList(torch.randn(width) for _ in range(3))

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        for layer, scale in zip(self.layers, self.scales, strict=True):
            rows = rows + torch.tanh(layer(rows)) * scale
        return rows


class TiedInside(Net):
    """One weight, used twice and the second time transposed; and one layer under two names."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encode = nn.Linear(width, width)
        self.again = self.encode
        self.decode_bias = nn.Parameter(torch.randn(width))

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        rows = torch.tanh(self.again(torch.tanh(self.encode(rows))))
        return F.linear(rows, self.encode.weight.T, self.decode_bias)


class Einsum(Net):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(width, 3, width) / width)
        self.down = nn.Parameter(torch.randn(3, width, width) / width)

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        inner = torch.einsum("...d,dhf->...hf", rows, self.up)
        return torch.einsum("...hf,hfd->...d", torch.sigmoid(inner), self.down)


class Matmul(Net):
    """The weight on the right, as it is and transposed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(width, 2 * width) / width)
        self.down = nn.Parameter(torch.randn(width, 2 * width) / width)

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.matmul(torch.tanh(rows @ self.up), self.down.T)


class MatmulLeft(Net):
    """The weight on the left: it mixes the features of each position, written the way of the textbooks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width) / width)

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.matmul(self.weight, rows.unsqueeze(-1)).squeeze(-1)


class Addmm(Net):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width) / width)
        self.bias = nn.Parameter(torch.randn(width))

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        flat = rows.reshape(-1, rows.shape[-1])
        return torch.addmm(self.bias, torch.tanh(flat.mm(self.weight)), self.weight, alpha=0.5).reshape(rows.shape)


class Bmm(Net):
    """Heads of its own, each with a matrix."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, width // 2, width // 2))
        self.bias = nn.Parameter(torch.randn(2, 1, width // 2))

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        heads = rows.reshape(-1, 2, rows.shape[-1] // 2).transpose(0, 1)
        made = torch.bmm(heads, self.weight) + torch.baddbmm(self.bias, heads, self.weight, beta=0.5)
        return made.transpose(0, 1).reshape(rows.shape)


class ScaleShift(Net):
    """Elementwise: by feature, by a number, and by the rows themselves."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(width))
        self.shift = nn.Parameter(torch.randn(1, width))
        self.temperature = nn.Parameter(torch.rand(()) + 1)

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        rows = torch.addcmul(self.shift.to(rows.dtype), rows, self.scale.to(rows.dtype)) / self.temperature
        return torch.where(rows > 0, rows, self.scale * 0.1 * rows)


class Views(Net):
    """One parameter for everything: parts, rows, transposes and other shapes of it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.all = nn.Parameter(torch.randn(3 * width, width) / width)
        self.vectors = nn.Parameter(torch.randn(4, width))

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        first, second, third = self.all.chunk(3, 0)
        rows = F.linear(rows, first, self.vectors[0])
        rows = torch.tanh(rows) @ second.T + self.vectors[1:2].squeeze(0)
        rows = rows * self.vectors[2].unsqueeze(0) + F.linear(rows, third.reshape(third.shape))
        return rows + self.vectors.narrow(0, 3, 1).view(-1) + self.all[-1].expand_as(rows)


class Embeddings(ExpertModule):
    """Tables looked up by the context's ids, plainly and after integer arithmetic on the ids."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_TOKENS, width, padding_idx=0)
        self.buckets = nn.Embedding(4, width)
        self.offsets = nn.Parameter(torch.randn(NUM_TOKENS))

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        out = batch.hidden
        for ids in id_rows(batch.context):
            bucket = (ids * 3 + 1) % 4
            row = self.embedding(ids) + self.buckets(bucket) * (ids // 2 - bucket).unsqueeze(-1)
            row = row + self.offsets[(ids + 2).clamp(max=NUM_TOKENS - 1)].unsqueeze(-1)
            out = out + row.reshape(-1, *[1] * (out.dim() - 2), out.shape[-1])
        return ExpertResult(out)


class IdArithmetic(ExpertModule):
    """No table: numbers made of ids, among them comparisons and bits."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(width))

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        out = batch.hidden * self.scale
        for ids in id_rows(batch.context):
            number = torch.where(ids > 3, ids - 3, ids * 2) + (ids & 1) + F.one_hot(ids, NUM_TOKENS).argmax(-1)
            out = out + number.to(out.dtype).reshape(-1, *[1] * (out.dim() - 1)) * self.scale
        return ExpertResult(out)


class Convolution1d(Net):
    """Over positions, in two groups and with a stretch; then one tap for each channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, 3, padding=2, dilation=2, groups=2)
        self.depthwise = nn.Conv1d(width, width, 3, padding=1, groups=width, bias=False)

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        made = self.depthwise(torch.relu(self.conv(positions(rows).transpose(1, 2))))
        return made.transpose(1, 2).reshape(rows.shape)


class Convolution2d(Net):
    """Positions and features as a picture."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.back = nn.Conv2d(3, 1, (1, 3), padding=(0, 1))

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        return self.back(torch.tanh(self.conv(positions(rows).unsqueeze(1)))).reshape(rows.shape)


class Attention(ExpertModule):
    """nn.MultiheadAttention over positions, with a mask of keys, or a causal one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        rows_NSD = positions(batch.hidden)
        padding = padding_of(batch)
        num_positions = rows_NSD.shape[1]
        later = None
        if padding is None:
            later = torch.ones(num_positions, num_positions, dtype=torch.bool).triu(1)
        made = self.attention(
            rows_NSD, rows_NSD, rows_NSD, key_padding_mask=padding, attn_mask=later, need_weights=False
        )[0]
        return ExpertResult(batch.hidden + made.reshape(batch.hidden.shape))


class AttentionWeights(Net):
    """Attention that gives its weights as well, over ``[S, N, D]``, with key and value of other widths."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, kdim=width // 2, vdim=width // 2, add_bias_kv=False)

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        rows_SND = positions(rows).transpose(0, 1)
        left, right = rows_SND.chunk(2, -1)
        made, weights_NSS = self.attention(rows_SND, left, right)
        return (made.transpose(0, 1) * (1 + weights_NSS.mean(-1, keepdim=True))).reshape(rows.shape)


class EncoderLayer(ExpertModule):
    """nn.TransformerEncoderLayer, with the padding that a boolean mask gives."""

    def __init__(self, width: int, *, norm_first: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(
            width, 2, 2 * width, dropout, batch_first=True, norm_first=norm_first, activation="gelu"
        )

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        made = self.layer(positions(batch.hidden), src_key_padding_mask=padding_of(batch))
        return ExpertResult(made.reshape(batch.hidden.shape))


class PackedAttention(Net):
    """Attention by hand: query, key and value in one matrix, unbound; positions seen causally."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Parameter(torch.randn(3 * width, width) / width)
        self.out = nn.Linear(width, width, bias=False)

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        rows_NSD = positions(rows)
        num_rows, num_positions, width = rows_NSD.shape
        heads = F.linear(rows_NSD, self.qkv).view(num_rows, num_positions, 3, 2, width // 2)
        query, key, value = heads.transpose(1, 3).unbind(2)
        made = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(made.transpose(1, 2).flatten(2)).reshape(rows.shape)


class SoftmaxAttention(Net):
    """Attention without torch's help: products, a softmax, and a learned score."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.score = nn.Parameter(torch.randn(width))

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        rows_NSD = positions(rows)
        scores_NSS = self.query(rows_NSD) @ rows_NSD.transpose(1, 2) / rows.shape[-1] ** 0.5
        mixed_NSD = scores_NSS.softmax(-1) @ rows_NSD
        pooled_ND = ((rows_NSD @ self.score).softmax(-1).unsqueeze(-1) * rows_NSD).sum(1, keepdim=True)
        return (mixed_NSD + pooled_ND).reshape(rows.shape)


class Recurrence(Net):
    """A recurrent layer of torch's over positions."""

    def __init__(self, width: int, kind: Callable[..., nn.Module], **options: Any) -> None:
        super().__init__()
        inner = width // 2 if options.get("bidirectional") else width
        self.layer = kind(width, inner, batch_first=True, **options)

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        return self.layer(positions(rows))[0].reshape(rows.shape)


class LearnedStart(Net):
    """An LSTM with an initial state of its own; its rows include the last state."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.LSTM(width, width, batch_first=True)
        self.hidden = nn.Parameter(torch.randn(1, 1, width))
        self.cell = nn.Parameter(torch.randn(1, 1, width))

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        rows_NSD = positions(rows)
        num_rows = rows_NSD.shape[0]
        start = (self.hidden.expand(-1, num_rows, -1).contiguous(), self.cell.repeat(1, num_rows, 1))
        made, (last, cell) = self.layer(rows_NSD, start)
        return (made + last.transpose(0, 1) * cell.transpose(0, 1)).reshape(rows.shape)


class Cell(Net):
    """A recurrent cell, stepped by the expert itself from zeros."""

    def __init__(self, width: int, kind: Callable[..., nn.Module] = nn.GRUCell) -> None:
        super().__init__()
        self.cell = kind(width, width)

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        rows_NSD = positions(rows)
        state = None
        made = []
        for step_ND in rows_NSD.unbind(1):
            state = self.cell(step_ND, state)
            made.append(state[0] * state[1] if isinstance(state, tuple) else state)
        return torch.stack(made, 1).reshape(rows.shape)


class Expanded(Net):
    """A matrix for each row, of one parameter, for ``bmm``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width) / width)
        self.bias = nn.Parameter(torch.randn(width))

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        rows_NSD = positions(rows)
        weight_NDD = self.weight.expand(rows_NSD.shape[0], -1, -1)
        made_NSD = torch.tanh(torch.bmm(rows_NSD, weight_NDD))
        return torch.baddbmm(self.bias, made_NSD, weight_NDD, alpha=0.5).reshape(rows.shape)


class Flattened(Net):
    """Positions put among the rows, and back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        flat = rows.reshape(-1, rows.shape[-1])
        return self.norm(self.linear(flat)).view(rows.shape) + self.linear(rows.flatten(0, -2)).view_as(rows)


class PositionsFirst(Net):
    """``[S, N, D]`` inside, as much code has it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.scale = nn.Parameter(torch.randn(width))

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        rows_SND = positions(rows).transpose(0, 1)
        made_SND = torch.relu(self.linear(rows_SND)) * self.scale + rows_SND.mean(0, keepdim=True)
        return made_SND.permute(1, 0, 2).reshape(rows.shape)


class ReadsBuffers(Net):
    """Buffers that are read only: a table by feature, a number, and one that no checkpoint has."""

    mean: torch.Tensor
    temperature: torch.Tensor
    signs: torch.Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.register_buffer("mean", torch.randn(width))
        self.register_buffer("temperature", torch.rand(()) + 1)
        self.register_buffer("signs", torch.ones(width).bernoulli_().mul_(2).sub_(1), persistent=False)

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        return self.linear((rows - self.mean) / self.temperature) * self.signs


class BatchNormInEval(Net):
    """Batch norm that its expert keeps from ever looking at the batch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        with torch.no_grad():
            self.norm.running_mean.normal_()
            self.norm.running_var.uniform_(0.5, 2)
            self.norm.weight.normal_()

    def train(self, mode: bool = True) -> BatchNormInEval:
        super().train(mode)
        self.norm.eval()
        return self

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        return self.norm(rows.reshape(-1, rows.shape[-1])).reshape(rows.shape)


class WidthsInAList(Net):
    """Layers of several widths; their shapes are drawn once for a model, so that siblings agree."""

    def __init__(self, width: int, inner: tuple[int, ...] = (3, 8, 5)) -> None:
        super().__init__()
        widths = [width, *inner, width]
        self.layers = nn.ModuleList(nn.Linear(*each) for each in itertools.pairwise(widths))

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        skips = [rows]
        for layer in self.layers:
            skips.append(torch.tanh(layer(skips[-1])))
        return torch.cat(skips, -1)[..., : rows.shape[-1]] + skips[-1]


class SplitWidths(Net):
    """A list of parts of unlike width, each with a layer of its own, put together again."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.parts = [1, 2, width - 3]
        self.layers = nn.ModuleDict({str(part): nn.Linear(part, width) for part in dict.fromkeys(self.parts)})

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        made = [self.layers[str(part.shape[-1])](part) for part in rows.split(self.parts, -1)]
        return torch.stack(made).sum(0)


class RowLosses(ExpertModule):
    """Losses of each row, summed over the rows that it was given."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        out = self.linear(batch.hidden)
        flat = out.reshape(-1, out.shape[-1])
        entropy = F.cross_entropy(flat, flat.detach().argmin(-1), reduction="none")
        return ExpertResult(out, {"entropy": entropy.sum(), "distance": (out - batch.hidden).pow(2).sum(-1).sum()})


class MeanLosses(ExpertModule):
    """Losses whose reduction divides by the number of rows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        out = self.linear(batch.hidden)
        mean = F.mse_loss(out, batch.hidden) + out.mean() ** 2
        return ExpertResult(out, {"mean": mean, "largest": out.abs().amax(), "log": out.reshape(-1).logsumexp(0)})


class ParameterLosses(ExpertModule):
    """Losses that no row has a part in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.unused = nn.Parameter(torch.randn(width))

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        decay = sum(parameter.pow(2).sum() for parameter in self.parameters())
        gram = self.linear.weight @ self.linear.weight.T
        return ExpertResult(
            self.linear(batch.hidden),
            {"decay": decay, "orthogonal": gram.triu(1).pow(2).mean(), "one": gram.new_ones(())},
        )


class MaskedLosses(ExpertModule):
    """The mean over the rows that the mask has."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        out = self.linear(batch.hidden)
        row_losses = out.pow(2).flatten(1).sum(1)
        if batch.mask is None:
            return ExpertResult(out, {"kept": row_losses.sum()})
        keep = batch.mask.to(out.dtype).flatten(1).sum(1) if batch.mask.dim() > 1 else batch.mask.to(out.dtype)
        return ExpertResult(out, {"kept": (row_losses * keep).sum() / keep.abs().sum().clamp(min=1)})
