import pytest

from tests.distributed.pool import Pool


@pytest.fixture(scope="session")
def pool():
    """Four ranks for all tests: a test uses the first two, three or four."""
    found = Pool(4)
    yield found
    found.close()
