"""What a process for rewards runs: one function, call after call, watched by a keeper.

Started by path with the standard library alone (``pool`` does), so that it is there at once and is
no fork of a process with threads. It becomes two: the worker, in a process group of its own, calls
the function, which may hang where no thread and no handler of Python's runs; the keeper waits for
the word of the process that started it, or for its end, and then kills the worker's whole group.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import os
import pickle
import select
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

# Frames that lie between a call and the code that was called.
_OURS = (os.path.dirname(__file__), os.path.dirname(asyncio.__file__), "<frozen")


class NoValueError(TypeError):
    """A reward returned something that is neither a number nor made of numbers and text."""


def plain(value: Any) -> Any:
    """``value`` as JSON has it: numbers of arrays and tensors become those of Python.

    Raises:
        NoValueError: on what is none of its kinds.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, dict):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if callable(getattr(value, "tolist", None)):
        return plain(value.tolist())
    raise NoValueError(f"returned an object of type {type(value).__name__}")


def told(error: BaseException) -> str:
    """Kind, text and place of an error, in one line; the place in the file that was called."""
    text = " ".join(str(error).split())
    if isinstance(error, NoValueError):
        return text
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if not frame.filename.startswith(_OURS)]
    inner = [frame for frame in theirs if frame.filename == theirs[0].filename]
    place = f" ({inner[-1].filename}, line {inner[-1].lineno})" if inner else ""
    return f"raised {type(error).__name__}{': ' * bool(text)}{text}{place}"


def load(path: str, arguments: dict[str, Any], modules: Sequence[str]) -> Any:
    """The callable at ``module:name``; an instance of it, made with ``arguments``, if a class.

    ``modules`` are imported too: what the arguments of calls are made of, which takes its time.
    """
    for module in modules:
        importlib.import_module(module)
    module, _, name = path.partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found(**arguments) if inspect.isclass(found) else found


def serve(channel: Connection) -> None:
    """Answer calls until the other end closes."""
    answer = json.dumps({"value": None})
    function: Any = None
    own = os.getpid()
    # One loop for all calls: a client that a reward keeps belongs to the loop that it began in.
    runner = asyncio.Runner()
    while True:
        try:
            content = pickle.loads(channel.recv_bytes())
        except EOFError:
            return
        try:
            if function is None:
                function = load(*content)
            else:
                value = function(*content[0], **content[1])
                if inspect.iscoroutine(value):
                    value = runner.run(value)
                answer = json.dumps({"value": plain(value)})
        except BaseException as error:  # a sys.exit() of the function's, too
            answer = json.dumps({"failure": told(error)})
        if os.getpid() != own:
            # A fork that came back from the call; it would answer calls of its parent.
            os._exit(0)
        channel.send_bytes(answer.encode())


def keep(worker: int, life: int) -> int:
    """End the worker and its children when ``life`` says or closes; its exit code."""
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    # It may have ended before the handler was there.
    ended, status = os.waitpid(worker, os.WNOHANG)
    while not ended:
        if life in select.select([life, woken], [], [])[0]:
            _kill_group(worker)
            ended, status = os.waitpid(worker, 0)
        else:
            os.read(woken, 64)
            ended, status = os.waitpid(worker, os.WNOHANG)
    # What it started itself and left behind.
    _kill_group(worker)
    return os.waitstatus_to_exitcode(status)


def _kill_group(leader: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def main() -> None:
    """``worker.py CHANNEL LIFE``: two file descriptors."""
    channel, life = int(sys.argv[1]), int(sys.argv[2])
    for number in (channel, life):
        os.set_inheritable(number, False)
    worker = os.fork()
    if worker:
        os.close(channel)
        # It does so itself, whoever comes first.
        with suppress(OSError):
            os.setpgid(worker, worker)
        code = keep(worker, life)
        # A signal's number travels as a shell's would.
        os._exit(code if code >= 0 else 128 - code)
    os.setpgid(0, 0)
    os.close(life)
    serve(Connection(channel))


if __name__ == "__main__":
    main()
