"""Calls of a reward in processes of their own, each with its time limit."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Pipe, wait
from pathlib import Path
from typing import Any

from .calling import Call, Failure, OnFailure, Outcome, timed_out

_SCRIPT = Path(__file__).with_name("worker.py")
# Until a process has imported the reward's module, which may load a model.
_START_SECONDS = 300.0


class RewardError(ValueError):
    """A reward failed, and is told to end the run by that; all ranks raise it."""


class RewardPool:
    """Processes that call one reward; one that hangs is killed and another takes its place.

    They are started by the first call and end with this object or with this process, however it
    ends. They are fresh interpreters: no thread, no lock, no memory of this process is in them.

    Args:
        path: ``module:name`` of the reward.
        arguments: what it is made with, if it is a class.
        modules: that hold the types of its arguments.
        num_processes: calls at once.
        timeout_seconds: of a call; None lets it take its time.
    """

    def __init__(
        self,
        path: str,
        arguments: dict[str, Any],
        *,
        modules: Sequence[str] = (),
        num_processes: int,
        timeout_seconds: float | None,
    ) -> None:
        self.path = path
        self._reward = path, arguments, modules
        self.num_processes = num_processes
        self.timeout_seconds = timeout_seconds
        self._workers: list[_Worker] = []
        weakref.finalize(self, _end_all, self._workers, os.getpid())

    def close(self) -> None:
        """End the processes; the next call starts others."""
        _end_all(self._workers, os.getpid())

    def run(self, calls: Sequence[Call], on_failure: OnFailure) -> list[Outcome]:
        """What the calls return, in their order.

        Raises:
            RewardError: if a process cannot be started.
        """
        outcomes: list[Outcome] = [None] * len(calls)
        waiting = deque(enumerate(calls))
        try:
            while waiting or any(worker.is_busy for worker in self._workers):
                self._hand_out(waiting)
                for worker in self._await():
                    number, outcome = worker.number, worker.take(self.timeout_seconds)
                    if worker.is_lost:
                        self._workers.remove(worker)
                    if number is None:
                        self._check_start(outcome)
                        continue
                    outcomes[number] = outcome
                    if isinstance(outcome, Failure):
                        on_failure(number, outcome)
        except BaseException:
            # Nobody waits for what is under way.
            self.close()
            raise
        return outcomes

    def _hand_out(self, waiting: deque[tuple[int, Call]]) -> None:
        for worker in [worker for worker in self._workers if not worker.is_busy]:
            if waiting and worker.give(*waiting[0], self.timeout_seconds):
                waiting.popleft()
            elif waiting:
                # It ended while it had nothing to do.
                worker.end()
                self._workers.remove(worker)
        num_calls = sum(w.is_busy and w.number is not None for w in self._workers) + len(waiting)
        while len(self._workers) < min(self.num_processes, num_calls):
            self._workers.append(_Worker(self._reward))

    def _await(self) -> list[_Worker]:
        """Busy workers that have an answer, have ended, or have had their time."""
        busy = {worker.channel: worker for worker in self._workers if worker.is_busy}
        deadlines = [w.deadline for w in busy.values() if w.deadline is not None]
        seconds = max(min(deadlines) - time.monotonic(), 0.0) if deadlines else None
        ready = [busy[channel] for channel in wait(list(busy), seconds)]  # type: ignore[index]
        now = time.monotonic()
        late = (w for w in busy.values() if w.deadline is not None and w.deadline <= now)
        return ready + [worker for worker in late if worker not in ready]

    def _check_start(self, outcome: Outcome) -> None:
        if isinstance(outcome, Failure):
            raise RewardError(f"rollout.reward {self.path!r} cannot be started: {outcome.reason}")


class _Worker:
    """A process, and the call that it has; at first it is busy with loading the reward."""

    def __init__(self, reward: tuple[str, dict[str, Any], Sequence[str]]) -> None:
        self.channel, theirs = Pipe()
        life, self._life = os.pipe()
        inherited = (theirs.fileno(), life)
        # Its own folder is not to be searched for modules, but whatever this process searches.
        command = [sys.executable, "-P", str(_SCRIPT), *map(str, inherited)]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path),
            "OMP_NUM_THREADS": "1",
        }
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            pass_fds=inherited,
            env=environment,
            start_new_session=True,
        )
        theirs.close()
        os.close(life)
        self.number: int | None = None
        self.is_busy, self.is_lost = True, False
        self.deadline: float | None = time.monotonic() + _START_SECONDS
        self._send(reward)

    def give(self, number: int, call: Call, timeout_seconds: float | None) -> bool:
        """Hand a call over; False if the process is gone."""
        self.number, self.is_busy = number, True
        self.deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        return self._send((call.args, call.kwargs))

    def take(self, timeout_seconds: float | None) -> Outcome:
        """The answer to the call, or why there is none; then the process is gone."""
        self.is_busy = False
        seconds = _START_SECONDS if self.number is None else timeout_seconds
        if not self.channel.poll():
            self.is_lost = True
            self.end()
            return timed_out(seconds)
        try:
            answer = json.loads(self.channel.recv_bytes())
        except (EOFError, OSError):
            self.is_lost = True
            return Failure(f"ended its process ({_told_code(self.end())})")
        return Failure(answer["failure"]) if "failure" in answer else answer["value"]

    def end(self) -> int:
        """Kill it with all that it started; its exit code."""
        if not self.channel.closed:
            # By word too: a fork of this process may hold this end of the pipe open.
            with suppress(BrokenPipeError):
                os.write(self._life, b".")
            os.close(self._life)
            self.channel.close()
        return self._process.wait()

    def _send(self, content: object) -> bool:
        try:
            self.channel.send_bytes(pickle.dumps(content))
        except (BrokenPipeError, ConnectionResetError):
            return False
        return True


def _end_all(workers: list[_Worker], owner: int) -> None:
    # A fork that lets go of its copy ends nothing.
    while workers and os.getpid() == owner:
        workers.pop().end()


def _told_code(code: int) -> str:
    names = {128 + number: number.name for number in signal.Signals}
    return names.get(code, f"exit code {code}")
