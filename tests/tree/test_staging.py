"""Arrays that go to a device together arrive as they were, in one buffer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_pg.tree import staging, to_device

# A device for its own sake: the CPU's tensors say none.
ELSEWHERE = torch.device("cpu", 0)


def test_what_arrives() -> None:
    torch.manual_seed(0)
    arrays = [
        torch.arange(7),
        torch.rand(3, 5) > 0.5,
        torch.empty(0, 4, dtype=torch.int16),
        torch.randn(33, dtype=torch.float64),
        torch.tensor(3, dtype=torch.int32),
        torch.randn(6, 4)[::2, 1:3],
    ]
    there = to_device(arrays, ELSEWHERE)
    for before, after in zip(arrays, there, strict=True):
        assert after.dtype == before.dtype and torch.equal(after, before)
    moved = [after for after in there if after.numel()]
    (buffer,) = {after.untyped_storage().data_ptr() for after in moved}
    starts = [after.data_ptr() - buffer for after in moved]
    assert all(start % 16 == 0 for start in starts) and starts == sorted(set(starts))


def test_what_is_there_stays() -> None:
    here = torch.arange(3)
    assert to_device([here], torch.device("cpu"))[0] is here
    assert to_device([], torch.device("cpu")) == ()


@pytest.mark.parametrize("kind", ["cuda", "meta", "cpu"])
def test_memory_is_pinned_for_cuda_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(staging.torch, "empty", lambda *args, **kwargs: asked.append(kwargs))
    staging._host_buffer(8, torch.device(kind))
    assert [kwargs["pin_memory"] for kwargs in asked] == [kind == "cuda"]
