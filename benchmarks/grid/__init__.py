"""``python -m benchmarks.grid``: training steps and planning beside celmoe-vp 1.1.4, over the whole grid."""
