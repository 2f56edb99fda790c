"""``python -m benchmarks.grouped``: an engine beside celmoe-vp and a hand-written stack, over the grid."""
