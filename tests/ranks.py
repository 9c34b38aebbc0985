"""Ranks for tests: every case gets new ones, forked from one process that has imported everything.

The fixture ``ranks`` is a ``Pool``. A case is a function of any module that can be imported, with
arguments that can be pickled; each rank calls it, and what it returns is for the test to judge:

    def test_sum(ranks: Pool) -> None:
        assert ranks.run(2, summed, 3) == [6, 6]

A rank has the variables of a launcher, one thread, nothing of an earlier case, and a session of its
own, which ends with the case. ``tests/README.md`` shows more.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.fork_server import result_file

ROOT = Path(__file__).parent.parent
# Of every process that tests start: a Megatron-Core laid over the environment's own stays there.
PYTHONPATH = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)])
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# For importing what a case needs, on a busy machine.
_ANSWER_SECONDS = 180
# What ranks get to end by themselves when another one has failed: they often say why.
_GRACE_SECONDS = 10


class RanksFailed(AssertionError):
    """Says which rank failed and how, with every traceback and the output of the ranks."""


@dataclass
class Job:
    """Ranks that run one function.

    Attributes:
        name: of the function.
        pids: by rank.
        codes: exit codes of the ranks that have been seen to end, negative for a signal.
        log: what the ranks printed.
    """

    pool: Pool
    name: str
    pids: list[int]
    log: Path
    codes: dict[int, int] = field(default_factory=dict)

    @property
    def running(self) -> list[int]:
        return [rank for rank in range(len(self.pids)) if rank not in self.codes]

    def poll(self, seconds: float = 0) -> bool:
        """Whether all ranks have ended; waits so long for one of them."""
        ended = self.pool.ask("reap", [self.pids[rank] for rank in self.running], seconds)
        self.codes |= {self.pids.index(pid): code for pid, code in ended.items()}
        return not self.running

    def kill(self, ranks: Sequence[int], number: int = signal.SIGKILL) -> None:
        for rank in ranks:
            os.kill(self.pids[rank], number)

    def wait(self, timeout: float, grace: float | None = None) -> dict[int, int]:
        """Exit codes by rank.

        Raises:
            RanksFailed: if ranks still run after ``timeout`` seconds, or ``grace`` seconds after
                another one failed, or leave processes behind; all are killed.
        """
        end, hanging = time.monotonic() + timeout, []
        try:
            while not self.poll(0.5):
                if grace is not None and any(self.codes.values()):
                    end, grace = min(end, time.monotonic() + grace), None
                if time.monotonic() > end:
                    hanging = self.running
                    for rank in hanging:
                        # It writes down where it is; one after another, to be read.
                        self.kill([rank], signal.SIGUSR1)
                        time.sleep(0.2)
                    break
        finally:
            left = self._end_sessions()
        if hanging:
            raise RanksFailed(self.report(f"ranks {hanging} did not end and were killed"))
        if left:
            raise RanksFailed(self.report(f"processes outlive ranks {left}"))
        return self.codes

    def values(self) -> list[Any]:
        """What the ranks returned; for ranks that have ended.

        Raises:
            RanksFailed: unless each ended well.
        """
        if any(self.codes.values()):
            raise RanksFailed(self.report("not every rank ended well"))
        return [pickle.loads(result_file(self.log, r).read_bytes()) for r in range(len(self.pids))]

    def report(self, what: str) -> str:
        told = [f"{self.name} on {len(self.pids)} ranks: {what}"]
        for rank, code in self.codes.items():
            how = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
            told += [f"rank {rank} {how}"] if code else []
        printed = self.log.read_text(errors="replace")[-8000:] if self.log.is_file() else ""
        return "\n".join([*told, "--- what the ranks printed:", printed])

    def _end_sessions(self) -> list[int]:
        """Ranks in whose sessions something was still running."""
        left = []
        for rank in self.running:
            os.kill(self.pids[rank], signal.SIGKILL)
        for rank, pid in enumerate(self.pids):
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
                left.append(rank)
        while not self.poll(0.5):
            pass
        return left


class Pool:
    """Starts ranks; ``close`` ends whatever still runs, and so does the end of this process.

    Args:
        environment: variables of the ranks beside those that this process has now; what a case
            sets for itself later, all other cases would see.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        kept = {k: v for k, v in os.environ.items() if k not in _LAUNCHER}
        self._environment = {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH}
        self._environment |= environment or {}
        self._server: subprocess.Popen[bytes] | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self._num_jobs = 0

    def run(
        self,
        num_ranks: int,
        function: Callable[..., Any],
        *args: Any,
        log: Path | None = None,
        timeout: float = 120,
    ) -> list[Any]:
        """What ``function(*args)`` returns on each of ``num_ranks`` ranks."""
        job = self.start(num_ranks, function, *args, log=log)
        job.wait(timeout, _GRACE_SECONDS)
        return job.values()

    def start(
        self, num_ranks: int, function: Callable[..., Any], *args: Any, log: Path | None = None
    ) -> Job:
        """As ``run``, without waiting; output is added to ``log``."""
        self._num_jobs += 1
        log = log or Path(self._folder.name) / f"{self._num_jobs}.log"
        name = f"{function.__module__}.{function.__qualname__}"
        pids = self.ask("fork", num_ranks, function, args, log)
        return Job(self, name, pids, log)

    def ask(self, *request: Any) -> Any:
        """The answer of the process that forks ranks, which is started where there is none."""
        if self._server is None:
            self._start_server()
        try:
            self._connection.send_bytes(pickle.dumps(request))
            if not self._connection.poll(_ANSWER_SECONDS):
                raise EOFError
            is_good, answer = pickle.loads(self._connection.recv_bytes())
        except (EOFError, OSError):
            self._end_server()
            told = (Path(self._folder.name) / "server.log").read_text(errors="replace")
            raise RanksFailed(f"the process that forks ranks is gone:\n{told[-4000:]}") from None
        if not is_good:
            raise RanksFailed(answer)
        return answer

    def close(self) -> None:
        self._end_server()
        self._folder.cleanup()

    def _start_server(self) -> None:
        self._connection, other = Pipe()
        with other, open(Path(self._folder.name) / "server.log", "wb") as log:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "tests.fork_server", str(other.fileno())],
                cwd=ROOT,
                env=self._environment,
                pass_fds=[other.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C is for pytest alone; the connection's end is the end of all ranks.
                start_new_session=True,
            )

    def _end_server(self) -> None:
        if self._server is not None:
            self._connection.close()
            with suppress(subprocess.TimeoutExpired):
                self._server.wait(10)
            self._server.kill()
            self._server.wait()
            self._server = None


@contextmanager
def process_group() -> Iterator[None]:
    """The ranks of this case as gloo's default group."""
    alone: dict[str, Any] = dict(store=dist.HashStore(), rank=0, world_size=1)
    dist.init_process_group("gloo", **({} if "MASTER_ADDR" in os.environ else alone))
    yield
    # The first rank serves what the others look up.
    dist.barrier()
    dist.destroy_process_group()
