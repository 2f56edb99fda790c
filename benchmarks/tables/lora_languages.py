"""LoRA for many languages: attached experts in one mixed batch, beside PEFT's adapters language by language.

PEFT trains one adapter at a time, so a batch of 32 languages is 32 passes. Both train the same weights on the same
rows, and are compared before they are timed.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import celmoe
from benchmarks.harness.interleaved import Timings, interleave
from benchmarks.harness.one_table import Lines, amount, ask, ratio_words, refusing
from benchmarks.harness.tables import ratio_columns
from benchmarks.harness.wording import ms_words

MIXED, STACKED, SWITCHED = "one batch", "one batch, stacked", "PEFT, language by language"
WAYS = {MIXED: "plain", STACKED: "stacked"}
RANK, ALPHA, TOKENS, RATE = 8, 16, 100, 1e-3
# Of the layers that get adapters, and of an adapter's two factors.
LAYERS = ("query", "value")
FACTORS = {"down": "lora_A", "up": "lora_B"}
# The tolerance of all engines in float32.
TOLERANCE = 1e-5
SECONDS = amount("seconds", "20", "about how long each line goes on")


class DifferentError(RuntimeError):
    """The contenders compute something else."""


@dataclass(frozen=True)
class Size:
    """A small encoder, and a batch with so many rows of each language."""

    width: int
    layers: int
    positions: int
    languages: int = 32
    rows: int = 4

    @property
    def names(self) -> list[str]:
        """The languages."""
        return [f"language{number:02d}" for number in range(self.languages)]

    @property
    def tokens(self) -> torch.Tensor:
        """``[languages * rows, positions]``, language by language."""
        shape = self.languages * self.rows, self.positions
        return torch.randint(0, TOKENS, shape, generator=torch.Generator().manual_seed(0))

    @property
    def targets(self) -> torch.Tensor:
        """``[languages * rows, positions, width]``, to be reached."""
        shape = self.languages * self.rows, self.positions, self.width
        return torch.randn(shape, generator=torch.Generator().manual_seed(1))

    def host(self) -> nn.Module:
        """An encoder of random weights, without dropout, so that all contenders compute the same."""
        import transformers  # noqa: PLC0415  # an extra

        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=TOKENS,
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=4,
            intermediate_size=4 * self.width,
            max_position_embeddings=self.positions,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        return transformers.BertModel(config, add_pooling_layer=False)  # type: ignore[no-any-return]  # not typed


SIZES = (Size(64, 2, 16), Size(128, 2, 16), Size(256, 2, 16), Size(128, 4, 16), Size(128, 2, 64))


class Step(ABC):
    """A training step: forward, backward, clipping, AdamW."""

    def __init__(self, model: nn.Module, trained: Iterable[nn.Parameter], optimizer: Any) -> None:
        self.model = model
        self.trained = list(trained)
        self.optimizer = optimizer(self.trained, lr=RATE)

    def __call__(self) -> None:
        """Take the step."""
        self.optimizer.zero_grad()
        self.passes()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()

    @abstractmethod
    def passes(self) -> torch.Tensor:
        """Make the forward and backward passes; returns the loss of each language."""

    @abstractmethod
    def factors(self) -> Mapping[str, nn.Parameter]:
        """The factors of all adapters, by PEFT's names."""


class Together(Step):
    """All languages in one batch, by attached experts."""

    def __init__(self, size: Size, host: nn.Module, *, is_stacked: bool) -> None:
        torch.manual_seed(1)
        config = celmoe.CELMoEConfig.from_tree({"all": size.names}, ("all", "language"), hidden_size=size.width)
        config.levels[0].enabled = False
        where = [f"encoder.layer.*.attention.self.{layer}" for layer in LAYERS]
        celmoe.attach(
            host, config, lambda *_: celmoe.zoo.LoRA(size.width, rank=RANK, alpha=ALPHA), where, engine="auto"
        )
        celmoe.freeze_host(host)
        if is_stacked:
            celmoe.adapters(host).stack()
        super().__init__(host, (each for each in host.parameters() if each.requires_grad), celmoe.optim.AdamW)
        self.tokens, self.targets, self.languages = size.tokens, size.targets, size.languages
        self.compiler = celmoe.adapters(host).compiler
        self.routing = {"language": [name for name in size.names for _ in range(size.rows)]}

    def passes(self) -> torch.Tensor:
        """The loss is the sum over languages of each language's mean."""
        with celmoe.routed(self.model, self.compiler(self.routing)):
            hidden = self.model(self.tokens).last_hidden_state
        losses: torch.Tensor = (hidden - self.targets).square().view(self.languages, -1).mean(-1)
        losses.sum().backward()
        return losses.detach()

    def factors(self) -> Mapping[str, nn.Parameter]:
        """See `Step`; parts of the stacks if there are any."""
        experts: list[tuple[str, str, Any]] = [
            (place, name, expert)
            for place, hierarchy in celmoe.adapters(self.model).items()
            for name, expert in hierarchy.level_modules["language"].items()  # type: ignore[operator]  # by real names
        ]
        return {
            f"base_model.model.{place}.{theirs}.{name}.weight": getattr(expert, ours).weight
            for place, name, expert in experts
            for ours, theirs in FACTORS.items()
        }


class OneByOne(Step):
    """A pass for each language, by PEFT's adapters."""

    def __init__(self, size: Size, host: nn.Module) -> None:
        import peft  # noqa: PLC0415  # an extra

        torch.manual_seed(1)
        first, *others = size.names
        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(LAYERS))
        model = peft.get_peft_model(host, config, adapter_name=first)
        for name in others:
            model.add_adapter(name, config)
        trained = {key: each for key, each in model.named_parameters() if "lora_" in key}
        super().__init__(model, trained.values(), torch.optim.AdamW)
        self._factors = trained
        self.batches = list(zip(size.names, size.tokens.split(size.rows), size.targets.split(size.rows), strict=True))

    def passes(self) -> torch.Tensor:
        """Switch to each language, and make its passes."""
        losses = []
        for name, tokens, targets in self.batches:
            self.model.set_adapter(name)  # type: ignore[operator]  # PEFT's own
            loss = (self.model(tokens).last_hidden_state - targets).square().mean()
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses)

    def factors(self) -> Mapping[str, nn.Parameter]:
        """See `Step`."""
        return self._factors


@torch.no_grad()
def contenders(size: Size) -> dict[str, Step]:
    """The contenders, with the same weights."""
    host = size.host()
    switched = OneByOne(size, copy.deepcopy(host))
    together = {name: Together(size, copy.deepcopy(host), is_stacked=name == STACKED) for name in WAYS}
    for name, factor in switched.factors().items():
        # PEFT's second factor starts at zero, and then the first has no gradient.
        if FACTORS["up"] in name:
            factor.normal_(0.0, 0.02)
        for step in together.values():
            step.factors()[name].copy_(factor)
    return {**together, SWITCHED: switched}


def difference(steps: Mapping[str, Step]) -> float:
    """The largest difference of the losses and of the adapters' gradients, relative to the largest value.

    Raises:
        DifferentError: It is more than rounding.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, step in steps.items():
        step.optimizer.zero_grad()
        losses = step.passes()
        found[name] = {"losses": losses, **{key: factor.grad for key, factor in step.factors().items()}}
    theirs, largest = found.pop(SWITCHED), 0.0
    for name, ours in found.items():
        apart = torch.stack([(ours[key] - each).abs().max() / each.abs().max() for key, each in theirs.items()])
        # Written so that NaN is caught, too.
        if not (apart < TOLERANCE).all():
            raise DifferentError(f"{name!r} must compute the same as {SWITCHED!r} (got a difference of {apart.max()})")
        largest = max(largest, float(apart.max()))
    return largest


def measure(size: Size, seconds: float) -> tuple[Timings, float]:
    """Time whole steps in turn; and the difference of the first ones."""
    steps = contenders(size)
    apart = difference(steps)
    return interleave(steps, seconds), apart


@refusing
def main(arguments: Sequence[str]) -> int:
    """Measure; returns the exit code."""
    asked = ask("lora-languages", __doc__, arguments, SECONDS)
    asked.start()
    title = "A training step of LoRA adapters: all languages in one batch, beside one language at a time"
    headings = ("encoder", "batch", f"{SWITCHED}, ms", "experts", "ms", "times as fast (middle half)", "difference")
    lines = Lines(asked, "lora_languages", title, headings)
    for size in lines.over(SIZES):
        timings, apart = measure(size, asked[SECONDS])
        encoder = f"{size.layers} layers, width {size.width}"
        batch = f"{size.languages} languages, {size.rows} rows each, {size.positions} tokens"
        for name, way in WAYS.items():
            switched, together = (1e3 * timings.median(each) for each in (SWITCHED, name))
            ratio = ratio_columns(timings, SWITCHED, name)
            ms = {"switched_ms": f"{switched:.3f}", "together_ms": f"{together:.3f}"}
            columns = {**vars(size), "experts_are": way, **ms, **ratio}
            columns |= {"difference": f"{apart:.1e}", "rounds": timings.rounds}
            cells = ms_words(switched), way, ms_words(together), ratio_words(ratio), f"{apart:.0e}"
            lines.add(columns, encoder, batch, *cells)
    return 0
