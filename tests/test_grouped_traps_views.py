"""Writes into a tensor that is a view for an expert of one row, and a copy for others; and into shared tensors.

An axis of length one has no place in memory: transposed rows of one sample are contiguous, and are not copied.
"""

from __future__ import annotations

import pytest
import torch

from tests.traps import GROUPED, Batch, Traps, assert_ran_grouped, build, check_refusal

COPIES = Traps()
REASON = "makes a copy or a view|wrote into a tensor that is shared"


@COPIES.add(REASON)
def put_in_order(self, rows, batch):
    folded = (rows + 0).view(-1, 2, 4)
    turned = folded.transpose(0, 1).contiguous()
    turned += 1
    return folded.reshape(-1, 8)


@COPIES.add(REASON)
def folded(self, rows, batch):
    opened = (rows + 0).view(-1, 2, 4)
    flat = opened.transpose(0, 1).reshape(2, -1)
    flat += 1
    return opened.reshape(-1, 8)


@COPIES.add(REASON)
def a_part_in_order(self, rows, batch):
    whole = rows + 0
    part = whole[:, :4].contiguous()
    part *= 2
    return whole


@COPIES.add(REASON)
def what_the_part_was_made_of(self, rows, batch):
    whole = rows + 0
    part = whole[:, :4].flatten()
    whole *= 2
    return whole + part.reshape(-1, 4).repeat(1, 2)


def make_buffer(self):
    self.register_buffer("shift", torch.ones(8))


@COPIES.add(REASON, prepare=make_buffer)
def a_buffer_for_each_row(self, rows, batch):
    shift = self.shift.expand(rows.shape[0], -1).unsqueeze(1).contiguous()
    shift += 1
    return rows + shift.squeeze(1)


@COPIES.add(REASON)
def a_table_in_its_own_dtype(self, rows, batch):
    table = batch.context["table"].float()
    table += 1
    return rows + table[0]


@COPIES.add(REASON)
def a_table_detached(self, rows, batch):
    table = batch.context["table"].detach()
    table += 1
    return rows + table[0]


@COPIES.add(REASON)
def a_table_transposed(self, rows, batch):
    table = torch.einsum("ij->ji", batch.context["table"])
    table += 1
    return rows + table[:, 0]


@pytest.mark.parametrize("name", list(COPIES))
def test_grouped_refuses(name: str):
    COPIES.check_refusal(name)


def test_other_writes_are_grouped():
    """A tensor that is copied for any number of rows may be written into."""

    def heads(self, rows, batch):
        turned = (rows + 0).view(-1, 2, 4).transpose(1, 2).contiguous()
        turned += 1
        return turned.view(-1, 8)

    traps = Traps()
    traps.add("")(heads)
    make = traps.classes["heads"]
    model = build(lambda: make().arm(), GROUPED)
    check_refusal(lambda: make().arm(), "", may_run=True)
    Batch()(model)
    assert_ran_grouped(model, Batch())
