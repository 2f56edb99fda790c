"""accelerate: a prepared model, optimizer and loader, with a plan in each batch."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import celmoe
from celmoe import RoutingPlan
from tests.bridges.hosts import assert_same, attached, bert, collator, experts_of, samples, stirred

accelerate = pytest.importorskip("accelerate")
SIZE, STEPS = 4, 6


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """accelerate keeps its state for the whole process."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def classifier(*, is_stacked: bool = False) -> Any:
    model = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    stirred(attached(model, "bert.encoder.layer.*"))
    if is_stacked:
        celmoe.adapters(model).stack()
    return model


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    return celmoe.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def loader_of(model: Any, size: int = SIZE) -> DataLoader[Any]:
    return DataLoader(samples(SIZE * STEPS), size, collate_fn=collator(model))


def by_hand(model: Any, steps: int = STEPS, size: int = SIZE) -> dict[str, torch.Tensor]:
    optimizer = optimizer_of(model)
    for step, batch in enumerate(loader_of(model, size)):
        if step == steps:
            break
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.state_dict())


def step_with(accelerator: Any, model: Any, optimizer: Any, batch: Any) -> None:
    with accelerator.accumulate(model):
        accelerator.backward(model(**batch).loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("is_stacked", [False, True])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_prepared_steps_are_those_of_a_loop(accumulated: int, is_stacked: bool) -> None:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulated)
    plain = classifier(is_stacked=is_stacked)
    model, optimizer, loader = accelerator.prepare(plain, optimizer_of(plain), loader_of(plain))
    for batch in loader:
        assert isinstance(batch["plan"], RoutingPlan)
        step_with(accelerator, model, optimizer, batch)
    assert accelerator.unwrap_model(model) is plain
    wanted = by_hand(classifier(is_stacked=is_stacked), size=SIZE * accumulated)
    assert_same(dict(plain.state_dict()), wanted, rtol=2e-3, atol=2e-4)
    assert not all(torch.equal(each, wanted[key]) for key, each in classifier().state_dict().items())


def test_bfloat16() -> None:
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    plain = classifier()
    before = experts_of(plain)
    model, optimizer, loader = accelerator.prepare(plain, optimizer_of(plain), loader_of(plain))
    for batch in loader:
        output = model(**batch)
        # accelerate gives float32 back.
        assert output.logits.dtype == torch.float32
        accelerator.backward(output.loss)
        optimizer.step()
        optimizer.zero_grad()
    assert {each.dtype for each in experts_of(plain).values()} == {torch.float32}
    assert any(not torch.equal(each, before[key]) for key, each in experts_of(plain).items())


@pytest.mark.parametrize("is_stacked", [False, True])
def test_a_state_saved_in_the_middle_goes_on(tmp_path: Path, is_stacked: bool) -> None:
    """Weights, moments and counts of steps: the second half ends where an uninterrupted run does."""

    def run(first: int, last: int, *, loads: bool = False, saves: bool = False) -> dict[str, torch.Tensor]:
        accelerator = accelerate.Accelerator(cpu=True)
        plain = classifier(is_stacked=is_stacked)
        model, optimizer, loader = accelerator.prepare(plain, optimizer_of(plain), loader_of(plain))
        if loads:
            accelerator.load_state(str(tmp_path))
        for number, batch in enumerate(loader):
            if first <= number < last:
                step_with(accelerator, model, optimizer, batch)
        if saves:
            accelerator.save_state(str(tmp_path))
        return dict(copy.deepcopy(plain.state_dict()))

    half = run(0, 3, saves=True)
    found = run(3, STEPS, loads=True)
    wanted = run(0, STEPS)
    assert_same(found, wanted, rtol=0.0, atol=0.0)
    assert not all(torch.equal(half[key], wanted[key]) for key in wanted)


def test_a_plan_moves_with_its_batch() -> None:
    """`send_to_device` asks each object for its ``to``."""
    model = classifier()
    batch = next(iter(loader_of(model)))
    moved = accelerate.utils.send_to_device(batch, torch.device("meta"))
    assert moved["plan"].device == torch.device("meta")
    assert moved["plan"].batch_size == SIZE
    assert batch["plan"].device == torch.device("cpu")


def test_the_size_of_a_batch_is_found() -> None:
    assert accelerate.utils.find_batch_size(next(iter(loader_of(classifier())))) == SIZE
