"""The report of a benchmarks' run: records, ratios, figures, a page, and the losses of speed since another run.

Axes: B samples, S positions, H hidden size, E experts of the last level.
"""
