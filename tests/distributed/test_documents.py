"""The guide's functions for several ranks do as it says; and `celmoe.distributed` shows the names that it lists."""

import importlib

import pytest
import torch
import torch.distributed as dist

import celmoe.distributed
from tests.distributed import jobs
from tests.distributed.jobs import Job
from tests.distributed.test_data_parallel import STEPS
from tests.documents import GUIDE, examples


def follow(block):
    """Run both trainings of the guide, and return the ranks' values afterwards; and the steps of one process."""
    names = {"torch": torch, "__name__": "__guide__"}
    exec(block, names)
    rank, job = dist.get_rank(), Job(STEPS[:3])
    models = [jobs.make_model(job) for _ in range(2)]
    batches = [jobs.make_batches(job, step, 0)[rank] for step in range(3)]
    given = [(batch.hidden, {"language": batch.languages}, batch.targets) for batch in batches]
    names["train_data_parallel"](models[0], given)
    names["train_expert_parallel"](models[1], given, 2)
    return [model.state_dict() for model in models]


def test_the_guides_trainings(two):
    block = examples((GUIDE / "ranks.md").read_text(encoding="utf-8"))[0][1]
    job = Job(STEPS[:3])
    found = two.run(follow, block)
    for way, max_norm in ((0, None), (1, 1.0)):
        model = jobs.make_model(job)
        optimizer = torch.optim.AdamW(model.parameters())
        for step in range(3):
            optimizer.zero_grad()
            batch = jobs.joined(jobs.make_batches(job, step, 0))
            errors = model(**batch.inputs(job)).fused_hidden - batch.targets
            errors.square().mean().backward()
            if max_norm is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
        wanted = {name: value.detach() for name, value in model.named_parameters()}
        # AdamW as it comes divides by gradients as small as 1e-8, and so magnifies rounding.
        jobs.assert_close("", found[0][way] | found[1][way], wanted, 1e-8)


def test_the_list_is_sorted_and_equals_what_is_visible():
    visible = {
        name
        for name, value in vars(celmoe.distributed).items()
        if not name.startswith("_") and getattr(value, "__module__", "").startswith("celmoe.distributed")
    }
    assert celmoe.distributed.__all__ == sorted(celmoe.distributed.__all__)
    assert set(celmoe.distributed.__all__) == visible
    for name in visible:
        assert getattr(celmoe.distributed, name).__doc__


def test_an_older_pytorch_is_told(monkeypatch):
    monkeypatch.delattr(dist, "all_gather_single")
    with pytest.raises(ImportError, match=r"'celmoe.distributed' must have PyTorch 2.13 or later \(got "):
        importlib.reload(celmoe.distributed.versions)
