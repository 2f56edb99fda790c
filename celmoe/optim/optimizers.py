"""Optimizers that treat each expert of a stack as an expert of its own.

PyTorch's optimizers see one parameter in a stack. Experts without a sample in the batch have gradients of zero there:
weight decay and old momentum move these experts. The optimizers here leave them as they are, with their moments and
their number of steps, as PyTorch's do with parameters whose gradient is ``None``. They take the same arguments. Their
parameter groups may hold stacked experts' own tensors. They compute by PyTorch's own functions, over runs of
neighbouring experts that have made equally many steps.

Axes: M members of a stack.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from celmoe.errors import ConfigError
from celmoe.torch_internals import without_amp_scaling

from .per_expert import PerExpert, Runs, grad_of, parts_of


class _AdamLike(PerExpert):
    _function: Callable[..., None]

    def step_group(
        self, group: dict[str, Any], parameters: Sequence[torch.Tensor], all_runs: Sequence[Runs | None]
    ) -> None:
        """See `PerExpert.step_group`."""
        is_fused = _is_fused(group, parameters)
        averages = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])]
        stepped: list[torch.Tensor] = []
        grads: list[torch.Tensor] = []
        steps: list[torch.Tensor] = []
        state: dict[str, list[torch.Tensor]] = {key: [] for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")}
        for parameter, runs in zip(parameters, all_runs, strict=True):
            device, own = parameter.device if is_fused else torch.device("cpu"), self.state[parameter]
            if runs is None:
                if "step" not in own:
                    own["step"] = torch.zeros((), device=device)
                steps.append(own["step"])
            else:
                # A copy, for PyTorch counts in place, and other parameters have the same runs.
                steps += torch.tensor(runs.steps, device=device).unbind(0)
            for key in averages:
                if key not in own:
                    own[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            stepped += parts_of(runs, parameter)
            grads += parts_of(runs, grad_of(parameter))
            for key in averages:
                state[key] += parts_of(runs, own[key])
        if not stepped:
            return
        beta1, beta2 = group["betas"]
        type(self)._function(
            *(stepped, grads, *state.values(), steps),
            foreach=group["foreach"],
            fused=is_fused,
            has_complex=any(map(torch.is_complex, parameters)),
            amsgrad=group["amsgrad"],
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )


class AdamW(_AdamLike, torch.optim.AdamW):
    """`torch.optim.AdamW`, which leaves the absent experts of a stack as they are.

    Args:
        params: See `torch.optim.AdamW`, like all other arguments.
        kwargs: ``capturable`` and ``differentiable`` must be false.

    Raises:
        ConfigError: ``capturable`` or ``differentiable`` is true.
    """

    _function = staticmethod(adamw)

    def __init__(self, params: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(params, *args, **_plain(kwargs))
        without_amp_scaling(self)


class Adam(_AdamLike, torch.optim.Adam):
    """`torch.optim.Adam`, which leaves the absent experts of a stack as they are.

    Args:
        params: See `torch.optim.Adam`, like all other arguments.
        kwargs: ``capturable`` and ``differentiable`` must be false.

    Raises:
        ConfigError: ``capturable`` or ``differentiable`` is true.
    """

    _function = staticmethod(adam)

    def __init__(self, params: Any, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("decoupled_weight_decay"):
            raise ConfigError("'decoupled_weight_decay' must be False (got True; take celmoe.optim.AdamW)")
        super().__init__(params, *args, **_plain(kwargs))
        without_amp_scaling(self)


class SGD(PerExpert, torch.optim.SGD):
    """`torch.optim.SGD`, which leaves the absent experts of a stack as they are.

    Args:
        params: See `torch.optim.SGD`, like all other arguments.
        kwargs: ``differentiable`` must be false.

    Raises:
        ConfigError: ``differentiable`` is true.
    """

    def __init__(self, params: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(params, *args, **_plain(kwargs))
        without_amp_scaling(self)

    def step_group(
        self, group: dict[str, Any], parameters: Sequence[torch.Tensor], all_runs: Sequence[Runs | None]
    ) -> None:
        """See `PerExpert.step_group`."""
        has_momentum = bool(group["momentum"])
        stepped: list[torch.Tensor] = []
        grads: list[torch.Tensor] = []
        # A first step takes the gradient for the momentum.
        momenta: list[torch.Tensor | None] = []
        kept: list[torch.Tensor | None] = []
        for parameter, runs in zip(parameters, all_runs, strict=True):
            stepped += parts_of(runs, parameter)
            grads += parts_of(runs, grad_of(parameter))
            if not has_momentum:
                continue
            own = self.state[parameter]
            if runs is None:
                momenta.append(own.get("momentum_buffer"))
                kept.append(None)
                continue
            if own.get("momentum_buffer") is None:
                own["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            parts = runs.of(own["momentum_buffer"])
            momenta += [part if step else None for part, step in zip(parts, runs.steps.tolist(), strict=True)]
            kept += parts
        # Fused kernels take either no momenta or all.
        are_new = [each is None for each in momenta] or [False] * len(stepped)
        for is_new in set(are_new):
            places = [place for place, each in enumerate(are_new) if each == is_new]
            some = [momenta[place] for place in places] if momenta else []
            sgd(
                *([stepped[place] for place in places], [grads[place] for place in places], some),
                has_sparse_grad=any(each.is_sparse for each in grads),
                foreach=group["foreach"],
                fused=_is_fused(group, parameters),
                weight_decay=group["weight_decay"],
                momentum=group["momentum"],
                lr=group["lr"],
                dampening=group["dampening"],
                nesterov=group["nesterov"],
                maximize=group["maximize"],
            )
            if is_new:
                for place, made in zip(places, some, strict=True):
                    momenta[place] = made
                    if (part := kept[place]) is not None and made is not None:
                        part.copy_(made)
        ordinary = [each for each, runs in zip(parameters, all_runs, strict=True) if runs is None and has_momentum]
        new_of = [made for part, made in zip(kept, momenta, strict=True) if part is None]
        for parameter, momentum in zip(ordinary, new_of, strict=True):
            self.state[parameter]["momentum_buffer"] = momentum


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    """The options, none of which keeps the host from reading which experts are stepped.

    Raises:
        ConfigError: One of them does.
    """
    for name in ("capturable", "differentiable"):
        if options.get(name):
            raise ConfigError(f"{name!r} must be False, for the host reads which experts are stepped (got True)")
    return options


def _is_fused(group: dict[str, Any], parameters: Sequence[torch.Tensor]) -> bool | None:
    """True for PyTorch's fused kernels. If nobody chose, a CPU takes them: many runs would take long one by one."""
    if group["fused"] is not None or group["foreach"] is not None:
        return bool(group["fused"])
    are_usual = all(each.is_floating_point() and each.device.type == "cpu" for each in parameters)
    has_sparse = any(grad_of(each).layout is not torch.strided for each in parameters)
    return True if are_usual and not has_sparse and not isinstance(group["lr"], torch.Tensor) else None
