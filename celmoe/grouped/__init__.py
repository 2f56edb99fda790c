"""Many experts, one run: capture, lower, verify, run.

- `capture`: an expert's forward pass as a graph, by PyTorch's tracer; `guard` says for whom it holds
- `program`: the graph lowered to a flat list of calls, by the records of `ops`; `binding` resolves the calls
- `values`: rows, stacks and constants, the three kinds of values that a program computes with
- `segments`, `kernels`: whose rows are whose, and products by member
- `verify`: a program beside the loop
- `classes`: which experts share a program, and what has changed since
- `boundary`: whom losses reach on the way back
- `declared`: what users declare to act on each row alone
- `inline`, `waiting`: graphs within graphs; a line for a user who waits
"""
