"""Contenders that compute the right output and learn something wrong, each in one place."""

import dataclasses

import torch

from benchmarks.harness.equality import Part


def with_gradients(evidence):
    """The weights whose gradients a step reaches, by name."""
    found = [name for name, value in evidence.items() if name.startswith("gradient of ") and value is not None]
    return [name.removeprefix("gradient of ") for name in found if name != "gradient of the input"]


def freeze(weights, first, second):
    """The parameter of the first gets no gradient."""
    _whole(weights[first]).requires_grad_(False)


def scale(weights, first, second):
    """The gradient of the first is 1 % too large; of a stack, the first expert's part alone."""
    weight = weights[first]

    def scaled(grad):
        grad = grad.clone()
        (grad[weight.place] if isinstance(weight, Part) else grad).mul_(1.01)
        return grad

    _whole(weight).register_hook(scaled)


def swap(weights, first, second):
    """Two experts get each other's gradients."""
    one, other = weights[first], weights[second]
    if isinstance(one, Part):

        def swapped(grad):
            grad = grad.clone()
            grad[[one.place, other.place]] = grad[[other.place, one.place]]
            return grad

        assert one.whole is other.whole
        one.whole.register_hook(swapped)
        return
    seen = set()

    def exchange(parameter):
        seen.add(parameter)
        if seen == {one, other}:
            one.grad, other.grad = other.grad, one.grad
            seen.clear()

    for each in (one, other):
        each.register_post_accumulate_grad_hook(exchange)


GRADIENTS = {"frozen": freeze, "scaled": scale, "swapped": swap}


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden):
        return hidden.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 1.01 * gradient


def with_another_input_gradient(contender):
    """The same, but for the gradient of the hidden states."""
    return dataclasses.replace(contender, forward=lambda hidden: contender.forward(_ScaledGradient.apply(hidden)))


def two_alike(weights, names):
    """The same parameter of two experts, of one level if the level keeps them in one tensor; or of the only one."""
    for first in reversed(names):
        for second in names:
            if first != second and _kind(weights, first) == _kind(weights, second):
                return first, second
    return names[0], names[0]


def _kind(weights, name):
    weight = weights[name]
    _expert, _, parameter = name.partition(".body." if ".body." in name else ".")
    return id(weight.whole) if isinstance(weight, Part) else (parameter, weight.shape)


def _whole(weight):
    return weight.whole if isinstance(weight, Part) else weight
