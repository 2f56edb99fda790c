"""A step's memory is counted, and the engines keep to their limits."""

import pytest
import torch

import celmoe
from benchmarks.harness.memory import can_measure, kept_bytes, peak_bytes
from benchmarks.harness.steps import Passes, string_routed
from benchmarks.workloads.workload import Workload

MEGABYTE = 1 << 20
CPU = torch.device("cpu")
# Limits on the grouped engine's peak: by the looped engine's peak, and by the bytes of the weights.
MOST_BY_LOOPED, MOST_BY_WEIGHTS = 1.2, 1.1


def test_the_peak_is_what_lives_at_once():
    def step():
        torch.empty(3 * MEGABYTE, dtype=torch.uint8)
        first = torch.empty(2 * MEGABYTE, dtype=torch.uint8)
        second = torch.empty(2 * MEGABYTE, dtype=torch.uint8)
        del first
        torch.empty(MEGABYTE, dtype=torch.uint8)
        del second

    assert peak_bytes(step, CPU) == 4 * MEGABYTE


def test_what_is_kept_is_counted():
    kept = []
    assert kept_bytes(lambda: kept.append(torch.empty(MEGABYTE, dtype=torch.uint8))) == MEGABYTE
    assert kept_bytes(lambda: torch.empty(MEGABYTE, dtype=torch.uint8)) == 0


def test_memory_that_kernels_take_is_counted():
    rows = torch.randn(512, 512).t()
    assert peak_bytes(lambda: rows.sort(dim=0), CPU) > 3 * rows.nbytes


def test_which_devices_tell():
    assert can_measure(CPU)
    assert not can_measure(torch.device("meta"))


def weights_of(model):
    return sum(each.nbytes for each in model.parameters())


@pytest.mark.parametrize(
    ("expert", "batch_size"),
    [("linear", 1024), ("mlp", 1024), ("low-rank", 1024), ("gru", 64), ("gru", 512), ("block", 64)],
)
def test_a_grouped_step_takes_little_more_than_a_looped_one(expert, batch_size):
    workload = Workload(expert, 64, batch_size, 32)
    peaks = {}
    for engine in ("grouped", "looped"):
        model = workload.build(celmoe, engine=engine)
        step = Passes(string_routed(model, workload), model.parameters(), workload)
        step()
        step.clear()
        peaks[engine] = weights_of(model) + peak_bytes(step, CPU)
    assert peaks["grouped"] <= MOST_BY_LOOPED * peaks["looped"]


@pytest.mark.parametrize("expert", ["linear", "mlp", "gru", "block"])
def test_no_copy_of_the_weights_is_kept(expert):
    workload = Workload(expert, 64, 64, 32)
    model = workload.build(celmoe, engine="grouped")
    step = Passes(string_routed(model, workload), model.parameters(), workload)

    def first_step():
        step()
        step.clear()

    assert weights_of(model) + kept_bytes(first_step) <= MOST_BY_WEIGHTS * weights_of(model)
