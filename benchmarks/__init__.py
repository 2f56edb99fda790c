"""Measurements of the library, and its main job. An import leads to the packages named before, never to one after.

- `workloads`: what is timed.
- `harness`: the means of timing, the same for all.
- `contenders`: who is timed.
- `suite`: the benchmarks, run by pytest.
- `report`: ``python -m benchmarks``, from a run of the suite to its page.
- `tables`: ``python -m benchmarks NAME``, measurements that have a table of their own.
- `multilingual`: the main job, ``python -m benchmarks.multilingual``, which uses `workloads` and `harness` alone.

`commands` and `extras` find a command, and the packages that it needs.
"""
