"""The benchmark of an actor update runs, and compares gradients before it reports."""

from __future__ import annotations

import json
import os
from pathlib import Path
from unittest import mock

import pytest

pytest.importorskip("verl", reason="verl is installed in its own lane")

from tools.bench.run import main  # noqa: E402

pytestmark = pytest.mark.verl


def test_rows_keep_the_contract(tmp_path: Path) -> None:
    file = tmp_path / "verl.json"
    # Megatron-Core says its choice of attention in variables, which ranks would inherit.
    with mock.patch.dict(os.environ):
        assert main(["verl", "--quick", "--threads", "1", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    assert [row["baseline"] for row in rows] == ["written out", "verl"] * 2
    for row in rows:
        assert row["benchmark"] == "verl" and row["ratio"] > 0 and row["bound"] > 1.5
        assert row["share"] == pytest.approx(row["ratio"] / row["bound"])
        assert 0 < row["max_error"] <= 1e-3, "gradients were compared"
