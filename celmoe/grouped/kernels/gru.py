"""A GRU layer of all members, each position of all rows together, without autograd.

``h' = n + z (h - n)`` with gates r and z and the new value n, by the equations in the documentation of ``nn.GRU``.

Axes: S positions, R rows, P members, H hidden width, G = 3H: what the gates r and z and the new value are given.
"""

from __future__ import annotations

import torch

from celmoe.grouped.segments import Segments

from .product import repeated


def gru(
    given_SRG: torch.Tensor, start_RH: torch.Tensor, w_PGH: torch.Tensor, b_PG: torch.Tensor | None, segments: Segments
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the layer.

    Args:
        given_SRG: The inputs' share of gates and new values.
        start_RH: The first states.
        w_PGH: The weights of the hidden states.
        b_PG: Their biases, or ``None``.
        segments: The rows of each member.

    Returns:
        All states ``[S, R, H]``, and what `gru_gradients` reads ``[S, R, G]``: both gates, and the hidden's share of
        the new value.
    """
    num_positions, num_rows, gates = given_SRG.shape
    width = gates // 3
    out_SRH = given_SRG.new_empty(num_positions, num_rows, width)
    kept_SRG = torch.empty_like(given_SRG)
    multiply = repeated(w_PGH, b_PG, segments)
    hidden = start_RH
    for given, kept, out in zip(given_SRG.unbind(0), kept_SRG.unbind(0), out_SRH.unbind(0), strict=True):
        multiply(hidden, kept)
        kept[:, : 2 * width].add_(given[:, : 2 * width]).sigmoid_()
        reset, update, hidden_new = kept.chunk(3, 1)
        new = torch.addcmul(given[:, 2 * width :], reset, hidden_new).tanh_()
        hidden = torch.lerp(new, hidden, update, out=out)
    return out_SRH, kept_SRG


def gru_gradients(
    grad_SRH: torch.Tensor,
    given_SRG: torch.Tensor,
    before_SRH: torch.Tensor,
    kept_SRG: torch.Tensor,
    w_PGH: torch.Tensor,
    segments: Segments,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Differentiate the layer: backpropagation through time.

    Args:
        grad_SRH: The gradient of all states.
        given_SRG: See `gru`.
        before_SRH: The state before each position.
        kept_SRG: See `gru`.
        w_PGH: See `gru`.
        segments: See `gru`.

    Returns:
        The gradients of the hidden's shares ``[S, R, G]``, of the new values' inputs ``[S, R, H]``, and of the first
        states ``[R, H]``. The gates' inputs have the gradients of the hidden's shares.
    """
    reset, update, hidden_new = kept_SRG.chunk(3, 2)
    new = torch.addcmul(given_SRG.chunk(3, 2)[2], reset, hidden_new).tanh_()
    # All slopes at once. They become gradients in place, as those of the states are known.
    shares_SRG = torch.empty_like(kept_SRG)
    of_reset, of_update, of_hidden = shares_SRG.chunk(3, 2)
    torch.mul((before_SRH - new).mul_(update), 1 - update, out=of_update)
    of_new = new.square_().neg_().add_(1).mul_(1 - update)
    torch.mul(of_new, reset, out=of_hidden)
    torch.mul(of_hidden * hidden_new, 1 - reset, out=of_reset)
    multiply = repeated(w_PGH.transpose(1, 2), None, segments)
    grad_hidden = torch.zeros_like(before_SRH[0])
    product = torch.empty_like(grad_hidden)
    for position in range(len(grad_SRH) - 1, -1, -1):
        grad, share = grad_hidden.add_(grad_SRH[position]), shares_SRG[position]
        share.unflatten(1, (3, -1)).mul_(grad.unsqueeze(1))
        of_new[position].mul_(grad)
        grad_hidden = torch.addcmul(multiply(share, product), grad, update[position])
    return shares_SRG, of_new, grad_hidden
