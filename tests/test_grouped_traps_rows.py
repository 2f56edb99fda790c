"""Experts that mix their samples, look at values, or ask for their number of rows.

Run over the rows of several experts at once, each of these would give something else, most of them only on a batch that
no verifying would draw. The grouped engine therefore has to see their operations, not their results.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from celmoe import (
    CELMoEConfig,
    EngineRefusedError,
    ExpertConfig,
    ExpertResult,
    HierarchicalCELMoE,
    HierarchyLevelConfig,
)
from tests.traps import Traps, shows

MIXES = Traps()
MIXING = r"mix|batch|sample|rows|across"


@MIXES.add(rf"mean|{MIXING}")
def mean_of_hidden(self, rows, batch):
    return rows + batch.hidden.mean(0, keepdim=True)


@MIXES.add(rf"sum|{MIXING}")
def sum_of_everything(self, rows, batch):
    return rows + batch.hidden.sum() * 0.01


@MIXES.add(rf"amax|max|{MIXING}")
def largest_of_hidden(self, rows, batch):
    return rows - batch.hidden.amax(0)


@MIXES.add(rf"softmax|{MIXING}")
def softmax_over_the_batch(self, rows, batch):
    return rows * batch.hidden.softmax(0)


@MIXES.add(rf"cumsum|{MIXING}")
def running_sum(self, rows, batch):
    return rows + rows.cumsum(0)


@MIXES.add(rf"sort|{MIXING}")
def sorted_rows(self, rows, batch):
    return rows + rows.sort(0).values


@MIXES.add(rf"flip|{MIXING}")
def reversed_rows(self, rows, batch):
    return rows + rows.flip(0)


@MIXES.add(rf"roll|{MIXING}")
def neighbouring_rows(self, rows, batch):
    return rows + rows.roll(1, 0)


@MIXES.add(rf"select|getitem|index|{MIXING}")
def first_row(self, rows, batch):
    return rows + rows[0]


@MIXES.add(rf"slice|getitem|index|cat|{MIXING}")
def differences_of_neighbours(self, rows, batch):
    return rows - torch.cat([rows[:1], rows[:-1]])


@MIXES.add(rf"matmul|mm|softmax|{MIXING}")
def attention_over_samples(self, rows, batch):
    return (rows @ rows.T).softmax(-1) @ rows


@MIXES.add(rf"mean|transpose|\.T|{MIXING}")
def mean_of_the_transpose(self, rows, batch):
    return rows + rows.T.mean(1)


@MIXES.add(rf"view|reshape|{MIXING}")
def rows_taken_for_features(self, rows, batch):
    return rows + rows.T.reshape(rows.shape)


@MIXES.add(rf"reshape|flatten|cumsum|{MIXING}")
def cumulated_after_flattening(self, rows, batch):
    return rows + rows.flatten().cumsum(0).view_as(rows)


@MIXES.add(rf"normalize|norm|{MIXING}")
def normalized_by_column(self, rows, batch):
    return F.normalize(rows, dim=0)


@MIXES.add(rf"std|var|{MIXING}")
def divided_by_the_deviation(self, rows, batch):
    return rows / (batch.hidden.var(0, correction=0) + 1)


@MIXES.add(rf"argmax|max|{MIXING}")
def row_of_the_largest(self, rows, batch):
    return rows + rows.argmax(0)


@MIXES.add(rf"quantile|median|{MIXING}")
def median_of_hidden(self, rows, batch):
    return rows - rows.median(0).values


@MIXES.add(rf"batch_?norm|{MIXING}")
def batch_norm_without_buffers(self, rows, batch):
    return F.batch_norm(torch.cat([rows, rows + 1]), None, None, training=True)[: len(rows)]


@MIXES.add(rf"einsum|{MIXING}")
def einsum_over_the_batch(self, rows, batch):
    return rows + torch.einsum("nd,ne->de", rows, rows).diagonal()


@MIXES.add(rf"arange|index|batch size|rows|{MIXING}")
def number_of_each_row(self, rows, batch):
    return rows + torch.arange(rows.shape[0]).unsqueeze(1)


@MIXES.add(rf"linspace|eye|batch size|rows|{MIXING}")
def a_ramp_over_the_rows(self, rows, batch):
    return rows * torch.linspace(0, 1, len(rows)).unsqueeze(1)


@MIXES.add(rf"any|mean|mask|{MIXING}")
def mean_of_the_mask(self, rows, batch):
    return rows * batch.mask.float().mean()


@MIXES.add(rf"sum|mask|{MIXING}")
def share_of_the_masked_rows(self, rows, batch):
    return rows / batch.mask.sum().clamp(min=1)


@MIXES.add(rf"mean|context|{MIXING}")
def mean_of_the_context(self, rows, batch):
    return rows + batch.context["scale"].mean(0)[:1]


@MIXES.add(rf"max|context|{MIXING}")
def longest_of_the_context(self, rows, batch):
    return rows * (batch.context["lengths"] / batch.context["lengths"].max()).unsqueeze(1)


@MIXES.add(rf"gather|index|context|{MIXING}")
def rows_gathered_by_ids(self, rows, batch):
    return rows + rows[batch.context["lengths"] % len(rows)]


@MIXES.add(rf"scatter|index|{MIXING}")
def rows_scattered_by_ids(self, rows, batch):
    bins = rows.new_zeros(6, rows.shape[1]).index_add(0, batch.context["lengths"], rows)
    return rows + bins[batch.context["lengths"]]


@MIXES.add(rf"batch_?norm|buffer|running|num_batches|{MIXING}", method="spring")
def batch_norm_in_training(self, batch):
    return ExpertResult(self.norm(self.linear(torch.cat([batch.hidden, batch.hidden]))).chunk(2)[0])


def _batch_norm(self):
    self.norm = nn.BatchNorm1d(8)


MIXES.classes["batch_norm_in_training"].prepare = _batch_norm


VALUES = Traps()
VALUE = r"value|branch|bool|item|python|read"


@VALUES.add(VALUE)
def branch_on_the_largest(self, rows, batch):
    if batch.hidden.abs().max() > 9:
        return rows * 2
    return rows


@VALUES.add(VALUE)
def branch_on_bool(self, rows, batch):
    return -rows if bool((batch.hidden.detach() > 3).any()) else rows


@VALUES.add(VALUE)
def branch_on_not_all(self, rows, batch):
    return rows if not (batch.hidden < 9).all() else rows * 3


@VALUES.add(VALUE)
def reads_an_item(self, rows, batch):
    return rows + batch.hidden[0, 0].item()


@VALUES.add(VALUE)
def float_of_a_sum(self, rows, batch):
    return rows + float(batch.hidden.detach().sum())


@VALUES.add(VALUE)
def int_of_a_count(self, rows, batch):
    return rows * int((batch.hidden > 0).sum())


@VALUES.add(rf"{VALUE}|tolist")
def reads_a_list(self, rows, batch):
    return rows + sum(batch.context["lengths"].tolist())


@VALUES.add(rf"{VALUE}|numpy")
def goes_through_numpy(self, rows, batch):
    return rows + torch.from_numpy(np.sort(batch.hidden.detach().numpy(), 0))


@VALUES.add(rf"{VALUE}|numpy|array")
def taken_for_an_array(self, rows, batch):
    return rows + float(np.asarray(batch.context["lengths"]).max())


@VALUES.add(rf"{VALUE}|nan|equal")
def guard_against_nan(self, rows, batch):
    assert not torch.isnan(rows).any()
    return rows


@VALUES.add(rf"{VALUE}|equal")
def compares_whole_tensors(self, rows, batch):
    return rows if torch.equal(batch.hidden, batch.hidden.clamp(-9, 9)) else rows * 2


@VALUES.add(rf"{VALUE}|allclose")
def compares_loosely(self, rows, batch):
    return rows if torch.allclose(batch.hidden, batch.hidden.clamp(-9, 9)) else rows * 2


@VALUES.add(rf"{VALUE}|mask")
def branch_on_the_mask(self, rows, batch):
    return rows if batch.mask.all() else rows + batch.mask.unsqueeze(1)


@VALUES.add(rf"{VALUE}|context")
def cut_to_the_longest(self, rows, batch):
    longest = int(batch.context["lengths"].max())
    return rows + F.pad(rows[:, :longest], (0, 8 - longest))


@VALUES.add(rf"{VALUE}|iter|unbind|loop|batch|rows")
def loop_over_the_samples(self, rows, batch):
    return torch.stack([row * (1 + index) for index, row in enumerate(rows)])


@VALUES.add(rf"{VALUE}|index|slice|range")
def value_as_an_index(self, rows, batch):
    return rows + rows[:, batch.context["lengths"].max()].unsqueeze(1)


@VALUES.add(rf"{VALUE}|repr|str|format")
def reads_the_text(self, rows, batch):
    return rows * (2 if "e+0" in f"{batch.hidden.detach()}" else 1)


@VALUES.add(rf"{VALUE}|nonzero|where|shape")
def picks_by_value(self, rows, batch):
    index = (batch.hidden[:, 0] > 0).nonzero()
    return rows * len(index)


@VALUES.add(rf"{VALUE}|index|masked|shape", may_run=True)
def writes_where_a_mask_is(self, rows, batch):
    rows = rows.clone()
    rows[batch.mask] = rows[batch.mask] * 2
    return rows


@VALUES.add(rf"{VALUE}|unique|shape")
def counts_what_differs(self, rows, batch):
    return rows * len(batch.context["lengths"].unique())


@VALUES.add(rf"{VALUE}|parameter|weight", may_run=True)
def branch_on_a_parameter(self, rows, batch):
    """A value of its own, but another one for each expert."""
    return rows * 2 if self.linear.bias[0] > 0 else rows


@VALUES.add(rf"{VALUE}|parameter|bias", may_run=True)
def float_of_a_parameter(self, rows, batch):
    return rows * float(self.linear.bias.detach()[0])


@VALUES.add(rf"{VALUE}|numpy|parameter|weight", may_run=True)
def parameter_through_numpy(self, rows, batch):
    return rows + torch.from_numpy(self.linear.weight.detach().numpy().max(0))


SIZES = Traps()
SIZE = r"batch size|number of rows|shape\[0\]|size|len|rows|one row|batch"


@SIZES.add(SIZE)
def few_rows(self, rows, batch):
    return rows * 2 if batch.hidden.shape[0] < 9 else rows


@SIZES.add(SIZE)
def few_rows_by_len(self, rows, batch):
    return rows * 2 if len(batch.hidden) < 9 else rows


@SIZES.add(SIZE)
def odd_number_of_rows(self, rows, batch):
    return rows + batch.hidden.size(0) % 2


@SIZES.add(SIZE)
def divided_by_the_batch_size(self, rows, batch):
    return rows / batch.hidden.shape[0]


@SIZES.add(SIZE)
def root_of_the_batch_size(self, rows, batch):
    return rows * math.sqrt(rows.shape[0])


@SIZES.add(SIZE)
def a_shape_compared(self, rows, batch):
    return rows * 2 if batch.hidden.shape == (1, 8) else rows


@SIZES.add(SIZE)
def a_shape_looked_up(self, rows, batch):
    return rows * {(1, 8): 2.0, (5, 8): 3.0}.get(tuple(batch.hidden.shape), 1.0)


@SIZES.add(rf"{SIZE}|numel")
def number_of_elements(self, rows, batch):
    return rows * 2 if batch.hidden.numel() > 32 else rows


@SIZES.add(rf"{SIZE}|nbytes|storage")
def number_of_bytes(self, rows, batch):
    return rows * 2 if rows.nbytes > 128 else rows


@SIZES.add(rf"{SIZE}|squeeze")
def squeezed_where_alone(self, rows, batch):
    return rows * (2 if batch.hidden.squeeze().dim() == 1 else 1)


@SIZES.add(SIZE)
def loop_over_the_batch_size(self, rows, batch):
    for _ in range(batch.hidden.shape[0]):
        rows = rows * 0.9
    return rows


@SIZES.add(SIZE)
def size_of_the_mask(self, rows, batch):
    return rows * batch.mask.shape[0]


@SIZES.add(SIZE)
def size_of_the_context(self, rows, batch):
    return rows * 2 if len(batch.context["lengths"]) > 4 else rows


@SIZES.add(SIZE)
def a_tensor_of_the_batch_size(self, rows, batch):
    return rows / torch.tensor(float(rows.shape[0]))


@SIZES.add(SIZE)
def a_full_tensor_of_the_batch_size(self, rows, batch):
    return rows * torch.full_like(rows, rows.shape[0])


@SIZES.add(rf"{SIZE}|sum|ones", may_run=True)
def ones_counted(self, rows, batch):
    return rows * rows.new_ones(rows.shape[0]).sum()


@SIZES.add(rf"{SIZE}|shape", may_run=True)
def shapes_in_a_try(self, rows, batch):
    """It fits by chance alone."""
    try:
        return rows + batch.hidden.reshape(5, 8)
    except RuntimeError:
        return rows


ALL = {
    f"{kind}: {name}": (traps, name)
    for kind, traps in {"mixes": MIXES, "values": VALUES, "sizes": SIZES}.items()
    for name in traps
}


@pytest.mark.parametrize("trap", ALL)
def test_grouped_refuses_and_says_why(trap: str):
    traps, name = ALL[trap]
    traps.check_refusal(name)


@pytest.mark.parametrize("trap", ALL)
def test_armed_after_a_grouped_call(trap: str):
    traps, name = ALL[trap]
    traps.check_arming(name)


# These read a value of their own, or each row's: siblings with equal weights would not show the fault.
SILENT = {
    "writes_where_a_mask_is",
    "guard_against_nan",
    "branch_on_a_parameter",
    "float_of_a_parameter",
    "parameter_through_numpy",
}


@pytest.mark.parametrize("trap", [trap for trap, (_, name) in ALL.items() if name not in SILENT])
def test_the_trap_would_show(trap: str):
    traps, name = ALL[trap]
    assert shows(traps.classes[name])


# Of one layout: two experts that get gradients, each alone in its scale, and three that are detached from their input.
SCALES = (0.0, 0.0, 1.0, 0.5, 0.0)


class Asking(nn.Module):
    """Asks whether its rows carry a gradient; with ``is_odd``, it also computes otherwise under the tracer."""

    def __init__(self, asked: str, is_odd: bool) -> None:
        super().__init__()
        self.asked, self.is_odd = asked, is_odd

    def forward(self, batch):
        rows = batch.hidden
        match self.asked:
            case "requires_grad":
                answer = rows.requires_grad
            case "grad_fn":
                answer = rows.grad_fn is not None
            case "grad_fn and mode":
                answer = torch.is_grad_enabled() and rows.grad_fn is not None
        factor = (2.0 if answer else 3.0) * (2.0 if self.is_odd and torch.compiler.is_dynamo_compiling() else 3.0)
        return ExpertResult(rows * factor)


def _hierarchy_of_asking(engine: str, asked: str, is_odd: bool) -> HierarchicalCELMoE:
    experts = {
        f"e{number}": ExpertConfig(f"e{number}", gradient_scale=scale or None, stop_gradient_from_parent=not scale)
        for number, scale in enumerate(SCALES)
    }
    config = CELMoEConfig(4, [HierarchyLevelConfig("language", experts)], use_learned_fusion=False)
    return HierarchicalCELMoE(config, lambda *_: Asking(asked, is_odd), engine=engine)


@pytest.mark.parametrize("asked", ["requires_grad", "grad_fn", "grad_fn and mode"])
@pytest.mark.parametrize("is_odd", [False, True])
def test_detached_experts_are_verified_on_detached_rows(asked, is_odd):
    """Two wrongs once made a right: the factors 2 and 3 for one that was verified with gradients, as 3 and 2."""
    routing = {"language": ["e0", "e1", "e2", "e3", "e4", "e1"]}
    hidden = torch.randn(6, 4, requires_grad=True)
    expected = _hierarchy_of_asking("looped", asked, is_odd)(hidden, routing=routing).fused_hidden
    grouped = _hierarchy_of_asking("grouped", asked, is_odd)
    if is_odd:
        with pytest.raises(EngineRefusedError, match="compute something else"):
            grouped(hidden, routing=routing)
    else:
        torch.testing.assert_close(grouped(hidden, routing=routing).fused_hidden, expected)
        assert "run as one" in str(grouped.explain(routing))
