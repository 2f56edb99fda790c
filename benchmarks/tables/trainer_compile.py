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
from rich.table import Table
from torch import nn

import celmoe
from benchmarks.harness.one_table import REFUSED, ask
from benchmarks.harness.tables import write_rows
from benchmarks.harness.wording import ms_words

WITHOUT, ORDINARY, STACKED = "none", "ordinary", "stacked"
EAGER, COMPILED = "eager", "compiled"
WIDTH, WORDS, SIZE, POSITIONS = 64, 1000, 16, 32
# Steps in which the compiler may work: an epoch of ten, whose last batch is smaller.
FIRST = 10
SAMPLES = FIRST * SIZE - 5
TREE = {family: [f"{family}{number}" for number in range(4)] for family in ("slavic", "romance")}


class Adapter(nn.Module):
    """A bottleneck that begins as the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.down, self.up = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)
        nn.init.zeros_(self.up.weight)

    def forward(self, batch: celmoe.ExpertBatch) -> celmoe.ExpertResult:
        """``[samples, positions, WIDTH]`` to the same shape."""
        return celmoe.ExpertResult(batch.hidden + self.up(torch.relu(self.down(self.norm(batch.hidden)))))


def adapter(level: str, name: str, metadata: Any) -> Adapter:  # noqa: ARG001  # all alike
    """The expert of any level and name."""
    return Adapter()


def config() -> celmoe.CELMoEConfig:
    """Two families of four languages."""
    return celmoe.CELMoEConfig.from_tree(TREE, ("family", "language"), hidden_size=WIDTH)


def encoder(experts: str) -> Any:
    """An encoder of two layers with a classifier, and experts behind each layer."""
    from transformers import BertConfig, BertForSequenceClassification  # noqa: PLC0415  # takes seconds

    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 4 * WIDTH}
    model = BertForSequenceClassification(BertConfig(vocab_size=WORDS, hidden_size=WIDTH, **sizes))
    if experts != WITHOUT:
        celmoe.attach(model, config(), adapter, "bert.encoder.layer.*")
    if experts == STACKED:
        celmoe.adapters(model).stack()
    return model


class Batches:
    """Collates samples to batches whose number of positions differs from step to step, if asked to."""

    def __init__(self, experts: str, *, is_varied: bool) -> None:
        collate = torch.utils.data.default_collate
        routed = celmoe.Collator(celmoe.RoutingCompiler(config()), {"language": "lang"}, collate)
        self._collate = routed if experts != WITHOUT else self._without_route
        self._draw = random.Random(0) if is_varied else None

    def __call__(self, samples: list[Any]) -> dict[str, Any]:
        """The batch of some samples, with a plan if there are experts."""
        batch: dict[str, Any] = self._collate(samples)
        if self._draw is not None:
            batch["input_ids"] = batch["input_ids"][:, : self._draw.randint(POSITIONS // 2, POSITIONS)].contiguous()
        return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}

    @staticmethod
    def _without_route(samples: list[Any]) -> Any:
        kept = [{name: each for name, each in sample.items() if name != "lang"} for sample in samples]
        return torch.utils.data.default_collate(kept)


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
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=SIZE,
            torch_compile=way == COMPILED,
            remove_unused_columns=False,
            use_cpu=True,
            disable_tqdm=True,
            **options,
        )
        batches = Batches(experts, is_varied=is_varied)
        trainer = Trainer(encoder(experts), arguments, data_collator=batches, train_dataset=data(), callbacks=[Clock()])
        trainer.train()
    return found


def measure(experts: str, steps: int, *, is_varied: bool) -> dict[str, Any]:
    """Time both ways: half of the eager steps come before the compiled ones, and half after."""
    half = FIRST + steps // 2
    torch.compiler.reset()
    before = seconds_of(experts, EAGER, half, is_varied=is_varied)
    with tempfile.TemporaryDirectory() as cache:
        # The first steps' seconds are of a compiler that has seen nothing yet.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        compiled = seconds_of(experts, COMPILED, FIRST + steps, is_varied=is_varied)
        del os.environ["TORCHINDUCTOR_CACHE_DIR"]
    after = seconds_of(experts, EAGER, half, is_varied=is_varied)
    eager = [*before[FIRST:], *after[FIRST:]]
    low, middle, high = statistics.quantiles(compiled[FIRST:], n=4)
    of_eager = statistics.median(eager)
    return {
        "experts": experts,
        "positions": "varied" if is_varied else "fixed",
        "eager_ms": 1e3 * of_eager,
        "compiled_ms": 1e3 * middle,
        "ratio": middle / of_eager,
        "first_quartile": low / of_eager,
        "third_quartile": high / of_eager,
        "slowest_later_ms": 1e3 * max(compiled[FIRST:]),
        "first_seconds": sum(compiled[:FIRST]),
        "steps": steps,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure.

    Returns:
        0; 2 where an argument was refused.
    """
    asked = ask(
        "trainer-compile",
        __doc__,
        arguments,
        amount="steps",
        default="200",
        meaning=f"steps that are timed after the first {FIRST}",
    )
    if asked is None:
        return REFUSED
    console, report = asked.console, asked.report
    steps = max(4, round(asked.amount))
    table = Table(title=f"A step of the Trainer after the first {FIRST}, an encoder of two layers")
    for heading in ("experts", "positions", "eager, ms", "compiled, ms", "times as long", "slowest, ms", "first, s"):
        table.add_column(heading)
    rows: list[dict[str, Any]] = []
    for experts in (WITHOUT, ORDINARY, STACKED):
        for is_varied in (False, True):
            found = measure(experts, steps, is_varied=is_varied)
            times = [ms_words(found[name]) for name in ("eager_ms", "compiled_ms")]
            quartiles = f"({found['first_quartile']:.2f} to {found['third_quartile']:.2f})"
            ratio = f"{found['ratio']:.2f} {quartiles}"
            slowest = ms_words(found["slowest_later_ms"])
            table.add_row(experts, found["positions"], *times, ratio, slowest, f"{found['first_seconds']:.0f}")
            rows.append({name: f"{each:.4f}" if isinstance(each, float) else each for name, each in found.items()})
            write_rows(report / "trainer_compile.csv", rows)
    console.print(table)
    return 0
