"""Routes: names to codes to a plan.

- `memberships`: samples of several experts, or of none
- `routes`: the forms of a routing, and codes for its names
- `layout`: the part of a config that decides plans
- `planner`: codes to index tensors
- `plan`: the plan, a value that crosses processes; `load`: its samples by expert
- `compiler`: the config's routes to plans, without a model
"""
