"""Freezing, and gradient norms, by expert: ranks do as one process on the joined batch."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import celmoe
from celmoe.distributed import shard_experts, shard_levels
from tests.stacks import MLP, NAMES, WIDTH, build, expert_of

ROUTES = ["e0", "e2", "e2", "e5", "e0", "e3", "e1", "e1"]
# The change before each step.
CHANGES = [("freeze", "e[23]"), ("freeze", "e0"), ("unfreeze", "e2"), ("unfreeze", "*")]


def _alone(model):
    return lambda: None


def _by_expert(model):
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("expert",))
    return shard_experts(model, mesh).reduce_gradients


def _by_level(model):
    shard_levels(model, dist.init_device_mesh("cpu", (dist.get_world_size(),)))
    return lambda: None


WAYS = {"alone": _alone, "by expert": _by_expert, "by level": _by_level}


def train(way, verb_before):
    """The norms at each step, and at its end the fused output of this rank's samples."""
    rank, size = (0, 1) if way == "alone" else (dist.get_rank(), dist.get_world_size())
    model = build(MLP, "looped").double()
    if verb_before:
        model.freeze("language", "e1")
    reduce = WAYS[way](model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    seen = []
    for step, (verb, pattern) in enumerate(CHANGES):
        getattr(model, verb)("language", pattern)
        hidden = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(step)).double()[rank::size]
        optimizer.zero_grad()
        output = model(hidden, {"language": ROUTES[rank::size]}).fused_hidden
        (output.square().sum() * size).backward()
        reduce()
        norms = celmoe.gradient_norms(model)
        optimizer.step()
        seen.append((norms, output.detach()))
    return seen


@pytest.mark.parametrize("verb_before", [True, False])
@pytest.mark.parametrize("way", ["by expert", "by level"])
def test_ranks_do_as_one_process(two, way, verb_before):
    alone, ranks = train("alone", verb_before), two.run(train, way, verb_before)
    for step, (norms, output) in enumerate(alone):
        for rank, seen in enumerate(ranks):
            assert list(seen[step][0]["language"]) == list(norms["language"])
            assert seen[step][0]["language"] == pytest.approx(norms["language"], rel=1e-9)
            torch.testing.assert_close(seen[step][1], output[rank::2], rtol=0, atol=1e-9)
    assert list(alone[0][0]["language"]) == (["e0", "e5"] if verb_before else ["e0", "e1", "e5"])


def test_experts_on_other_ranks_are_trained_again(two):
    assert two.run(_thawed) == [(False, True)] * 2


def _thawed():
    model = build(MLP, "looped")
    model.freeze("language")
    _by_expert(model)
    before = any(each.requires_grad for name in NAMES for each in expert_of(model, name).parameters())
    model.unfreeze("language")
    return before, all(each.requires_grad for name in NAMES for each in expert_of(model, name).parameters())
