"""Models in surroundings that are unusual but legal."""

from __future__ import annotations

import torch

B = 4


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
