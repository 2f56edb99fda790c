"""Recurrent layers: all rows of all members take each step together.

A loop over members runs S · P tiny steps; here S steps serve all members, each step one product by member. A GRU layer
is an autograd Function with an explicit backward pass (backpropagation through time), because a graph of S · 10 nodes
would cost more than the products. Differentiating the layer twice builds such a graph.

Axes: R rows, S positions, K input width, H hidden width, P members.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import Function
from torch.nn import functional as F

from celmoe.directml import is_directml
from celmoe.grouped.kernels.product import is_batched, linear, outer, segment_sum
from celmoe.grouped.segments import Segments
from celmoe.grouped.values import CannotGroupError, Rows, Stack, like, rows
from celmoe.torch_internals import VARIABLE_FUNCTIONS

from .product import by_weights
from .table import Run, arguments, by_members, lowered, operation

_NAMES = ("input", "hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional", "batch_first")


def _step_gru(given: torch.Tensor, share: torch.Tensor, state: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """One step of ``nn.GRU``, by the equations in its documentation."""
    (hidden,) = state
    reset, update, new = given.chunk(3, -1)
    hidden_reset, hidden_update, hidden_new = share.chunk(3, -1)
    update = torch.sigmoid(update + hidden_update)
    new = torch.tanh(new + torch.sigmoid(reset + hidden_reset) * hidden_new)
    return (new + update * (hidden - new),)


def _step_lstm(given: torch.Tensor, share: torch.Tensor, state: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """One step of ``nn.LSTM``, by the equations in its documentation."""
    _, cell = state
    enter, forget, new, leave = (given + share).chunk(4, -1)
    cell = torch.sigmoid(forget) * cell + torch.sigmoid(enter) * torch.tanh(new)
    return torch.sigmoid(leave) * torch.tanh(cell), cell


def _step_rnn(activation: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., tuple[torch.Tensor, ...]]:
    def step(given: torch.Tensor, share: torch.Tensor, state: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (activation(given + share),)

    return step


# Each step maps the input's share of all gates, the hidden state's share and the state to the next state.
_STEPS = {"gru": _step_gru, "lstm": _step_lstm, "rnn_tanh": _step_rnn(torch.tanh), "rnn_relu": _step_rnn(torch.relu)}


@operation("gru", "lstm", "rnn_tanh", "rnn_relu", namespaces=(VARIABLE_FUNCTIONS,))
def recurrent(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> tuple[Rows, ...]:
    """Run the layers of ``nn.GRU``, ``nn.LSTM`` or ``nn.RNN``, in one or two directions."""
    value, state, weights, has_biases, layers, dropout, training, both_ways, batch_first = arguments(
        _NAMES, args, kwargs
    )
    states = list(state) if name == "lstm" else [state]
    if not isinstance(value, Rows) or value.axis != (0 if batch_first else 1) or value.factor != 1:
        raise CannotGroupError(f"called {name} on other tensors than rows of positions")
    if any(not isinstance(each, Rows) or each.axis != 1 or each.factor != 1 for each in states):
        raise CannotGroupError(f"called {name} with a state that is not for rows")
    if any(not isinstance(each, Stack) or each.is_reduced for each in weights):
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


@operation("gru_cell", "lstm_cell", "rnn_tanh_cell", "rnn_relu_cell", namespaces=(torch,))
def cell(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Run one step of ``nn.GRUCell``, ``nn.LSTMCell`` or ``nn.RNNCell``: two products by member."""
    names = ("input", "hx", "w_ih", "w_hh", "b_ih", "b_hh")
    value, state, w_in, w_state, b_in, b_state = arguments(names, args, kwargs, (None, None))
    states = list(state) if name == "lstm_cell" else [state]
    if any(not isinstance(each, Rows) or each.axis != 0 or each.dim() != 2 for each in (value, *states)):
        raise CannotGroupError(f"called {name} on other tensors than rows and their states")
    if len({each.factor for each in (value, *states)}) > 1:
        raise CannotGroupError(f"put samples side by side with others ({name})")
    if any(not isinstance(each, Stack) for each in (w_in, w_state, b_in, b_state) if each is not None):
        raise CannotGroupError(f"called {name} with weights that are no parameters")
    if value.plain.is_cuda:
        # CUDA kernels take all operands in the lower precision under autocast.
        states = [like(each, lowered(each.plain)[0]) for each in states]
    given = by_weights(run, value, w_in, b_in).plain
    share = by_weights(run, states[0], w_state, b_state).plain
    found = _STEPS[name.removesuffix("_cell")](given, share, tuple(each.plain for each in states))
    result = tuple(rows(each, 0, value.factor) for each in found)
    return result if name == "lstm_cell" else result[0]


def _layer(
    run: Run,
    name: str,
    inner: torch.Tensor,
    start: tuple[torch.Tensor, ...],
    weights: tuple[Any, ...],
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Run one direction of one layer: ``[S, R, K]`` to ``[S, R, H]``, and the last state."""
    w_in, w_state, b_in, b_state = weights
    # One product computes the inputs' share of all steps.
    given = by_weights(run, rows(inner, 1), w_in, b_in).plain
    # `_GRU` uses a kernel that DirectML lacks, and writes into parts of tensors.
    is_autocast = torch.is_autocast_enabled(given.device.type)
    if name == "gru" and not is_directml(given.device) and not is_autocast:
        members = [*by_members(run, w_state), *([] if b_state is None else by_members(run, b_state))]
        out = _GRU.apply(given.contiguous(), start[0].contiguous(), run.segments, *members)
        return out, (out[-1],)
    weight, bias = lowered(w_state.plain, None if b_state is None else b_state.plain)
    is_low = all(each.dtype.itemsize < 4 for each in start) or (is_autocast and (name == "lstm" or given.is_cuda))
    if not is_low:
        return _unrolled(_STEPS[name], given, start, weight, bias, run.segments)
    # Like PyTorch's own kernels, take and return the lower precision but accumulate in float32.
    wide = tuple(each.float() for each in start)
    outputs, state = _unrolled(_STEPS[name], given.float(), wide, weight, bias, run.segments)
    return outputs.to(given.dtype), tuple(each.to(given.dtype) for each in state)


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
        state = step(each, linear(state[0].to(w.dtype), w, b, segments, 1), state)
        outputs.append(state[0])
    return torch.stack(outputs), state


class _GRU(Function):
    """One GRU layer: inputs' shares ``[S, R, 3H]`` and first states ``[R, H]`` to all states ``[S, R, H]``.

    Weights and biases come by member, and each pass stacks them anew. A stack kept from forward to backward would hold
    as much memory as the weights.
    """

    @staticmethod
    def forward(
        ctx: Any, given_SRG: torch.Tensor, start_RH: torch.Tensor, segments: Segments, *members: torch.Tensor
    ) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        w_PGH, b_PG = _stacked(members, segments)
        num_positions, num_rows, gates = given_SRG.shape
        width = gates // 3
        out = given_SRG.new_empty(num_positions, num_rows, width)
        # The backward pass reads both gates and the hidden's share of the new value, and recomputes the new value.
        kept = given_SRG.new_empty(num_positions, 3, num_rows, width)
        hidden = start_RH
        for position, given in enumerate(given_SRG.unbind(0)):
            share = linear(hidden, w_PGH, b_PG, segments, 1)
            both = torch.add(given[:, : 2 * width], share[:, : 2 * width]).sigmoid_()
            reset, update, hidden_new = kept[position].unbind(0)
            reset.copy_(both[:, :width])
            update.copy_(both[:, width:])
            hidden_new.copy_(share[:, 2 * width :])
            new = torch.addcmul(given[:, 2 * width :], reset, hidden_new).tanh_()
            hidden = torch.lerp(new, hidden, update, out=out[position])
        ctx.save_for_backward(given_SRG, start_RH, out, kept, *members)
        ctx.segments = segments
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if grads[0] is None:
            return (None,) * len(ctx.needs_input_grad)
        given_SRG, start_RH, out, kept, *members = ctx.saved_tensors
        segments = ctx.segments
        if torch.is_grad_enabled() or is_batched(grads[0]):
            return _again(given_SRG, start_RH, members, segments, grads[0], ctx.needs_input_grad)
        num_positions, num_rows, width = out.shape
        grad_given = torch.empty_like(given_SRG)
        # `d_share` is for one position; `shares` keeps a row's positions together, to sum the weights' gradients.
        d_share = given_SRG.new_empty(num_rows, 3 * width)
        shares = given_SRG.new_empty(num_rows, num_positions, 3 * width)
        grad_hidden = torch.zeros_like(start_RH)
        w_PHG = _stacked(members, segments)[0].transpose(1, 2)
        for position in range(num_positions - 1, -1, -1):
            reset, update, hidden_new = kept[position].unbind(0)
            new = torch.addcmul(given_SRG[position][:, 2 * width :], reset, hidden_new).tanh_()
            before = out[position - 1] if position else start_RH
            grad = grad_hidden + grads[0][position]
            d_given = grad_given[position]
            # h' = n + z (h - n)
            d_new = (grad - grad * update) * (1 - new * new)
            d_update = grad * (before - new) * update * (1 - update)
            d_reset = d_new * hidden_new * reset * (1 - reset)
            d_given[:, :width], d_given[:, width : 2 * width], d_given[:, 2 * width :] = d_reset, d_update, d_new
            d_share[:, : 2 * width] = d_given[:, : 2 * width]
            torch.mul(d_new, reset, out=d_share[:, 2 * width :])
            shares[:, position] = d_share
            grad_hidden = torch.addcmul(linear(d_share, w_PHG, None, segments, 1), grad, update)
        # Free the stack before gradients of its size are made.
        del w_PHG
        num_members = segments.num_members
        of_weights, of_biases = ctx.needs_input_grad[3 : 3 + num_members], ctx.needs_input_grad[3 + num_members :]
        of_members: list[torch.Tensor | None] = [None] * len(members)
        if any(of_weights):
            hiddens = start_RH.new_empty(num_rows, num_positions, width)
            hiddens[:, 0] = start_RH
            hiddens[:, 1:] = out[:-1].transpose(0, 1)
            found = outer(shares.flatten(0, 1), hiddens.flatten(0, 1), segments, num_positions)
            of_members[:num_members] = found.unbind(0)
        if any(of_biases):
            of_members[num_members:] = segment_sum(shares.flatten(0, 1), segments, num_positions).unbind(0)
        return grad_given, grad_hidden, None, *of_members


def _stacked(members: Sequence[torch.Tensor], segments: Segments) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Stack weights to ``[P, 3H, H]``, and any biases to ``[P, 3H]``."""
    num_members = segments.num_members
    weights, biases = list(members[:num_members]), list(members[num_members:])
    return torch.stack(weights), torch.stack(biases) if biases else None


def _again(
    given: torch.Tensor,
    start: torch.Tensor,
    members: Sequence[torch.Tensor],
    segments: Segments,
    grad: torch.Tensor,
    needed: Sequence[bool],
) -> tuple[torch.Tensor | None, ...]:
    """The gradients as a graph that can be differentiated again."""
    inputs = [given, start, None, *members]
    wanted = [each for each, needs in zip(inputs, needed, strict=True) if needs and each is not None]
    with torch.enable_grad():
        out, _ = _unrolled(_step_gru, given, (start,), *_stacked(members, segments), segments)
    found = iter(torch.autograd.grad(out, wanted, grad, create_graph=torch.is_grad_enabled(), allow_unused=True))
    return tuple(
        next(found) if needs and each is not None else None for each, needs in zip(inputs, needed, strict=True)
    )
