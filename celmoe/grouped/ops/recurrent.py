"""Recurrent layers: all rows of all members take each step together.

A loop over members runs S · P tiny steps; here S steps serve all members, each step one product by member. A GRU layer
is an autograd Function with an explicit backward pass (backpropagation through time), because a graph of S · 10 nodes
would cost more than the products. Differentiating the layer twice builds such a graph.

Axes: R rows, S positions, K input width, H hidden width, P members.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, cast

import torch
from torch.autograd import Function
from torch.nn import functional as F

from celmoe.directml import is_directml
from celmoe.grouped.kernels.gru import gru, gru_gradients
from celmoe.grouped.kernels.product import is_batched, linear, outer, segment_sum
from celmoe.grouped.segments import DeviceSegments, Segments
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
        stacks = [w_state] if b_state is None else [w_state, b_state]
        is_whole = all(each.members is None for each in stacks)
        by_stack = [[each.plain] if is_whole else by_members(run, each) for each in stacks]
        out = _GRU.apply(given.contiguous(), start[0].contiguous(), run.segments, is_whole, *chain(*by_stack))
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

    Weights and biases come by member, or as stacks that there are already (``is_whole``). Each pass stacks members
    anew. A stack kept from forward to backward would hold as much memory as the weights.
    """

    @staticmethod
    def forward(
        ctx: Any,
        given_SRG: torch.Tensor,
        start_RH: torch.Tensor,
        segments: Segments,
        is_whole: bool,
        *members: torch.Tensor,
    ) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        w_PGH, b_PG = _stacked(members, segments, is_whole)
        if isinstance(segments, DeviceSegments):
            out_SRH, kept_SRG = torch.ops.celmoe.gru(given_SRG, start_RH, w_PGH, b_PG, segments.ends())
        else:
            out_SRH, kept_SRG = gru(given_SRG, start_RH, w_PGH, b_PG, segments)
        ctx.save_for_backward(given_SRG, start_RH, out_SRH, kept_SRG, *members)
        ctx.segments, ctx.is_whole = segments, is_whole
        return cast(torch.Tensor, out_SRH)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if grads[0] is None:
            return (None,) * len(ctx.needs_input_grad)
        given_SRG, start_RH, out_SRH, kept_SRG, *members = ctx.saved_tensors
        segments, is_whole = ctx.segments, ctx.is_whole
        if torch.is_grad_enabled() or is_batched(grads[0]):
            return _again(given_SRG, start_RH, members, segments, is_whole, grads[0], ctx.needs_input_grad)
        before = torch.cat([start_RH.unsqueeze(0), out_SRH[:-1]])
        # Not kept: gradients of the weights' size are made below.
        arguments = grads[0], given_SRG, before, kept_SRG, _stacked(members, segments, is_whole)[0]
        if isinstance(segments, DeviceSegments):
            shares, of_new, of_start = torch.ops.celmoe.gru_gradients(*arguments, segments.ends())
        else:
            shares, of_new, of_start = gru_gradients(*arguments, segments)
        del arguments
        of_members = _of_members(ctx, shares, before)
        shares.chunk(3, 2)[2].copy_(of_new)
        return shares, of_start, None, None, *of_members


def _of_members(ctx: Any, shares_SRG: torch.Tensor, before_SRH: torch.Tensor) -> list[torch.Tensor | None]:
    """The gradients of weights and biases, by member or of the whole stacks."""
    segments, num_positions = ctx.segments, len(shares_SRG)
    needed = ctx.needs_input_grad[4:]
    num_weights = 1 if ctx.is_whole else segments.num_members
    # A row's positions stand together, to be summed.
    shares = shares_SRG.transpose(0, 1).flatten(0, 1)
    found: list[torch.Tensor | None] = [None] * len(needed)
    if any(needed[:num_weights]):
        of_weights = outer(shares, before_SRH.transpose(0, 1).flatten(0, 1), segments, num_positions)
        found[:num_weights] = [of_weights] if ctx.is_whole else of_weights.unbind(0)
    if any(needed[num_weights:]):
        of_biases = segment_sum(shares, segments, num_positions)
        found[num_weights:] = [of_biases] if ctx.is_whole else of_biases.unbind(0)
    return found


def _stacked(
    members: Sequence[torch.Tensor], segments: Segments, is_whole: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weights ``[P, 3H, H]``, and any biases ``[P, 3H]``."""
    if is_whole:
        return members[0], members[1] if len(members) > 1 else None
    num_members = segments.num_members
    weights, biases = list(members[:num_members]), list(members[num_members:])
    return torch.stack(weights), torch.stack(biases) if biases else None


def _again(
    given: torch.Tensor,
    start: torch.Tensor,
    members: Sequence[torch.Tensor],
    segments: Segments,
    is_whole: bool,
    grad: torch.Tensor,
    needed: Sequence[bool],
) -> tuple[torch.Tensor | None, ...]:
    """The gradients as a graph that can be differentiated again."""
    inputs = [given, start, None, None, *members]
    wanted = [each for each, needs in zip(inputs, needed, strict=True) if needs and each is not None]
    with torch.enable_grad():
        out, _ = _unrolled(_step_gru, given, (start,), *_stacked(members, segments, is_whole), segments)
    found = iter(torch.autograd.grad(out, wanted, grad, create_graph=torch.is_grad_enabled(), allow_unused=True))
    return tuple(
        next(found) if needs and each is not None else None for each, needs in zip(inputs, needed, strict=True)
    )
