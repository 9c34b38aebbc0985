"""Commands that start as if everything were imported already: what a README shows, run in seconds.

``python`` and ``torchrun`` in a folder hand their arguments, folder, variables and standard streams
to one process, which has imported what commands need, and forks one that runs them.

``python -m tests.warm_python FOLDER`` answers those of the folder, until its input ends.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.ranks import PYTHONPATH, ROOT

_CLIENT = """#!{python} -IS
import json, os, socket, sys
names = {{"torchrun": ["-m", "torch.distributed.run"]}}
arguments = names.get(os.path.basename(sys.argv[0]), []) + sys.argv[1:]
message = json.dumps([arguments, os.getcwd(), dict(os.environ)]).encode()
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    socket.send_fds(server, [len(message).to_bytes(4, "big")], [0, 1, 2])
    server.sendall(message)
    code = int.from_bytes(server.recv(4) or b"\\1", "big", signed=True)
sys.exit(code if code >= 0 else 128 - code)
"""


@contextmanager
def commands_of(folder: Path) -> Iterator[Path]:
    """The folder, with ``python`` and ``torchrun`` in it that run within the block."""
    for name in ("python", "torchrun"):
        path = folder / name
        path.write_text(_CLIENT.format(python=sys.executable, address=str(folder / "socket")))
        path.chmod(0o755)
    own = {"PYTHONPATH": PYTHONPATH, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.warm_python", str(folder)]
    server = subprocess.Popen(command, cwd=ROOT, env=os.environ | own, stdin=subprocess.PIPE)
    try:
        while not (folder / "socket").exists():
            assert server.poll() is None, "the process that runs commands has ended"
            time.sleep(0.2)
        yield folder
    finally:
        server.kill()
        server.wait()


def serve(folder: Path) -> None:
    """Answer the commands of a folder."""
    import torch.distributed.run  # noqa: F401
    from transformers import pipeline  # noqa: F401

    from tests.train import late_imports  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "opening"))
        listener.listen(64)
        gc.freeze()
        (folder / "opening").rename(folder / "socket")
        # Nobody writes there: it is closed when whoever started this is gone.
        while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
            connection, _ = listener.accept()
            if not os.fork():
                listener.close()
                _keep(connection, folder / "python")
            connection.close()


def _keep(connection: socket.socket, python: Path) -> None:
    """Run one command, and end it where whoever asked is gone."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, streams, *_ = socket.recv_fds(connection, 4, 3)
    content = b""
    while len(content) < int.from_bytes(size, "big"):
        content += connection.recv(1 << 20)
    pid = os.fork()
    if not pid:
        connection.close()
        _run(*json.loads(content), streams, python)
    handle = os.pidfd_open(pid)
    if handle not in select.select([handle, connection], [], [])[0]:
        os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with suppress(OSError):
        connection.sendall(code.to_bytes(4, "big", signed=True))
    os._exit(0)


def _run(
    arguments: list[str], folder: str, variables: dict[str, str], streams: list[int], python: Path
) -> None:
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    code = 0
    try:
        _start(arguments, python)
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    # As Python ends: executors are told to, and other threads waited for.
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


def _start(arguments: list[str], python: Path) -> Any:
    """As ``python ARGUMENTS``."""
    while arguments[0] == "-u":
        arguments = arguments[1:]
    first, *others = arguments
    if first == "-c":
        sys.argv, sys.path[0] = ["-c", *others[1:]], ""
        return exec(compile(others[0], "<string>", "exec"), {"__name__": "__main__"})
    if first == "-m":
        sys.argv, sys.path[0] = others, os.getcwd()
        if others[0] == "torch.distributed.run":
            # Its ranks are started warm, too.
            sys.executable = str(python)
        return runpy.run_module(others[0], run_name="__main__", alter_sys=True)
    sys.argv, sys.path[0] = [first, *others], str(Path(first).resolve().parent)
    return runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
