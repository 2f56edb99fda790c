"""The `Trainer` of transformers: a plan in each batch, and everything that it does around a step."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import celmoe
from tests.bridges.hosts import (
    assert_same,
    attached,
    bert,
    collator,
    experts_of,
    llama,
    planned,
    routes,
    samples,
    stirred,
    words,
)
from tests.slow import slow_after

transformers = pytest.importorskip("transformers")

# The name of before, which the oldest of the tested versions knows; and what PyTorch's own compiler calls.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_kwargs` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]
WHERE = "bert.encoder.layer.*"
SIZE, STEPS = 8, 6


def classifier(*, is_stacked: bool = False, **others: Any) -> Any:
    """A model without dropout, whose experts are no identity."""
    model = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **others)
    stirred(attached(model, WHERE))
    if is_stacked:
        celmoe.adapters(model).stack()
    return model


def trainer_of(model: Any, folder: Path, *, data: Any = None, **others: Any) -> Any:
    optimizer = others.pop("optimizer", None)
    arguments = {
        "per_device_train_batch_size": SIZE,
        "per_device_eval_batch_size": SIZE,
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "remove_unused_columns": False,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "seed": 5,
        **others,
    }
    return transformers.Trainer(
        model,
        transformers.TrainingArguments(str(folder), **arguments),
        data_collator=collator(model),
        train_dataset=samples(SIZE * STEPS) if data is None else data,
        eval_dataset=samples(SIZE * 2 + 3),
        optimizers=(None, None) if optimizer is None else (optimizer, None),
    )


def losses_of(trainer: Any) -> list[float]:
    return [each["loss"] for each in trainer.state.log_history if "loss" in each]


def gradients_of(trainer: Any) -> list[float]:
    return [each["grad_norm"] for each in trainer.state.log_history if "grad_norm" in each]


def trained(model: Any, folder: Path, **others: Any) -> Any:
    trainer = trainer_of(model, folder, **others)
    trainer.train()
    return trainer


def by_hand(model: Any) -> list[float]:
    """The losses of the same training, in a loop over its steps."""
    torch.manual_seed(0)
    data, losses = samples(SIZE * STEPS), []
    decayed = [
        each for name, each in model.named_parameters() if not name.endswith("bias") and "norm" not in name.lower()
    ]
    others = [each for each in model.parameters() if not any(each is one for one in decayed)]
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": others}], lr=1e-3, weight_decay=0.0)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(5)).tolist()
    for step in range(STEPS):
        batch = collator(model)([data[place] for place in order[step * SIZE : (step + 1) * SIZE]])
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 - step / STEPS)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_trainer_trains_as_a_loop_does(tmp_path: Path) -> None:
    trainer = trained(classifier(), tmp_path)
    torch.testing.assert_close(losses_of(trainer), by_hand(classifier()), rtol=1e-4, atol=1e-4)


def test_languages_without_samples_stay_as_they_are(tmp_path: Path) -> None:
    """Weight decay included, which would move every parameter that has a gradient."""
    model = classifier()
    before = experts_of(model)
    trained(model, tmp_path, data=samples(SIZE * STEPS, ["de", "fr"]), weight_decay=0.1)
    moved = {key for key, each in experts_of(model).items() if not torch.equal(each, before[key])}
    assert {key.split(".celmoe.level_modules.")[1].split(".")[1] for key in moved} == {
        "germanic",
        "romance",
        "de",
        "fr",
    }


def test_bfloat16(tmp_path: Path) -> None:
    model = classifier()
    found = trained(model, tmp_path, bf16=True)
    wanted = trained(classifier(), tmp_path)
    assert {each.dtype for each in experts_of(model).values()} == {torch.float32}
    assert losses_of(found) != losses_of(wanted)
    torch.testing.assert_close(losses_of(found), losses_of(wanted), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("is_stacked", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(tmp_path: Path, use_reentrant: bool, is_stacked: bool) -> None:
    """Losses and norms of gradients are those without. A reentrant checkpoint wants inputs that require gradients."""
    model = classifier(is_stacked=is_stacked)
    model.enable_input_require_grads()
    found = trained(
        model,
        tmp_path,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
    )
    wanted = trained(classifier(is_stacked=is_stacked), tmp_path)
    assert losses_of(found) == pytest.approx(losses_of(wanted), abs=1e-4)
    assert gradients_of(found) == pytest.approx(gradients_of(wanted), rel=1e-4)
    assert_same(experts_of(model), experts_of(wanted.model), rtol=1e-4, atol=1e-5)


def decoder_losses(folder: Path, **others: Any) -> tuple[list[float], list[float]]:
    model = stirred(attached(llama(), "model.layers.*"))
    data = [{**each, "labels": each["input_ids"]} for each in samples(SIZE * STEPS)]
    trainer = trained(model, folder, data=data, **others)
    return losses_of(trainer), gradients_of(trainer)


def test_a_decoder_with_checkpoints_in_bfloat16(tmp_path: Path) -> None:
    found, wanted = (decoder_losses(tmp_path, bf16=True, gradient_checkpointing=way) for way in (True, False))
    assert found[0] == pytest.approx(wanted[0], abs=1e-3)
    assert found[1] == pytest.approx(wanted[1], rel=1e-2)


@pytest.mark.parametrize("is_stacked", [False, True])
def test_an_interrupted_run_goes_on(tmp_path: Path, is_stacked: bool) -> None:
    """The weights are those of a run without the interruption; stacked with an optimizer that skips absent experts."""

    def build() -> tuple[Any, Any]:
        model = classifier(is_stacked=is_stacked)
        optimizer = celmoe.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1) if is_stacked else None
        return model, optimizer

    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "data": samples(SIZE * STEPS, ["de", "fr"])}
    model, optimizer = build()
    trained(model, tmp_path, optimizer=optimizer, **options)
    other, optimizer = build()
    trainer = trainer_of(other, tmp_path / "on", optimizer=optimizer, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert trainer.state.global_step == STEPS
    wanted = model.state_dict()
    assert_same(dict(other.state_dict()), dict(wanted), rtol=0.0, atol=0.0)
    # The first half alone is something else.
    half, _ = build()
    celmoe.load_adapters(half, tmp_path / "checkpoint-3" / "model.safetensors")
    assert any(not torch.equal(each, wanted[key]) for key, each in experts_of(half).items())


def test_stacked_experts_train_as_ordinary_ones(tmp_path: Path) -> None:
    found, wanted = classifier(is_stacked=True), classifier()
    for model in (found, wanted):
        kind = celmoe.optim.AdamW if model is found else torch.optim.AdamW
        optimizer = kind(model.parameters(), lr=1e-2, weight_decay=0.1)
        data = samples(SIZE * STEPS, ["de", "fr", "it"])
        # Clipped, for the norm of a stack's gradient is that of all its experts'.
        trained(model, tmp_path, optimizer=optimizer, max_grad_norm=0.5, data=data)
    assert_same(experts_of(found), experts_of(wanted), rtol=1e-4, atol=1e-5)


def test_evaluation_and_prediction(tmp_path: Path) -> None:
    """On a data set whose last batch is smaller."""
    model = classifier()
    trainer = trainer_of(model, tmp_path)
    data = samples(SIZE * 2 + 3)
    batch = collator(model)(data)
    model.eval()
    with torch.no_grad():
        wanted = model(**batch)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(wanted.loss.item(), rel=1e-5)
    found = torch.from_numpy(trainer.predict(data).predictions)
    torch.testing.assert_close(found, wanted.logits, rtol=1e-5, atol=1e-6)


def test_accumulated_batches(tmp_path: Path) -> None:
    """Two batches a step are one that is twice as large."""
    found = decoder_losses(tmp_path, gradient_accumulation_steps=2, max_steps=3)
    wanted = decoder_losses(tmp_path, per_device_train_batch_size=2 * SIZE, max_steps=3)
    assert found[0] == pytest.approx(wanted[0], rel=1e-4)
    assert found[1] == pytest.approx(wanted[1], rel=1e-3)


def test_a_frozen_host(tmp_path: Path) -> None:
    model = classifier()
    celmoe.freeze_host(model)
    host = {key: each.clone() for key, each in model.state_dict().items() if ".celmoe." not in key}
    before = experts_of(model)
    trained(model, tmp_path, gradient_checkpointing=True)
    after = model.state_dict()
    assert all(torch.equal(after[key], each) for key, each in host.items())
    assert any(not torch.equal(after[key], each) for key, each in before.items())


def test_without_a_plan_training_ends_with_the_reason(tmp_path: Path) -> None:
    trainer = trainer_of(classifier(), tmp_path)
    trainer.data_collator = lambda rows: transformers.default_data_collator(
        [{key: each for key, each in row.items() if key != "lang"} for row in rows]
    )
    with pytest.raises(celmoe.MissingRouteError, match="'plan' must be given to a model with experts at"):
        trainer.train()


@pytest.mark.slow
def test_compiled(tmp_path: Path) -> None:
    """PyTorch's own compiler, on a model with one layer: losses are those without, up to rounding."""
    torch._dynamo.reset()
    small = {"num_hidden_layers": 1, "intermediate_size": 32}
    found = trained(classifier(is_stacked=True, **small), tmp_path, torch_compile=True)
    assert not counters["graph_break"]
    wanted = trained(classifier(is_stacked=True, **small), tmp_path)
    assert losses_of(found) == pytest.approx(losses_of(wanted), abs=2e-4)
    assert gradients_of(found) == pytest.approx(gradients_of(wanted), rel=1e-3)


def of_many_shapes(model: Any, *, has_plan: bool) -> Any:
    """Collates other numbers of positions every time; the data set's last batch is of another size by itself."""
    inner, lengths = collator(model), itertools.cycle([7, 6, 5, 4])

    def collate(rows: list[Any]) -> Any:
        length, batch = next(lengths), inner(rows)
        given = {name: batch[name][:, :length].contiguous() for name in ("input_ids", "attention_mask")}
        return {**given, "labels": batch["labels"], **({"plan": batch["plan"]} if has_plan else {})}

    return collate


@pytest.mark.parametrize(("kind", "captures"), slow_after(1, [("ordinary", 1), ("without experts", 0), ("stacked", 1)]))
def test_a_graph_for_all_positions_and_one_for_all_sizes(tmp_path: Path, kind: str, captures: int) -> None:
    """As many graphs as without experts, and one more for batches in expert order. Experts are captured once."""
    torch._dynamo.reset()
    counters.clear()
    model = classifier(is_stacked=kind == "stacked", num_hidden_layers=1)
    # Graphs are made, and run as they are.
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
    trainer = trainer_of(model, tmp_path, data=samples(SIZE * 6 + 3), max_steps=-1, num_train_epochs=2, **compiled)
    trainer.data_collator = of_many_shapes(model, has_plan=captures > 0)
    if not captures:
        celmoe.detach(model)
    trainer.train()
    assert not counters["graph_break"]
    # Some of these small batches are in expert order by chance: their indices begin the plan's buffer.
    sorted_ones = 1 if captures else 0
    assert counters["stats"]["unique_graphs"] == 3 + captures + sorted_ones


def test_what_is_saved_is_the_model(tmp_path: Path) -> None:
    """`save_model` of a trainer, then a bare model with experts attached."""
    trainer = trained(classifier(is_stacked=True), tmp_path)
    trainer.save_model(str(tmp_path / "saved"))
    other = attached(transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval(), WHERE)
    celmoe.load_adapters(other, tmp_path / "saved" / "model.safetensors")
    given, plan = words(5), planned(other, routes(5))
    assert torch.equal(other(**given, plan=plan).logits, trainer.model.eval()(**given, plan=plan).logits)
