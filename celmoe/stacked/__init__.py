"""Experts whose tensors are stacked: one parameter for each tensor of all alike experts.

- `stack`: the stacked tensors of alike experts, an expert's view of its own, and ordinary modules of the same values.
- `member`: the Python class of an expert's modules while its tensors are stacked.
- `presence`: the members that a backward pass reached.
- `parallel`: stacks under `DistributedDataParallel`.
- `rows`: the members that a rank holds of a sharded stack.
- `naming`: a model's parameters by the experts' own names.
- `frozen`, `freezing`: experts that are not trained for a time.
- `assembly`: one stack is made, or taken apart.
- `fitness`: which experts can be stacked together, and what holds others back.
"""
