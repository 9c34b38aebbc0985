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
import yaml

from tests.ranks import PYTHONPATH
from tests.utils import ROOT

README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / ".github/CONTRIBUTING.md").read_text()
WALK, ROWS = (
    (ROOT / f"megatron_pg/{name}/README.md").read_text() for name in ("checkpoint", "mcore")
)
BLOCKS, OTHERS = (
    re.findall(r"^```(\w+)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    for text in (README, "\n".join([CONTRIBUTING, WALK, ROWS]))
)


def block(language: str, words: str, blocks: list[tuple[str, str]] = BLOCKS) -> str:
    """The one block in a language that holds the words."""
    (found,) = (code for name, code in blocks if name == language and words in code)
    return found


CHECKPOINTS = block("bash", "tools/reshard_checkpoint.py", OTHERS)
CONVERSION = block("bash", "tools/hf_to_megatron.py")
PLANNING = block("bash", "--dry-run")
MODEL = block("python", "PrefixSharingGPTModel")
OWN_ROW = block("python", "PrefixGroupedSeqParams", OTHERS)
LOOP = block("python", "GrpoStep")
OWN = block("yaml", "my_losses", OTHERS)
PROMPTS = block("bash", "examples/prompts.yaml")
ROW = block("json", "prompt_ids")
# What installs an environment of its own.
NOT_RUN = {
    "verl.trainer.main_ppo": 3,
    "pip install -e .": 2,
    "bash examples/quickstart.sh": 1,
    "tests/run.sh": 1,
}


def test_every_block_is_run_or_installs() -> None:
    run = [CONVERSION, PLANNING, MODEL, LOOP, PROMPTS, ROW]
    others = [code for _, code in BLOCKS if code not in run]
    assert len(others) == len(NOT_RUN)
    for words, num_lines in NOT_RUN.items():
        (code,) = (code for code in others if words in code)
        assert len(code.splitlines()) == num_lines


def test_length() -> None:
    assert len(README.splitlines()) <= 220


def run_bash(code: str, folder: Path, commands: Path, timeout: float = 300) -> str:
    """What the lines print, with the repository's tools and examples in the folder."""
    for name in ("tools", "examples"):
        (folder / name).symlink_to(ROOT / name)
    environment = os.environ | {
        "PATH": f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": PYTHONPATH,
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        ["bash", "-euc", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


@pytest.mark.megatron
def test_planning_commands_run(tmp_path: Path, commands: Path) -> None:
    from tests.checkpoint.tiny import SMOLLM2, save_hf

    save_hf(SMOLLM2, tmp_path / "HF_FOLDER")
    rows = (ROOT / "examples/rollouts.jsonl").read_text()
    (tmp_path / "ROLLOUTS.jsonl").write_text(rows)
    printed = run_bash(PLANNING, tmp_path, commands)
    assert "4 rank" in printed and "reuse" in printed, printed


@pytest.mark.megatron
def test_own_modules_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The modules that CONTRIBUTING shows, by the names that the README has for them."""
    from megatron_pg.loss import ADVANTAGE_ESTIMATORS, POLICY_LOSSES
    from tests.train.tiny import first_step

    shown = re.findall(r"```python\n# (my_\w+\.py)\n(.*?)```", CONTRIBUTING, flags=re.DOTALL)
    assert len(shown) == 5
    for name, code in shown:
        (tmp_path / name).write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    sections = yaml.safe_load(OWN)
    names = re.findall(r"my_\w+:\w+", OWN)
    assert {name.split(":")[0] + ".py" for name in names} == {name for name, _ in shown}
    rollout = sections["rollout"] | {"max_response_tokens": 4, "num_generations": 4}
    algorithm = {f"algorithm__{name}": value for name, value in sections["algorithm"].items()}
    packing = {f"prefix_group__{name}": value for name, value in sections["prefix_group"].items()}
    metrics = first_step(tmp_path, rollout=rollout, **algorithm, **packing)
    assert metrics["actor/updates"] == 1 and metrics["tokens/reuse_ratio"] > 1
    # As long as the modules are there, and no longer.
    for registry in (ADVANTAGE_ESTIMATORS, POLICY_LOSSES):
        for name in names:
            registry.pop(name, None)
    for name, _ in shown:
        sys.modules.pop(name.removesuffix(".py"), None)


@pytest.mark.megatron
def test_loop_runs(tmp_path: Path) -> None:
    from megatron_pg.train import load_config
    from tests.train import tiny

    config = load_config(tiny.write_config(tmp_path / "run.yaml", tiny.run_sections(tmp_path)))
    with tiny.opened(config) as trainer:
        chunks = trainer.model.chunks
        known = dict(chunks=chunks, vocab_size=tiny.VOCAB, groups=tiny.make_groups())
        exec(compile(LOOP, "README loop", "exec"), known)
        assert len(known["batch"].minibatches) == 2
        assert all(bool(p.main_grad.any()) for p in chunks[0].parameters())


def test_recorded_row_is_read(tmp_path: Path) -> None:
    from megatron_pg.data import read_rollouts

    (tmp_path / "rows.jsonl").write_text(json.dumps(json.loads(ROW)) + "\n")
    (group,) = read_rollouts([tmp_path / "rows.jsonl"])
    (sample,) = group.samples
    assert (group.group_id, sample.reward, sample.num_loss_tokens) == ("7", 1.0, 2)


@pytest.mark.megatron
@pytest.mark.parametrize(
    ("code", "printed"), [(MODEL, "ran (1, 9, 64)"), (OWN_ROW, "ran (1, 6, 64)")]
)
def test_model_examples_run(code: str, printed: str, commands: Path) -> None:
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
    code = worker.replace("BLOCK", repr(code))
    command = [str(commands / "python"), "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert printed in done.stdout, done.stderr[-2000:]


@pytest.mark.megatron
def test_prompts_commands_run(tmp_path: Path, commands: Path) -> None:
    """As printed, with a tiny model and few steps."""
    pytest.importorskip("reasoning_gym", reason='pip install "megatron_pg[rollout]"')
    from tests.checkpoint.tiny import SMOLLM2, save_hf
    from tests.train.tiny import save_tokenizer

    model = tmp_path / re.findall(r"model\.hf=(\S+)", PROMPTS)[0]
    model.parent.mkdir()
    save_hf(SMOLLM2, model)
    save_tokenizer(model)
    fewer = "run.num_steps=2 run.groups_per_step=2 run.eval_prompts=2 run.eval_generations=2"
    run_bash(f"{PROMPTS.rstrip()} {fewer}\n", tmp_path, commands)
    steps = [json.loads(line) for line in (tmp_path / "runs/prompts/metrics.jsonl").open()]
    assert [step["step"] for step in steps] == [1, 2]
    assert all(step["tokens/reuse_ratio"] > 1 for step in steps)


@pytest.mark.megatron
def test_conversion_commands_run(tmp_path: Path, commands: Path) -> None:
    from tests.checkpoint.tiny import SMOLLM2, save_hf

    save_hf(SMOLLM2, tmp_path / "MODEL")
    assert "runs/start and runs/hf are equal" in run_bash(CONVERSION, tmp_path, commands)


@pytest.mark.megatron
def test_checkpoint_commands_run(tmp_path: Path, commands: Path) -> None:
    """As printed, on a tiny model of SmolLM2's head relations in the place of the real one."""
    from megatron_pg.checkpoint import compare_weights, open_weights
    from tests.checkpoint.tiny import SMOLLM2, save_hf
    from tests.train.tiny import save_tokenizer

    model = tmp_path / re.findall(r"^MODEL=(\S+)", CHECKPOINTS, flags=re.MULTILINE)[0]
    model.parent.mkdir()
    save_hf(SMOLLM2, model)
    save_tokenizer(model)
    printed = run_bash(CHECKPOINTS, tmp_path, commands, timeout=1500)
    assert "runs/pp2/checkpoints and runs/tp3/checkpoints are equal" in printed
    assert "optimizer state: True" in printed
    assert "greedy continuation equal" in printed and "'role': 'assistant'" in printed
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


PATHS = re.findall(r"(?:examples|tools|tests|megatron_pg)/[\w/.-]+\.[a-z]+\b", README)


@pytest.mark.parametrize("path", sorted(set(PATHS) | set(re.findall(r"\]\(([^:)]+)\)", README))))
def test_path_exists(path: str) -> None:
    assert (ROOT / path).is_file()


def test_names_exist() -> None:
    modules = set(re.findall(r"\bmegatron_pg(?:\.\w+)+", README))
    assert modules
    for name in modules:
        assert importlib.util.find_spec(name) is not None, f"{name} does not exist"


def test_every_benchmark_is_named() -> None:
    folder = ROOT / "tools" / "bench"
    code = "".join(path.read_text() for path in folder.glob("*.py"))
    names = set(re.findall(r'^@register\("(\w+)"\)', code, flags=re.MULTILINE))
    table = re.findall(r"^\| (`.*?) \|", (folder / "README.md").read_text(), flags=re.MULTILINE)
    assert {name for cell in table for name in re.findall(r"`(\w+)`", cell)} == names
    assert "prepare" in names
