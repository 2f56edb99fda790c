"""A level whose experts are spread over ranks: samples go to their experts, and come back.

Axes: B samples in batch order, R rows received, G ranks of the group, E experts of the level.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import nn

from celmoe.config import HierarchyLevelConfig
from celmoe.explain import LevelExplanation
from celmoe.level import Level, LevelInput, promoted_blocks
from celmoe.names import NamedModules, modules_named
from celmoe.outputs import CELMoEOutput, LevelOutput
from celmoe.routing.plan import LevelPlan, RoutingPlan
from celmoe.rows.blocks import Blocks
from celmoe.rows.dispatch import combine, dispatch

from .gradients import tied
from .meeting import Meeting, Table, coded, decoded
from .transport import Way, from_experts, to_experts


class Passage:
    """The state that the sharded levels of one model share in a forward pass.

    Args:
        group: The ranks over which the experts are spread.
        table: The table at which the ranks meet.
        first: The name of the first sharded level.

    Attributes:
        meeting: Facts of this pass that all ranks know.
        token: The token of the last exchange.
    """

    def __init__(self, group: dist.ProcessGroup, table: Table, first: str) -> None:
        self.group = group
        self.table = table
        self._first = first
        self.meeting: Meeting | None = None
        self.token: torch.Tensor | None = None

    def enter(self, level: str, host_plan: RoutingPlan, given: LevelInput) -> tuple[Meeting, torch.Tensor]:
        """The meeting and the token that a level needs before rows travel.

        Raises:
            InputError: See `Table.meet`.
        """
        if level == self._first:
            self.meeting = self.table.meet(host_plan, given)
            self.token = torch.zeros((), device=given.hidden.device, requires_grad=torch.is_grad_enabled())
        assert self.meeting is not None
        assert self.token is not None
        return self.meeting, self.token

    def leave(self, _model: nn.Module, _args: object, output: CELMoEOutput) -> None:
        """Tie fused output and losses to the pass's exchanges: a backward pass from any of them makes all exchanges.

        Losses of levels that are not spread get their shares of all ranks' samples, times the number of ranks: the mean
        of ranks' totals is the total of one process.
        """
        token, self.token = self.token, None
        meeting, self.meeting = self.meeting, None
        assert meeting is not None
        for level in output.levels.values():
            factor = dist.get_world_size(self.group) * level.hidden.shape[0] / max(meeting.num_samples, 1)
            for key in level.loss_shares if level.name not in meeting.counts else ():
                level.loss_shares[key] *= factor
                output.loss_shares[key] = level.loss_shares[key]
        if token is None or not torch.is_grad_enabled():
            return
        output.fused_hidden = tied(output.fused_hidden, token)
        for level in output.levels.values():
            for key, value in level.losses.items():
                level.losses[key] = output.losses[key] = tied(value, token)


class ShardedLevel(Level):
    """One level of a model, with its experts spread over ranks.

    Args:
        config: The level's config.
        modules: The level's experts, with a `RemoteExpert` for each expert that another rank holds.
        owners: The rank of each expert, in the config's order.
        passage: The passage of the model's sharded levels.
    """

    def __init__(
        self, config: HierarchyLevelConfig, modules: NamedModules, owners: Sequence[int], passage: Passage
    ) -> None:
        super().__init__(config)
        self._modules = modules
        self._names = tuple(config.experts)
        self._owners = np.asarray(owners, dtype=np.int64)
        self._passage = passage
        rank = dist.get_rank(passage.group)
        positions = {name: position for position, name in enumerate(self._names)}
        self._owner_by_name = {name: owners[position] for name, position in positions.items()}
        # The positions, in the config's order, of the experts here, sorted by name.
        self._here = [positions[name] for name in sorted(positions) if owners[positions[name]] == rank]

    def run(
        self,
        experts: Sequence[nn.Module],  # noqa: ARG002  # those of this rank's samples: most are elsewhere
        engine: str,
        given: LevelInput,
        plan: LevelPlan,
        host_plan: RoutingPlan,
    ) -> tuple[LevelOutput, Blocks | None]:
        """Run as `Level.run` does, but samples run on their experts' ranks, together with other ranks' samples.

        Losses and aux are those of the experts here, over the samples of all ranks. The losses' weights are multiplied
        by the number of ranks, for the sum of all ranks' objectives is divided by that number. Their shares are of the
        samples of all ranks.
        """
        passage = self._passage
        meeting, token = passage.enter(plan.name, host_plan, given)
        counts = meeting.counts[plan.name]
        present = counts.sum(0) > 0
        if not present.any():
            # No rank of the group has samples. Ranks of other groups may have some, and all make a backward pass.
            output, _ = super().run([*self._modules.values()], engine, given, plan, host_plan)
            output.hidden = tied(output.hidden, token)
            return output, None
        dtype, is_differentiated = self._agreed_input(meeting, given)
        scales = self.scales(self._names)
        if not any(scale for scale, is_there in zip(scales, present, strict=True) if is_there):
            is_differentiated = False

        num_ranks = dist.get_world_size(passage.group)
        rank = dist.get_rank(passage.group)
        here = counts[:, self._here]
        sent = np.bincount(self._owners, weights=counts[rank], minlength=num_ranks).astype(np.int64)
        way = Way(passage.group, tuple(sent.tolist()), tuple(here.sum(1).tolist()))
        outward = self._by_owner(plan)
        rows = self._outgoing(given, outward, meeting, dtype, is_differentiated)
        looks = meeting.rows
        has_gradient = [is_differentiated, *(each[2] for each in (looks.mask, *looks.context) if each is not None)]
        token, received = to_experts(rows, way, [looks.records and each for each in has_gradient], token)

        weights = None if meeting.weights is None else meeting.weights[plan.name][:, self._here].sum(0)
        local_plan = self._local_plan(here, weights, given.hidden.device)
        hidden, *rest = received
        mask = rest.pop(0) if given.mask is not None else None
        local = LevelInput(hidden, None, given.context.with_aligned(rest) if rest else given.context, mask)
        modules = modules_named(self._modules, local_plan.present)
        output, _ = super().run(modules, engine, local, local_plan, host_plan)

        result = self._in_agreed_dtype(output.hidden, bool(here.any()))
        passage.token, returned = from_experts(result, way, token)
        blocks = promoted_blocks([returned, *_passed(given.hidden, plan)])
        output.hidden = combine(blocks, outward).reshape(given.hidden.shape)
        output.loss_weights = {key: weight * num_ranks for key, weight in output.loss_weights.items()}
        num_received = local.hidden.shape[0]
        output.loss_shares = {
            key: share * num_received / meeting.num_samples for key, share in output.loss_shares.items()
        }
        return output, None

    def explain(
        self,
        modules: NamedModules,
        engine: str,
        experts: Sequence[nn.Module],  # noqa: ARG002  # as in `run`
        plan: LevelPlan | None,  # noqa: ARG002  # which samples come here is not known before ranks meet
    ) -> LevelExplanation:
        """The explanation of this rank's experts."""
        here = {self._names[position]: modules[self._names[position]] for position in sorted(self._here)}
        return super().explain(NamedModules(here), engine, list(here.values()), None)

    def _agreed_input(self, meeting: Meeting, given: LevelInput) -> tuple[torch.dtype, bool]:
        """The dtype in which rows travel, and if gradients come back."""
        if meeting.counts.keys() and next(iter(meeting.counts)) == self.name:
            return meeting.dtype, meeting.is_differentiated
        # Each rank knows only its own output of the levels in between.
        heard = self._heard([int(given.hidden.shape[0] > 0), *coded(given.hidden)], given.hidden.device)
        return decoded(heard[:, 1:], heard[:, 0] > 0, given.hidden.dtype)

    def _in_agreed_dtype(self, rows: torch.Tensor, has_some: bool) -> torch.Tensor:
        """The experts' rows in the promoted dtype of all ranks' rows, as in one process."""
        heard = self._heard([int(has_some), *coded(rows)], rows.device)
        dtype, _ = decoded(heard[:, 1:], heard[:, 0] > 0, rows.dtype)
        return rows.to(dtype)

    def _heard(self, said: Sequence[int], device: torch.device) -> npt.NDArray[np.int64]:
        return self._passage.table.all_gathered(np.array(said, dtype=np.int64), device)

    def _outgoing(
        self, given: LevelInput, outward: LevelPlan, meeting: Meeting, dtype: torch.dtype, is_differentiated: bool
    ) -> list[torch.Tensor]:
        """Hidden states, mask and the context's batch-aligned tensors, in the order of their destination ranks."""
        hidden = given.hidden if is_differentiated else given.hidden.detach()
        tensors = [hidden, *([] if given.mask is None else [given.mask]), *given.context.aligned]
        if given.hidden.shape[0]:
            tensors[0] = hidden.to(dtype)
            return [dispatch(tensor, outward)[0] for tensor in tensors]
        # Empty rows take the form of other ranks' rows. The tie passes a gradient of zeros to this rank's own tensors.
        looks = meeting.rows
        wanted = [(looks.hidden, dtype), *(each[:2] for each in (looks.mask, *looks.context) if each is not None)]
        return [
            tied(torch.empty((0, *shape), dtype=each, device=hidden.device), tensor)
            for (shape, each), tensor in zip(wanted, tensors, strict=True)
        ]

    def _by_owner(self, plan: LevelPlan) -> LevelPlan:
        """This rank's plan as one group of rows: ordered by destination rank, then by expert, then as in the batch."""
        owners = [self._owner_by_name[name] for name in plan.present]
        size = sum(plan.counts)
        positions = sorted(range(len(owners)), key=owners.__getitem__)
        if positions == list(range(len(owners))):
            return plan._replace(present=("",), counts=(size,), follows_previous=False)
        counts = np.asarray(plan.counts, dtype=np.int64)
        starts = np.cumsum(counts) - counts
        return plan.rearranged(_ranges(starts[positions], counts[positions]), (size,))._replace(present=("",))

    def _local_plan(
        self, here: npt.NDArray[np.int64], weights: npt.NDArray[np.float64] | None, device: torch.device
    ) -> LevelPlan:
        """The plan of the rows received. Rows come by rank, then by expert; an expert wants its rows by rank.

        Args:
            here: ``[G, E here]``, rows by rank and expert.
            weights: ``[E here]``, the sums of the rows' weights, or ``None``.
            device: The rows' device.
        """
        starts = (np.cumsum(here) - here.reshape(-1)).reshape(here.shape)
        order = _ranges(starts.T.reshape(-1), here.T.reshape(-1))
        counts = here.sum(0)
        is_there = np.flatnonzero(counts)
        size, num_present = len(order), len(is_there)
        ids = np.tile(np.asarray(self._here, dtype=np.int64), len(here)).repeat(here.reshape(-1))
        packed = np.concatenate([order, np.argsort(order, kind="stable"), ids, np.cumsum(counts[is_there])])
        tensor = torch.from_numpy(packed).to(device, non_blocking=True)
        parts = tensor.split([size, size, size, num_present])
        return LevelPlan(
            self.name,
            tuple(self._names[self._here[place]] for place in is_there.tolist()),
            tuple(counts[is_there].tolist()),
            bool((order == np.arange(size)).all()),
            False,
            *cast(tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], parts),
            weights=None if weights is None else tuple(weights[is_there].tolist()),
        )


def _passed(hidden: torch.Tensor, plan: LevelPlan) -> list[torch.Tensor]:
    """The rows of samples without an expert, if there are some: they stay here."""
    if plan.mixture is None or not plan.mixture.num_passed:
        return []
    return [hidden.index_select(0, plan.order[sum(plan.counts) :])]


def _ranges(starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The ranges with these starts and lengths, one after another."""
    shifts = starts - (np.cumsum(lengths) - lengths)
    return np.repeat(shifts, lengths) + np.arange(int(lengths.sum()), dtype=np.int64)
