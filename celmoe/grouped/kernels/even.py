"""Products of a stack on a CPU by one batched product: equally many places for each member.

Axes: R rows (with positions folded in), P members, L places of a member, K and N widths. A place without a row holds
zeros, and its results are dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from celmoe.grouped.segments import Segments


class Even:
    """The backend; see `product.Backend`."""

    def multiply(
        self, x_RK: torch.Tensor, w_PNK: torch.Tensor, bias_PN: torch.Tensor | None, segments: Segments, factor: int
    ) -> torch.Tensor:
        """Multiply ``[R, K]`` by ``[P, N, K]`` to ``[R, N]``, with a bias by member."""
        return _taken(_product(_placed(x_RK, segments, factor), w_PNK.transpose(1, 2), bias_PN), segments, factor)

    def outer(self, y_RN: torch.Tensor, x_RK: torch.Tensor, segments: Segments, factor: int) -> torch.Tensor:
        """Multiply and sum ``[R, N]`` and ``[R, K]`` to ``[P, N, K]``."""
        return torch.bmm(_placed(y_RN, segments, factor).transpose(1, 2), _placed(x_RK, segments, factor))

    def segment_sum(self, x_RK: torch.Tensor, segments: Segments, factor: int) -> torch.Tensor:
        """Sum ``[R, K]`` to ``[P, K]``."""
        return _placed(x_RK, segments, factor).sum(1)


EVEN = Even()


def gradients(
    grad_RN: torch.Tensor,
    x_RK: torch.Tensor,
    w_PNK: torch.Tensor,
    segments: Segments,
    factor: int,
    needed: Sequence[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The gradients of rows, weights and biases of `Even.multiply`, as far as needed; rows are placed once."""
    grad_PLN = _placed(grad_RN, segments, factor)
    grad_x = _taken(torch.bmm(grad_PLN, w_PNK.conj()), segments, factor) if needed[0] else None
    grad_w = None
    if needed[1]:
        grad_w = torch.bmm(grad_PLN.transpose(1, 2), _placed(x_RK.conj(), segments, factor))
    return grad_x, grad_w, grad_PLN.sum(1) if needed[2] else None


def repeated(
    w_PNK: torch.Tensor, bias_PN: torch.Tensor | None, segments: Segments
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The product by the same weights again and again: ``[R, K]`` into ``[R, N]``, which it returns."""
    places, most = segments.even_places()
    w_PKN = w_PNK.transpose(1, 2)
    members, inner, width = w_PKN.shape
    # Empty places stay zero.
    x_PLK, out_PLN = w_PNK.new_zeros(members, most, inner), w_PNK.new_empty(members, most, width)
    flat_x, flat_out = x_PLK.view(-1, inner), out_PLN.view(-1, width)

    def multiply(x_RK: torch.Tensor, out_RN: torch.Tensor) -> torch.Tensor:
        flat_x.index_copy_(0, places, x_RK)
        _product(x_PLK, w_PKN, bias_PN, out_PLN)
        return torch.index_select(flat_out, 0, places, out=out_RN)

    return multiply


def _product(
    x_PLK: torch.Tensor, w_PKN: torch.Tensor, bias_PN: torch.Tensor | None, out: torch.Tensor | None = None
) -> torch.Tensor:
    if bias_PN is None:
        return torch.bmm(x_PLK, w_PKN, out=out)
    return torch.baddbmm(bias_PN.unsqueeze(1), x_PLK, w_PKN, out=out)


def _placed(x_RK: torch.Tensor, segments: Segments, factor: int) -> torch.Tensor:
    """``[R, K]`` to ``[P, L, K]``."""
    places, most = segments.even_places(factor)
    members, width = segments.num_members, x_RK.shape[1]
    return x_RK.new_zeros(members * most, width).index_copy_(0, places, x_RK).view(members, most, width)


def _taken(x_PLK: torch.Tensor, segments: Segments, factor: int) -> torch.Tensor:
    """``[P, L, K]`` to ``[R, K]``."""
    return x_PLK.flatten(0, 1).index_select(0, segments.even_places(factor)[0])
