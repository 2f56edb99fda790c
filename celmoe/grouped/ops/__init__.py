"""The operations that programs are made of: a handler for each, registered by the function that an expert calls.

`table` holds them, and what all of them need. To add one, see notes/tracer.md.
"""

from . import (
    attention,
    complex_numbers,
    distance,
    elementwise,
    image,
    index,
    loss,
    norm,
    parameters,
    product,
    recurrent,
    reduce,
    shape,
)

__all__ = [
    "attention",
    "complex_numbers",
    "distance",
    "elementwise",
    "image",
    "index",
    "loss",
    "norm",
    "parameters",
    "product",
    "recurrent",
    "reduce",
    "shape",
]
