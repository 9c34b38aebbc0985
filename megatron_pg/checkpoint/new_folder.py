"""Folders that appear complete or not at all, each written by one process at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

# Answers of file systems that have no locks.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@dataclass(frozen=True)
class LockedFile:
    """A file that one process has, until it closes it or ends, however it ends.

    Attributes:
        file: open, and says who has it.
        no_locks: why nothing keeps others out, on a file system without locks.
    """

    file: BinaryIO
    no_locks: OSError | None = None


class InUseError(OSError):
    """Another process has the file; the text says which, as far as it is known."""


def lock_file(path: Path) -> LockedFile | None:
    """Take a file, made where it is not there; None if whoever had it removed it meanwhile.

    Between hosts it holds where the network file system passes ``flock`` on (NFS unless mounted
    with ``nolock`` or ``local_lock``, Lustre with ``-o flock``), else on one host.

    Raises:
        InUseError: another process has it.
        OSError: it cannot be opened or written.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    file = os.fdopen(os.open(path, flags, 0o666), "r+b", buffering=0)
    no_locks = None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = file.read(300).decode(errors="replace").strip()
        file.close()
        raise InUseError(holder or "which has just begun") from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        no_locks = error
    if no_locks is None and not _is_at(file, path):
        file.close()
        return None
    since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on host {socket.gethostname()} since {since}\n".encode())
    except OSError:
        with suppress(OSError):
            path.unlink()
        file.close()
        raise
    return LockedFile(file, no_locks)


def check_absent(path: Path) -> None:
    """Refuse an output folder that holds something, or that cannot be made.

    Raises:
        ValueError: naming the folder and the remedy.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path}: exists and is not empty; remove it or pass another out_dir=DIR")
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"{parent}: no permission to write; pass another out_dir=DIR")


def partial_path(path: Path) -> Path:
    """Where a folder is written before it is complete: beside it, under a hidden name."""
    path = path.absolute()
    return path.parent / f".{path.name}.partial"


class NewFolder:
    """The empty partial folder of ``path``, of this process alone; what another one left goes.

    Raises:
        ValueError: if ``path`` holds something, or another process is writing it.
        OSError: if it cannot be made.
    """

    def __init__(self, path: Path) -> None:
        check_absent(path)
        self._path, self.partial = path.absolute(), partial_path(path)
        self._lock = self.partial.with_suffix(".lock")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        locked = None
        try:
            while locked is None:
                locked = lock_file(self._lock)
        except InUseError as error:
            raise ValueError(
                f"{path}: another process writes it ({error}); wait for it, or pass another "
                "out_dir=DIR"
            ) from error
        self._locked = locked
        try:
            # Whoever had it may have finished meanwhile.
            check_absent(path)
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir()
        except BaseException:
            self.close()
            raise

    def publish(self) -> None:
        """Rename it to ``path``, in one step; files get ordinary permissions."""
        umask = os.umask(0)
        os.umask(umask)
        for file in self.partial.rglob("*"):
            if file.is_file():
                # safetensors makes files that only their owner may read.
                file.chmod(0o666 & ~umask)
        if self._path.is_dir():
            self._path.rmdir()
        os.replace(self.partial, self._path)

    def close(self) -> None:
        """Let others write it; what was not published goes."""
        shutil.rmtree(self.partial, ignore_errors=True)
        with suppress(OSError):
            self._lock.unlink()
        self._locked.file.close()


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A folder that appears at ``path`` when the block ends well, and not at all otherwise.

    Raises:
        ValueError: if ``path`` holds something, cannot be written, is being written by another
            process, or the disk is full.
    """
    path = Path(path)
    folder = None
    try:
        folder = NewFolder(path)
        yield folder.partial
        folder.publish()
    except OSError as error:
        raise ValueError(f"{path}: writing failed ({error}); nothing was kept") from error
    finally:
        if folder is not None:
            folder.close()


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
