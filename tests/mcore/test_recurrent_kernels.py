"""Forks by the kernels of FLA and mamba_ssm, which no other test has; see the module."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_pg.mcore.versions import HAS_HYBRID_MODEL
from tests.mcore import harness
from tests.utils import ROOT

pytestmark = pytest.mark.triton

# Beside the environment, since transformers would call them on the CPU: see tests/run.sh.
FOLDER = Path(sys.prefix) / "recurrent-kernels"
PACKAGES = {"gated_delta_net": "fla", "mamba": "mamba_ssm"}


@pytest.mark.parametrize("name", PACKAGES)
def test_kernels_that_are_forked_equal_whole_samples(name: str) -> None:
    if not (FOLDER / PACKAGES[name]).is_dir():
        pytest.skip(f"{PACKAGES[name]} is not in {FOLDER}, where the Python 3.12 lane has it")
    if name == "mamba" and not HAS_HYBRID_MODEL:
        pytest.skip("Mamba-2 layers need HybridModel, from 0.18")
    command = [sys.executable, "-m", "tests.mcore.recurrent_kernels", name, str(FOLDER)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert ended.returncode == 0, ended.stderr[-4000:]
    found = json.loads(ended.stdout.splitlines()[-1])
    # Of two depths, the second in batches of like lengths where there is no varlen.
    assert found["num_calls"] == {"gated_delta_net": 2, "mamba": 4}[name]
    assert len(found["errors"]) >= 8
    harness.assert_within(found["errors"], 1e-5)
