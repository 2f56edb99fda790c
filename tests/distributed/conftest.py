"""Two and four processes for all tests of this folder."""

import pytest

from tests.distributed.pool import Pool
from tests.features import HAS_DISTRIBUTED

# They can't be imported there.
collect_ignore_glob = [] if HAS_DISTRIBUTED else ["test_*.py"]


def _pool(size):
    pool = Pool(size)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def two():
    yield from _pool(2)


@pytest.fixture(scope="session")
def four():
    yield from _pool(4)
