"""Processes of a gloo group on loopback, as many as asked for, that count some cases."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta

import torch
import torch.distributed as dist

from benchmarks.tables.scaling.runs import Case, Counted, count

_LIMIT = timedelta(seconds=120)


def count_on_ranks(cases: Sequence[Case], num_ranks: int) -> list[list[Counted]]:
    """The counts of each rank in each case, ``[case][rank]``."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(num_ranks, context) as pool:
        tasks = [pool.submit(_rank, cases, rank, num_ranks, f"file://{folder}/meeting") for rank in range(num_ranks)]
        by_rank = [task.result() for task in tasks]
    return [list(each) for each in zip(*by_rank, strict=True)]


def _rank(cases: Sequence[Case], rank: int, num_ranks: int, where: str) -> list[Counted]:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=num_ranks, timeout=_LIMIT)
    try:
        return [count(case) for case in cases]
    finally:
        dist.destroy_process_group()
