"""The benchmarks: ``pytest benchmarks/suite``. Each ``test_*`` file has the benchmarks of one part of a step.

- `sets`: the workloads and contenders of each set.
- `stages`: the timed work, and who takes part.
- `contest`: one benchmark: contenders are gathered, compared, timed in `rounds`, and leave a `record`.
- `parts`: a whole step's time by part.
- `operations`: the launches of a step, counted.
- `conftest`: pytest's options and fixtures.
"""
