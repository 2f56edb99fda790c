"""``python -m benchmarks``: runs the suite, and makes a page of it.

- `command` with `machine`: from the command line to the exit code.
- `running`, `pacing`, `terminal`: the suite in a process of its own, its order, its progress.
- `reading`, `ratios`: from pytest-benchmark's JSON to records and ratios.
- `targets`, `regressions`, `crossover`: what a set is held to, what got slower, where a device wins.
- `bars`, `panels`, `growth`: the drawings: a row a workload, a panel a kind of experts, lines by size.
- `tables`, `roster`, `page`: rows of cells, who and what is named how, and the page.

Axes: B samples, S positions, H hidden size, E experts of the last level.
"""
