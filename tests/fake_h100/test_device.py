"""The fake device sees what a function does, and refuses what a real one would."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from tests.fake_h100.probes import MISTAKES, PROBES, device_name, errors, records  # noqa: E402
from tests.fake_h100.record import Record  # noqa: E402
from tests.ranks import Pool  # noqa: E402

pytestmark = pytest.mark.triton


@pytest.fixture(scope="module")
def recorded(device_ranks: Pool) -> dict[str, Record]:
    (found,) = device_ranks.run(1, records)
    return found


@pytest.fixture(scope="module")
def raised(device_ranks: Pool) -> dict[str, str]:
    (found,) = device_ranks.run(1, errors)
    return found


def test_pytorch_finds_an_h100(device_ranks: Pool) -> None:
    assert device_ranks.run(1, device_name) == [("NVIDIA H100 (fake)", (9, 0), True)]


# Kernels, copies to the device, pageable ones among them, copies to the host, waits.
EXPECTED = {
    "views": (1, 0, 0, 0, 0),
    "matrix product": (6, 0, 0, 0, 0),
    "on the host": (0, 0, 0, 0, 0),
    "a number": (2, 0, 0, 0, 0),
    "pinned": (0, 1, 0, 0, 0),
    "slice of pinned": (0, 1, 0, 0, 0),
    "pinned, waits": (0, 1, 0, 0, 1),
    "pageable": (0, 1, 1, 0, 0),
    "pageable, waits": (0, 1, 1, 0, 1),
    "copy_": (1, 1, 1, 0, 0),
    "a scalar": (0, 1, 1, 0, 0),
    "numbers": (0, 1, 1, 0, 1),
    "indices of the host": (2, 1, 1, 0, 1),
    "cpu": (1, 0, 0, 1, 1),
    "cpu, later": (1, 0, 0, 1, 0),
    "copy_ to the host": (1, 0, 0, 1, 1),
    "item": (1, 0, 0, 1, 1),
    "bool": (1, 0, 0, 1, 1),
    "tolist": (1, 0, 0, 1, 1),
    "device": (0, 0, 0, 0, 1),
    "stream": (0, 0, 0, 0, 1),
    "event": (0, 0, 0, 0, 1),
    "compiled": (2, 0, 0, 0, 0),
    "triton": (3, 0, 0, 0, 0),
    "module": (2, 2, 2, 0, 2),
}


@pytest.mark.parametrize("name", PROBES)
def test_what_is_recorded(recorded, name: str) -> None:
    record = recorded[name]
    sent = [copy for copy in record.copies if copy.is_to_device]
    counts = len(record.kernels), len(sent), len(record.pageable)
    counts += len(record.copies) - len(sent), len(record.syncs)
    assert counts == EXPECTED[name], record


@pytest.mark.parametrize("name", MISTAKES)
def test_what_is_refused(raised, name: str) -> None:
    assert name in raised
