"""Steps of transformers' ``Trainer`` with ``torch_compile=True``, beside the same steps without."""

from __future__ import annotations

import os
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch

import celmoe
from benchmarks.harness.one_table import Lines, ask, count, ratio_words, refusing
from benchmarks.harness.wording import ms_words

WITHOUT, ORDINARY, STACKED = "none", "ordinary", "stacked"
FIXED, VARIED = "fixed", "varied"
LINES = [(experts, positions) for experts in (WITHOUT, ORDINARY, STACKED) for positions in (FIXED, VARIED)]
EAGER, COMPILED = "eager", "compiled"
WIDTH, INNER, WORDS, SIZE, POSITIONS = 64, 16, 1000, 16, 32
# Steps in which the compiler may work: an epoch of ten, whose last batch is smaller.
FIRST = 10
SAMPLES = FIRST * SIZE - 5
TREE = {family: [f"{family}{number}" for number in range(4)] for family in ("slavic", "romance")}
CONFIG = celmoe.CELMoEConfig.from_tree(TREE, ("family", "language"), hidden_size=WIDTH)
STEPS = count("steps", "200", f"steps that are timed after the first {FIRST}", 4)


def encoder(experts: str) -> Any:
    """An encoder of two layers with a classifier, and experts behind each layer."""
    from transformers import BertConfig, BertForSequenceClassification  # noqa: PLC0415  # takes seconds

    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 4 * WIDTH}
    model = BertForSequenceClassification(BertConfig(vocab_size=WORDS, hidden_size=WIDTH, **sizes))
    if experts != WITHOUT:
        celmoe.attach(model, CONFIG, lambda *_: celmoe.zoo.Pfeiffer(WIDTH, INNER), "bert.encoder.layer.*")
    if experts == STACKED:
        celmoe.adapters(model).stack()
    return model


class Batches:
    """Collates samples to batches, with plans for experts; the number of positions may differ from step to step."""

    def __init__(self, experts: str, *, is_varied: bool) -> None:
        collate = torch.utils.data.default_collate
        routed = celmoe.Collator(celmoe.RoutingCompiler(CONFIG), {"language": "lang"}, collate)
        self._collate = routed if experts != WITHOUT else collate
        self._draw = random.Random(0) if is_varied else None

    def __call__(self, samples: list[Any]) -> dict[str, Any]:
        """The batch."""
        batch: dict[str, Any] = self._collate(samples)
        batch.pop("lang", None)
        if self._draw is not None:
            batch["input_ids"] = batch["input_ids"][:, : self._draw.randint(POSITIONS // 2, POSITIONS)].contiguous()
        return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}


def data() -> list[dict[str, Any]]:
    """Sentences, each with a label and a language."""
    draw = random.Random(0)
    languages = [name for names in TREE.values() for name in names]
    return [
        {
            "input_ids": torch.tensor([draw.randrange(WORDS) for _ in range(POSITIONS)]),
            "labels": draw.randrange(2),
            "lang": draw.choice(languages),
        }
        for _ in range(SAMPLES)
    ]


def seconds_of(experts: str, way: str, steps: int, *, is_varied: bool) -> list[float]:
    """The seconds of each step of a training, from the first on."""
    from transformers import Trainer, TrainerCallback, TrainingArguments  # noqa: PLC0415  # takes seconds

    found: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]  # the package may be missing
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            found.append(time.perf_counter() - self.start)

    options = {"max_steps": steps, "logging_strategy": "no", "save_strategy": "no", "report_to": []}
    options |= {"per_device_train_batch_size": SIZE, "remove_unused_columns": False}
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(folder, torch_compile=way == COMPILED, use_cpu=True, disable_tqdm=True, **options)
        batches = Batches(experts, is_varied=is_varied)
        Trainer(encoder(experts), arguments, data_collator=batches, train_dataset=data(), callbacks=[Clock()]).train()
    return found


def measure(experts: str, steps: int, *, is_varied: bool) -> dict[str, float]:
    """Time both ways: half of the eager steps come before the compiled ones, and half after."""
    half = FIRST + steps // 2
    torch.compiler.reset()
    eager = seconds_of(experts, EAGER, half, is_varied=is_varied)[FIRST:]
    with tempfile.TemporaryDirectory() as cache:
        # The first steps' seconds are of a compiler that has seen nothing yet.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        compiled = seconds_of(experts, COMPILED, FIRST + steps, is_varied=is_varied)
        del os.environ["TORCHINDUCTOR_CACHE_DIR"]
    eager += seconds_of(experts, EAGER, half, is_varied=is_varied)[FIRST:]
    low, middle, high = statistics.quantiles(compiled[FIRST:], n=4)
    of_eager = statistics.median(eager)
    return {
        "eager_ms": 1e3 * of_eager,
        "compiled_ms": 1e3 * middle,
        "ratio": middle / of_eager,
        "first_quartile": low / of_eager,
        "third_quartile": high / of_eager,
        "slowest_later_ms": 1e3 * max(compiled[FIRST:]),
        "first_seconds": sum(compiled[:FIRST]),
    }


@refusing
def main(arguments: Sequence[str]) -> int:
    """Measure; returns the exit code."""
    asked = ask("trainer-compile", __doc__, arguments, STEPS)
    asked.start()
    title = f"A step of the Trainer after the first {FIRST}, an encoder of two layers"
    headings = ("experts", "positions", "eager, ms", "compiled, ms", "times as long", "slowest, ms", "first, s")
    lines = Lines(asked, "trainer_compile", title, headings)
    for experts, positions in lines.over(LINES):
        found = measure(experts, asked[STEPS], is_varied=positions == VARIED)
        eager, compiled, slowest = (ms_words(found[f"{each}_ms"]) for each in (EAGER, COMPILED, "slowest_later"))
        columns = {name: f"{value:.4f}" for name, value in found.items()}
        cells = eager, compiled, ratio_words(found), slowest, f"{found['first_seconds']:.0f}"
        line = {"experts": experts, "positions": positions, **columns, "steps": asked[STEPS]}
        lines.add(line, experts, positions, *cells)
    return 0
