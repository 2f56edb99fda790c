"""What becomes of a run of the benchmarks: records, ratios, figures, a page, and what got slower since another run.

Axes: B samples, S positions, H hidden size, E experts of the last level.
"""
