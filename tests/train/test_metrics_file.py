"""``metrics.jsonl`` of a run that goes on: no step is lost without a word."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("megatron.core")

from megatron_pg.train.metrics import read_metrics  # noqa: E402
from megatron_pg.train.metrics.sinks import JsonLines  # noqa: E402

STEPS = [{"step": float(number), "reward/mean": number / 8} for number in range(5)]
LINES = [json.dumps(step).encode() for step in STEPS]


@pytest.mark.parametrize("last", [b'{"step": 5.0, "rew', b"\0\0\0", b"{}", b"\xff", b"[" * 9999])
def test_a_torn_last_line_is_left_out(tmp_path: Path, last: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([*LINES, last]))
    assert read_metrics(path) == STEPS
    JsonLines(path, 3).write({"step": 4.0})
    assert read_metrics(path) == [*STEPS[:4], {"step": 4.0}]


@pytest.mark.parametrize("line", [b"", b"5", b"[]", b'{"a": 1}', b'{"step": "2"}', b"\xff", b"{"])
def test_a_damaged_line_cuts_off_nothing(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    content = b"\n".join([*LINES[:2], line, *LINES[2:], b""])
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 3 holds no step"):
        JsonLines(path, 4)
    assert path.read_bytes() == content
