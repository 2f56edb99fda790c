"""Recurrent layers: all rows of all members take each step together.

The loop over members runs S · P tiny steps; here S steps serve them all, each one product by member. A layer of GRU is
an autograd Function with its backward pass written out (backpropagation through time), for a graph of S · 10 nodes
would cost more than the products; differentiated twice, it is such a graph.

Axes: R rows, S positions, K input width, H hidden width, P members.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import Function
from torch.nn import functional as F

from .directml import is_directml
from .operations import Run, arguments, operation
from .operations_product import by_weights
from .product import is_batched, linear, outer, segment_sum
from .ragged import CannotGroupError, Rows, Stack, rows
from .segments import Segments

_NAMES = ("input", "hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional", "batch_first")


def _step_gru(
    given: torch.Tensor, state: tuple[torch.Tensor, ...], w: torch.Tensor, b: torch.Tensor | None, segments: Segments
) -> tuple[torch.Tensor, ...]:
    """One step of ``nn.GRU``, by the equations in its documentation."""
    (hidden,) = state
    reset, update, new = given.chunk(3, -1)
    hidden_reset, hidden_update, hidden_new = linear(hidden, w, b, segments, 1).chunk(3, -1)
    update = torch.sigmoid(update + hidden_update)
    new = torch.tanh(new + torch.sigmoid(reset + hidden_reset) * hidden_new)
    return (new + update * (hidden - new),)


def _step_lstm(
    given: torch.Tensor, state: tuple[torch.Tensor, ...], w: torch.Tensor, b: torch.Tensor | None, segments: Segments
) -> tuple[torch.Tensor, ...]:
    """One step of ``nn.LSTM``, by the equations in its documentation."""
    hidden, cell = state
    enter, forget, new, leave = (given + linear(hidden, w, b, segments, 1)).chunk(4, -1)
    cell = torch.sigmoid(forget) * cell + torch.sigmoid(enter) * torch.tanh(new)
    return torch.sigmoid(leave) * torch.tanh(cell), cell


def _step_rnn(activation: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., tuple[torch.Tensor, ...]]:
    def step(
        given: torch.Tensor,
        state: tuple[torch.Tensor, ...],
        w: torch.Tensor,
        b: torch.Tensor | None,
        segments: Segments,
    ) -> tuple[torch.Tensor, ...]:
        return (activation(given + linear(state[0], w, b, segments, 1)),)

    return step


_STEPS = {"gru": _step_gru, "lstm": _step_lstm, "rnn_tanh": _step_rnn(torch.tanh), "rnn_relu": _step_rnn(torch.relu)}


@operation("gru", "lstm", "rnn_tanh", "rnn_relu", namespaces=(torch._VF,))
def recurrent(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> tuple[Rows, ...]:
    """What ``nn.GRU``, ``nn.LSTM`` and ``nn.RNN`` call: layers of one or two directions."""
    value, state, weights, has_biases, layers, dropout, training, both_ways, batch_first = arguments(
        _NAMES, args, kwargs
    )
    states = list(state) if name == "lstm" else [state]
    if torch.is_autocast_enabled(value.device.type):
        raise CannotGroupError(f"called {name} under autocast")
    if not isinstance(value, Rows) or value.axis != (0 if batch_first else 1) or value.factor != 1:
        raise CannotGroupError(f"called {name} on other tensors than rows of positions")
    if any(not isinstance(each, Rows) or each.axis != 1 or each.factor != 1 for each in states):
        raise CannotGroupError(f"called {name} with a state that is not for rows")
    if any(not isinstance(each, Stack) for each in weights):
        raise CannotGroupError(f"called {name} with weights that are no parameters")
    directions = 2 if both_ways else 1
    per_layer = 4 if has_biases else 2
    if len(weights) != per_layer * layers * directions:
        raise CannotGroupError(f"called {name} with projections")
    # Positions first: [S, R, K].
    inner = value.plain.transpose(0, 1) if batch_first else value.plain
    last: list[tuple[torch.Tensor, ...]] = []
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            index = layer * directions + direction
            own = (*weights[index * per_layer : (index + 1) * per_layer], None, None)[:4]
            start = tuple(each.plain[index] for each in states)
            turned = inner.flip(0) if direction else inner
            out, end = _layer(run, name, turned, start, own)
            outputs.append(out.flip(0) if direction else out)
            last.append(end)
        inner = outputs[0] if directions == 1 else torch.cat(outputs, -1)
        if dropout and training and layer < layers - 1 and not run.is_rehearsal:
            inner = F.dropout(inner, dropout)
    result = rows(inner.transpose(0, 1), 0) if batch_first else rows(inner, 1)
    return (result, *(rows(torch.stack(each), 1) for each in zip(*last, strict=True)))


def _layer(
    run: Run,
    name: str,
    inner: torch.Tensor,
    start: tuple[torch.Tensor, ...],
    weights: tuple[Any, ...],
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """One direction of one layer: ``[S, R, K]`` to ``[S, R, H]``, and the last state."""
    w_in, state_weights, b_in, state_bias = weights
    w_state, b_state = state_weights.plain, None if state_bias is None else state_bias.plain
    # The inputs' share of all steps is one product.
    given = by_weights(run, rows(inner, 1), w_in, b_in).plain
    # Written out, it uses a kernel that DirectML lacks, and writes into parts of tensors.
    if name == "gru" and not is_directml(given.device):
        out = _GRU.apply(given.contiguous(), start[0].contiguous(), w_state, b_state, run.segments)
        return out, (out[-1],)
    outputs, state = _unrolled(_STEPS[name], given, start, w_state, b_state, run.segments)
    return outputs, state


def _unrolled(
    step: Callable[..., tuple[torch.Tensor, ...]],
    given: torch.Tensor,
    state: tuple[torch.Tensor, ...],
    w: torch.Tensor,
    b: torch.Tensor | None,
    segments: Segments,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    outputs = []
    for each in given.unbind(0):
        state = step(each, state, w, b, segments)
        outputs.append(state[0])
    return torch.stack(outputs), state


class _GRU(Function):
    """One layer: ``[S, R, 3H]`` of inputs' shares and ``[R, H]`` to ``[S, R, H]``."""

    @staticmethod
    def forward(
        ctx: Any,
        given_SRG: torch.Tensor,
        start_RH: torch.Tensor,
        w_PGH: torch.Tensor,
        b_PG: torch.Tensor | None,
        segments: Segments,
    ) -> torch.Tensor:
        num_positions, num_rows, gates = given_SRG.shape
        width = gates // 3
        out = given_SRG.new_empty(num_positions, num_rows, width)
        # What the backward pass needs: both gates, the new value, and the hidden's share of it.
        kept = given_SRG.new_empty(num_positions, 4, num_rows, width)
        hidden = start_RH
        for position, given in enumerate(given_SRG.unbind(0)):
            share = linear(hidden, w_PGH, b_PG, segments, 1)
            both = torch.add(given[:, : 2 * width], share[:, : 2 * width]).sigmoid_()
            reset, update, new, hidden_new = kept[position].unbind(0)
            reset.copy_(both[:, :width])
            update.copy_(both[:, width:])
            hidden_new.copy_(share[:, 2 * width :])
            torch.addcmul(given[:, 2 * width :], reset, hidden_new, out=new).tanh_()
            hidden = torch.lerp(new, hidden, update, out=out[position])
        ctx.save_for_backward(given_SRG, start_RH, w_PGH, b_PG, out, kept)
        ctx.segments = segments
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        given_SRG, start_RH, w_PGH, b_PG, out, kept = ctx.saved_tensors
        segments = ctx.segments
        if torch.is_grad_enabled() or is_batched(*grads):
            return (*_again(given_SRG, start_RH, w_PGH, b_PG, segments, grads[0], ctx.needs_input_grad), None)
        num_positions, num_rows, width = out.shape
        grad_given = torch.empty_like(given_SRG)
        grad_share = torch.empty_like(given_SRG)
        grad_hidden = torch.zeros_like(start_RH)
        w_PHG = w_PGH.transpose(1, 2)
        for position in range(num_positions - 1, -1, -1):
            reset, update, new, hidden_new = kept[position].unbind(0)
            before = out[position - 1] if position else start_RH
            grad = grad_hidden + grads[0][position]
            d_given, d_share = grad_given[position], grad_share[position]
            # h' = n + z (h - n)
            d_new = (grad - grad * update) * (1 - new * new)
            d_update = grad * (before - new) * update * (1 - update)
            d_reset = d_new * hidden_new * reset * (1 - reset)
            d_given[:, :width], d_given[:, width : 2 * width], d_given[:, 2 * width :] = d_reset, d_update, d_new
            d_share[:, : 2 * width] = d_given[:, : 2 * width]
            torch.mul(d_new, reset, out=d_share[:, 2 * width :])
            grad_hidden = torch.addcmul(linear(d_share, w_PHG, None, segments, 1), grad, update)
        grad_w = grad_b = None
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            # Every position of a row together: [S, R, G] -> [R · S, G].
            shares = grad_share.transpose(0, 1).reshape(num_rows * num_positions, -1)
            if ctx.needs_input_grad[2]:
                hiddens = torch.cat([start_RH.unsqueeze(0), out[:-1]]).transpose(0, 1).reshape(shares.shape[0], width)
                grad_w = outer(shares, hiddens, segments, num_positions)
            if b_PG is not None and ctx.needs_input_grad[3]:
                grad_b = segment_sum(shares, segments, num_positions)
        return grad_given, grad_hidden, grad_w, grad_b, None


def _again(
    given: torch.Tensor,
    start: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor | None,
    segments: Segments,
    grad: torch.Tensor,
    needed: tuple[bool, ...],
) -> list[torch.Tensor | None]:
    """The gradients as a graph that can be differentiated again."""
    inputs = [given, start, w, b]
    wanted = [each for each, needs in zip(inputs, needed, strict=False) if needs and each is not None]
    with torch.enable_grad():
        out, _ = _unrolled(_step_gru, given, (start,), w, b, segments)
    found = iter(torch.autograd.grad(out, wanted, grad, create_graph=torch.is_grad_enabled(), allow_unused=True))
    return [next(found) if needs and each is not None else None for each, needs in zip(inputs, needed, strict=False)]
