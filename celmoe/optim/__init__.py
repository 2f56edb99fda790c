"""Optimizers that treat each expert of a stack as an expert of its own, and any optimizer's state by expert.

- `per_expert`: a step of present experts alone, so that absent ones stay as they are
- `optimizers`: `AdamW`, `Adam` and `SGD` that step so
- `members`: a stack's state, cut by expert and put together
- `by_name`: any optimizer's state by the experts' own names
"""

from .by_name import load_state_by_name, state_by_name
from .optimizers import SGD, Adam, AdamW

__all__ = ["SGD", "Adam", "AdamW", "load_state_by_name", "state_by_name"]
