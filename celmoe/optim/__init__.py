"""Optimizers that treat each expert of a stack as an expert of its own, and any optimizer's state by expert."""

from .by_name import load_state_by_name, state_by_name
from .optimizers import SGD, Adam, AdamW

__all__ = ["SGD", "Adam", "AdamW", "load_state_by_name", "state_by_name"]
