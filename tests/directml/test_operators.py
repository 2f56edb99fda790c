"""The verdict on operators, at known examples."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.directml import operators
from tests.directml.operators import Kind, decomposed, name_of, verdict

aten = torch.ops.aten


@pytest.mark.parametrize(
    ("op", "kind", "reached"),
    [
        (aten.add.Tensor, Kind.NATIVE, "add.out"),
        (aten.add_.Tensor, Kind.NATIVE, "add.out"),
        (aten.sum.dim_IntList, Kind.NATIVE, "sum.IntList_out"),
        (aten.max.dim, Kind.NATIVE, "max.dim_max"),
        (aten.index_select.default, Kind.NATIVE, "index_select"),
        (aten.index_add_.default, Kind.FALLS_BACK, "index_add.out"),
        (aten.lerp_.Scalar, Kind.FALLS_BACK, "lerp.Scalar_out"),
        (aten.bincount.default, Kind.FALLS_BACK, "bincount"),
        (aten.index.Tensor, Kind.HIDDEN_CPU, "index.Tensor_out"),
        (aten.embedding_dense_backward.default, Kind.HIDDEN_CPU, "embedding_dense_backward"),
        (aten.bernoulli_.float, Kind.HIDDEN_CPU, "bernoulli_.float"),
        (aten._local_scalar_dense.default, Kind.SYNC, "_local_scalar_dense"),
        (aten.scatter_add.default, Kind.WRONG, "scatter_add.out"),
        (aten.rsub.Scalar, Kind.DOUBLE, "rsub.Scalar"),
        (aten.mv.default, Kind.DECOMPOSES, "mv"),
        (aten.new_zeros.default, Kind.DECOMPOSES, "new_zeros"),
        (aten.select_backward.default, Kind.DECOMPOSES, "select_backward"),
    ],
    ids=str,
)
def test_an_operator_s_verdict(op: Any, kind: Kind, reached: str):
    assert verdict(op) == (kind, reached)


def test_operators_of_a_newer_torch_fall_back_unless_they_are_made_of_others(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(operators, "FALLBACK", frozenset())
    monkeypatch.setattr(operators, "_verdict", operators._verdict.__wrapped__)
    assert verdict(aten.bincount.default).kind is Kind.FALLS_BACK
    assert verdict(aten.index_add.default).kind is Kind.FALLS_BACK
    assert verdict(aten.mv.default).kind is Kind.DECOMPOSES


def test_wrong_results_depend_on_arguments():
    once, twice = torch.tensor([2, 0, 1]), torch.tensor([2, 0, 2])
    values = torch.ones(3)
    assert verdict(aten.scatter_add.default, (values, 0, once, values)).kind is Kind.NATIVE
    assert verdict(aten.scatter_add.default, (values, 0, twice, values)).kind is Kind.WRONG
    assert verdict(aten.mul.Tensor, (values, values)).kind is Kind.NATIVE
    assert verdict(aten.mul.Tensor, (values, values > 0)).kind is Kind.WRONG
    rows = torch.ones(2, 3)
    assert verdict(aten.native_layer_norm.default, (rows, [3], None, None, 1e-5)).kind is Kind.NATIVE
    assert verdict(aten.native_layer_norm.default, (rows.t(), [2], None, None, 1e-5)).kind is Kind.WRONG
    loss = (values[:2], rows, torch.tensor([0, 1]), None)
    assert verdict(aten.nll_loss_backward.default, (*loss, 1, -100, values[0])).kind is Kind.NATIVE
    assert verdict(aten.nll_loss_backward.default, (*loss, 0, -100, values[0])).kind is Kind.WRONG


def test_what_decomposes_is_run_as_what_it_is_made_of():
    seen = []

    class Seeing(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if verdict(func, args, kwargs).kind is Kind.DECOMPOSES:
                with self:
                    return decomposed(func, args, kwargs or {})
            seen.append(name_of(func))
            return func(*args, **(kwargs or {}))

    matrix, vector = torch.arange(6.0).view(2, 3), torch.arange(3.0)
    with Seeing():
        product = torch.mv(matrix, vector)
    assert "addmv_" in seen
    assert torch.equal(product, matrix @ vector)


def test_exceptions_are_of_native_operators():
    special = operators.HIDDEN_CPU | operators.SYNC | operators.DOUBLE | operators.COPIES | operators.WRONG.keys()
    assert special <= operators.NATIVE
    assert not operators.NATIVE & operators.FALLBACK
    assert (len(operators.NATIVE), len(operators.FALLBACK)) == (296, 593)
