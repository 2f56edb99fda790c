"""Resampling and reordering positions of images and sequences, within each row."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from celmoe.grouped.values import CannotGroupError, Ragged, Rows, like

from .table import Run, operands, operation, refuse_row_counts

# Pixel shuffles move entries among this many last axes; any axes may stand in front.
_PIXELS = 3


@operation("interpolate", "upsample", "channel_shuffle", namespaces=(F, torch))
def resample(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Ragged:
    """Resample positions, or shuffle channels, of values whose first axis is the row axis."""
    value, options = _taken(name, args, kwargs)
    if not isinstance(value, Rows) or value.axis != 0:
        raise CannotGroupError(f"called {name} with another axis than the batch first")
    return like(value, func(value.plain, *args[1:], **options))


@operation("pixel_shuffle", "pixel_unshuffle", namespaces=(F, torch))
def shuffle(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Ragged:
    """Move entries between channels and positions, which are the last axes."""
    value, options = _taken(name, args, kwargs)
    if isinstance(value, Rows) and value.axis >= value.dim() - _PIXELS:
        raise CannotGroupError(f"mixed samples ({name} over the batch axis)")
    return like(value, func(value.plain, *args[1:], **options))


def _taken(name: str, args: Any, kwargs: Any) -> tuple[Ragged, dict[str, Any]]:
    options = dict(kwargs)
    value: Ragged = args[0] if args else options.pop("input")
    rest = [*args[1:], *options.values()]
    refuse_row_counts(name, [part for each in rest for part in (each if isinstance(each, list | tuple) else [each])])
    if operands(rest):
        raise CannotGroupError(f"called {name} with tensors for options")
    return value, options
