"""The means of timing.

- `steps`: a step of a model as its users take it.
- `equality`: contenders that compute something else are refused before they are timed.
- `interleaved`: contenders in turn, and the ratios of their times; `noise` tells a machine that was not quiet.
- `memory`: the peak of a step.
- `devices`, `setting`, `peers`: the machine, its facts, and the packages to compare with.
- `arguments`, `one_table`, `interrupts`: command lines, and Ctrl-C.
- `tables`, `canvas`, `wording`: CSV files and their shared columns, the parts of all drawings, numbers in words.
"""
