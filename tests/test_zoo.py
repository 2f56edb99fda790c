"""Ready experts: each beside the oracle, grouped and stacked; the identity at first; what they say of wrong arguments.

A record says how an expert is made and what it is given. All of them go through the same tests.
"""

from __future__ import annotations

import copy
import io
import pickle
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import celmoe
from celmoe import (
    ConfigError,
    ConfigTypeError,
    ExpertBatch,
    HierarchicalCELMoE,
    InputError,
    zoo,
)
from tests.traps import BATCHES, GROUPED, LEVEL, WIDTH, Batch, assert_like_oracle, assert_ran_grouped, build, experts_of

POSITIONS = 5
INPUT = 6


@dataclass(frozen=True)
class Kind:
    """How an expert of the zoo is made, and what it is given.

    Attributes:
        make: Makes an expert.
        trailing: Axes between samples and width.
        masked: Whether it reads the mask.
    """

    make: Callable[[], nn.Module]
    trailing: tuple[int, ...] = (POSITIONS,)
    masked: bool = False


KINDS: dict[str, Kind] = {
    "Linear": Kind(lambda: zoo.Linear(WIDTH)),
    "Linear without bias": Kind(lambda: zoo.Linear(WIDTH, bias=False), ()),
    "MLP": Kind(lambda: zoo.MLP(WIDTH)),
    "MLP with relu": Kind(lambda: zoo.MLP(WIDTH, 5, activation="relu"), ()),
    "GLU": Kind(lambda: zoo.GLU(WIDTH)),
    "Houlsby": Kind(lambda: zoo.Houlsby(WIDTH, 3)),
    "Pfeiffer": Kind(lambda: zoo.Pfeiffer(WIDTH, 3)),
    "LoRA behind a layer": Kind(lambda: zoo.LoRA(INPUT, WIDTH, rank=2, alpha=3)),
    "Prefix": Kind(lambda: zoo.Prefix(WIDTH, 3, heads=2)),
    "Prefix of one position": Kind(lambda: zoo.Prefix(WIDTH, 3), ()),
    "Convolution": Kind(lambda: zoo.Convolution(WIDTH, 3, inner_size=6)),
    "Convolution with a mask": Kind(lambda: zoo.Convolution(WIDTH, 3), masked=True),
    "Block": Kind(lambda: zoo.Block(WIDTH, 2, inner_size=12)),
    "Block with a mask": Kind(lambda: zoo.Block(WIDTH, 2, inner_size=12, activation="silu"), masked=True),
}
#: Not the identity at first, as the others are.
REPLACING: dict[str, Kind] = {
    "Linear": Kind(lambda: zoo.Linear(WIDTH, residual=False)),
    "MLP": Kind(lambda: zoo.MLP(WIDTH, residual=False)),
    "GLU": Kind(lambda: zoo.GLU(WIDTH, residual=False), ()),
}
ALL = {**KINDS, **{f"{name}, replacing": kind for name, kind in REPLACING.items()}}
DTYPES = [torch.float32, torch.float64]


class Given(Batch):
    """A batch with a layer's inputs; the mask leaves some positions out, and all positions of one sample."""

    def __init__(self, kind: Kind, *args: Any, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        super().__init__(*args, trailing=kind.trailing, dtype=dtype, **options)
        shape = (*self.mask.shape, INPUT)
        generator = torch.Generator().manual_seed(1)
        self.leaves["input"] = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
        self.context = {"input": self.leaves["input"]}
        self.mask[0] = False
        self.is_masked = kind.masked

    def __call__(self, forward: Callable[..., Any]) -> Any:
        mask = self.mask if self.is_masked else None
        return forward(self.leaves["hidden"], self.routing, self.context, mask)


def counts_of(batch: Any) -> tuple[Any, ...]:
    """The counts and the seed of one of `BATCHES`."""
    return batch.args if isinstance(batch, partial) else ()


def make_batch(kind: Kind, place: int, dtype: torch.dtype = torch.float32) -> Callable[[], Given]:
    return partial(Given, kind, *counts_of(BATCHES[place]), dtype=dtype)


def trained(model: HierarchicalCELMoE) -> HierarchicalCELMoE:
    """The model with weights like those of a trained one: an expert that is the identity shows no mistake."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("name", ALL)
def test_runs_grouped_and_like_the_oracle(name: str, dtype: torch.dtype):
    """Rows and all gradients, on batches of other counts, with groups of one row and with absent experts."""
    kind = ALL[name]
    subject, twin = (trained(build(kind.make, dtype=dtype)) for _ in range(2))
    for place in range(3):
        batch = make_batch(kind, place, dtype)
        assert_like_oracle(subject, twin, batch)
        assert_ran_grouped(subject, batch())


@pytest.mark.parametrize("name", ALL)
def test_no_operation_runs_expert_by_expert_in_grouped(name: str):
    kind = ALL[name]
    model, batch = build(kind.make), make_batch(kind, 0)()
    batch(model)
    (found,) = model.explain(batch.routing).levels[0].classes
    assert (found.engine, found.operations_looped) == (GROUPED, {})


def observed(kind: Kind, engine: str, dtype: torch.dtype, rows: torch.dtype, *, autocast: bool) -> dict[str, Any]:
    model, batch = trained(build(kind.make, engine, dtype=dtype)), make_batch(kind, 0, rows)()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = batch(model).levels[LEVEL].hidden
    if engine == GROUPED:
        assert_ran_grouped(model, batch)
    output.double().sin().sum().backward()
    leaves = {**batch.leaves, **dict(model.named_parameters())}
    return {"hidden": output} | {name: leaf.grad for name, leaf in leaves.items()}


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
@pytest.mark.parametrize("name", KINDS)
def test_in_bfloat16_grouped_is_as_near_to_float64_as_the_loop(name: str, autocast: bool):
    kind = KINDS[name]
    dtype = torch.float32 if autocast else torch.bfloat16
    exact = observed(kind, "looped", torch.float64, torch.float64, autocast=False)
    looped, grouped = (observed(kind, each, dtype, dtype, autocast=autocast) for each in ("looped", GROUPED))
    far: dict[str, list[tuple[float, float]]] = {}
    for key, wanted in exact.items():
        mine, theirs = grouped[key], looped[key]
        assert (mine is None) == (theirs is None) == (wanted is None), key
        if mine is None:
            continue
        assert mine.dtype == theirs.dtype, key
        within = re.sub(rf"level_modules\.{LEVEL}\.\w+\.", "", key)
        far.setdefault(within, []).append((distance(mine, wanted), distance(theirs, wanted)))
    assert far
    for key, distances in far.items():
        mine, theirs = map(statistics.fmean, zip(*distances, strict=True))
        assert mine <= 1.25 * theirs + 2**-9, (key, mine, theirs)


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm().clamp(min=1e-3))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_begins_as_the_identity(name: str, dtype: torch.dtype):
    """Bit for bit, padding and all, alone and grouped."""
    kind = KINDS[name]
    model, batch = build(kind.make, dtype=dtype), make_batch(kind, 0, dtype)()
    found = batch(model).levels[LEVEL].hidden
    assert_ran_grouped(model, batch)
    assert torch.equal(found, batch.leaves["hidden"])
    mask = batch.mask if kind.masked else None
    alone = experts_of(model)[0](ExpertBatch(batch.leaves["hidden"], batch.context, mask)).hidden
    assert torch.equal(alone, batch.leaves["hidden"])


@pytest.mark.parametrize("name", KINDS)
def test_a_first_step_leaves_the_identity(name: str):
    """The gradient reaches what is zero at first: an expert that can't begin would pass the test before."""
    kind = KINDS[name]
    model, batch = build(kind.make, "looped"), make_batch(kind, 0)()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch(model).levels[LEVEL].hidden.sin().sum().backward()
    optimizer.step()
    assert not torch.equal(batch(model).levels[LEVEL].hidden, batch.leaves["hidden"])


@pytest.mark.parametrize("name", REPLACING)
def test_without_residual_it_is_another_function(name: str):
    kind = REPLACING[name]
    model, batch = build(kind.make), make_batch(kind, 0)()
    assert not torch.allclose(batch(model).levels[LEVEL].hidden, batch.leaves["hidden"], atol=0.1)


@pytest.mark.parametrize("name", KINDS)
def test_stacks_as_one_class_and_trains_like_ordinary_experts_in_grouped(name: str):
    kind = KINDS[name]
    ordinary, stacked = (trained(build(kind.make, dtype=torch.float64)) for _ in range(2))
    report = celmoe.stack_experts(stacked)
    assert [len(each.experts) for each in report.classes if not each.reason] == [len(experts_of(ordinary))]
    assert len(report.classes) == 1
    (stack,) = stacked._stacks[LEVEL]
    # Nothing of an expert may change unseen, so that a call asks one of them.
    assert stack.is_fixed
    options = {"lr": 0.01, "weight_decay": 0.1, "eps": 1e-3}
    pairs = [
        (ordinary, torch.optim.AdamW(ordinary.parameters(), **options)),
        (stacked, celmoe.optim.AdamW(stacked.parameters(), **options)),
    ]
    for place in range(3):
        outputs = []
        for model, optimizer in pairs:
            optimizer.zero_grad()
            batch = make_batch(kind, place, torch.float64)()
            outputs.append(batch(model).levels[LEVEL].hidden)
            assert_ran_grouped(model, batch)
            outputs[-1].sin().sum().backward()
            optimizer.step()
        torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-10)
    wanted = ordinary.state_dict()
    assert list(stacked.state_dict()) == list(wanted)
    for key, value in stacked.state_dict().items():
        torch.testing.assert_close(value, wanted[key], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["MLP", "Prefix", "Convolution with a mask", "Block with a mask"])
def test_compiles_without_a_break(name: str):
    """As the graph's own operations, for all routings; shown for two layers, a softmax, shifts and attention."""
    kind = KINDS[name]
    model = trained(build(kind.make, "auto", dtype=torch.float64))
    celmoe.stack_experts(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for place in (0, 3):
        batch = make_batch(kind, place, torch.float64)()
        batch.routing = model.compile_routing(batch.routing)
        found, wanted = batch(compiled).fused_hidden, batch(partial(celmoe.reference.reference_forward, model))
        torch.testing.assert_close(found, wanted.fused_hidden, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", KINDS)
def test_copies_pickles_and_checkpoints(name: str):
    kind = KINDS[name]
    torch.manual_seed(0)
    expert = kind.make()
    with torch.no_grad():
        for parameter in expert.parameters():
            parameter.add_(0.1)
    loaded = kind.make()
    file = io.BytesIO()
    torch.save(expert.state_dict(), file)
    file.seek(0)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    batch = make_batch(kind, 0)()
    given = ExpertBatch(batch.leaves["hidden"], batch.context, batch.mask if kind.masked else None)
    wanted = expert(given).hidden
    for other in (copy.deepcopy(expert), pickle.loads(pickle.dumps(expert)), loaded):
        assert torch.equal(other(given).hidden, wanted)


@pytest.mark.parametrize("name", ["Convolution with a mask", "Block with a mask"])
def test_padding_reaches_no_real_position_and_passes_unchanged(name: str):
    kind = KINDS[name]
    model = trained(build(kind.make))
    batch = make_batch(kind, 0)()
    wanted = batch(model).levels[LEVEL].hidden
    other = make_batch(kind, 0)()
    with torch.no_grad():
        other.leaves["hidden"][~other.mask] += 7.0
    found = other(model).levels[LEVEL].hidden
    assert torch.equal(found[batch.mask], wanted[batch.mask])
    assert torch.equal(found[~batch.mask], other.leaves["hidden"][~batch.mask])
    # The comparison can fail: without the mask they are seen.
    batch.is_masked = other.is_masked = False
    assert not torch.equal(batch(model).levels[LEVEL].hidden[batch.mask], other(model).levels[LEVEL].hidden[batch.mask])


@pytest.mark.parametrize("name", ["Convolution with a mask", "Block with a mask"])
def test_a_mask_may_hold_numbers(name: str):
    kind = KINDS[name]
    model, batch = trained(build(kind.make)), make_batch(kind, 0)()
    wanted = batch(model).levels[LEVEL].hidden
    batch.mask = batch.mask.float()
    assert torch.equal(batch(model).levels[LEVEL].hidden, wanted)


def test_the_mask_of_a_sample_without_real_positions_gives_numbers():
    expert = KINDS["Block"].make()
    hidden = torch.randn(2, POSITIONS, WIDTH, requires_grad=True)
    result = expert(ExpertBatch(hidden, None, torch.zeros(2, POSITIONS, dtype=torch.bool))).hidden
    result.sum().backward()
    assert result.isfinite().all()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


# What the papers' formulas give, in other words than the experts'.
def test_formulas():
    torch.manual_seed(0)
    rows = torch.randn(3, POSITIONS, WIDTH, dtype=torch.float64)

    def run(expert: Any) -> tuple[Any, torch.Tensor]:
        expert = expert.double()
        with torch.no_grad():
            for parameter in expert.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        return expert, expert(ExpertBatch(rows)).hidden

    expert, found = run(zoo.Pfeiffer(WIDTH, 3))
    normed = F.layer_norm(rows, (WIDTH,), expert.norm.weight, expert.norm.bias)
    inner = torch.relu(normed @ expert.down.weight.T + expert.down.bias)
    torch.testing.assert_close(found, rows + inner @ expert.up.weight.T + expert.up.bias)

    expert, found = run(zoo.Houlsby(WIDTH, 3, activation="tanh"))
    inner = torch.tanh(rows @ expert.down.weight.T + expert.down.bias)
    torch.testing.assert_close(found, rows + inner @ expert.up.weight.T + expert.up.bias)

    expert, found = run(zoo.GLU(WIDTH, 5))
    gates = rows @ expert.gate.weight.T
    inner = gates / (1 + torch.exp(-gates)) * (rows @ expert.up.weight.T)
    torch.testing.assert_close(found, rows + inner @ expert.down.weight.T)

    # Each head: a softmax over scores with keys of its own, times its values.
    expert, found = run(zoo.Prefix(WIDTH, 3, heads=2))
    keys, values = expert.keys.weight.view(2, 3, WIDTH), expert.values.weight.T.view(2, 3, WIDTH)
    wanted = rows + sum(torch.softmax(rows @ keys[head].T, -1) @ values[head] for head in range(2))
    torch.testing.assert_close(found, wanted)

    # PyTorch's own depthwise convolution.
    expert, _ = run(zoo.Convolution(WIDTH, 5))
    wanted = F.conv1d(rows.mT, expert.kernel.T.unsqueeze(1), padding=2, groups=WIDTH).mT
    torch.testing.assert_close(expert._convolved(rows), wanted)

    # PyTorch's own block.
    expert, found = run(zoo.Block(WIDTH, 2, inner_size=12, activation="relu"))
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 12, 0.0, batch_first=True, norm_first=True).double()
    layer.load_state_dict(
        {
            "self_attn.in_proj_weight": expert.attention_in.weight,
            "self_attn.in_proj_bias": expert.attention_in.bias,
            "self_attn.out_proj.weight": expert.attention_out.weight,
            "self_attn.out_proj.bias": expert.attention_out.bias,
            "linear1.weight": expert.up.weight,
            "linear1.bias": expert.up.bias,
            "linear2.weight": expert.down.weight,
            "linear2.bias": expert.down.bias,
            "norm1.weight": expert.attention_norm.weight,
            "norm1.bias": expert.attention_norm.bias,
            "norm2.weight": expert.norm.weight,
            "norm2.bias": expert.norm.bias,
        }
    )
    torch.testing.assert_close(found, layer(rows))


def test_sizes_in_the_notes():
    text = (Path(__file__).parents[1] / "notes" / "zoo.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\|[^|]*\| ([\d,]+)", text, re.MULTILINE)
    assert {name for name, _ in rows} == {*zoo.__all__} - {"BasedExpert"}
    for name, size in rows:
        expert = getattr(zoo, name)(768, **({"rank": 8} if name == "LoRA" else {}))
        assert sum(parameter.numel() for parameter in expert.parameters()) == int(size.replace(",", "")), name


def test_every_expert_names_its_paper():
    for name in {*zoo.__all__} - {"BasedExpert"}:
        # Authors, year, title and number.
        assert re.search(
            r"[A-Z]\w+[\w., ]* 20\d\d.*\"[A-Z].*\(arXiv:\d{4}\.\d{5}", getattr(zoo, name).__doc__, re.DOTALL
        ), name


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_a_linear_expert_as_a_linear_layer(residual: bool, bias: bool):
    torch.manual_seed(0)
    expert = zoo.Linear(WIDTH, bias=bias, residual=residual).double()
    with torch.no_grad():
        for parameter in expert.parameters():
            parameter.add_(torch.randn_like(parameter))
    rows = torch.randn(4, WIDTH, dtype=torch.float64)
    weight, shift = expert.as_linear()
    torch.testing.assert_close(F.linear(rows, weight, shift), expert(ExpertBatch(rows)).hidden)
    assert not weight.requires_grad
    assert not shift.requires_grad
    before = expert.linear.weight.detach().clone()
    weight.zero_()
    assert torch.equal(expert.linear.weight, before)


DROPOUTS: dict[str, Callable[[float], nn.Module]] = {
    "MLP": lambda rate: zoo.MLP(WIDTH, dropout=rate),
    "GLU": lambda rate: zoo.GLU(WIDTH, dropout=rate),
    "Houlsby": lambda rate: zoo.Houlsby(WIDTH, 3, dropout=rate),
    "Pfeiffer": lambda rate: zoo.Pfeiffer(WIDTH, 3, dropout=rate),
    "LoRA": lambda rate: zoo.LoRA(INPUT, WIDTH, rank=2, dropout=rate),
    "Prefix": lambda rate: zoo.Prefix(WIDTH, 3, dropout=rate),
    "Convolution": lambda rate: zoo.Convolution(WIDTH, 3, dropout=rate),
    "Block": lambda rate: zoo.Block(WIDTH, 2, dropout=rate),
}


@pytest.mark.parametrize("name", DROPOUTS)
def test_dropout_in_training_alone_grouped_too(name: str):
    kind = Kind(lambda: DROPOUTS[name](0.5))
    model, batch = trained(build(kind.make)), make_batch(kind, 0)()

    def run() -> torch.Tensor:
        return batch(model).levels[LEVEL].hidden

    assert not torch.equal(run(), run())
    assert_ran_grouped(model, batch)
    model.eval()
    assert torch.equal(run(), run())
    assert_ran_grouped(model, batch)


def wrong(make: Callable[[], object], kind: type[Exception], words: str) -> Any:
    return pytest.param(make, kind, words, id=words.partition(" (")[0][:60] + f" {kind.__name__}")


WRONG = [
    wrong(lambda: zoo.Linear(0), ConfigError, "'hidden_size' must be at least 1 (got 0)"),
    wrong(lambda: zoo.Linear(8.0), ConfigTypeError, "'hidden_size' must be an integer (got 8.0)"),
    wrong(lambda: zoo.Linear(8, residual="no"), ConfigTypeError, "'residual' must be a bool (got 'no')"),
    wrong(lambda: zoo.Linear(8, bias=0), ConfigTypeError, "'bias' must be a bool (got 0)"),
    wrong(lambda: zoo.MLP(8, 0), ConfigError, "'inner_size' must be at least 1 (got 0)"),
    wrong(lambda: zoo.MLP(8, dropout=1.5), ConfigError, "'dropout' must be between 0 and 1 (got 1.5)"),
    wrong(lambda: zoo.MLP(8, dropout="0"), ConfigTypeError, "'dropout' must be a number (got '0')"),
    wrong(lambda: zoo.MLP(8, dropout=float("nan")), ConfigError, "'dropout' must be finite (got nan)"),
    wrong(
        lambda: zoo.MLP(8, activation="gleu"),
        ConfigError,
        "'activation' must be one of 'gelu', 'relu', 'silu', 'tanh' (got 'gleu'; nearest: 'gelu')",
    ),
    wrong(
        lambda: zoo.MLP(8, activation=torch.relu),
        ConfigTypeError,
        f"'activation' must be a string (got {torch.relu!r})",
    ),
    wrong(lambda: zoo.GLU(True), ConfigTypeError, "'hidden_size' must be an integer (got True)"),
    wrong(lambda: zoo.GLU(8, -1), ConfigError, "'inner_size' must be at least 1 (got -1)"),
    wrong(lambda: zoo.Houlsby(8, 0), ConfigError, "'bottleneck' must be at least 1 (got 0)"),
    wrong(lambda: zoo.Pfeiffer(8, "64"), ConfigTypeError, "'bottleneck' must be an integer (got '64')"),
    wrong(lambda: zoo.Prefix(8, 0), ConfigError, "'length' must be at least 1 (got 0)"),
    wrong(lambda: zoo.Prefix(8, heads=0), ConfigError, "'heads' must be at least 1 (got 0)"),
    wrong(lambda: zoo.Convolution(8, 4), ConfigError, "'kernel_size' must be odd (got 4)"),
    wrong(lambda: zoo.Convolution(8, 0), ConfigError, "'kernel_size' must be at least 1 (got 0)"),
    wrong(lambda: zoo.Block(8, 3), ConfigError, "'heads' must divide 'hidden_size' (got 3 heads for 8)"),
    wrong(lambda: zoo.Block(8, 0), ConfigError, "'heads' must be at least 1 (got 0)"),
    wrong(lambda: zoo.LoRA(8, rank=0), ConfigError, "'rank' must be at least 1 (got 0)"),
    wrong(lambda: zoo.LoRA(0, rank=2), ConfigError, "'in_features' must be at least 1 (got 0)"),
    wrong(lambda: zoo.LoRA(8, 0, rank=2), ConfigError, "'out_features' must be at least 1 (got 0)"),
    wrong(lambda: zoo.LoRA(8, rank=2, alpha="16"), ConfigTypeError, "'alpha' must be a number (got '16')"),
    wrong(lambda: zoo.LoRA(8, rank=2, alpha=float("inf")), ConfigError, "'alpha' must be finite (got inf)"),
    wrong(
        lambda: zoo.LoRA(8, rank=2, base="layer"),
        ConfigTypeError,
        "'base' must be a torch.nn.Module or None (got 'layer')",
    ),
    wrong(
        lambda: zoo.LoRA(8, 6, rank=2, base=nn.Linear(8, 6)),
        ConfigError,
        "'out_features' must equal 'in_features' with a base, because experts give rows as wide as they take "
        "(got 6 and 8)",
    ),
]


@pytest.mark.parametrize(("make", "kind", "words"), WRONG)
def test_wrong_arguments(make: Callable[[], object], kind: type[Exception], words: str):
    with pytest.raises(kind) as error:
        make()
    assert str(error.value) == words


@pytest.mark.parametrize("engine", ["looped", "grouped", "auto"])
@pytest.mark.parametrize("name", ["Convolution", "Block"])
def test_rows_without_positions(name: str, engine: str):
    model = build(KINDS[name].make, engine)
    with pytest.raises(InputError) as error:
        model(torch.randn(4, WIDTH), {LEVEL: ["a", "a", "b", "b"]})
    assert str(error.value).startswith(
        f"'hidden' must be [B, S, D] for a {name}, which looks at positions (got 2 axes)"
    )


@pytest.mark.parametrize("engine", ["looped", "grouped"])
def test_a_mask_of_other_positions(engine: str):
    model = build(KINDS["Block"].make, engine)
    with pytest.raises(InputError) as error:
        model(torch.randn(4, 5, WIDTH), {LEVEL: ["a", "a", "b", "b"]}, mask=torch.ones(4, 6, dtype=torch.bool))
    assert str(error.value).startswith(
        "'mask' must be [B, S], true at real positions, with a place for each of the 5 positions (got shape [B, 6])"
    )
