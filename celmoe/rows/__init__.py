"""Rows: from batch order into expert order and back, and the context that goes with them.

- `slots`, `containers`: what objects and containers hold
- `context`: each expert's part of the context
- `dispatch`: rows into expert order, and back
"""
