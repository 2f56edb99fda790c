"""Kinds of experts that the grouped engine must reach: layers, indices, distances, transforms, images."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from celmoe import ExpertBatch, ExpertModule, ExpertResult
from tests.traps import (
    WIDTH,
)

Function = Callable[[Any, torch.Tensor, ExpertBatch], torch.Tensor]


class Kind(ExpertModule):
    """A layer, then a function of its rows, then a factor from the context."""

    def __init__(self, function: Function, prepare: Callable[[Any], None] | None = None) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.function = function
        if prepare is not None:
            prepare(self)

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        rows = self.function(self, self.layer(batch.hidden), batch)
        factor = batch.context["scale"][:, 0]
        return ExpertResult(rows * factor.view(-1, *(1,) * (rows.dim() - 1)))


# By name, what makes an expert, and the axes between samples and width.
KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {}


def kind(*trailing: int, prepare: Callable[[Any], None] | None = None) -> Callable[[Function], Function]:
    """Add the kind that a function is."""

    def add(function: Function) -> Function:
        KINDS[function.__name__] = partial(Kind, function, prepare), trailing
        return function

    return add


def layer(name: str, make: Callable[[], nn.Module], *trailing: int) -> None:
    """Add the kind that a layer is, which takes the rows and gives rows."""

    def prepare(expert: Any) -> None:
        expert.inner = make()

    KINDS[name] = partial(Kind, lambda expert, rows, _: expert.inner(rows), prepare), trailing


def linear() -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH)


def in_evaluation(module: nn.Module) -> nn.Module:
    """With statistics, or vectors, that are the module's own."""
    for buffer in module.buffers():
        if buffer.is_floating_point():
            buffer.data.uniform_(0.5, 1.5)
    return module.eval()


class Symmetric(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.triu() + weight.triu(1).mT


def parametrized(parametrization: nn.Module) -> nn.Linear:
    module = linear()
    parametrize.register_parametrization(module, "weight", parametrization)
    return module


layer("weight_norm", lambda: parametrizations.weight_norm(linear()))
layer("weight_norm of columns", lambda: parametrizations.weight_norm(linear(), dim=1))
layer("weight_norm of all", lambda: parametrizations.weight_norm(linear(), dim=None))
layer("weight_norm of a convolution", lambda: parametrizations.weight_norm(nn.Conv1d(3, 3, 3, padding=1)), 3)
layer("spectral_norm in evaluation", lambda: in_evaluation(parametrizations.spectral_norm(linear())))
layer("orthogonal", lambda: parametrizations.orthogonal(linear()))
layer("orthogonal by cayley", lambda: parametrizations.orthogonal(linear(), orthogonal_map="cayley"))
layer("orthogonal by householder", lambda: parametrizations.orthogonal(linear(), orthogonal_map="householder"))
layer("a parametrization of the user's", lambda: parametrized(Symmetric()))
layer("batch_norm in evaluation", lambda: in_evaluation(nn.BatchNorm1d(WIDTH)))
layer("batch_norm of positions in evaluation", lambda: in_evaluation(nn.BatchNorm1d(3)), 3)
layer("instance_norm", lambda: nn.InstanceNorm1d(3), 3)
layer("instance_norm with weights", lambda: nn.InstanceNorm1d(3, affine=True), 3)
layer("instance_norm in evaluation", lambda: in_evaluation(nn.InstanceNorm1d(3, track_running_stats=True)), 3)


@kind()
def checkpointed(expert, rows, batch):
    return checkpoint(lambda some: torch.tanh(expert.layer(some)) * 2, rows, use_reentrant=False)


@kind()
def checkpointed_twice(expert, rows, batch):
    for _ in range(2):
        rows = checkpoint(expert.layer, rows, use_reentrant=False)
    return rows


@kind()
def checkpointed_within_a_checkpoint(expert, rows, batch):
    inner = partial(checkpoint, expert.layer, use_reentrant=False)
    return checkpoint(lambda some: inner(some) * some, rows, use_reentrant=False)


@kind()
def checkpointed_with_two_results(expert, rows, batch):
    first, second = checkpoint(lambda some: (some.sin(), some.cos()), rows, use_reentrant=False)
    return first * expert.layer(second)


@kind()
def a_list_as_a_key(expert, rows, batch):
    return rows + rows[..., [0, 2]].sum(-1, keepdim=True)


ORDER = [3, 2, 1, 0, 7, 6, 5, 4]


@kind()
def a_list_of_the_module(expert, rows, batch):
    return rows[:, ORDER]


@kind()
def a_tensor_as_a_key(expert, rows, batch):
    return rows[:, torch.tensor([1, 0, 3, 2, 5, 4, 7, 6])] * rows[:, torch.arange(WIDTH - 1, -1, -1)]


@kind()
def a_list_of_truths_as_a_key(expert, rows, batch):
    return rows + rows[:, [True, False] * 4].sum(-1, keepdim=True)


@kind()
def a_mask_as_a_key(expert, rows, batch):
    return rows + rows[:, torch.arange(WIDTH) % 3 == 0].sum(-1, keepdim=True)


@kind(3)
def a_mask_of_two_axes_as_a_key(expert, rows, batch):
    return rows + rows[:, torch.ones(3, WIDTH).tril() > 0].sum(-1)[:, None, None]


@kind(3)
def neighbouring_lists_as_keys(expert, rows, batch):
    return rows + rows[:, [0, 2], [1, 3]].sum(-1)[:, None, None]


@kind(3, 4)
def lists_apart_as_keys(expert, rows, batch):
    # Their axis comes first, before the row axis.
    return rows + rows[:, [0, 2], :, [1, 3]].sum(0)[:, None, :, None]


@kind(3)
def lists_in_front_as_keys(expert, rows, batch):
    return rows + rows.transpose(0, 1)[[0, 2], :, [1, 3]].sum(0)[:, None, None]


@kind(3)
def a_list_of_lists_as_a_key(expert, rows, batch):
    return rows + rows[:, [[0, 1], [2, 0]]].sum((1, 2))[:, None]


def _own_order(expert: Any) -> None:
    expert.register_buffer("order", torch.randperm(WIDTH))


@kind(prepare=_own_order)
def a_buffer_as_a_key(expert, rows, batch):
    return rows[:, expert.order] + rows.index_select(-1, expert.order)


@kind()
def assigned_to_slices(expert, rows, batch):
    out = torch.zeros_like(rows)
    out[:, 1:] = rows[:, :-1]
    out[:, 0] = 2.0
    return out


@kind()
def assigned_by_lists_and_masks(expert, rows, batch):
    out = rows.clone()
    out[:, [6, 7]] = rows[:, [0, 1]] * 3
    out[..., torch.arange(WIDTH) == 2] = 0.5
    out[out > 0.7] = 0.7
    return out


@kind()
def assigned_in_place(expert, rows, batch):
    out = rows * 1
    out[:, 1:] += rows[:, :-1]
    out[..., 0] *= 2
    return out


@kind()
def assigned_parameters(expert, rows, batch):
    out = rows.clone()
    out[:, 0] = expert.layer.bias[0]
    out[:, 2:] = expert.layer.bias[2:]
    return out


@kind()
def assigned_to_new_rows(expert, rows, batch):
    out = rows.new_zeros(rows.shape[0], WIDTH + 2)
    out[:, 1:-1] = rows
    return out[:, :WIDTH] + out[:, 2:]


@kind(3)
def assigned_to_turned_rows(expert, rows, batch):
    out = rows.transpose(0, 1).clone()
    out[1] = rows[:, 0]
    out[2, :, 3:] = rows[:, 1, :-3]
    return out.transpose(0, 1)


@kind()
def assigned_to_a_constant(expert, rows, batch):
    factors = torch.ones(WIDTH)
    factors[2:4] = 0.5
    return rows * factors


@kind()
def gathered(expert, rows, batch):
    return rows.gather(-1, rows.argsort(-1))


@kind()
def scattered(expert, rows, batch):
    return torch.zeros_like(rows).scatter(-1, rows.argsort(-1), rows) + rows.scatter(1, rows.argmax(-1, True), 0.0)


@kind()
def scattered_of_the_largest(expert, rows, batch):
    values, places = rows.topk(3, -1)
    return torch.zeros_like(rows).scatter_(-1, places, values.softmax(-1))


@kind()
def scattered_and_added(expert, rows, batch):
    places = rows.argsort(-1) // 2
    out = torch.zeros_like(rows).scatter_add(-1, places, rows)
    return out.scatter_add_(-1, places, rows) + torch.zeros_like(rows).scatter_reduce(-1, places, rows, "sum")


@kind(3)
def scattered_along_turned_rows(expert, rows, batch):
    turned = rows.transpose(0, 1)
    return turned.scatter(0, turned.argsort(0), turned * 2).transpose(0, 1)


@kind()
def put_at_places(expert, rows, batch):
    places = torch.tensor([0, 3, 1])
    return rows.index_add(-1, places, rows[:, :3]) + rows.index_copy(-1, places, rows[:, 3:6])


@kind()
def cosine_similarity(expert, rows, batch):
    return rows * F.cosine_similarity(rows, batch.hidden, dim=-1)[:, None]


@kind()
def cosine_similarity_to_parameters(expert, rows, batch):
    return rows * F.cosine_similarity(rows[:, None], expert.layer.weight, dim=-1)


@kind(3)
def cosine_similarity_of_turned_rows(expert, rows, batch):
    turned = rows.transpose(0, 1)
    return rows * F.cosine_similarity(turned, turned * turned, dim=0)[:, None]


@kind()
def pairwise_distance(expert, rows, batch):
    far = F.pairwise_distance(rows, batch.hidden, p=1, keepdim=True)
    return rows * far + F.pairwise_distance(rows, expert.layer.bias)[:, None]


@kind(3)
def distances_between_positions(expert, rows, batch):
    return torch.cdist(rows, rows * 2).softmax(-1) @ rows


@kind(3)
def distances_to_parameters(expert, rows, batch):
    return rows * torch.cdist(rows, expert.layer.weight)


@kind()
def fourier(expert, rows, batch):
    return torch.fft.irfft(torch.fft.rfft(rows, dim=-1) * 2, n=WIDTH, dim=-1) + torch.fft.fft(rows).imag


@kind(3)
def fourier_of_two_axes(expert, rows, batch):
    spectrum = torch.fft.fft2(rows)
    return torch.fft.ifft2(spectrum * spectrum.conj()).real + torch.fft.fftshift(rows, dim=(1, 2))


@kind(3)
def fourier_mixing(expert, rows, batch):
    return torch.fft.fft(torch.fft.fft(rows, dim=-1), dim=1).real


@kind()
def complex_numbers(expert, rows, batch):
    turned = torch.polar(rows.abs(), rows) * torch.complex(rows, expert.layer.bias.expand_as(rows))
    return torch.view_as_real(turned).sum(-1) + turned.angle()


@kind()
def interpolated(expert, rows, batch):
    grown = F.interpolate(rows[:, None], scale_factor=2, mode="linear")
    return grown[:, 0, ::2] + F.interpolate(rows[:, None], WIDTH)[:, 0]


@kind(3)
def interpolated_images(expert, rows, batch):
    grown = F.interpolate(rows[:, None], size=(6, 16), mode="bilinear", align_corners=False)
    return grown[:, 0, ::2, ::2]


@kind(3, 4)
def shuffled_pixels(expert, rows, batch):
    images = rows.reshape(rows.shape[0], 3, 4, 4, 2).permute(0, 1, 4, 2, 3).reshape(rows.shape[0], 6, 4, 4)
    smaller = F.pixel_unshuffle(images, 2)
    return F.channel_shuffle(F.pixel_shuffle(torch.tanh(smaller), 2), 3).reshape(rows.shape)
