"""Jobs drawn at random, in every layout: uneven and empty batches, frozen and detached experts, both engines."""

import random
from dataclasses import replace

import pytest

from tests.distributed import jobs
from tests.distributed.jobs import Job, assert_as_alone, assert_ranks_agree
from tests.distributed.test_data_parallel import train_with_ddp
from tests.distributed.test_expert_parallel import train_with_experts_spread
from tests.distributed.test_fully_sharded import put_together, train_with_levels_sharded
from tests.slow import slow_after, slow_but

LANGUAGES = list(jobs.FAMILY_OF)
TRAININGS = [train_with_ddp, train_with_experts_spread, train_with_levels_sharded]


def draw(seed, *, mixed=False):
    """A job for two ranks. Its rows get no gradients: DDP has none for them if a rank's experts are all detached."""
    choose = random.Random(seed)

    def route(known):
        if not mixed or choose.random() < 0.3:
            return choose.choice(known)
        some = choose.sample(known, min(len(known), choose.randint(1, 3)))
        return choose.choice([None, {name: choose.choice([0.25, 0.7, 1.0]) for name in some}])

    def batch():
        known = LANGUAGES[: choose.randint(1, len(LANGUAGES))]
        return [route(known) for _ in range(choose.choice([0, 1, 1, 2, 3, 7]))]

    return Job(
        [[[batch(), batch()] for _ in range(choose.choice([1, 1, 2]))] for _ in range(3)],
        engine=["looped", "grouped", "auto"][seed % 3],
        optimizer=choose.choice(["SGD", "AdamW"]),
        fusion=choose.choice(["learned", "mean"]),
        frozen=tuple(name for name in ["core", *jobs.FAMILIES, *LANGUAGES] if choose.random() < 0.2),
        detached=tuple(name for name in [*jobs.FAMILIES, *LANGUAGES] if choose.random() < 0.2),
        max_norm=choose.choice([None, 0.1]),
        positions=choose.choice([None, 2]),
        objective=choose.choice(["all", "fused", "family"]),
        hidden_grad=False,
    )


@pytest.mark.parametrize("seed", slow_after(2, range(4)))
def test_every_layout_trains_as_one_process(two, seed):
    job = draw(seed)
    for training in TRAININGS:
        histories = two.run(training, job)
        if training is train_with_levels_sharded:
            histories = put_together(histories)
        assert_ranks_agree(histories)
        assert assert_as_alone(job, histories)["gradients"]


@pytest.mark.parametrize("seed", slow_but([1], range(3)))
def test_samples_of_several_experts_or_none_train_as_in_one_process(two, seed):
    job = draw(seed, mixed=True)
    with_losses = replace(job, has_losses=True, objective="all")
    for training, each in [(train_with_experts_spread, with_losses), *((training, job) for training in TRAININGS)]:
        histories = two.run(training, each)
        if training is train_with_levels_sharded:
            histories = put_together(histories)
        assert_ranks_agree(histories)
        assert assert_as_alone(each, histories)["gradients"]


def test_what_is_drawn():
    """The drawn jobs include the cases worth drawing for."""
    drawn = [draw(seed) for seed in range(4)]
    shares = [share for job in drawn for step in job.steps for micro in step for share in micro]
    assert [] in shares
    assert any(len(step) > 1 for job in drawn for step in job.steps)
    assert {job.engine for job in drawn} >= {"looped", "grouped"}
    assert any(job.frozen for job in drawn)
    assert any(job.detached for job in drawn)
