"""``python -m benchmarks whole-steps``: whole training steps plain, stacked, compiled, by hand and of celmoe-vp.

- `command`: the command.
- `row`: one workload's contenders, compared and timed.
- `bounded`: a row in a process of its own, which a clock ends.
- `report`: the table, in a file of notes too, the CSV file and the figure.
"""
