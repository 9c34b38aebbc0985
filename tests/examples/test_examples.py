"""The examples run as they are printed."""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_pg.attention import AttentionInputs, available_backends
from tests.ranks import PYTHONPATH, Pool
from tests.utils import ROOT

ENVIRONMENT = os.environ | {
    "PYTHONPATH": PYTHONPATH,
    "PYTHONWARNINGS": "ignore",
    "OMP_NUM_THREADS": "1",
}


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=ROOT,
        env=ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def example(name: str, *arguments: str) -> str:
    """What a rank of an example prints that runs as under torchrun."""
    # A launcher says where ranks meet, even to one that is alone.
    for variable, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "0")):
        os.environ.setdefault(variable, value)
    sys.argv = [name, *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    return printed.getvalue()


def test_attention_only() -> None:
    done = run(sys.executable, "examples/attention_only.py")
    assert "15 logical tokens, 10 computed" in done.stdout, done.stderr
    # Its calls are fp32: what runs them is named.
    runs_fp32 = available_backends(AttentionInputs(torch.device("cpu"), torch.float32, 64, 8, 2))
    assert f"backends for these inputs: {', '.join(runs_fp32)}" in done.stdout


@pytest.mark.megatron
def test_wrapped_model_equals_the_stock_model_on_two_ranks(commands: Path) -> None:
    launcher = (str(commands / "torchrun"), "--standalone", "--nproc-per-node", "2")
    done = run(*launcher, "examples/wrap_gpt_model.py")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("largest relative difference of a gradient") == 3
    assert "6,144 written out, 2,112 encoded" in done.stdout
    assert "24 prefix-grouped, 0 ordinary" in done.stdout


def test_recorded_rollouts(tmp_path: Path) -> None:
    arguments = ("examples/recorded.yaml", f"run.out={tmp_path}")
    done = run(sys.executable, "-m", "megatron_pg.train", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in steps] == [1, 2, 3, 4]
    assert all(m["tokens/reuse_ratio"] > 1.3 for m in steps)
    assert (tmp_path / "reward.png").stat().st_size > 0
    # The backend that was chosen when the model was built, and its merge if it has one.
    (backend,) = json.loads((tmp_path / "summary.json").read_text())["attention_backends"]
    inputs = AttentionInputs(torch.device("cpu"), torch.float32, 16, 4, 2)
    assert backend.split(",")[0] == available_backends(inputs)[0]


@pytest.fixture
def two_hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces joined by a cable: 10.77.0.1 and 10.77.0.2."""
    if shutil.which("ip") is None:
        pytest.skip("needs iproute2 to lay out two hosts")
    tag = uuid.uuid4().hex[:6]
    names = (f"pg-a-{tag}", f"pg-b-{tag}")
    cable = (f"va{tag}", f"vb{tag}")

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)

    try:
        for name in names:
            ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"may not make network namespaces: {error.stderr.decode().strip()}")
    try:
        ip("link", "add", cable[0], "type", "veth", "peer", "name", cable[1])
        for number, (name, end) in enumerate(zip(names, cable), start=1):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def test_two_node_launch_meets_across_hosts(two_hosts: tuple[str, str], tmp_path: Path) -> None:
    nodes = []
    for rank, host in enumerate(two_hosts):
        interface = subprocess.run(
            ["ip", "-n", host, "-br", "link", "show", "type", "veth"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split("@")[0]
        environment = ENVIRONMENT | {
            "NODE_RANK": str(rank),
            "MASTER_ADDR": "10.77.0.1",
            "NPROC_PER_NODE": "1",
            "GLOO_SOCKET_IFNAME": interface,
            "PYTHON": sys.executable,
        }
        command = ["ip", "netns", "exec", host, "bash", "examples/grpo_2nodes.sh"]
        command += ["examples/recorded.yaml", f"run.out={tmp_path}", "run.num_steps=2"]
        command += ["parallel.pipeline_model_parallel_size=2"]
        nodes.append(
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    outputs = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(outputs)[-4000:]
    steps = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(steps) == 2 and json.loads(steps[0])["pipeline/bubble"] > 0


@pytest.mark.megatron
@pytest.mark.parametrize("layout", ["one", "tp2", "pp2", "dp2"])
def test_a_forest_of_an_agent_equals_its_rows_written_out(ranks: Pool, layout: str) -> None:
    printed = ranks.run(1 if layout == "one" else 2, example, "agent_forest.py", layout)
    # The example itself compares the loss and every gradient.
    told = "64 rows: 8,832 tokens written out, 2,656 encoded; gradients differ by "
    assert [text.count(told) for text in printed] == [1] * len(printed)


@pytest.mark.megatron
@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_a_loop_of_one_s_own_equals_the_written_out_loop(ranks: Pool, layout: str) -> None:
    printed = ranks.run(2, example, "own_loop.py", layout)
    # Three steps; the example itself compares every weight.
    assert [text.count("2.67x, differ by ") for text in printed] == [3, 3]
    assert len((ROOT / "examples" / "own_loop.py").read_text().splitlines()) <= 100
