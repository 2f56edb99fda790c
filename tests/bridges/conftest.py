"""The tested versions of the bridged packages want a newer torch than the library does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

_OLDEST = "2.6"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip this folder's tests on an older torch. pytest calls this with the tests of all folders."""
    if torch.__version__ >= _OLDEST:
        return
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=f"transformers 5.24 wants torch {_OLDEST}"))
