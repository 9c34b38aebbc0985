"""The README's code runs, and what it names exists."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys

import pytest

from tests.utils import ROOT

README = (ROOT / "README.md").read_text()
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
