"""``python -m benchmarks``: runs the suite, and makes a page of it.

- `command` with `options`, `presence`, `machine`: from the command line to the exit code.
- `running`, `pacing`, `terminal`: the suite in a process of its own, its order, its progress.
- `reading`, `ratios`: from pytest-benchmark's JSON to records and ratios.
- `targets`, `regressions`, `crossover`: what a set is held to, what got slower, where a device wins.
- `canvas`: the parts of all drawings; `speedups`, `panels`, `scaling`, `stages`, `devices`, `memory` draw.
- `tables`, `wording`, `page`: rows of cells, words, and the page.

Axes: B samples, S positions, H hidden size, E experts of the last level.
"""
