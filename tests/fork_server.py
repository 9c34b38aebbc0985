"""The process behind ``tests.ranks``: it imports what cases need, and forks their ranks.

``python -m tests.fork_server FD`` answers requests over the connection FD and ends with it.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.ports import free_port

_PR_SET_PDEATHSIG = 1


def result_file(log: Path, rank: int) -> Path:
    """Where a rank leaves what it returned."""
    return log.with_name(f"{log.name}.{rank}")


class Server:
    """Forks ranks; it computes nothing itself, so that it has no threads."""

    def __init__(self, connection: Connection) -> None:
        # It is waited for.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
        self.connection = connection
        self.running: set[int] = set()

    def serve(self) -> None:
        with suppress(EOFError, OSError):
            while True:
                request = self.connection.recv_bytes()
                try:
                    # Imports what the function needs, once for all cases.
                    name, *args = pickle.loads(request)
                    answer = True, getattr(self, name)(*args)
                except Exception:
                    answer = False, traceback.format_exc()
                self.connection.send_bytes(pickle.dumps(answer))
        for pid in self.running:
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)

    def fork(
        self, num_ranks: int, function: Callable[..., Any], args: tuple[Any, ...], log: Path
    ) -> list[int]:
        # Collections in the ranks leave alone, and shared, what is here already.
        gc.freeze()
        launcher = {"WORLD_SIZE": str(num_ranks)}
        if num_ranks > 1:
            launcher |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        pids, server = [], os.getpid()
        for rank in range(num_ranks):
            pid = os.fork()
            if not pid:
                self.connection.close()
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                _be_rank(server, launcher | own, function, args, log)
            pids.append(pid)
        self.running.update(pids)
        return pids

    def reap(self, pids: list[int], seconds: float) -> dict[int, int]:
        """Exit codes of those that have ended; if none has, waits so long for some child to."""
        for _ in range(2):
            ended = [os.waitpid(pid, os.WNOHANG) for pid in pids]
            codes = {pid: os.waitstatus_to_exitcode(status) for pid, status in ended if pid}
            if codes or not pids or not signal.sigtimedwait([signal.SIGCHLD], seconds):
                break
        self.running.difference_update(codes)
        return codes


def _be_rank(
    server: int,
    launcher: dict[str, str],
    function: Callable[..., Any],
    args: tuple[Any, ...],
    log: Path,
) -> None:
    code = 1
    try:
        os.setsid()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != server:
            # It was gone before this could be asked for.
            os._exit(1)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        faulthandler.register(signal.SIGUSR1)
        os.environ |= launcher
        value = function(*args)
        result_file(log, int(launcher["RANK"])).write_bytes(pickle.dumps(value))
        code = 0
    except BaseException:
        # In one piece, so that those of several ranks do not mix.
        text = f"[rank {launcher['RANK']}]\n{traceback.format_exc()}\n"
        with suppress(OSError):
            os.write(2, text.encode())
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    Server(Connection(int(sys.argv[1]))).serve()
    # Nothing of what was imported needs to be taken down.
    os._exit(0)
