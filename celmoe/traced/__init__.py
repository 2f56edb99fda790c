"""A model's forward pass while a tracer follows it: `torch.compile` and `torch.export`.

- `decision`: how a level can be part of the graph; asked while the tracer runs, with a few rows that have values.
- `inside`: a level in the graph, for all routings.
- `opaque`: a level as one operator that runs as ever.
- `forward`: the forward pass, from the plan to the output.
- `modes`: the grad mode and autocast of a trace, for operators that run later.
- `registered`: the models of this process, which operators find by a text.
"""
