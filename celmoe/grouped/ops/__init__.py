"""The operations that programs are made of, each with a handler, registered by the function that an expert calls.

`table` holds the registry and the helpers that all handlers share. See notes/tracer.md to add an operation.

- `elementwise`; `shape` and `index`: values, axes, entries
- `product`, `recurrent`, `attention`: layers with weights
- `reduce`, `norm`, `distance`, `loss`: sums within rows, and by member
- `image`, `complex_numbers`: resampling, Fourier transforms
- `parameters`: operations on parameters alone
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
