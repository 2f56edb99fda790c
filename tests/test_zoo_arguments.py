"""Ready experts: copies, masks, formulas, and wrong arguments."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from celmoe import (
    ConfigError,
    ConfigTypeError,
    ExpertBatch,
    InputError,
    zoo,
)
from tests.traps import LEVEL, WIDTH, assert_ran_grouped, build
from tests.zoo import INPUT, KINDS, POSITIONS, Kind, make_batch, trained


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
def test_padding_reaches_no_real_position_and_passes_unchanged_in_grouped(name: str):
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
def test_a_mask_may_hold_numbers_in_grouped(name: str):
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
