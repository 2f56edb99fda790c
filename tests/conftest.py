"""What all tests share: one thread, and how many examples hypothesis draws.

The default profile fits the suite's ten minutes on two cores. For a long look before a release, or for a new engine,
draw twenty times as many::

    HYPOTHESIS_PROFILE=thorough pytest tests/test_properties.py
    pytest tests/test_properties.py --hypothesis-profile=thorough

Tests with a number of examples of their own scale it by `examples`.
"""

from __future__ import annotations

import os

import torch
from hypothesis import HealthCheck, settings

pytest_plugins = ["tests.peer_report"]

torch.set_num_threads(1)

_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example, HealthCheck.filter_too_much]
settings.register_profile("default", deadline=None, suppress_health_check=_SLOW, max_examples=100, database=None)
settings.register_profile("thorough", settings.get_profile("default"), max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
