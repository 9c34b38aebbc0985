"""Ranks on the fake device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fake_h100 import driver
from tests.ranks import Pool


@pytest.fixture(scope="package")
def device_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """As ``ranks``, on a machine that has the fake device."""
    reason = driver.missing()
    if reason is not None:
        pytest.skip(reason)
    pool = Pool(driver.environment(tmp_path_factory.mktemp("driver")))
    yield pool
    pool.close()
