"""Real OpenAI-compatible servers as child processes of a test."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.ports import free_port

VLLM_PYTHON = os.environ.get("MEGATRON_PG_VLLM_PYTHON") or (
    sys.executable if importlib.util.find_spec("vllm") else None
)
SERVING = ("fastapi", "uvicorn", "openai", "accelerate")
STARTUP_SECONDS = 300.0


@contextmanager
def run_server(command: list[str], log: Path, **environment: str) -> Iterator[str]:
    """Address of the server that ``command`` starts on ``{port}``; ended with its children."""
    port = str(free_port())
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"} | environment
    with log.open("w") as output:
        server = subprocess.Popen(
            [part.replace("{port}", port) for part in command],
            cwd=log.parent,
            env=env,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        end = time.monotonic() + STARTUP_SECONDS
        while time.monotonic() < end and server.poll() is None:
            with socket.socket() as knock:
                if knock.connect_ex(("127.0.0.1", int(port))) == 0:
                    break
            time.sleep(0.2)
        assert server.poll() is None, log.read_text()[-4000:]
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


@contextmanager
def transformers_server(folder: Path) -> Iterator[str]:
    """Address of ``transformers serve``; the test is skipped where it is not installed."""
    missing = [name for name in SERVING if not importlib.util.find_spec(name)]
    if missing:
        pytest.skip(f'{missing} not installed: pip install "transformers[serving]"')
    start = "from transformers.cli.transformers import main; main()"
    options = ["--device", "cpu", "--host", "127.0.0.1", "--port", "{port}"]
    with run_server([sys.executable, "-c", start, "serve", *options], folder / "log") as url:
        yield url
