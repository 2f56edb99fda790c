"""What is timed. Read `workload` first: a kind of experts, sizes, a hierarchy, routes.

- `bodies`: the kinds of experts.
- `languages`: 54 languages and their families.
- `hierarchies`: the experts of each level, and the names of a batch.
- `points`: grids of workloads, and workloads with targets of their own.
"""
