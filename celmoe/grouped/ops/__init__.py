"""The operations that programs are made of, each with a handler, registered by the function that an expert calls.

`table` holds the registry and the helpers that all handlers share. See notes/tracer.md to add an operation.
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
