"""The README's code runs, and what it names exists."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.utils import ROOT

README = (ROOT / "README.md").read_text()
CHECKPOINTS = README.split("## Checkpoints")[1].split("```bash\n")[1].split("```")[0]
PYTHON_BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_attention_example_runs() -> None:
    exec(compile(PYTHON_BLOCKS[0], "README attention", "exec"), {})


@pytest.mark.megatron
def test_model_example_runs() -> None:
    worker = """
import torch, torch.distributed as dist
from megatron_pg.mcore import cpu
from tests.mcore import harness
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
with cpu.emulate_cuda():
    harness.initialize(harness.Case())
    changes = dict(normalization="LayerNorm", gated_linear_unit=False)
    config = harness.make_config(harness.Case(dtype=torch.float32, config=changes))
    exec(compile(BLOCK, "README model", "exec"))
    print("ran", tuple(logits.shape))
"""
    code = worker.replace("BLOCK", repr(PYTHON_BLOCKS[1]))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert "ran (1, 6, 64)" in done.stdout, done.stderr[-2000:]
    assert len(PYTHON_BLOCKS) == 2


@pytest.mark.megatron
def test_checkpoint_commands_run(tmp_path: Path) -> None:
    """As printed, on a tiny model of SmolLM2's head relations in the place of the real one."""
    from megatron_pg.checkpoint import compare_weights, open_weights
    from tests.checkpoint.tiny import SMOLLM2, save_hf
    from tests.train.tiny import save_tokenizer

    model = tmp_path / re.findall(r"^MODEL=(\S+)", CHECKPOINTS, flags=re.MULTILINE)[0]
    model.parent.mkdir()
    save_hf(SMOLLM2, model)
    save_tokenizer(model)
    for folder in ("tools", "examples"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": "1",
    }

    done = subprocess.run(
        ["bash", "-euc", CHECKPOINTS],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert "runs/pp2/checkpoints and runs/tp3/checkpoints are equal" in done.stdout
    assert "optimizer state: True" in done.stdout
    assert "greedy continuation equal" in done.stdout and "'role': 'assistant'" in done.stdout
    # tp=3 went on where pp=2 stopped; what left is what the run itself wrote, and was trained.
    runs = tmp_path / "runs"
    steps = [
        [json.loads(line)["step"] for line in (runs / name / "metrics.jsonl").open()]
        for name in ("pp2", "tp3")
    ]
    assert steps == [[1, 2, 3], [4]]
    left, trained, halfway, start = (
        open_weights(path)
        for path in (runs / "hf", runs / "tp3/hf_step_4", runs / "pp2/hf_step_3", model)
    )
    assert not list(compare_weights(left, trained))
    for a, b in ((start, halfway), (halfway, left)):
        assert any("q_proj.weight: " in line for line in compare_weights(a, b))


def test_paths_exist() -> None:
    paths = set(
        re.findall(
            r"(?:examples|tools|tests|megatron_pg)/[\w/.-]+\.(?:py|sh|yaml|jsonl|sbatch)", README
        )
    )
    assert len(paths) > 15
    missing = sorted(path for path in paths if not (ROOT / path).is_file())
    assert not missing


def test_names_exist() -> None:
    modules = set(re.findall(r"\bmegatron_pg(?:\.\w+)+", README))
    assert modules
    for name in modules:
        assert importlib.util.find_spec(name) is not None, f"{name} does not exist"
