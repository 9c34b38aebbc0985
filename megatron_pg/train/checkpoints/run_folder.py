"""The folder of a run: one run at a time, and errors that name what could not be written."""

from __future__ import annotations

import errno
import os
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ...checkpoint import InUseError, LockedFile, lock_file
from ...parallel import on_first_rank
from ..config import TrainConfig

LOCK = "run.lock"
_CANNOT = "cannot be written"
# What torch's archive says of a file that takes no more.
_TORCH_CANNOT = ("inline_container", "PytorchStreamWriter", "iostream error")


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Let errors of the block name the file or folder that could not be written.

    Raises:
        OSError: with the file's name, also for what torch reports in its own way.
    """
    try:
        yield
    except OSError as error:
        if (error.strerror or "").startswith(_CANNOT):
            raise
        raise _cannot_write(error, error.filename or path) from error
    except ValueError as error:
        # A library of ours has said it for people who call it alone.
        if not isinstance(error.__cause__, OSError):
            raise
        raise OSError(error.__cause__.errno or errno.EIO, str(error), str(path)) from error
    except RuntimeError as error:
        if not any(words in str(error) for words in _TORCH_CANNOT):
            raise
        # torch closes its archive before it passes on why that could not be written.
        cause = error.__context__
        if not isinstance(cause, OSError):
            cause = OSError(errno.EIO, str(error).splitlines()[0])
        raise _cannot_write(cause, path) from error


def write_atomically(path: Path, text: str) -> None:
    """Write a file that is complete or unchanged, whenever the process ends."""
    partial = path.with_name(f".{path.name}.partial")
    with writing(path):
        with partial.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)


def _cannot_write(error: OSError, path: str | Path) -> OSError:
    return OSError(error.errno or errno.EIO, f"{_CANNOT} ({_reason(error)})", str(path))


class FolderLock:
    """Keeps every other run out of a folder until it is released or this process ends.

    The kernel holds the lock and gives it back however the process ends: what a killed run leaves
    behind keeps nobody out. How far it reaches says ``lock_file``.

    Args:
        folder: made if it is not there.
        setting: that names the folder, for messages.

    Attributes:
        warning: what a person should know about the file system, or None.

    Raises:
        ValueError: if another run holds the folder, or it cannot be written.
    """

    def __init__(self, folder: Path, setting: str) -> None:
        self.warning: str | None = None
        self._folder = folder.absolute()
        self._label = f"{setting}={folder}"
        self._made: list[Path] = []
        self._locked: LockedFile | None = None
        try:
            self._made = [p for p in (self._folder, *self._folder.parents) if not p.exists()]
            while self._locked is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._locked = lock_file(self._folder / LOCK)
        except InUseError as error:
            raise ValueError(
                f"{self._label} is in use by another run ({error}); wait for it, stop it, or "
                "choose another folder"
            ) from error
        except OSError as error:
            self.release()
            raise ValueError(
                f"{self._label} cannot be written ({_reason(error)}): a run keeps its files there; "
                f"mend that, or choose another {setting}"
            ) from error
        if self._locked.no_locks is not None:
            self.warning = (
                f"{self._label} lies on a file system without locks "
                f"({_reason(self._locked.no_locks)}): nothing keeps a second run out of it"
            )
        own = weakref.ref(self)
        # A fork would hold the lock as long as it lives.
        os.register_at_fork(after_in_child=lambda: _close(own()))

    def release(self) -> None:
        """Let others in. What was made for the lock and holds nothing else goes."""
        if self._locked is not None:
            with suppress(OSError):
                (self._folder / LOCK).unlink()
        self.close()
        for folder in self._made:
            with suppress(OSError):
                folder.rmdir()

    def close(self) -> None:
        """Give up this process's part in the lock."""
        if self._locked is not None:
            self._locked.file.close()
            self._locked = None


@contextmanager
def hold_folders(config: TrainConfig) -> Iterator[list[str]]:
    """Hold what a run writes for the ``with`` block; every rank takes part, the first one holds.

    Returns:
        Warnings, on the first rank.

    Raises:
        ValueError: on every rank, if another run holds a folder or one cannot be written.
    """
    server = config.rollout.server
    warnings: list[str] = []
    with ExitStack() as held:

        def hold(folder: str, setting: str) -> None:
            lock = FolderLock(Path(folder), setting)
            held.callback(lock.release)
            warnings.extend(filter(None, [lock.warning]))

        def hold_all() -> None:
            hold(config.run.out, "run.out")
            _require_writable(Path(config.run.out) / "checkpoints")
            export_dir = server.export_dir if config.rollout.source == "server" else None
            # The run holds its own folder already.
            if export_dir is not None and not _is_same(export_dir, config.run.out):
                hold(export_dir, "rollout.server.export_dir")

        on_first_rank(hold_all)
        yield warnings


def _is_same(a: str, b: str) -> bool:
    return os.path.realpath(a) == os.path.realpath(b)


def _require_writable(folder: Path) -> None:
    """Refuse a folder that is there and takes no file, before work is lost."""
    if not folder.exists():
        return
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError as error:
        raise ValueError(
            f"{folder} cannot be written ({_reason(error)}); mend that, or choose another run.out"
        ) from error


def _reason(error: OSError) -> str:
    if isinstance(error, FileExistsError):
        return "it is a file"
    return error.strerror or str(error)


def _close(lock: FolderLock | None) -> None:
    if lock is not None:
        lock.close()
