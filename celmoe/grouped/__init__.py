"""Many experts, one run: capture, lower, verify, run.

- `capture`: an expert's forward pass as a graph, by PyTorch's tracer; `guard` tells for which experts it holds
- `program`: the graph lowered to a flat list of calls, by the records of `ops`; `binding` resolves the calls
- `values`: rows, stacks and constants, the three kinds of values that a program computes with
- `segments`, `kernels`: the rows of each member, and products by member
- `verify`: compares a program with the loop
- `classes`: finds the experts that share a program, and sees their changes
- `identities`, `namespaces`, `canonical`: things that a captured graph depends on, and PyTorch's guards don't see
- `boundary`: limits the members that losses reach in a backward pass
- `declared`: functions that users declare to act on each row alone
- `inline`, `waiting`: graphs within graphs; a line for a user who waits
"""
