"""Models over ranks: round trips, logits, exchange with Megatron-Core, resharded training."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoint import worker
from tests.utils import run_ranks

pytestmark = pytest.mark.megatron


def test_every_layout(models: Path) -> None:
    """Round trips bit-equal, logits as transformers', checkpoints as Megatron-Core's."""
    output = run_ranks("tests.checkpoint.worker", 4, str(models), timeout=600)
    for column, what in enumerate(("round trip", "logits", "exchange")):
        wanted = sum(len(names[column]) for names in worker.LAYOUTS.values())
        assert output.count(f"{what} ") == wanted > 0, output[-4000:]


def test_resharded_training(models: Path, tmp_path: Path) -> None:
    """tp=2 -> pp=2 -> dp=2, specs alternating, is the trajectory of tp=2 throughout."""
    output = run_ranks("tests.checkpoint.trajectory", 2, str(models), str(tmp_path))
    assert "same trajectory" in output and "same distributed state" in output, output[-4000:]
