"""``python -m benchmarks.grouped``: an engine beside celmoe-vp, one dense expert and a hand-written stack."""
