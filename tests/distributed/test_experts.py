"""Experts do not come and go while a model is spread over ranks; their order travels with checkpoints."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import celmoe
from celmoe import CELMoEConfig, ExpertConfig, HierarchicalCELMoE
from celmoe.distributed import load_checkpoint, load_file, save_checkpoint, shard_experts, shard_levels, write_file
from tests.lifecycle import WIDTH, build, factory

CALLS = {
    "add_expert": lambda model: model.add_expert("language", "x", ExpertConfig("x")),
    "remove_expert": lambda model: model.remove_expert("language", "ru"),
    "rename_expert": lambda model: model.rename_expert("language", "ru", "x"),
    "subset": lambda model: model.subset({"language": ["ru"]}),
    "load_experts": lambda model: celmoe.load_experts(model, build(is_stacked=False).state_dict()),
}


def told_by_a_spread_model(layout):
    model = build(is_stacked=layout == "stacked DDP")
    if "DDP" in layout:
        keep = DistributedDataParallel(torch.nn.Sequential(model))
    elif layout == "shard_experts":
        keep = shard_experts(model, init_device_mesh("cpu", (2,), mesh_dim_names=("expert",)))
    else:
        keep = shard_levels(model, init_device_mesh("cpu", (2,)))
    found = []
    for call in CALLS.values():
        try:
            call(model)
        except celmoe.ProcessGroupError as error:
            found.append(str(error))
    del keep
    return found


@pytest.mark.parametrize("layout", ["DDP", "stacked DDP", "shard_experts", "shard_levels"])
def test_a_spread_model_refuses(two, layout):
    for found in two.run(told_by_a_spread_model, layout):
        for name, words in zip(CALLS, found, strict=True):
            assert words.startswith(f"'model' must be in one process for {name!r} (got one ")


def of_order(families):
    config = CELMoEConfig.from_tree({name: [f"{name}0"] for name in families}, ("family", "language"), WIDTH)
    return HierarchicalCELMoE(config, factory)


def test_checkpoints_keep_the_order(tmp_path):
    model = torch.nn.Sequential(of_order(["a", "b", "c"]))
    save_checkpoint(tmp_path / "kept", model)
    write_file(tmp_path / "kept", tmp_path / "file")
    torch.save(model.state_dict(), tmp_path / "state")
    loads = {
        "kept": load_checkpoint,
        "file": load_file,
        "state": load_file,
    }
    for name, load in loads.items():
        load(tmp_path / name, torch.nn.Sequential(of_order(["a", "b", "c"])))
        other = torch.nn.Sequential(of_order(["a", "c", "b"]))
        before = {key: each.clone() for key, each in other.state_dict().items()}
        with pytest.raises(celmoe.CheckpointError, match="'checkpoint' must have the experts of level 'family' in the"):
            load(tmp_path / name, other)
        assert all(torch.equal(each, before[key]) for key, each in other.state_dict().items())


def test_checkpoints_of_earlier_versions_load(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("celmoe.distributed.checkpoints.saving.orders_of", lambda _: {})
        save_checkpoint(tmp_path / "kept", of_order(["a", "b"]))
    torch.save(dict(of_order(["a", "b"]).state_dict()), tmp_path / "state")

    load_checkpoint(tmp_path / "kept", of_order(["b", "a"]))
    load_file(tmp_path / "state", of_order(["b", "a"]))
