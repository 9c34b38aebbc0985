"""How a run ends: exit codes, one message, and nothing that stays behind."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

pytest.importorskip("megatron.core")

from megatron_pg.train.__main__ import how_to_go_on  # noqa: E402
from megatron_pg.train.config import RunConfig  # noqa: E402
from megatron_pg.train.lifetime import Lifetime  # noqa: E402
from tests.train import tiny  # noqa: E402
from tests.train.test_runs import prepare  # noqa: E402
from tests.utils import ROOT  # noqa: E402

ADVICE = "the same command goes on"
GLOO = "[/src/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1"


@pytest.fixture(autouse=True)
def heeds_ctrl_c() -> Iterator[None]:
    """Ignored where a shell has put the tests into the background; processes inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def exit_for_broken_pipe() -> SystemExit:
    error = SystemExit(1)
    error.__context__ = BrokenPipeError(errno.EPIPE, "Broken pipe")
    return error


ENDS: dict[str, tuple[BaseException, int, str]] = {
    "refusal": (ValueError("run.out=x"), 2, "error: run.out=x\n"),
    "not supported": (NotImplementedError("no"), 2, "error: no\n"),
    "full disk": (
        OSError(errno.ENOSPC, "cannot be written (No space left on device)", "/out/metrics.jsonl"),
        2,
        "error: /out/metrics.jsonl: cannot be written (No space left on device); " + ADVICE + "\n",
    ),
    "diverged": (FloatingPointError("step 3"), 2, f"error: step 3; {ADVICE}\n"),
    "lost rank": (
        RuntimeError(GLOO + "\nmore"),
        3,
        f"error: no connection to the other ranks ({GLOO}); {ADVICE}\n",
    ),
    "lost store": (
        dist.DistNetworkError("gone"),
        3,
        f"error: no connection to the other ranks (gone); {ADVICE}\n",
    ),
    "exit with a code": (SystemExit(7), 7, "error: sys.exit(7) was called inside the run\n"),
    # Whatever was called, the run is not at its end.
    "exit with 0": (SystemExit(), 1, "error: sys.exit(None) was called inside the run\n"),
    "exit with a text": (
        SystemExit("bye"),
        1,
        "error: sys.exit('bye') was called inside the run\n",
    ),
    "reader is gone": (
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
        3,
        f"error: what reads the output of this run has ended; {ADVICE}\n",
    ),
    "reader is gone, as rich says it": (
        exit_for_broken_pipe(),
        3,
        f"error: what reads the output of this run has ended; {ADVICE}\n",
    ),
}


def end(monkeypatch: pytest.MonkeyPatch, error: BaseException, rank: int = 0) -> tuple[int, str]:
    """Exit code and standard error of a process that ends with ``error``."""
    monkeypatch.setattr("megatron_pg.train.lifetime._FIRST_RANK_SECONDS", 0)
    monkeypatch.setattr("megatron_pg.train.lifetime._LOST_RANK_SECONDS", 0)
    monkeypatch.setenv("RANK", str(rank))
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(write, 2)
        sys.stderr = os.fdopen(2, "w")
        lifetime = Lifetime()
        lifetime.advice = lambda: ADVICE
        with lifetime.telling():
            raise error
        os._exit(99)
    os.close(write)
    with os.fdopen(read) as told:
        text = told.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text


@pytest.mark.parametrize("name", ENDS)
def test_an_end_is_one_message_and_a_code(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error, code, message = ENDS[name]
    assert end(monkeypatch, error) == (code, message)


def test_only_a_bug_has_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    code, told = end(monkeypatch, KeyError("a bug"))
    assert code == 1 and told.startswith("error: Traceback (most recent call last):\n")
    assert told.endswith("KeyError: 'a bug'\n") and told.count("KeyError") == 1


def test_the_first_rank_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    error = OSError(errno.ENOSPC, "full", "/out")
    assert end(monkeypatch, error, rank=3) == (2, "error: rank 3: /out: full\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("busy", ["in Python", "in a library", "printing to nobody"])
def test_a_signal_ends_the_process_at_once(number: signal.Signals, busy: str) -> None:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(write, 2)
        sys.stderr = os.fdopen(2, "w")
        lifetime = Lifetime()
        lifetime.advice = lambda: ADVICE
        lifetime.watch()
        os.write(write, b"-")
        if busy == "in Python":
            while True:
                time.sleep(0.01)
        elif busy == "in a library":
            # No handler of Python's runs in here.
            dist.TCPStore("127.0.0.1", 0, 1, True).get("nothing")
        else:
            sys.stdout = os.fdopen(os.pipe()[1], "w")
            print("x" * 1_000_000)
    os.close(write)
    with os.fdopen(read) as told:
        assert told.read(1) == "-"
        time.sleep(0.2)
        os.kill(child, number)
        text = told.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + number
    name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    assert text == f"stopped by {name}; {ADVICE}\n"


def test_what_a_shell_ignores_stays_ignored() -> None:
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        Lifetime().watch()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_forks_of_a_rank_end_alone_and_with_it() -> None:
    """Those of a reward function: a signal to one is not the rank's, the rank's end is theirs."""
    read, write = os.pipe()
    rank = os.fork()
    if rank == 0:
        Lifetime().watch()
        forks = []
        for _ in range(2):
            pid = os.fork()
            if pid == 0:
                time.sleep(60)
            forks.append(pid)
        os.kill(forks[0], signal.SIGTERM)
        os.write(write, f"{os.waitpid(forks[0], 0)[1]} {forks[1]}\n".encode())
        time.sleep(60)
    os.close(write)
    with os.fdopen(read) as told:
        status, fork = map(int, told.readline().split())
        assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM
        time.sleep(0.2)
        assert os.waitpid(rank, os.WNOHANG) == (0, 0) and is_running(fork)
        os.kill(rank, signal.SIGKILL)
        os.waitpid(rank, 0)
        # The pipe is closed when the fork has ended too.
        assert told.read() == ""
    assert ends(fork)


@pytest.mark.parametrize(
    ("settings", "tracker", "advice"),
    [
        ({}, "3", "the same command goes on after step 3, the newest checkpoint in {}"),
        ({"load": False}, "3", "the same command with run.load=true goes on after step 3"),
        ({"save_interval": 2}, None, "no checkpoint was written: the same command begins again"),
        ({}, None, "no checkpoint was written (run.save_interval=0): the same command begins"),
        ({"save_interval": 2}, "\\xff", "no checkpoint was written: the same command begins"),
    ],
)
def test_how_to_go_on(
    settings: dict[str, object], tracker: str | None, advice: str, tmp_path: Path
) -> None:
    checkpoints = tmp_path / "checkpoints"
    if tracker is not None:
        checkpoints.mkdir()
        (checkpoints / "latest_checkpointed_iteration.txt").write_text(tracker)
    told = how_to_go_on(RunConfig(out=str(tmp_path), **settings))
    assert told.startswith(advice.format(checkpoints))


def test_how_to_go_on_from_a_checkpoint_that_is_not_said(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoints" / "iter_0000001"
    checkpoint.mkdir(parents=True)
    told = how_to_go_on(RunConfig(out=str(tmp_path)))
    assert told == f"{checkpoint.parent} holds a checkpoint: the same command goes on after it"


def ranks_of(launcher: int) -> list[int]:
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text()
    return [int(pid) for pid in children.split()]


def is_running(pid: int) -> bool:
    """A zombie, which nobody has waited for, is not."""
    status = Path(f"/proc/{pid}/status")
    try:
        return "\nState:\tZ" not in status.read_text()
    except FileNotFoundError:
        return False


def ends(pid: int) -> bool:
    """A process closes its pipes a moment before it is gone."""
    deadline = time.monotonic() + 5
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not is_running(pid)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_nothing_outlives_the_launcher(number: signal.Signals, tmp_path: Path) -> None:
    """Two ranks that train and save in the background, behind a pipe."""
    prepare(tmp_path, run__num_steps=100_000, run__save_interval=1, run__async_save=True)
    metrics = tmp_path / "out" / "metrics.jsonl"
    launcher = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        + ["-m", "megatron_pg.train", str(tmp_path / "config.yaml")],
        cwd=ROOT,
        env=tiny.clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    ranks: list[int] = []
    try:
        deadline = time.monotonic() + 200
        while not metrics.is_file() or metrics.read_text().count("\n") < 3:
            assert launcher.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        ranks = ranks_of(launcher.pid)
        assert len(ranks) == 2 and all(map(is_running, ranks))
        launcher.send_signal(number)
        # The pipe is closed when the last process that could write to it has ended.
        output, _ = launcher.communicate(timeout=60)
        assert all(map(ends, ranks)), output
    finally:
        for pid in filter(is_running, [launcher.pid, *ranks]):
            os.kill(pid, signal.SIGKILL)
    ours = [line for line in output.splitlines() if "goes on after step" in line]
    assert len(ours) == 1, output
    if number == signal.SIGKILL:
        assert ours[0].startswith("error: the launcher of this run is gone; the same command goes")
        assert "Traceback" not in output
    else:
        assert ours[0].startswith("stopped by Ctrl-C; the same command goes on after step")
        # The launcher's own traceback is not ours.
        assert "megatron_pg" not in output.split("Traceback", 1)[-1], output
