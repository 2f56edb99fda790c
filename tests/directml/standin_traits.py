"""The stand-in is as strict as it says. Run by `test_standin`, in a process of its own."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.directml.operators import FALLBACK, NATIVE
from tests.directml.standin import (
    FallbackError,
    UnsupportedError,
    WrongResultError,
    install,
    tallied,
)

DEVICE = install()


def there(*shape: int) -> torch.Tensor:
    """Numbers on the device, all different."""
    return (torch.arange(float(torch.Size(shape).numel())) + 1).view(shape).to(DEVICE)


def index(*places: int) -> torch.Tensor:
    return torch.tensor(places).to(DEVICE)


def test_a_tensor_looks_as_it_does_on_directml():
    rows = there(2, 3)
    assert type(rows) is torch.Tensor
    assert (rows.device.type, rows.device.index, str(rows.device)) == ("privateuseone", 0, "privateuseone:0")
    assert not rows.is_cpu
    assert not rows.is_cuda


def test_computes_what_the_cpu_computes():
    weight, rows = torch.randn(4, 3), torch.randn(5, 3)

    def run(device: torch.device | str) -> list[torch.Tensor]:
        w, x = (each.detach().to(device).requires_grad_() for each in (weight, rows))
        made = F.layer_norm(F.linear(x, w).view(5, 2, 2).transpose(0, 1).contiguous(), (2,))
        loss = torch.softmax(made.reshape(10, 2), -1).pow(2).sum() / 3
        loss.backward()
        return [each.cpu() for each in (made.detach(), loss.detach(), w.grad, x.grad)]

    for mine, cpus in zip(run(DEVICE), run("cpu"), strict=True):
        assert torch.equal(mine, cpus)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: torch.zeros(3, 3, device=DEVICE).index_add_(0, index(0, 1), x),
        lambda x: x.index_copy(0, index(0, 1), x),
        lambda x: torch.bincount(index(0, 1)),
        lambda x: torch.searchsorted(x[0], x[1]),
        lambda x: x.repeat_interleave(index(1, 2), 0),
        lambda x: torch.lerp(x, x, 0.5),
        lambda x: x @ x[0],
        lambda x: x.std(),
        torch.nn.GRUCell(3, 3).to(DEVICE),
        lambda x: torch.linalg.inv(x[:, :2]),
    ],
    ids=[
        *("index_add", "index_copy", "bincount", "searchsorted", "repeat_interleave", "lerp", "matrix @ vector", "std"),
        *("gru", "inv"),
    ],
)
def test_what_falls_back_is_refused(call: Callable[[torch.Tensor], Any]):
    with tallied() as tally, pytest.raises(FallbackError, match="has no kernel on DirectML"):
        call(there(2, 3))
    assert len(tally.refused) == 1


@pytest.mark.parametrize("layer", [torch.nn.GRU, torch.nn.LSTM])
def test_gated_recurrent_layers_of_pytorch_fail(layer: Callable[[int, int], torch.nn.Module]):
    """For this device type PyTorch runs them by fused cells, which exist for CUDA alone."""
    with pytest.raises(FallbackError, match="the CPU, to which it falls back, has none either"):
        layer(3, 3).to(DEVICE)(there(2, 3))
    torch.nn.RNN(3, 3).to(DEVICE)(there(2, 3))


def test_a_backward_pass_that_falls_back_is_refused():
    rows = there(3, 2).requires_grad_()
    picked = rows.index_select(0, index(2, 0))
    with pytest.raises(FallbackError, match=r"aten\.index_add"):
        picked.sum().backward()


@pytest.mark.parametrize(
    "call",
    [
        lambda x: torch.zeros(4, device=DEVICE).scatter_add(0, index(0, 0), x[0, :2]),
        lambda x: x[0].requires_grad_().gather(0, index(1, 1)).sum().backward(),
        lambda x: x * (x > 1),
        lambda x: F.cross_entropy(x.requires_grad_(), index(0, 1), reduction="none").sum().backward(),
    ],
    ids=["scatter_add", "gather's backward", "float * bool", "a loss for each sample"],
)
def test_what_comes_out_wrong_is_refused(call: Callable[[torch.Tensor], Any]):
    with pytest.raises(WrongResultError):
        call(there(2, 3))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x.double(),
        lambda x: x.bfloat16(),
        lambda x: x.to(torch.complex64),
        lambda x: torch.zeros(2, dtype=torch.float64, device=DEVICE),
        lambda x: torch.zeros(2, dtype=torch.bfloat16).to(DEVICE),
        lambda x: x[None, None, None, None],
        lambda x: x.view(2, 3, 1, 1, 1, 1),
        lambda x: x + torch.ones(2, 3),
        repr,
    ],
    ids=[
        *("double", "bfloat16", "complex", "double from the start", "bfloat16 from the CPU"),
        *("six dimensions", "six dimensions by a view", "a tensor of the CPU's", "printed"),
    ],
)
def test_what_is_not_there_is_refused(call: Callable[[torch.Tensor], Any]):
    with pytest.raises((UnsupportedError, RuntimeError), match=r"DirectML|same device"):
        call(there(2, 3))


def test_a_module_that_moves_gets_new_parameters():
    """PyTorch keeps parameters and ties when a module moves between the CPU and CUDA, but not for this device type."""
    first, second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    second.weight = weight = first.weight
    torch.nn.ModuleList([first, second]).to(DEVICE)
    assert first.weight is not weight
    assert first.weight is not second.weight


def test_there_is_no_inference_mode():
    rows = there(2, 3)
    with torch.inference_mode(), pytest.raises(UnsupportedError, match="version_counter"):
        rows + rows
    with torch.no_grad():
        assert (rows + rows).cpu().sum() == 42


def test_parts_of_a_split_are_copies_and_slices_are_not():
    rows = there(4, 2)
    for parts in (rows.split(2), rows.split([1, 3]), rows.chunk(2)):
        parts[0].zero_()
        assert rows.cpu().min() == 1
    rows[:2].zero_()
    rows.narrow(0, 2, 1).zero_()
    assert rows.cpu().count_nonzero() == 2


@pytest.mark.parametrize(
    ("call", "kernel"),
    [
        (lambda x: x[index(1, 0)], "index.Tensor_out"),
        (lambda x: x.index_put_((index(1, 0),), x), "_index_put_impl_"),
        (lambda x: torch.randn(3, device=DEVICE), "normal_"),
        (lambda x: torch.rand(3, device=DEVICE), "uniform_"),
        (lambda x: torch.randperm(3, device=DEVICE), "randperm.generator_out"),
        (lambda x: torch.dropout(x, 0.5, True), "native_dropout"),
        (
            lambda x: F.embedding(index(1), x.requires_grad_()).sum().backward(),
            "embedding_dense_backward",
        ),
    ],
    ids=["x[idx]", "index_put", "randn", "rand", "randperm", "dropout", "embedding's backward"],
)
def test_what_the_cpu_computes_in_secret_is_counted(call: Callable[[torch.Tensor], Any], kernel: str):
    rows = there(2, 3)
    with tallied() as tally:
        call(rows)
    assert tally.hidden[kernel] == 1


@pytest.mark.parametrize(
    ("call", "kernel"),
    [
        (lambda x: x.sum().item(), "_local_scalar_dense"),
        (lambda x: bool((x > 0).all()), "_local_scalar_dense"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: torch.equal(x, x), "equal"),
        (lambda x: x.masked_select(x > 1), "masked_select"),
        (lambda x: x.cpu(), "copy_"),
        (lambda x: x.tolist(), "copy_"),
        (lambda x: torch.empty(2, 3).copy_(x), "copy_"),
    ],
    ids=["item", "bool", "nonzero", "equal", "masked_select", "cpu", "tolist", "copy_"],
)
def test_reads_are_counted(call: Callable[[torch.Tensor], Any], kernel: str):
    rows = there(2, 3)
    with tallied() as tally:
        call(rows)
    assert tally.reads == {kernel: 1}


def test_what_stays_on_the_device_counts_as_nothing():
    rows, weight = there(4, 6).requires_grad_(), there(6, 6).requires_grad_()
    keep = torch.tensor([True, False, True, True]).to(DEVICE)
    with tallied() as tally:
        made = torch.cat(list(torch.einsum("rd,de->re", rows, weight).split([1, 3])))
        made = torch.where(keep[:, None], made, made.masked_fill(~keep[:, None], 0.5))
        made = F.gelu(made).clamp(-5, 5).index_select(0, index(3, 2, 1, 0).argsort()).detach()
        (made.topk(2, 1).values.sum() + F.mse_loss(rows @ weight, made)).backward()
        torch.optim.SGD([rows, weight], lr=0.1, momentum=0.9).step()
    assert not tally.hidden
    assert not tally.reads
    assert tally.kernels["mm.out"] > 0


def test_backward_passes_run_in_another_thread():
    seen = []

    class Seeing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
            seen.append(threading.get_ident())
            return rows.clone()

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            seen.append(threading.get_ident())
            return grads[0]

    Seeing.apply(there(2).requires_grad_()).sum().backward()
    assert seen[0] == threading.get_ident() != seen[1]


def test_a_refusal_that_someone_catches_is_still_noted():
    with tallied() as tally, contextlib.suppress(RuntimeError):
        torch.lerp(there(2), there(2), 0.5)
    assert len(tally.refused) == 1


def test_the_dispatcher_sees_the_plug_in_s_operators():
    """The first list's operators have a kernel, the others none of the device's, as far as this PyTorch has them."""

    def has(name: str) -> bool:
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "PrivateUse1")

    known = set(torch._C._dispatch_get_all_op_names())
    native = {name for name in NATIVE if f"aten::{name}" in known}
    assert len(native) > 290
    # The three exceptions decompose in PyTorch, and do the same.
    assert {name for name in native if not has(name)} == {"reshape", "diag.out", "empty.out"}
    refused = {name for name in FALLBACK if f"aten::{name}" in known and has(name)}
    assert not refused & native
