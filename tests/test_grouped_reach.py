"""How far the grouped engine reaches: kinds of experts that run as one, each beside the oracle.

A kind is a layer, and a function of the layer's rows. Every kind is compared in float32 and float64, in rows and in all
gradients, and must have run grouped. In lower precision the grouped engine must be as near to float64 as the loop is.
"""

from __future__ import annotations

import logging
import re
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import celmoe
from celmoe import EngineRefusedError, ExpertBatch, ExpertResult, InputTypeError
from celmoe.reference import reference_forward
from tests import reach_of_code  # noqa: F401  # registers
from tests.reach import KINDS, Function, Kind, Symmetric, kind, linear, parametrized
from tests.reach_declared import clipped, sorted_values
from tests.traps import (
    BATCHES,
    GROUPED,
    LEVEL,
    WIDTH,
    Batch,
    assert_like_oracle,
    assert_ran_grouped,
    auto_groups_all,
    build,
    check_refusal,
    experts_of,
)

TABLE = torch.linspace(0.5, 1.5, WIDTH)


@kind()
def a_tensor_of_the_module(expert, rows, batch):
    return rows * TABLE + TABLE[2]


LOG = logging.getLogger("tests.experts")


@kind()
def calls_of_a_silent_logger(expert, rows, batch):
    LOG.debug("given %s axes", rows.dim())
    return rows * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", KINDS)
def test_runs_grouped_and_like_the_loop(name: str, dtype: torch.dtype):
    """Rows, and the gradients of input, context and parameters, on batches of other counts and with absent experts."""
    make, trailing = KINDS[name]
    subject, twin = build(make, dtype=dtype), build(make, dtype=dtype)
    for make_batch in BATCHES[:3]:
        batch = partial(make_batch, trailing=trailing, dtype=dtype)
        assert_like_oracle(subject, twin, batch)
        assert_ran_grouped(subject, batch())


# Kinds that compute otherwise in lower precision than in float64, beyond rounding: by order, or by thresholds.
DISCRETE = {
    *("gathered", "scattered", "scattered_of_the_largest", "scattered_and_added", "scattered_along_turned_rows"),
    *("assigned_by_lists_and_masks", "complex_numbers"),
}
# Kinds that PyTorch itself does not compute in bfloat16 on the CPU, or not under autocast.
FULL_PRECISION = {
    *("fourier", "fourier_of_two_axes", "fourier_mixing", "orthogonal", "orthogonal by cayley"),
    *("orthogonal by householder", "distances_between_positions", "distances_to_parameters"),
}
LOWERED = [name for name in KINDS if name not in DISCRETE | FULL_PRECISION]


def seen(make: Callable[[], nn.Module], engine: str, batch: Batch, dtype: torch.dtype, *, autocast: bool) -> Any:
    """What a user sees of a call and its backward pass; the engine that ran it is the one that was asked for."""
    model = build(make, engine, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = batch(model).levels[LEVEL].hidden
    if engine == GROUPED:
        assert_ran_grouped(model, batch)
    output.to(torch.float64).sin().sum().backward()
    leaves = {**batch.leaves, **dict(model.named_parameters())}
    return {"hidden": output} | {name: leaf.grad for name, leaf in leaves.items()}


def assert_as_near(name: str, rows: torch.dtype, parameters: torch.dtype, *, autocast: bool) -> None:
    """The grouped engine's dtypes are the loop's, and it is as near to float64 as the loop, or nearer."""
    make, trailing = KINDS[name]
    batch = partial(Batch, (7, 3, 5, 1, 9), trailing=trailing)
    exact = seen(make, "looped", batch(dtype=torch.float64), torch.float64, autocast=False)
    looped = seen(make, "looped", batch(dtype=rows), parameters, autocast=autocast)
    grouped = seen(make, GROUPED, batch(dtype=rows), parameters, autocast=autocast)
    # By the name within an expert: how far a single tensor is off is luck.
    far: dict[str, list[tuple[float, float]]] = {}
    for key, wanted in exact.items():
        mine, theirs = grouped[key], looped[key]
        assert (mine is None) == (theirs is None), key
        if mine is None:
            continue
        assert mine.dtype == theirs.dtype, key
        within = re.sub(rf"level_modules\.{LEVEL}\.\w+\.", "", key)
        far.setdefault(within, []).append((_distance(mine, wanted), _distance(theirs, wanted)))
    for key, distances in far.items():
        mine, theirs = map(statistics.fmean, zip(*distances, strict=True))
        assert mine <= 1.25 * theirs + 2**-9, (key, mine, theirs)


def _distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm().clamp(min=1e-3))


@pytest.mark.parametrize("name", LOWERED)
def test_in_bfloat16(name: str):
    """Rows and parameters in bfloat16."""
    assert_as_near(name, torch.bfloat16, torch.bfloat16, autocast=False)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
@pytest.mark.parametrize("name", LOWERED)
def test_under_autocast(name: str):
    """Parameters in float32, and rows of either dtype by turns: the first layer gives every kind bfloat16."""
    rows = (torch.float32, torch.bfloat16)[LOWERED.index(name) % 2]
    assert_as_near(name, rows, torch.float32, autocast=True)


@celmoe.rowwise
def centred(rows: torch.Tensor) -> torch.Tensor:
    return rows - rows.mean(0)


@celmoe.rowwise
def of_its_neighbour(rows: torch.Tensor) -> torch.Tensor:
    return torch.cat([rows[1:], rows[:1]])


@celmoe.rowwise
def all_together(rows: torch.Tensor) -> torch.Tensor:
    return rows.sum(0)


@celmoe.rowwise(grouped=lambda rows, shift, members: rows + shift[0])
def shifted_wrongly(rows: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    return rows + shift


LIARS: dict[str, tuple[Function, str]] = {
    "centred": (lambda _, rows, __: centred(rows), "from one row than from several|run as one"),
    "of its neighbour": (lambda _, rows, __: of_its_neighbour(rows), "from one row than from several|run as one"),
    "all together": (lambda _, rows, __: rows + all_together(rows), "something else than a row for each row"),
    "a wrong grouped form": (lambda expert, rows, _: shifted_wrongly(rows, expert.layer.bias), "run as one"),
    "turned": (lambda _, rows, __: clipped(rows.mT, 0.5).mT, "another axis than the batch first"),
}


@pytest.mark.parametrize("liar", LIARS)
def test_a_declaration_is_not_taken_on_trust(liar: str):
    """A declared function that is not what it is declared to be is refused, as is one that is called otherwise."""
    function, reason = LIARS[liar]
    check_refusal(partial(Kind, function), reason)


def test_a_declared_function_is_given_back():
    """Decorated or not, it does the same alone."""
    rows = torch.randn(5, WIDTH)
    assert clipped(rows, 0.5).norm(dim=-1).max() <= 0.5 + 1e-6
    assert torch.equal(sorted_values(rows), rows.sort(-1).values)


@pytest.mark.parametrize("declare", [lambda: celmoe.rowwise(3), lambda: celmoe.rowwise(grouped=3)])
def test_what_can_not_be_called_can_not_be_declared(declare: Callable[[], Any]):
    with pytest.raises(InputTypeError, match=r"must be a function.*\(got 3\)"):
        declare()


class Scaled(nn.Module):
    """A parametrization that only a number tells from its siblings."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.factor


def _is_doubled(expert: Any) -> None:
    parametrize.register_parametrization(expert.inner, "bias", Scaled(2.0))


def _is_twice_symmetric(expert: Any) -> None:
    parametrize.register_parametrization(expert.inner, "weight", Symmetric())


def _is_plain(expert: Any) -> None:
    parametrize.remove_parametrizations(expert.inner, "weight")


def _is_of_another_factor(expert: Any) -> None:
    expert.inner.parametrizations.weight[0].factor = 3.0


def _is_frozen(expert: Any) -> None:
    expert.inner.parametrizations.weight.original.requires_grad_(False)


CHANGES = [_is_doubled, _is_twice_symmetric, _is_plain, _is_of_another_factor, _is_frozen]


@pytest.mark.parametrize("is_late", [False, True], ids=["from the start", "after a call"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_parametrized_expert_that_differs_runs_apart(change: Callable[[Any], None], is_late: bool):
    """One expert of five is computed by itself, the others still as one; so it is when it changes later."""

    def prepare(expert: Any) -> None:
        expert.inner = parametrized(Scaled())

    subject, twin = (build(partial(Kind, lambda expert, rows, _: expert.inner(rows), prepare)) for _ in range(2))
    if is_late:
        assert_like_oracle(subject, twin, Batch)
        assert_ran_grouped(subject, Batch())
    for model in (subject, twin):
        change(experts_of(model)[3])
    assert_like_oracle(subject, twin, Batch)
    assert_ran_grouped(subject, Batch())
    (level,) = subject.explain(Batch().routing).levels
    assert [each.experts for each in level.classes] == [("a", "b", "c", "e"), ("d",)]


class DoubleWhenFrozen(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight if weight.requires_grad else weight * 2


def test_parametrized_experts_under_other_modes():
    """Without gradients the program may be another, and is verified anew."""

    def prepare(expert: Any) -> None:
        expert.inner = parametrized(DoubleWhenFrozen())

    make = partial(Kind, lambda expert, rows, _: expert.inner(rows) * (2 if torch.is_grad_enabled() else 1), prepare)
    subject, twin = build(make), build(make)
    for _ in range(2):
        assert_like_oracle(subject, twin, Batch)
        with torch.no_grad():
            assert torch.equal(Batch()(subject).fused_hidden, Batch()(partial(reference_forward, twin)).fused_hidden)
            assert_ran_grouped(subject, Batch())


class SizedExpert(Kind):
    """Its graph is a plain one, if it has more than one row."""

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        result = super().forward(batch)
        return ExpertResult(result.hidden * 2) if self.armed and batch.hidden.shape == (1, WIDTH) else result


@pytest.mark.parametrize("engine", [GROUPED, "auto"])
def test_an_equal_program_is_verified_anew_for_another_graph(engine: str):
    """Armed, an expert has the same program as before, and other guards: it is wrong for one row only."""
    make = partial(SizedExpert, lambda _, rows, __: torch.tanh(rows), lambda expert: setattr(expert, "armed", False))
    subject, twin = build(make), build(make)
    assert_like_oracle(subject, twin, Batch)
    assert_ran_grouped(subject, Batch())
    subject.engine = engine
    for model in (subject, twin):
        for expert in experts_of(model):
            expert.armed = True
    for _ in range(2):
        if engine == GROUPED:
            with pytest.raises(EngineRefusedError, match="from one row than from several"):
                Batch()(subject)
        else:
            assert_like_oracle(subject, twin, Batch)


def test_gumbel_softmax_runs_grouped():
    """Each row is a draw of its own, and gradients come through."""
    model = build(partial(Kind, lambda _, rows, __: F.gumbel_softmax(rows, 0.7, hard=True)))
    batch = Batch((40, 30, 50, 1, 9))
    batch.leaves["scale"].data.fill_(1)
    out = batch(model).levels[LEVEL].hidden
    assert_ran_grouped(model, batch)
    assert torch.equal(out.sum(-1).round(decimals=4), torch.ones(len(out)))
    assert len(out.argmax(-1).unique()) == WIDTH
    out[:, 0].sum().backward()
    assert batch.leaves["hidden"].grad.abs().sum() > 0
    again = batch(model).levels[LEVEL].hidden
    assert not torch.equal(out, again)


class Llama(nn.Module):
    """``LlamaMLP`` behind its norm."""

    def __init__(self) -> None:
        super().__init__()
        llama = pytest.importorskip("transformers.models.llama.modeling_llama")
        config = llama.LlamaConfig(hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_attention_heads=2)
        self.norm, self.mlp = llama.LlamaRMSNorm(WIDTH), llama.LlamaMLP(config)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows + self.mlp(self.norm(rows))


class EncoderLayer(nn.Module):
    """A layer of an encoder of transformers', without dropout."""

    def __init__(self, module: str, config: str, name: str) -> None:
        super().__init__()
        found = pytest.importorskip(module)
        options = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
        made = getattr(found, config)(hidden_size=WIDTH, num_attention_heads=2, intermediate_size=16, **options)
        made._attn_implementation = "sdpa"
        self.layer = getattr(found, name)(made)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        out = self.layer(rows)
        return out[0] if isinstance(out, tuple) else out


def adapted() -> nn.Module:
    """A linear layer with an adapter of PEFT's, whose second matrix is no zero."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["0"], init_lora_weights=False)
    return peft.inject_adapter_in_model(config, nn.Sequential(linear()))


def rearranged() -> nn.Module:
    layers = pytest.importorskip("einops.layers.torch")
    return nn.Sequential(layers.Rearrange("b s d -> b d s"), nn.Linear(3, 3), layers.Rearrange("b d s -> b s d"))


class Einops(nn.Module):
    """All that einops' functions do with rows."""

    def __init__(self) -> None:
        super().__init__()
        self.einops = pytest.importorskip("einops")
        self.layer = linear()

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        einops = self.einops
        heads = einops.rearrange(rows, "b s (h d) -> b h s d", h=2).tanh()
        folded = self.layer(einops.rearrange(heads, "b h s d -> (b s) (h d)"))
        means = einops.reduce(rows, "b s d -> b 1 d", "mean") + einops.reduce(rows, "b s d -> b d", "max")[:, None]
        firsts = einops.repeat(rows[:, 0], "b d -> b s d", s=rows.shape[1])
        product = einops.einsum(rows, self.layer.weight, "b s d, e d -> b s e")
        return einops.rearrange(folded, "(b s) d -> b s d", s=rows.shape[1]) + means * firsts + product


ROBERTA = "transformers.models.xlm_roberta.modeling_xlm_roberta", "XLMRobertaConfig", "XLMRobertaLayer"
OTHERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "LoRA": (adapted, ()),
    "LlamaMLP": (Llama, ()),
    "LlamaMLP of positions": (Llama, (3,)),
    "BertLayer": (partial(EncoderLayer, "transformers.models.bert.modeling_bert", "BertConfig", "BertLayer"), (3,)),
    "XLMRobertaLayer": (partial(EncoderLayer, *ROBERTA), (3,)),
    "einops": (Einops, (3,)),
    "einops' layers": (rearranged, (3,)),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", OTHERS)
def test_modules_of_other_packages(name: str, dtype: torch.dtype):
    """Layers of PEFT, transformers and einops run as one, where those are installed."""
    make_layer, trailing = OTHERS[name]

    def prepare(expert: Any) -> None:
        expert.inner = make_layer()

    make = partial(Kind, lambda expert, rows, _: expert.inner(rows), prepare)
    subject, twin = build(make, dtype=dtype), build(make, dtype=dtype)
    for make_batch in BATCHES[:2]:
        batch = partial(make_batch, trailing=trailing, dtype=dtype)
        assert_like_oracle(subject, twin, batch)
        assert_ran_grouped(subject, batch())


def test_a_logger_that_says_something_is_heard(caplog: pytest.LogCaptureFixture):
    """What experts log is never lost: they are looped while their logger is on, and grouped while it is off."""
    make, _ = KINDS["calls_of_a_silent_logger"]
    subject, twin = build(make, "auto"), build(make)
    for level in (logging.WARNING, logging.DEBUG, logging.WARNING):
        with caplog.at_level(level, LOG.name):
            caplog.clear()
            assert_like_oracle(subject, twin, Batch)
            heard = [record.getMessage() for record in caplog.records if record.name == LOG.name]
            # Five experts of the model, and five of the oracle's.
            assert heard == ["given 2 axes"] * (10 if level == logging.DEBUG else 0)
            if level == logging.WARNING:
                with auto_groups_all():
                    assert_ran_grouped(subject, Batch())


def test_a_tensor_of_the_module_may_change(monkeypatch: pytest.MonkeyPatch):
    """It is read at every call, whichever it is by then."""
    make, _ = KINDS["a_tensor_of_the_module"]
    subject, twin = build(make), build(make)
    assert_like_oracle(subject, twin, Batch)
    monkeypatch.setitem(globals(), "TABLE", TABLE * 3)
    assert_like_oracle(subject, twin, Batch)
    TABLE.add_(1)
    assert_like_oracle(subject, twin, Batch)
    assert_ran_grouped(subject, Batch())


class WithLosses(Kind):
    """Returns two losses, of which one is none of the rows."""

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        hidden = super().forward(batch).hidden
        return ExpertResult(hidden, {"square": hidden.square().mean(), "bias": self.layer.bias.abs().sum()})


LOSING = [
    *("weight_norm", "checkpointed", "assigned_to_slices", "assigned_in_place", "assigned_by_lists_and_masks"),
    *("assigned_parameters", "scattered_of_the_largest", "lists_apart_as_keys", "cosine_similarity", "fourier"),
    "instance_norm with weights",
]


@pytest.mark.parametrize("name", LOSING)
def test_with_losses(name: str):
    """Losses come out, and go in, as from the loop."""
    make, trailing = KINDS[name]
    assert isinstance(make, partial)
    with_losses = partial(WithLosses, *make.args)
    subject, twin = build(with_losses, dtype=torch.float64), build(with_losses, dtype=torch.float64)
    for make_batch in BATCHES[:2]:
        batch = partial(make_batch, trailing=trailing, dtype=torch.float64)
        assert_like_oracle(subject, twin, batch)
        assert_ran_grouped(subject, batch())


@pytest.mark.parametrize("name", ["a_declared_function_of_parameters", "a_declared_function_with_a_grouped_form"])
def test_declared_functions_beside_losses(name: str):
    """A backward pass of its own may make zeros of gradients that there are none of."""
    make, trailing = KINDS[name]
    assert isinstance(make, partial)
    with_losses = partial(WithLosses, *make.args)
    batch = partial(Batch, trailing=trailing, dtype=torch.float64)
    with pytest.raises(EngineRefusedError, match=r"return losses, and call \w+, which is not PyTorch's own"):
        batch()(build(with_losses, dtype=torch.float64))
    subject, twin = (build(with_losses, "auto", dtype=torch.float64) for _ in range(2))
    assert_like_oracle(subject, twin, batch)


@pytest.mark.parametrize("training", [None, False, True])
@pytest.mark.parametrize("function", [F.dropout, F.alpha_dropout, F.feature_alpha_dropout])
def test_dropouts_that_are_told_nothing(function: Any, training: bool | None):
    """Of some the default is to drop nothing out."""
    options = {} if training is None else {"training": training}
    make = partial(Kind, lambda expert, rows, batch: function(expert.layer(rows), **options))
    draws = function is F.dropout if training is None else training
    subject, twin = build(make), build(make)
    if draws:
        Batch()(subject)
    else:
        assert_like_oracle(subject, twin, Batch)
    assert_ran_grouped(subject, Batch())


def test_a_precision_that_is_not_known():
    def make() -> nn.Module:
        expert = Kind(lambda expert, rows, batch: expert.layer(rows) * expert.scale.float())
        expert.register_buffer("scale", torch.ones(WIDTH).to(torch.float8_e4m3fn))
        return expert

    with pytest.raises(EngineRefusedError, match=r"compute in 'torch\.float8_e4m3fn', whose precision is not known"):
        Batch()(build(make))
    with auto_groups_all():
        assert Batch()(build(make, "auto")).fused_hidden.isfinite().all()
