"""The job's parts, measured.

Each has a command of its own:

- `compare`, `hierarchy_clock`: the same steps by other ways, and the hierarchy's share of one.
- `ablation`: levels and losses taken out.
- `newcomers`: how much a warm start helps a language that comes later.
"""
