"""``python -m benchmarks.scaling``: the bytes that a training step moves between ranks, on paper and counted."""
