"""Transforms, accumulation, threads and DDP through the grouped engine."""

from __future__ import annotations

import copy
import datetime as dt
import io
import itertools
import pickle
import socket
import threading
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from celmoe import EngineRefusedError, HierarchicalCELMoE
from tests.architectures import NormMLP
from tests.features import loads_decompositions
from tests.grouped_features import (
    MAKERS,
    WITH_DERIVATIVES,
    _auto_groups_few_experts,  # noqa: F401  # an autouse fixture
    assert_close,
    grads_of,
)
from tests.traps import (
    BATCHES,
    GROUPED,
    LEVEL,
    NAMES,
    WIDTH,
    Batch,
    Plain,
    assert_like_oracle,
    assert_ran_grouped,
    assert_same,
    build,
    experts_of,
    observe,
    oracle_of,
)


def test_functional_call():
    """With other weights for all, for one expert, and for one parameter; the model's own are left alone."""
    model = build(MAKERS["norm"])
    batch = Batch()
    batch(model)
    before = copy.deepcopy(model.state_dict())
    everything = {key: value.detach() * 2 for key, value in model.named_parameters()}
    one = {key: value for key, value in everything.items() if f".{LEVEL}.b." in f".{key}"}
    single = dict([next(iter(one.items()))])
    for values in (everything, one, single, {}):
        given = {key: value.clone().requires_grad_() for key, value in values.items()}
        other = copy.deepcopy(model)
        other.load_state_dict({**model.state_dict(), **{key: value.detach() for key, value in given.items()}})
        arguments = batch.leaves["hidden"].detach(), batch.routing, batch.context, batch.mask
        found = torch.func.functional_call(model, given, arguments).fused_hidden
        expected = oracle_of(other)(*arguments).fused_hidden
        torch.testing.assert_close(found, expected)
        if given:
            grads = torch.autograd.grad(found.pow(2).sum(), list(given.values()), allow_unused=True)
            targets = [dict(other.named_parameters())[key] for key in given]
            assert_close(
                grads, torch.autograd.grad(expected.pow(2).sum(), targets, allow_unused=True), rtol=1e-4, atol=1e-5
            )
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_of_torch_func():
    """The loop must take over all that torch.func can't do through the grouped engine, or the call is refused in
    words."""
    model = build(MAKERS["plain"], "auto", dtype=torch.float64)
    batch = Batch(dtype=torch.float64)
    batch(model)
    parameters = {key: value.detach() for key, value in model.named_parameters()}
    hidden = batch.leaves["hidden"].detach()

    def loss(given: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(model, given, (hidden, batch.routing)).fused_hidden.pow(2).sum()

    oracle_of(model)(hidden, batch.routing).fused_hidden.pow(2).sum().backward()
    found = torch.func.grad(loss)(parameters)
    for key, parameter in model.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found[key], expected)
    batch(model)
    assert_ran_grouped(model, batch)
    model.engine = GROUPED
    with pytest.raises(EngineRefusedError, match=r"under a transform of torch\.func"):
        torch.func.grad(loss)(parameters)
    batch(model)


@loads_decompositions
def test_forward_derivatives():
    """Dual numbers go through the loop, and leave no trace."""
    model = build(MAKERS["norm"], "auto")
    batch = Batch()
    for ran in (False, True):
        if ran:
            batch(model)
        tangents = []
        for forward in (model, oracle_of(model)):
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(batch.leaves["hidden"], batch.leaves["hidden"].detach().sin())
                output = forward(dual, batch.routing, batch.context, batch.mask).fused_hidden
                tangents.append(forward_ad.unpack_dual(output).tangent)
        torch.testing.assert_close(*tangents)
    model.engine = GROUPED
    batch(model)
    with forward_ad.dual_level(), pytest.raises(EngineRefusedError, match="are differentiated forward"):
        batch(model)
    batch(model)


@WITH_DERIVATIVES
@pytest.mark.parametrize("name", MAKERS)
def test_batches_of_gradients(name: str):
    """Many directions at once, by either of torch's ways, once and twice: backward passes that vmap runs."""
    model = build(MAKERS[name], dtype=torch.float64)
    found = []
    for forward in (model, oracle_of(model)):
        batch = Batch((2, 1, 2, 0, 0), dtype=torch.float64)
        hidden, output = batch.leaves["hidden"], batch(forward).fused_hidden
        asked = [hidden, *experts_of(model)[0].parameters()]
        directions = torch.eye(output.numel(), dtype=torch.float64).reshape(-1, *output.shape)
        batched = torch.autograd.grad(output, asked, directions, is_grads_batched=True, create_graph=True)
        again = torch.autograd.grad(batched[0].pow(2).sum(), asked, retain_graph=True, allow_unused=True)
        (slope,) = torch.autograd.grad(output.sin().sum(), hidden, create_graph=True)
        twice = torch.autograd.grad(slope, asked, directions, is_grads_batched=True, retain_graph=True)

        def along(direction: torch.Tensor, output: torch.Tensor = output, asked: Any = asked) -> Any:
            return torch.autograd.grad(output, asked, direction, retain_graph=True)

        found.append([*batched, *again, *twice, *torch.func.vmap(along)(directions)])
    assert_close(*found, rtol=1e-9, atol=1e-11)


def test_tracing():
    """Tracers write the loop down; under ``engine="grouped"`` they are told so. Ordinary calls are grouped again."""
    model = build(MAKERS["norm"], "auto")
    batch = Batch()
    hidden, other = batch.leaves["hidden"].detach(), -2 * batch.leaves["hidden"].detach()

    def run(rows: torch.Tensor) -> torch.Tensor:
        return model(rows, batch.routing, batch.context, batch.mask).fused_hidden

    for _ in range(2):
        written = make_fx(run)(hidden)
        torch.testing.assert_close(written(other), oracle_of(model)(other, batch.routing).fused_hidden)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert run(mode.from_tensor(hidden)).shape == hidden.shape
        batch(model)
        assert_ran_grouped(model, batch)
    model.engine = GROUPED
    with pytest.raises(EngineRefusedError, match="are being traced"):
        make_fx(run)(hidden)


def test_gradients_accumulate():
    """Over batches of other experts, and twice over one graph."""
    subject, twin = build(MAKERS["gated"]), build(MAKERS["gated"])
    for model, forward in ((subject, subject), (twin, oracle_of(twin))):
        for make_batch in BATCHES:
            make_batch()(forward).fused_hidden.pow(2).sum().backward()
        total = Batch()(forward).fused_hidden.pow(2).sum()
        total.backward(retain_graph=True)
        total.backward()
        assert experts_of(model)[-1].down.weight.grad is None
    assert_close(grads_of(subject), grads_of(twin), rtol=1e-4, atol=1e-3)


def test_a_graph_kept_while_weights_change():
    """torch refuses a backward through weights that were edited in place; stacked copies must not hide it."""
    for edit in (False, True):
        subject, twin = build(MAKERS["gated"]), build(MAKERS["gated"])
        errors = []
        for model, forward in ((subject, subject), (twin, oracle_of(twin))):
            Batch()(forward)
            total = Batch()(forward).fused_hidden.pow(2).sum()
            total.backward(retain_graph=True)
            if edit:
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.mul_(2)
            try:
                total.backward()
            except RuntimeError as error:
                errors.append("modified by an inplace operation" in str(error))
        assert errors in ([True, True] if edit else [], [True, True])
        if not edit:
            assert_close(grads_of(subject), grads_of(twin), rtol=1e-4, atol=1e-4)


def test_some_gradients_alone():
    """torch.autograd.grad of one expert's weight, which needs nothing of the others."""
    subject, twin = build(MAKERS["norm"]), build(MAKERS["norm"])
    found = []
    for model, forward in ((subject, subject), (twin, oracle_of(twin))):
        asked = [experts_of(model)[1].up.weight, experts_of(model)[-1].up.weight, experts_of(model)[3].norm.bias]
        found.append(torch.autograd.grad(Batch()(forward).fused_hidden.pow(2).sum(), asked, allow_unused=True))
    assert found[1][1] is None
    assert_close(*found)


@pytest.mark.parametrize("frozen", ["one expert", "one layer of all", "all"])
def test_frozen_experts_pass_gradients_on(frozen: str):
    subject, twin = build(MAKERS["norm"]), build(MAKERS["norm"])
    for model in (subject, twin):
        for number, expert in enumerate(experts_of(model)):
            if frozen == "all" or (frozen == "one expert" and number == 1):
                expert.requires_grad_(False)
            elif frozen == "one layer of all":
                expert.up.requires_grad_(False)
    for make_batch in BATCHES:
        assert_like_oracle(subject, twin, make_batch)


def test_ddp(tmp_path: Any):
    """One process of one: its hooks fire for the experts present, and it finds those that are not."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store = torch.distributed.TCPStore("127.0.0.1", port, 1, True, timeout=dt.timedelta(seconds=20))
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=dt.timedelta(seconds=20))
    try:
        subject, twin = build(MAKERS["norm"]), build(MAKERS["norm"])
        wrapped = nn.parallel.DistributedDataParallel(subject, find_unused_parameters=True)
        optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in (subject, twin)]
        for make_batch in BATCHES:
            for forward, optimizer in zip((wrapped, oracle_of(twin)), optimizers, strict=True):
                optimizer.zero_grad()
                make_batch()(forward).fused_hidden.pow(2).mean().backward()
                optimizer.step()
            assert_close(subject.parameters(), twin.parameters(), rtol=1e-4, atol=1e-5)
    finally:
        torch.distributed.destroy_process_group()


def test_several_threads_in_inference():
    """From the first call on: all threads come upon an unproven class at once."""
    model = build(MAKERS["norm"]).eval()
    twin = build(MAKERS["norm"]).eval()
    with torch.no_grad():
        expected = [make_batch()(oracle_of(twin)).fused_hidden for make_batch in BATCHES]
    wrong: list[object] = []
    start = threading.Barrier(4)

    def serve(number: int) -> None:
        start.wait(20)
        try:
            with torch.inference_mode():
                for _ in range(15):
                    found = BATCHES[number]()(model).fused_hidden
                    if not torch.allclose(found, expected[number], rtol=1e-5, atol=1e-5):
                        wrong.append(number)
        except Exception as error:  # noqa: BLE001  # the assertion below shows a thread's error
            wrong.append(error)

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not wrong
    assert not any(thread.is_alive() for thread in threads)


def test_threads_of_several_models():
    """Threads with models of their own: verifying must not change streams and modes of other threads."""
    expected = observe(build(Plain), oracle_of(build(Plain)), Batch())["fused_hidden"]
    wrong: list[object] = []

    def train() -> None:
        try:
            model = build_without_seed()
            Batch()(model).fused_hidden.sum().backward()
            if not all(expert.linear.weight.grad is not None for expert in experts_of(model)[:5]):
                wrong.append("a gradient is missing")
        except Exception as error:  # noqa: BLE001  # as above
            wrong.append(error)

    threads = [threading.Thread(target=train) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not wrong
    assert torch.is_grad_enabled()
    torch.testing.assert_close(Batch()(build(Plain)).fused_hidden, expected)


def build_without_seed() -> HierarchicalCELMoE:
    """`build` seeds the process's one stream, which threads would take from one another."""
    template = build(Plain)
    return HierarchicalCELMoE(template.config, lambda *_: Plain(), engine=GROUPED)


def saved(value: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


def test_one_experts_checkpoint_holds_its_bytes_alone():
    """Also after calls, when its weights may be views of a storage that all share."""
    width = 64
    config = build(Plain).config
    config.hidden_size = width
    model = HierarchicalCELMoE(config, lambda *_: NormMLP(width), engine=GROUPED)
    fresh = saved(copy.deepcopy(model.level_modules[LEVEL]["b"].state_dict())).getbuffer().nbytes
    whole = saved(model.state_dict()).getbuffer().nbytes
    for _ in range(3):
        model(torch.randn(40, width), {LEVEL: list("abcde") * 8}).fused_hidden.sum().backward()
    expert = model.level_modules[LEVEL]["b"]
    for value in (expert.state_dict(), expert.up.weight, dict(expert.named_parameters()), copy.deepcopy(expert)):
        assert saved(value).getbuffer().nbytes <= 1.1 * fresh + 4096
    assert len(pickle.dumps(expert)) <= 1.1 * fresh + 8192
    assert saved(model.state_dict()).getbuffer().nbytes <= 1.01 * whole
    assert len(pickle.dumps(model)) <= 1.1 * whole + 65536
    for value in expert.state_dict().values():
        assert value.is_contiguous()


def test_weights_take_their_plain_memory():
    """All storages that parameters and buffers live in, each once, are at most 1.1 times the parameters' bytes."""
    model = build(partial(NormMLP, WIDTH))
    for _ in range(3):
        Batch()(model).fused_hidden.sum().backward()
    plain = sum(parameter.nbytes for parameter in model.parameters())
    storages = {
        parameter.untyped_storage().data_ptr(): parameter.untyped_storage().nbytes() for parameter in model.parameters()
    }
    assert sum(storages.values()) <= 1.1 * plain
    grads = [parameter.grad for parameter in model.parameters()]
    storages = {
        grad.untyped_storage().data_ptr(): grad.untyped_storage().nbytes() for grad in grads if grad is not None
    }
    present = sum(grad.nbytes for grad in grads if grad is not None)
    assert sum(storages.values()) <= 1.1 * present


def test_checkpoints_go_round():
    """Saved with weights only, loaded into a fresh model and into one that has run; safetensors' demands are met."""
    model = build(MAKERS["norm"])
    observe(model, model, Batch())
    state = torch.load(saved(model.state_dict()), weights_only=True)
    assert list(state) == list(build(MAKERS["norm"]).state_dict())
    for ran in (False, True):
        for assign in (False, True):
            other = build(MAKERS["norm"], seed=1)
            if ran:
                observe(other, other, Batch())
            other.load_state_dict(state, assign=assign)
            assert_same(observe(other, other, Batch()), observe(model, oracle_of(model), Batch()))
    # safetensors refuses tensors of one storage that overlap, and takes bytes of contiguous ones.
    spans = sorted((value.data_ptr(), value.nbytes) for value in model.state_dict().values())
    assert all(start + size <= following for (start, size), (following, _) in itertools.pairwise(spans))
    flat = {
        key: bytes(value.detach().reshape(-1).view(torch.uint8).tolist()) for key, value in model.state_dict().items()
    }
    again = {
        key: torch.frombuffer(bytearray(flat[key]), dtype=value.dtype).view(value.shape)
        for key, value in model.state_dict().items()
    }
    other = build(MAKERS["norm"], seed=1)
    other.load_state_dict(again)
    assert_same(observe(other, other, Batch()), observe(model, oracle_of(model), Batch()))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_share_nothing(copied: Any):
    model = build(MAKERS["norm"])
    observe(model, model, Batch())
    other, twin = copied(model), build(MAKERS["norm"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for make_batch in BATCHES:
        assert_like_oracle(other, twin, make_batch)
    mine = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert not mine & {parameter.untyped_storage().data_ptr() for parameter in other.parameters()}


@pytest.mark.parametrize("make_optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
@pytest.mark.parametrize("foreach", [False, True])
def test_optimizers(make_optimizer: Any, foreach: bool):
    """Made before the first call; parameters that they hold are those that the model runs."""
    subject, twin = build(MAKERS["norm"]), build(MAKERS["norm"])
    options = {} if make_optimizer is torch.optim.SGD else {"eps": 1e-3}
    optimizers = [make_optimizer(model.parameters(), lr=0.05, foreach=foreach, **options) for model in (subject, twin)]
    for make_batch in BATCHES:
        for forward, optimizer in zip((subject, oracle_of(twin)), optimizers, strict=True):
            optimizer.zero_grad()
            make_batch()(forward).fused_hidden.pow(2).mean().backward()
            optimizer.step()
    assert_close(subject.parameters(), twin.parameters(), rtol=1e-4, atol=1e-5)
    assert len(optimizers[0].state) == len(optimizers[1].state)


def test_clipped_gradients_and_parameter_groups():
    subject, twin = build(MAKERS["norm"]), build(MAKERS["norm"])
    found = []
    for model, forward in ((subject, subject), (twin, oracle_of(twin))):
        groups = [
            {"params": expert.parameters(), "lr": 0.01 * (number + 1)}
            for number, expert in enumerate(experts_of(model))
        ]
        optimizer = torch.optim.SGD(groups)
        for make_batch in BATCHES:
            optimizer.zero_grad()
            make_batch()(forward).fused_hidden.pow(2).sum().backward()
            found.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5))
            optimizer.step()
    assert_close(found[: len(BATCHES)], found[len(BATCHES) :], rtol=1e-4, atol=1e-5)
    assert_close(subject.parameters(), twin.parameters(), rtol=1e-4, atol=1e-5)


def test_rows_in_another_order_of_memory():
    """Transposed, expanded and strided rows; each kind is the same kind of input to the user."""
    subject, twin = build(MAKERS["norm"]), build(MAKERS["norm"])
    routing = {LEVEL: [NAMES[number % 5] for number in range(12)]}
    base = torch.randn(12, WIDTH, generator=torch.Generator().manual_seed(0))
    for rows in (base.T.contiguous().T, base[:1].expand(12, -1), base.repeat(2, 1)[::2], base.repeat(1, 2)[:, ::2]):
        torch.testing.assert_close(subject(rows, routing).fused_hidden, oracle_of(twin)(rows, routing).fused_hidden)


def test_the_features_ran_grouped():
    """All of the above would pass with a loop."""
    for make in MAKERS.values():
        model = build(make)
        Batch()(model)
        assert_ran_grouped(model, Batch())
