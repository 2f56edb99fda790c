"""The models of this process, by a text that a graph's calls find them by."""

from __future__ import annotations

import itertools
import weakref

from torch import nn

MODELS: weakref.WeakValueDictionary[str, nn.Module] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


def register(model: nn.Module) -> str:
    """A text that no other model of this process has had."""
    key = str(next(_NUMBERS))
    MODELS[key] = model
    return key
