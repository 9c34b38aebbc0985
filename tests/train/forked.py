"""Ranks of a run as forked processes: everything is imported once, a rank starts in no time."""

from __future__ import annotations

import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_pg.train import TrainConfig, Trainer, parallel_run


@dataclass
class Ranks:
    """Running ranks.

    Attributes:
        pids: of the ranks that have not been seen to end.
        codes: exit codes of those that have, negative for a signal.
        log: what the ranks printed.
        sessions: of all ranks; each leads one, to which its helper processes belong.
    """

    pids: dict[int, int]
    codes: dict[int, int]
    log: Path
    sessions: tuple[int, ...]

    def poll(self) -> bool:
        """Whether all ranks have ended."""
        for rank, pid in list(self.pids.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                self.codes[rank] = os.waitstatus_to_exitcode(status)
                del self.pids[rank]
        return not self.pids

    def kill(self, ranks: Sequence[int]) -> None:
        for rank in ranks:
            os.kill(self.pids[rank], signal.SIGKILL)

    def wait(self, timeout: float) -> dict[int, int]:
        """Exit codes by rank; what still runs after ``timeout`` seconds is an error."""
        end = time.monotonic() + timeout
        try:
            while not self.poll():
                if time.monotonic() > end:
                    raise AssertionError(f"hangs: ranks {list(self.pids)}\n{self.log.read_text()}")
                time.sleep(0.01)
        finally:
            left = self._end_sessions()
        assert not left, f"sessions {left} outlive their ranks\n{self.log.read_text()}"
        return self.codes

    def _end_sessions(self) -> list[int]:
        """Sessions of ranks in which some process was still running."""
        left = []
        for session in self.sessions:
            with suppress(ProcessLookupError):
                os.killpg(session, signal.SIGKILL)
                left.append(session)
        return left


def train(config: TrainConfig) -> None:
    """A whole run on this rank."""
    with parallel_run(config.parallel, config.run.seed) as ranks:
        Trainer(config, ranks).run()


def free_port() -> int:
    """A port that nobody listens on, below those that connections take for themselves."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def start(action: Callable[[], None], num_ranks: int, log: Path) -> Ranks:
    """Run ``action`` in ``num_ranks`` forks of this process, which must not have used threads."""
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    sys.stdout.flush()
    pids = {}
    for rank in range(num_ranks):
        pid = os.fork()
        if pid:
            pids[rank] = pid
            continue
        try:
            os.setsid()
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(num_ranks),
            }
            for name, value in rendezvous.items():
                os.environ.pop(name, None)
                if num_ranks > 1:
                    os.environ[name] = value
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            torch.set_num_threads(1)
            action()
            sys.stdout.flush()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    return Ranks(dict(pids), {}, log, tuple(pids.values()))


def finish(action: Callable[[], None], num_ranks: int, log: Path, timeout: float = 300) -> None:
    """As ``start``; every rank must end well."""
    codes = start(action, num_ranks, log).wait(timeout)
    assert set(codes.values()) == {0}, log.read_text()[-6000:]
