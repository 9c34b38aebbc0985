"""A checkpoint of a run leaves through the conversion tools, equal to what the run exports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rollout.tiny_model import save_tiny_model
from tests.utils import ROOT

pytest.importorskip("transformers", reason='pip install "megatron_pg[train]"')

ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}


def run(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


def test_checkpoint_of_two_stages_becomes_the_exported_folder(tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    save_tiny_model(model, 0)
    rollouts = tmp_path / "rollouts.jsonl"
    rows = [
        {"group_id": str(g), "prompt_ids": [5, 6, 7 + g], "response_ids": [9 + i, 1], "reward": i}
        for g in range(2)
        for i in range(3)
    ]
    rollouts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tmp_path / "config.yaml"
    config.write_text(
        f"""
model: {{hf: {model}}}
parallel: {{pipeline_model_parallel_size: 2}}
optimizer: {{lr: 0.01}}
rollout: {{source: recorded, files: [{rollouts}]}}
run: {{out: {out}, num_steps: 2, groups_per_step: 2, save_interval: 2, export_hf: true}}
"""
    )
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    run(*launcher, "-m", "megatron_pg.train", str(config))
    converted = tmp_path / "converted"
    checkpoints = str(out / "checkpoints")
    run("tools/megatron_to_hf.py", "--megatron", checkpoints, "--out", str(converted))
    (exported,) = out.glob("hf_*")
    run("tools/verify_checkpoint.py", str(converted), str(exported))
    different = subprocess.run(
        [sys.executable, "tools/verify_checkpoint.py", str(model), str(exported)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
    )
    assert different.returncode == 1, "training moved no weight"
