"""The engines, and the decision between them.

- `looped`: experts one after another
- `grouped`: experts of a class as one
- `cost`: the cost of either; `choice`: the decision, and its reason
- `arrangement`: the order of rows for the decision
- `registry`: the engines by name
"""
