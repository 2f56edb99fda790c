"""Rows: from batch order into expert order and back, and the context beside the rows.

- `slots`, `containers`: the values in objects and containers
- `context`: each expert's part of the context
- `blocks`: blocks of rows, private to each expert
- `mixing`: rows of samples with several experts, or none
- `dispatch`: rows into expert order, and back
"""
