"""``python -m benchmarks scaling``: the bytes that a training step moves between ranks, on paper and counted.

- `sizes`, `load`, `collectives`, `layouts`: the model, from parameters and samples to bytes by layout.
- `growth`: the model as ranks, experts or batches grow.
- `runs`, `counting`, `compared`: real steps on loopback, counted, beside the model.
- `command`, `report`: the command and its output.
"""
