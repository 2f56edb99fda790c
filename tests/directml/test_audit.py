"""No operation of the library's own is one that DirectML does not do well: the masquerade shows them on the CPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import celmoe.fusion
import celmoe.grouped.ops.table
import celmoe.grouped.verify
import celmoe.hierarchy
import celmoe.rows.dispatch
from celmoe import (
    CELMoEConfig,
    EngineRefusedError,
    ExpertBatch,
    ExpertConfig,
    ExpertModule,
    ExpertResult,
    HierarchicalCELMoE,
    HierarchyLevelConfig,
)
from celmoe.grouped.ops.product import _patches
from tests.directml.audit import WIDTH, Audit, audit, build, differentiated, inputs, require_clean
from tests.directml.masquerade import DEVICE, masquerade
from tests.experts import KINDS
from tests.slow import slow_but

# Checkpoints ask PyTorch for a module of the device's name; the others make rows of dtypes that it does not have.
_NOT_FOR_THE_DEVICE = {"checkpointed", "double", "brain"}
_AUDITED = [kind for kind in KINDS if kind not in _NOT_FOR_THE_DEVICE]
_FUSIONS = ("learned", "position_aware", "mean")
# Of kinds that are audited beside them: another order or number of layers, with the same operations.
_VARIANTS = {
    *("encoder_norm_first", "encoder_dropout", "transformer", "gru_two_ways", "lstm_two_ways", "lstm_two_layers"),
    *("lstm_learned_start", "gru_cell", "rnn_cell", "in_place_discarded", "in_place_surroundings", "shared_module"),
    *("sequential", "module_list", "split_widths", "packed_attention", "attention_weights", "mean_losses"),
    *("embeddings", "matmul_left", "functional_norms", "batch_norm"),
    *("frozen", "scale", "in_place_relu", "own_buffer", "remembers", "shared_weight", "tied_inside", "addmm", "bmm"),
    *("expanded", "scale_shift", "flattened", "positions_first", "context_view", "lookup", "reads_state", "conv2d"),
}
_USUAL = ("linear", "mlp", "encoder_layer", "gru", "losses")


def model_of(kind: str, engine: str, fusion: str = "learned") -> HierarchicalCELMoE:
    model = build(kind, engine, fusion)
    return model.eval() if kind == "batch_norm_eval" else model


def require_parity(found: Audit, model: HierarchicalCELMoE, given: Any) -> None:
    """The device's path gives the CPU's results."""
    fused, gradients = differentiated(model, given, given.routing)
    torch.testing.assert_close(found.fused, fused, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(found.gradients, gradients, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", slow_but([kind for kind in _AUDITED if kind not in _VARIANTS], _AUDITED))
def test_every_kind_of_expert(kind: str):
    engine = "auto" if KINDS[kind].is_refused else "grouped"
    number = _AUDITED.index(kind)
    given = inputs(has_positions=number % 2 == 0, mask=("bool", "grad")[number % 2])
    model = model_of(kind, engine, _FUSIONS[number % 3])
    plain = copy.deepcopy(model)
    found = audit(model, given, with_plan=number % 4 < 2)
    require_clean(found)
    if not KINDS[kind].stochastic and KINDS[kind].row_wise:
        require_parity(found, plain, given)


_ENGINES = [*((kind, engine) for kind in _USUAL for engine in ("looped", "grouped")), ("mlp", "auto")]


@pytest.mark.parametrize("has_positions", [False, True], ids=["BH", "BSH"])
@pytest.mark.parametrize(
    ("kind", "engine"), slow_but([each for each in _ENGINES if each[0] in ("linear", "mlp", "losses")], _ENGINES)
)
def test_every_engine_with_either_shape(kind: str, engine: str, has_positions: bool):
    given, model = inputs(has_positions=has_positions, mask="none"), model_of(kind, engine)
    plain = copy.deepcopy(model)
    found = audit(model, given, with_plan=not has_positions)
    require_clean(found)
    require_parity(found, plain, given)


@pytest.mark.parametrize("with_plan", [True, False], ids=["plan", "names"])
def test_inference(with_plan: bool):
    model, given = model_of("mlp", "grouped").eval(), inputs(has_positions=True)
    routing = model.compile_routing(given.routing) if with_plan else given.routing
    with torch.no_grad():
        expected = model(given.hidden, routing=routing).fused_hidden
        with masquerade() as record:
            found = model(given.hidden, routing=routing).fused_hidden
    assert not record.findings
    torch.testing.assert_close(found, expected)


def test_positions_past_the_last_bias():
    torch.manual_seed(0)
    fusion = celmoe.fusion.PositionAwareFusion(4, 2, max_positions=2, dropout=0.0)
    hiddens = [torch.randn(3, 5, 4) for _ in range(2)]
    expected = fusion(hiddens)
    expected.sum().backward()
    gradients = [each.grad for each in fusion.parameters()]
    fusion.zero_grad()
    with masquerade() as record:
        found = fusion(hiddens)
        found.sum().backward()
    assert not record.findings
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close([each.grad for each in fusion.parameters()], gradients)


class FiveAxes(ExpertModule):
    """A parameter that has as many axes as the device takes: a stack of it has one more, and would end the process."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.weight = nn.Parameter(torch.randn(1, 1, 1, 1, WIDTH))
        self.vector = nn.Parameter(torch.randn(WIDTH))

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        hidden = batch.hidden[:, None, None, None, :]
        match self.way:
            case "rows":
                hidden = hidden * self.weight
            case "parameters":
                hidden = hidden * (self.weight * self.vector)
            case "constants":
                hidden = hidden * (torch.ones_like(self.weight.detach()[:1, :1]).mul(2) * self.vector)
            case "einsum":
                hidden = hidden * torch.einsum("abcde,e->abcde", self.weight, self.vector)
        return ExpertResult(hidden.flatten(0, 3))


@pytest.mark.parametrize("way", ["rows", "parameters", "constants", "einsum"])
def test_experts_whose_parameters_have_too_many_axes_to_be_stacked_are_looped(way: str):
    config = CELMoEConfig(WIDTH, [HierarchyLevelConfig("lower", {f"e{n}": ExpertConfig(f"e{n}") for n in range(3)})])
    hidden, routing = torch.randn(6, WIDTH), {"lower": ["e0", "e1", "e2"] * 2}
    model = HierarchicalCELMoE(config, lambda *_: FiveAxes(way), engine="grouped")
    model(hidden, routing)  # elsewhere they are not
    model = HierarchicalCELMoE(config, lambda *_: FiveAxes(way), engine="grouped")
    with (
        masquerade() as record,
        pytest.raises(EngineRefusedError, match=r"parameters of 5 axes, .* too many for DirectML"),
    ):
        model(hidden, routing)
    assert not [found for found in record.findings if "dimensions" in found.what]


class Classifier(ExpertModule):
    """Its loss has a gradient on the device as long as nobody takes it row by row."""

    def __init__(self, reduction: str) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.reduction = reduction

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        scores = self.linear(batch.hidden)
        classes = batch.context["row_ids"] % WIDTH
        return ExpertResult(scores, {"loss": F.cross_entropy(scores, classes, reduction=self.reduction)})


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_losses_that_are_wrong_row_by_row_are_taken_by_expert(reduction: str):
    given = inputs(has_positions=False, mask="none")
    config = CELMoEConfig(
        WIDTH,
        [
            HierarchyLevelConfig(level, {name: ExpertConfig(name) for name in sorted(set(names))})
            for level, names in given.routing.items()
        ],
        fusion_dropout=0.0,
    )
    torch.manual_seed(0)
    model = HierarchicalCELMoE(config, lambda *_: Classifier(reduction), engine="grouped")
    plain = copy.deepcopy(model)
    found = audit(model, given, with_plan=True)
    require_clean(found)
    require_parity(found, plain, given)


@pytest.mark.parametrize(("length", "size", "step"), [(5, 3, 1), (7, 3, 2), (8, 3, 2), (9, 4, 3), (3, 3, 1), (4, 1, 2)])
def test_patches_are_those_of_unfolding(length: int, size: int, step: int):
    padded = torch.randn(2, 3, length)
    expected = padded.unfold(2, size, step)
    with masquerade():
        found = _patches(padded, size, step)
    assert torch.equal(found, expected)


# --- The audit can fail: each of these breaks the library in one way, and is caught by the operator's name.


def _by_index_add(rows: Any, order: Any, _: Any, counts: Any) -> Any:
    return celmoe.rows.dispatch.cut(rows.index_select(0, order), counts)


def _by_indexing(rows: Any, order: Any, _: Any, counts: Any) -> Any:
    return celmoe.rows.dispatch.cut(rows[order], counts)


def _by_gather(rows: Any, order: Any, _: Any, counts: Any) -> Any:
    flat = rows.reshape(len(rows), -1)
    index = order.view(-1, 1).expand_as(flat)
    return celmoe.rows.dispatch.cut(flat.gather(0, index).view(rows.shape) + flat.gather(0, index * 0)[0, 0], counts)


def _reading(hidden: Any, *_: Any) -> None:
    assert hidden.detach().abs().sum().item() >= 0


def _asking_on_the_host(hidden: Any, *_: Any) -> None:
    assert hidden.detach().to("cpu").numpy().size


def _by_embedding(stack: Any, segments: Any, factor: int) -> Any:
    flat = stack.flatten(1)
    return F.embedding(segments.member_of_row(factor), flat).view(-1, *stack.shape[1:])


def _by_repeating(stack: Any, segments: Any, factor: int) -> Any:
    counts = torch.tensor(segments.counts, device=stack.device) * factor
    return stack.repeat_interleave(counts, 0)


def _in_double(tensors: Any) -> Any:
    return torch.stack([each.double() for each in tensors]).mean(0).float()


def _in_bfloat16(tensors: Any) -> Any:
    return torch.stack([each.bfloat16() for each in tensors]).mean(0).float()


def _one_less(tensors: Any) -> Any:
    return 1.0 - sum(1.0 - each for each in tensors)


def _masked_by_bools(tensors: Any) -> Any:
    return sum(each * (each > 0) for each in tensors)


def _in_six_axes(tensors: Any) -> Any:
    return torch.stack([each[:, None, None, None] for each in tensors]).clone().mean(0).flatten(0, 3)


BREAKS = {
    "backward by index_add": (celmoe.rows.dispatch, "_scatter_rows", _by_index_add, "index_add.out falls back"),
    "indexing": (celmoe.rows.dispatch, "_scatter_rows", _by_indexing, "index.Tensor_out runs on the CPU"),
    "indexing backward": (celmoe.rows.dispatch, "_scatter_rows", _by_indexing, "_index_put_impl_ runs on the CPU"),
    "gather backward": (celmoe.rows.dispatch, "_scatter_rows", _by_gather, "scatter_add.out gives wrong results"),
    "item": (celmoe.hierarchy, "_check_hidden", _reading, "_local_scalar_dense reads values back"),
    "numpy": (celmoe.hierarchy, "_check_hidden", _asking_on_the_host, r"to\(cpu\) reads values back"),
    "embedding": (celmoe.grouped.ops.table, "spread", _by_embedding, "embedding runs on the CPU"),
    "embedding backward": (
        celmoe.grouped.ops.table,
        "spread",
        _by_embedding,
        "embedding_dense_backward runs on the CPU",
    ),
    "repeat_interleave": (celmoe.grouped.ops.table, "spread", _by_repeating, "repeat_interleave.Tensor falls back"),
    "float64": (celmoe.fusion, "_mean", _in_double, "mean.out takes or gives torch.float64"),
    "bfloat16": (celmoe.fusion, "_mean", _in_bfloat16, "mean.out takes or gives torch.bfloat16"),
    "one less": (celmoe.fusion, "_mean", _one_less, "rsub.Scalar needs float64"),
    "bools": (celmoe.fusion, "_mean", _masked_by_bools, "mul.out gives wrong results"),
    "axes": (celmoe.fusion, "_mean", _in_six_axes, "takes or gives more than 5 dimensions"),
}


@pytest.mark.parametrize("way", BREAKS)
def test_a_broken_library_is_caught(monkeypatch: pytest.MonkeyPatch, way: str):
    where, name, broken, words = BREAKS[way]
    monkeypatch.setattr(where, name, broken)
    found = audit(model_of("functional_norms", "grouped"), inputs(has_positions=True), with_plan=True)
    with pytest.raises(AssertionError, match=words):
        require_clean(found)
    assert found.later


def test_a_proof_is_audited_too(monkeypatch: pytest.MonkeyPatch):
    right = celmoe.grouped.verify._gradients

    def in_double(outputs: Any, inputs: Any) -> Any:
        return right([output.double() for output in outputs], inputs)

    monkeypatch.setattr(celmoe.grouped.verify, "_gradients", in_double)
    found = audit(model_of("linear", "grouped"), inputs(has_positions=True), with_plan=True)
    assert not found.later
    with pytest.raises(AssertionError, match=r"^in a first call: .*takes or gives torch.float64"):
        require_clean(found)


def test_what_experts_do_themselves_hides_nothing(monkeypatch: pytest.MonkeyPatch):
    """An operator that the experts use too is counted: once more is once too often."""
    given = inputs(has_positions=True)
    require_clean(audit(model_of("embedding", "looped", "position_aware"), given, with_plan=True))
    monkeypatch.setattr(celmoe.fusion, "is_directml", lambda _: False)
    with pytest.raises(AssertionError, match=r"embedding runs on the CPU, without a warning \(1 times\)"):
        require_clean(audit(model_of("embedding", "looped", "position_aware"), given, with_plan=True))


def test_parts_are_copies_on_the_masquerade():
    """Writing into a part of a split does not change the whole on the masquerade."""
    whole = torch.zeros(4)
    with masquerade():
        whole.split(2)[0].add_(1)
        whole.chunk(2)[1].add_(1)
        whole.narrow(0, 1, 1).add_(1)
    assert whole.tolist() == [0.0, 1.0, 0.0, 0.0]


def test_tensors_say_where_they_are():
    tensor = torch.zeros(2)
    with masquerade() as record:
        assert tensor.device == torch.ones(1, device=DEVICE).device == DEVICE
        assert not tensor.is_cpu
        host = tensor.cpu()
        assert host.is_cpu
        assert (host + 1).is_cpu
        assert not host.to(DEVICE).is_cpu
    assert {finding.operator for finding in record.findings} == {"cpu"}
    assert tensor.is_cpu
