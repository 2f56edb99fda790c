"""LoRA for many languages: attached experts in one mixed batch, beside PEFT's adapters language by language.

PEFT trains one adapter at a time, so a batch of 32 languages is 32 passes. Both train the same weights on the same
rows, and are compared before they are timed.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import track
from rich.table import Table
from torch import nn

import celmoe
from benchmarks.harness.interleaved import Timings, interleave
from benchmarks.harness.one_table import REFUSED, ask
from benchmarks.harness.tables import write_rows
from benchmarks.harness.wording import ms_words

MIXED, STACKED, SWITCHED = "one batch", "one batch, stacked", "PEFT, language by language"
RANK, ALPHA, TOKENS = 8, 16, 100
WHERE = ("encoder.layer.*.attention.self.query", "encoder.layer.*.attention.self.value")
# The tolerance of all engines in float32.
TOLERANCE = 1e-5


class DifferentError(RuntimeError):
    """The contenders compute something else."""


@dataclass(frozen=True)
class Size:
    """A small encoder, and a batch for it.

    Attributes:
        width: The hidden size.
        layers: Layers of the encoder.
        positions: Tokens of each sample.
        languages: Languages in the batch.
        rows: Samples of each language.
    """

    width: int
    layers: int
    positions: int
    languages: int = 32
    rows: int = 4


SIZES = (Size(64, 2, 16), Size(128, 2, 16), Size(256, 2, 16), Size(128, 4, 16), Size(128, 2, 64))


class Step:
    """A training step: forward, backward, clipping, AdamW.

    Attributes:
        losses: The losses of the last step, by language.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model = model
        self.trained = [each for each in model.parameters() if each.requires_grad]
        self.optimizer = optimizer
        self.losses: list[torch.Tensor] = []

    def __call__(self) -> None:
        """Take the step."""
        self.optimizer.zero_grad()
        self.losses = self.passes()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()

    def passes(self) -> list[torch.Tensor]:
        """Make the forward and backward passes; returns the loss of each language."""
        raise NotImplementedError


class Together(Step):
    """All languages in one batch, by attached experts."""

    def __init__(self, size: Size, host: nn.Module, *, is_stacked: bool) -> None:
        torch.manual_seed(1)
        config = celmoe.CELMoEConfig.from_tree({"all": names_of(size)}, ("all", "language"), hidden_size=size.width)
        config.levels[0].enabled = False
        celmoe.attach(
            host, config, lambda *_: celmoe.zoo.LoRA(size.width, rank=RANK, alpha=ALPHA), WHERE, engine="auto"
        )
        celmoe.freeze_host(host)
        if is_stacked:
            celmoe.adapters(host).stack()
        trained = [each for each in host.parameters() if each.requires_grad]
        super().__init__(host, celmoe.optim.AdamW(trained, lr=1e-3))
        self.tokens, self.targets = tokens_of(size), targets_of(size)
        compiler = celmoe.adapters(host).compiler
        self.routing = {"language": [name for name in names_of(size) for _ in range(size.rows)]}
        self.compiler, self.size = compiler, size

    def passes(self) -> list[torch.Tensor]:
        """The loss is the sum over languages of each language's mean."""
        with celmoe.routed(self.model, self.compiler(self.routing)):
            hidden = self.model(self.tokens).last_hidden_state
        errors = (hidden - self.targets).square()
        by_language = errors.view(self.size.languages, -1).mean(-1)
        by_language.sum().backward()
        return list(by_language.detach())


class OneByOne(Step):
    """A pass for each language, by PEFT's adapters."""

    def __init__(self, size: Size, host: nn.Module) -> None:
        import peft  # noqa: PLC0415  # an extra

        torch.manual_seed(1)
        options = {"r": RANK, "lora_alpha": ALPHA, "target_modules": ["query", "value"]}
        names = names_of(size)
        model = peft.get_peft_model(host, peft.LoraConfig(**options), adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, peft.LoraConfig(**options))
        trained = [each for key, each in model.named_parameters() if "lora_" in key]
        super().__init__(model, torch.optim.AdamW(trained, lr=1e-3))
        self.trained = trained
        batches = zip(tokens_of(size).split(size.rows), targets_of(size).split(size.rows), strict=True)
        self.blocks = list(zip(names, batches, strict=True))

    def passes(self) -> list[torch.Tensor]:
        """Switch to each language, and make its passes."""
        losses = []
        for name, (tokens, targets) in self.blocks:
            self.model.set_adapter(name)  # type: ignore[operator]  # PEFT's own
            loss = (self.model(tokens).last_hidden_state - targets).square().mean()
            loss.backward()
            losses.append(loss.detach())
        return losses


def names_of(size: Size) -> list[str]:
    """The languages."""
    return [f"language{number:02d}" for number in range(size.languages)]


def tokens_of(size: Size) -> torch.Tensor:
    """``[languages * rows, positions]``, language by language."""
    shape = size.languages * size.rows, size.positions
    return torch.randint(0, TOKENS, shape, generator=torch.Generator().manual_seed(0))


def targets_of(size: Size) -> torch.Tensor:
    """``[languages * rows, positions, width]``, to be reached."""
    shape = size.languages * size.rows, size.positions, size.width
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def hosts_of(size: Size, number: int) -> list[nn.Module]:
    """Encoders of the same random weights, without dropout, so that all contenders compute the same."""
    import transformers  # noqa: PLC0415  # an extra

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=TOKENS,
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=4,
        intermediate_size=4 * size.width,
        max_position_embeddings=size.positions,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    host = transformers.BertModel(config, add_pooling_layer=False)
    return [copy.deepcopy(host) for _ in range(number)]


def contenders(size: Size) -> dict[str, Step]:
    """The contenders, with the same weights."""
    first, second, third = hosts_of(size, 3)
    switched = OneByOne(size, first)
    steps: dict[str, Step] = {MIXED: Together(size, second, is_stacked=False)}
    steps[STACKED] = Together(size, third, is_stacked=True)
    theirs = dict(switched.model.named_parameters())
    with torch.no_grad():
        for together in steps.values():
            for place, hierarchy in celmoe.adapters(together.model).items():
                for name in names_of(size):
                    expert: Any = hierarchy.level_modules["language"][name]  # type: ignore[index]  # by real names
                    for own, other in ((expert.down, "lora_A"), (expert.up, "lora_B")):
                        # PEFT's second factor starts at zero, and then the first has no gradient.
                        source = theirs[f"base_model.model.{place}.{other}.{name}.weight"]
                        if other == "lora_B" and together is steps[MIXED]:
                            source.normal_(0.0, 0.02)
                        own.weight.copy_(source)
    return {**steps, SWITCHED: switched}


def difference(steps: dict[str, Step]) -> float:
    """The largest difference of the losses and of the adapters' gradients, relative to the largest value.

    Raises:
        DifferentError: It is more than rounding.
    """
    found = 0.0
    for step in steps.values():
        step.optimizer.zero_grad()
        step.losses = step.passes()
    switched = steps[SWITCHED]
    theirs = dict(switched.model.named_parameters())
    for name, step in steps.items():
        if name == SWITCHED:
            continue
        pairs: list[tuple[Any, Any]] = [(torch.stack(step.losses), torch.stack(switched.losses))]
        for place, hierarchy in celmoe.adapters(step.model).items():
            for language, expert in hierarchy.level_modules["language"].items():  # type: ignore[operator]  # by real names
                for own, other in ((expert.down, "lora_A"), (expert.up, "lora_B")):
                    key = f"base_model.model.{place}.{other}.{language}.weight"
                    pairs.append((own.weight.grad, theirs[key].grad))
        apart = torch.stack([(ours - other).abs().max() / other.abs().max() for ours, other in pairs])
        found = max(found, float(apart.max()))
        # Written so that NaN is caught, too.
        if not (apart < TOLERANCE).all():
            raise DifferentError(f"{name!r} must compute the same as {SWITCHED!r} (got a difference of {apart.max()})")
    return found


def measure(size: Size, seconds: float) -> tuple[Timings, float]:
    """Time whole steps in turn; and the difference of the first ones."""
    steps = contenders(size)
    apart = difference(steps)
    return interleave(steps, seconds), apart


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure.

    Returns:
        0; 2 if an argument was refused.
    """
    asked = ask(
        "lora-languages",
        __doc__,
        arguments,
        amount="seconds",
        default="20",
        meaning="about how long each line goes on",
    )
    if asked is None:
        return REFUSED
    console, report = asked.console, asked.report
    seconds = asked.amount
    table = Table(title="A training step of LoRA adapters: all languages in one batch, beside one language at a time")
    for heading in (
        "encoder",
        "batch",
        f"{SWITCHED}, ms",
        "experts",
        "ms",
        "times as fast (middle half)",
        "difference",
    ):
        table.add_column(heading)
    rows = []
    for size in track(SIZES, console=console):
        timings, apart = measure(size, seconds)
        for name in (MIXED, STACKED):
            low, high = timings.quartiles(SWITCHED, name)
            found = {"ratio": timings.ratio(SWITCHED, name), "first_quartile": low, "third_quartile": high}
            ms = {each: 1e3 * timings.median(each) for each in (SWITCHED, name)}
            way = "stacked" if name == STACKED else "plain"
            table.add_row(
                f"{size.layers} layers, width {size.width}",
                f"{size.languages} languages, {size.rows} rows each, {size.positions} tokens",
                ms_words(ms[SWITCHED]),
                way,
                ms_words(ms[name]),
                f"{found['ratio']:.2f} ({low:.2f} to {high:.2f})",
                f"{apart:.0e}",
            )
            rows.append(
                {
                    **vars(size),
                    "experts_are": way,
                    "switched_ms": f"{ms[SWITCHED]:.3f}",
                    "together_ms": f"{ms[name]:.3f}",
                    **{key: f"{value:.3f}" for key, value in found.items()},
                    "difference": f"{apart:.1e}",
                    "rounds": timings.rounds,
                }
            )
        write_rows(report / "lora_languages.csv", rows)
    console.print(table)
    return 0
