"""The peak memory of a step, beyond the memory in use before."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness.devices import CPU, CUDA, finish


def can_measure(device: torch.device) -> bool:
    """True if the device's memory can be counted; DirectML's can't."""
    return device.type in (CPU, CUDA)


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """The most bytes that lived at once during the step, beyond those before.

    A CPU's count takes in every allocation of PyTorch, kernels' included. The step should leave alive all that lived
    before: the count doesn't know that memory.
    """
    gc.collect()
    if device.type == CUDA:
        finish(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        finish(device)
        return torch.cuda.max_memory_allocated(device) - before
    return max(_totals(step))


def kept_bytes(step: Callable[[], object]) -> int:
    """Bytes on the CPU that are still there after the step, of those that it took."""
    return _totals(step)[-1]


def _totals(step: Callable[[], object]) -> list[int]:
    """Bytes alive on the CPU after each allocation and deallocation."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
        gc.collect()
    found = profiled.profiler
    assert found is not None
    assert found.kineto_results is not None
    totals = [0]
    for event in found.kineto_results.events():
        if event.name() == "[memory]":
            totals.append(totals[-1] + event.nbytes())
    return totals
