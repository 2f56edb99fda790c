"""Two names that share one expert, or a part of one, stay tied and keep their values, whoever saves."""

import pytest
import torch
from torch import nn

import celmoe
from celmoe.distributed import load_checkpoint, load_file, save_checkpoint, write_file

WIDTH = 4


class Expert(celmoe.ExpertModule):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("shift", torch.rand(WIDTH))

    def forward(self, batch):
        return celmoe.ExpertResult(self.linear(batch.hidden) + self.shift)


def tie_expert(experts):
    experts["b"] = experts["a"]


def tie_weight(experts):
    experts["b"].linear.weight = experts["a"].linear.weight


def tie_buffer(experts):
    experts["b"].shift = experts["a"].shift


def tie_within(experts):
    experts["a"].other = experts["a"].linear


def tie_nothing(experts):
    """The comparison's other end."""


TIES = [tie_expert, tie_weight, tie_buffer, tie_within]


def make_model(tie, seed, order="abc", engine="looped"):
    torch.manual_seed(seed)
    experts = {name: Expert() for name in "abc"}
    tie(experts)
    level = celmoe.HierarchyLevelConfig("level", {name: celmoe.ExpertConfig(name) for name in order})
    config = celmoe.CELMoEConfig(WIDTH, [level], fusion_dropout=0.0)
    return celmoe.HierarchicalCELMoE(config, lambda level, name, metadata: experts[name], engine=engine)


def step(model, optimizer):
    torch.manual_seed(5)
    optimizer.zero_grad()
    model(torch.randn(6, WIDTH), {"level": ["a", "b", "c", "a", "b", "b"]}).fused_hidden.square().sum().backward()
    optimizer.step()


def shared(model):
    """The names that share memory."""
    names = {}
    for name, value in model.state_dict().items():
        names.setdefault(value.data_ptr(), set()).add(name)
    return sorted(map(sorted, names.values()))


def by_checkpoint(model, other, optimizer, read, folder):
    save_checkpoint(folder / "checkpoint", model, optimizer)
    load_checkpoint(folder / "checkpoint", other, read)


def by_file(model, other, optimizer, read, folder):
    save_checkpoint(folder / "checkpoint", model, optimizer)
    write_file(folder / "checkpoint", folder / "file.pt")
    load_file(folder / "file.pt", other, read)


@pytest.mark.parametrize("order", ["abc", "cba"])
@pytest.mark.parametrize("way", [by_checkpoint, by_file])
@pytest.mark.parametrize("tie", TIES)
def test_checkpoints_keep_values_and_ties(tmp_path, tie, way, order, monkeypatch):
    # A checkpoint of an earlier version, which loads into a model of any order.
    monkeypatch.setattr("celmoe.distributed.checkpoints.saving.orders_of", lambda _: {})
    model, other = make_model(tie, 0), make_model(tie, 1, order)
    optimizer, read = (torch.optim.AdamW(each.parameters(), lr=0.1) for each in (model, other))
    step(model, optimizer)
    ties = shared(other)
    assert any(len(names) > 1 for names in ties)
    way(model, other, optimizer, read, tmp_path)
    assert shared(other) == ties
    # State is found under whichever of its names comes first in the other.
    assert len(read.state) == len(optimizer.state)
    for _ in range(2):
        step(model, optimizer)
        step(other, read)
    found, wanted = other.state_dict(), model.state_dict()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)


def test_ties_can_be_loosened(tmp_path):
    """State goes with each of the names, so that experts which were one go on as two."""
    model, other = make_model(tie_expert, 0), make_model(tie_nothing, 1)
    optimizer, read = (torch.optim.AdamW(each.parameters(), lr=0.1) for each in (model, other))
    step(model, optimizer)
    by_checkpoint(model, other, optimizer, read, tmp_path)
    states = [read.state[other.level_modules["level"][name].linear.weight]["exp_avg"] for name in "ab"]
    assert torch.equal(*states)
    assert states[0].data_ptr() != states[1].data_ptr()


@pytest.mark.parametrize("engine", ["looped", "auto"])
@pytest.mark.parametrize("tie", [*TIES, tie_nothing])
def test_safetensors_keeps_values_and_ties(tmp_path, tie, engine):
    safetensors = pytest.importorskip("safetensors.torch")
    model, other = make_model(tie, 0, engine=engine), make_model(tie, 1, engine=engine)
    # The engine has run, and has stacked its classes.
    step(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    step(other, torch.optim.AdamW(other.parameters(), lr=0.1))
    ties = shared(other)
    safetensors.save_model(model, tmp_path / "model.safetensors")
    missing, unexpected = safetensors.load_model(other, tmp_path / "model.safetensors")
    assert not missing
    assert not unexpected
    assert shared(other) == ties
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
    hidden, routing = torch.randn(3, WIDTH), {"level": ["a", "b", "c"]}
    assert torch.equal(other(hidden, routing).fused_hidden, model(hidden, routing).fused_hidden)
