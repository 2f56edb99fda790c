"""Stand-ins for the experts that other ranks hold: their names, and the norms of their gradients.

[Note: Gradients elsewhere] Loss scalers, clipping and checks for NaN decide from `.grad` of a rank's parameters. Ranks
with other experts would decide otherwise, and replicated parameters would diverge. A rank therefore keeps a *stand-in*
of two numbers for each remote parameter. After each reduction the stand-in's `.grad` holds the parameter's gradient
norm. `clip_grad_norm_` adds up norms by parameter, in the parameters' order. Every rank passes the same numbers, so
ranks clip alike to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import nn

from celmoe.errors import ProcessGroupError, listed
from celmoe.experts import ExpertBatch, ExpertModule, ExpertResult
from celmoe.names import ELSEWHERE, STACKED, NamedModules
from celmoe.torch_internals import norms_as_clipped

from .gradients import all_gathered

# A parameter of an expert: the level's name, the expert's, and the parameter's name in the expert. A stack's parameter
# has no expert, and the name in the level's registry.
Place: TypeAlias = tuple[str, str, str]

# Kinds of gradients.
_NONE, _DENSE, _SPARSE = 0, 1, 2
# In place of a norm that overflows. No real norm is negative.
_OVERFLOW = -1.0


class _StandIns(nn.Module):
    """Stand-ins under their parameters' names in the expert; a ``state_dict`` has none of them."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        below: dict[str, dict[str, nn.Parameter]] = {}
        for name, parameter in parameters.items():
            head, _, rest = name.partition(".")
            if rest:
                below.setdefault(head, {})[rest] = parameter
            else:
                self._parameters[head] = stand_in_of(parameter)
        for head, inner in below.items():
            # Not `add_module`: it refuses the names of attributes, which modules in an expert may have.
            self._modules[head] = _StandIns(inner)

    def _save_to_state_dict(self, destination: Mapping[str, Any], prefix: str, keep_vars: bool) -> None:
        pass

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],  # noqa: ARG002  # none is missed
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, [], unexpected_keys, error_msgs)


def stand_in_of(parameter: torch.Tensor) -> nn.Parameter:
    """A stand-in with as many axes as the parameter: optimizers are chosen by the number of axes."""
    shape = (*(1 for _ in parameter.shape[1:]), 2) if parameter.dim() else ()
    return nn.Parameter(parameter.new_zeros(shape), parameter.requires_grad)


class RemoteExpert(ExpertModule):
    """Stands for an expert that another rank holds.

    Each parameter of the expert has a stand-in of one or two numbers, ``elsewhere.<name>``. The values of stand-ins
    mean nothing and are in no ``state_dict``. `ExpertSharding.reduce_gradients` sets their gradients to the norms of
    the expert's gradients. Give stand-ins to the optimizer, and to ``clip_grad_norm_``, with all other parameters.

    Args:
        level: The level's name.
        expert: The expert's name.
        rank: The rank of the mesh's dimension that holds the expert.
        parameters: The expert's parameters, by name; shared ones only for the first expert that has them, and none that
            are stacked.

    Attributes:
        level: The level's name.
        expert: The expert's name.
        rank: The rank of the mesh's dimension that holds the expert.
        elsewhere: The stand-ins.
    """

    def __init__(self, level: str, expert: str, rank: int, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.level, self.expert, self.rank = level, expert, rank
        self.elsewhere = _StandIns(parameters)

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        """Refuse to run: another rank holds the expert.

        Raises:
            ProcessGroupError: Always.
        """
        raise ProcessGroupError(
            f"expert {self.expert!r} of level {self.level!r} must be called on rank {self.rank} of its mesh's "
            f"dimension, which holds it (got a call with {len(batch.hidden)} samples elsewhere)"
        )

    def extra_repr(self) -> str:
        """The expert's rank."""
        return f"rank={self.rank}"


def stand_ins(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of a model that stand for parameters on other ranks: experts' own, and stacked ones."""
    for module in model.modules():
        if isinstance(module, RemoteExpert):
            yield from module.parameters()
        elif isinstance(module, NamedModules):
            for name, parameter in module._parameters.items():
                if parameter is not None and name.startswith(ELSEWHERE):
                    yield parameter


def _places(level: str, experts: NamedModules) -> tuple[dict[Place, nn.Parameter], dict[Place, nn.Parameter]]:
    """A level's parameters here, and the stand-ins for others, each by the place of the real one."""
    here: dict[Place, nn.Parameter] = {}
    there: dict[Place, nn.Parameter] = {}
    for name, parameter in experts._parameters.items():
        if parameter is not None:
            place = level, "", name.replace(ELSEWHERE, STACKED)
            (there if name.startswith(ELSEWHERE) else here)[place] = parameter
    for expert, module in experts.items():
        root, found = (module.elsewhere, there) if isinstance(module, RemoteExpert) else (module, here)
        for path, part in root.named_modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    found[level, expert, f"{path}.{name}" if path else name] = parameter
    return here, there


class GradientNorms:
    """Exchanges the norms of experts' gradients between the ranks of a group. See [Note: Gradients elsewhere].

    Args:
        group: The ranks.
        places: By rank, the parameters of the rank's experts.
    """

    def __init__(self, group: dist.ProcessGroup, places: Sequence[Sequence[Place]]) -> None:
        self._group = group
        self._places = places
        self._rank = dist.get_rank(group)

    @torch.no_grad()
    def exchange(self, levels: Mapping[str, NamedModules]) -> None:
        """Send the norms of the experts here, and set the gradients of stand-ins to the norms of remote experts.

        One all-gather sends two numbers for each parameter, as many from each rank. Every rank of the group must call
        `exchange`.

        Args:
            levels: By level and expert, the modules: experts here, and `RemoteExpert` modules.

        Raises:
            ProcessGroupError: An expert has a gradient of a parameter that the expert did not have at first; every rank
                raises.
        """
        if len(self._places) == 1:
            return
        own = self._places[self._rank]
        here: dict[Place, nn.Parameter] = {}
        there: dict[Place, nn.Parameter] = {}
        for level, experts in levels.items():
            for all_places, those in zip((here, there), _places(level, experts), strict=True):
                all_places.update(those)
        known = {here[place] for place in own if place in here}
        new = [place for place, each in here.items() if each.grad is not None and each not in known]
        grads = [here[place].grad if place in here else None for place in own]
        device = next((each.device for each in (*here.values(), *there.values())), torch.device("cpu"))
        said = torch.zeros(1 + max(map(len, self._places)), 2, dtype=torch.float64, device=device)
        said[0, 0] = len(new)
        said[1 : 1 + len(own)] = _kinds_and_norms(grads).to(device)
        heard = all_gathered(said, self._group)
        kinds = heard[..., 0].tolist()
        if any(num_new for num_new, *_ in kinds):
            self._refuse(new)
        pairs: dict[tuple[torch.dtype, torch.device], tuple[torch.Tensor, ...]] = {}
        for rank, places in enumerate(self._places):
            for position, place in enumerate(places if rank != self._rank else ()):
                stand_in, kind = there[place], kinds[rank][1 + position]
                # An optimizer moves stand-ins: a penalty on all parameters sees zeros only between `reduce_gradients`
                # and `optimizer.step()`.
                stand_in.zero_()
                if kind == _NONE:
                    stand_in.grad = None
                    continue
                wanted = stand_in.dtype, stand_in.device
                if wanted not in pairs:
                    pairs[wanted] = _pairs(heard[..., 1], stand_in.dtype).to(stand_in.device).flatten(0, 1).unbind()
                grad = pairs[wanted][rank * len(said) + 1 + position]
                grad = grad.view(stand_in.shape) if stand_in.dim() else grad[0]
                stand_in.grad = grad.to_sparse() if kind == _SPARSE else grad

    def _refuse(self, new: Sequence[Place]) -> None:
        everyones: list[Any] = [None] * len(self._places)
        dist.all_gather_object(everyones, [".".join(filter(None, place)) for place in new], self._group)
        ranks = [rank for rank, names in enumerate(everyones) if names]
        names = listed(name for each in everyones for name in each)
        raise ProcessGroupError(
            f"'model' must have had all of its experts' trained parameters when 'shard_experts' was called (got "
            f"gradients of {names} on ranks {ranks}: add parameters before)"
        )


def _kinds_and_norms(grads: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """``[N, 2]``, float64: each gradient's kind, and its norm as `clip_grad_norm_` takes it.

    A norm that overflows while all elements are finite is given as `_OVERFLOW`.
    """
    found = torch.zeros(len(grads), 2, dtype=torch.float64)
    alike: dict[tuple[torch.dtype, torch.device], tuple[list[int], list[torch.Tensor]]] = {}
    for position, grad in enumerate(grads):
        if grad is not None:
            found[position, 0] = _SPARSE if grad.is_sparse else _DENSE
            positions, values = alike.setdefault((grad.dtype, grad.device), ([], []))
            positions.append(position)
            values.append(grad.coalesce().values() if grad.is_sparse else grad)
    for positions, values in alike.values():
        # Not `torch.linalg.vector_norm`: on CUDA `clip_grad_norm_` runs this kernel, and the bits must be the same.
        norms = torch.stack(list(norms_as_clipped(values))).double().cpu()
        for place in norms.isinf().nonzero().flatten().tolist():
            if values[place].isfinite().all():
                norms[place] = _OVERFLOW
        found[positions, 1] = norms
    return found


def _pairs(norms: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``[..., 2]``: two numbers for each norm. `_OVERFLOW` gives the dtype's largest twice: the norm overflows."""
    pairs = torch.stack([norms, torch.zeros_like(norms)], -1)
    return torch.where((norms == _OVERFLOW).unsqueeze(-1), torch.finfo(dtype).max, pairs).to(dtype)
