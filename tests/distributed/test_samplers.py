"""Samplers: ranks' shares make up one process's batches, for any number of ranks, and go on after a stop."""

import json
from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import celmoe
from celmoe.distributed import ExpertBalancedSampler, GlobalBatchSampler
from tests.strategies import examples

EXPERTS = ["ru"] * 40 + ["fr"] * 9 + ["zh.Hant"]


def batches(make, num_ranks, epoch=0):
    """The global batches that the ranks' shares make up."""
    samplers = [make(rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    shares = [list(sampler) for sampler in samplers]
    assert all(len(each) == len(sampler) for each, sampler in zip(shares, samplers, strict=True))
    for parts in zip(*shares, strict=True):
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1
    return [list(chain(*parts)) for parts in zip(*shares, strict=True)]


@examples(50)
@given(size=st.integers(0, 60), batch_size=st.integers(1, 70), num_ranks=st.integers(1, 5), epoch=st.integers(0, 3))
def test_shares_make_up_the_batches_of_one_process(size, batch_size, num_ranks, epoch):
    def make(**ranks):
        return GlobalBatchSampler(size, batch_size, seed=3, **ranks)

    found = batches(make, num_ranks, epoch)
    assert found == batches(make, 1, epoch)
    assert sorted(chain(*found)) == list(range(size))
    assert [len(each) for each in found[:-1]] == [batch_size] * (len(found) - 1)


def test_orders_depend_on_seed_and_epoch_alone():
    orders = {(seed, epoch): batches(lambda **r: GlobalBatchSampler(50, 50, seed=seed, **r), 2, epoch)[0]  # noqa: B023
              for seed in (0, 1) for epoch in (0, 1)}  # fmt: skip
    assert len({tuple(order) for order in orders.values()}) == 4
    assert batches(lambda **r: GlobalBatchSampler(50, 50, **r), 3)[0] == orders[0, 0]
    assert batches(lambda **r: GlobalBatchSampler(7, 3, shuffle=False, **r), 2) == [[0, 1, 2], [3, 4, 5], [6]]


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_experts_have_their_parts(exponent):
    taken = Counter()
    epochs = 40
    for epoch in range(epochs):
        found = batches(lambda **r: ExpertBalancedSampler(EXPERTS, 8, exponent=exponent, **r), 2, epoch)
        samples = list(chain(*found))
        assert len(samples) == len(EXPERTS)
        each = Counter(samples)
        for expert in set(EXPERTS):
            times = [each[place] for place, name in enumerate(EXPERTS) if name == expert]
            assert max(times) - min(times) <= 1
        taken.update(EXPERTS[sample] for sample in samples)
    weights = {expert: count**exponent for expert, count in Counter(EXPERTS).items()}
    for expert, weight in weights.items():
        share = weight / sum(weights.values()) * len(EXPERTS)
        assert abs(taken[expert] / epochs - share) < 0.25
    if exponent == 1.0:
        assert set(Counter(samples).values()) == {1}


def test_ids_and_names_and_the_epoch_s_size():
    ids = np.array([{"ru": 1, "fr": 0, "zh.Hant": 2}[name] for name in EXPERTS])
    sampler = ExpertBalancedSampler(ids, 16, exponent=0.0, epoch_size=300, rank=0, num_ranks=1)
    taken = Counter(EXPERTS[sample] for batch in sampler for sample in batch)
    assert taken == {"ru": 100, "fr": 100, "zh.Hant": 100}
    assert not list(ExpertBalancedSampler([], 4))


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_training_goes_on_with_other_ranks(num_ranks):
    first = ExpertBalancedSampler(EXPERTS, 8, seed=5, rank=0, num_ranks=2)
    first.set_epoch(4)
    state = first.state_dict(3)

    def make(**ranks):
        sampler = ExpertBalancedSampler(EXPERTS, 8, seed=5, **ranks)
        sampler.load_state_dict(state)
        return sampler

    whole = batches(lambda **ranks: ExpertBalancedSampler(EXPERTS, 8, seed=5, **ranks), 2, 4)
    assert batches(make, num_ranks, 4) == whole[3:]
    # The next epoch is whole again.
    assert len(batches(make, num_ranks, 5)) == len(whole)


def test_a_loader_takes_it():
    sampler = GlobalBatchSampler(10, 4, shuffle=False, rank=1, num_ranks=2)
    assert [batch.tolist() for batch in DataLoader(range(10), batch_sampler=sampler)] == [[2, 3], [6, 7], [9]]


def _shares():
    return list(GlobalBatchSampler(9, 4, shuffle=False)), dist.get_rank()


def test_ranks_are_those_of_the_process_group(two):
    assert two.run(_shares) == [([[0, 1], [4, 5], []], 0), ([[2, 3], [6, 7], [8]], 1)]


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: GlobalBatchSampler(-1, 1), celmoe.ConfigError, "'num_samples' must be at least 0 (got -1)"),
        (lambda: GlobalBatchSampler(1, 0), celmoe.ConfigError, "'batch_size' must be at least 1 (got 0)"),
        (lambda: GlobalBatchSampler(1, 1.0), celmoe.ConfigTypeError, "'batch_size' must be an integer (got 1.0)"),
        (
            lambda: GlobalBatchSampler(1, 1, rank=2, num_ranks=2),
            celmoe.ConfigError,
            "'rank' must be below 'num_ranks', 2 (got 2)",
        ),
        (
            lambda: ExpertBalancedSampler(["ru"], 1, exponent=2),
            celmoe.ConfigError,
            "'exponent' must be between 0 and 1 (got 2)",
        ),
        (
            lambda: ExpertBalancedSampler([], 1, epoch_size=2),
            celmoe.ConfigError,
            "'experts' must hold one for each sample (got none, for an epoch of 2)",
        ),
        (
            lambda: GlobalBatchSampler(9, 4).load_state_dict(GlobalBatchSampler(9, 4).state_dict(4)),
            celmoe.InputError,
            "'state' must be within the epoch's 3 batches (got 4)",
        ),
    ],
)
def test_refusals(make, kind, message):
    with pytest.raises(kind) as error:
        make()
    assert str(error.value) == message


def balanced(experts=("ru", "ru", "fr"), **options):
    return ExpertBalancedSampler(experts, 2, **options)


# A sampler, the sampler whose state it is given, and the first difference.
OTHERS = {
    "seed": (GlobalBatchSampler(9, 4), GlobalBatchSampler(9, 4, seed=1), "seed 0 (got 1)"),
    "batch size": (GlobalBatchSampler(9, 4), GlobalBatchSampler(9, 3), "batch_size 4 (got 3)"),
    "fewer samples": (GlobalBatchSampler(9, 4), GlobalBatchSampler(10, 4), "num_samples 9 (got 10)"),
    "shuffle": (GlobalBatchSampler(9, 4), GlobalBatchSampler(9, 4, shuffle=False), "shuffle True (got False)"),
    "sampler": (
        GlobalBatchSampler(3, 2),
        balanced(),
        "sampler GlobalBatchSampler (got ExpertBalancedSampler)",
    ),
    "balanced seed": (balanced(), balanced(seed=1), "seed 0 (got 1)"),
    "exponent": (balanced(), balanced(exponent=1), "exponent 0.5 (got 1.0)"),
    "epoch size": (balanced(), balanced(epoch_size=5), "epoch_size 3 (got 5)"),
    "more data, as long an epoch": (
        balanced(epoch_size=3),
        balanced(["ru", "ru", "fr", "fr"], epoch_size=3),
        "num_samples 3 (got 4)",
    ),
    "other experts": (balanced(), balanced(["ru", "fr", "fr"]), "experts_checksum "),
    "experts in another order": (balanced(), balanced(["ru", "fr", "ru"]), "experts_checksum "),
}


@pytest.mark.parametrize(("sampler", "other", "difference"), OTHERS.values(), ids=OTHERS)
def test_a_state_of_other_data_or_options_is_refused(sampler, other, difference):
    sampler.set_epoch(1)
    order = list(sampler)
    with pytest.raises(celmoe.InputError) as error:
        sampler.load_state_dict(other.state_dict(1))
    assert str(error.value).startswith(f"'state' must be of {difference}")
    assert list(sampler) == order


def test_a_state_that_lacks_an_option_is_refused():
    state = {"seed": 0, "epoch": 0, "batch": 0, "batch_size": 4, "sampler": "GlobalBatchSampler"}
    with pytest.raises(celmoe.InputError, match=r"^'state' must be of num_samples 9 \(got None\)$"):
        GlobalBatchSampler(9, 4).load_state_dict(state)


@pytest.mark.parametrize("kind", [int, np.int64, np.int32])
def test_a_state_is_json(kind):
    for sampler in (
        GlobalBatchSampler(kind(9), kind(4), seed=kind(3)),
        ExpertBalancedSampler(np.arange(9).astype(kind), kind(4), exponent=np.float64(0.3), epoch_size=kind(7)),
    ):
        sampler.load_state_dict(json.loads(json.dumps(sampler.state_dict(1))))
        assert len(sampler) == sampler.num_batches - 1
