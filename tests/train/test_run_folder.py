"""One run in a folder, and errors that name what could not be written."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")

from megatron_pg.train.checkpoints import write_atomically  # noqa: E402
from megatron_pg.train.checkpoints.run_folder import LOCK, FolderLock, hold_folders, writing  # noqa: E402
from megatron_pg.train.config import (  # noqa: E402
    RolloutConfig,
    RunConfig,
    ServerConfig,
    TrainConfig,
)


def in_fork(action: Callable[[], Any]) -> int:
    """Exit code of a fork that calls ``action``: 1 when that raises."""
    child = os.fork()
    if child == 0:
        # Threads of a kernel do not survive a fork, and would be waited for.
        torch.set_num_threads(1)
        try:
            action()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank without a process group."""
    monkeypatch.setattr(
        "megatron_pg.train.checkpoints.run_folder.on_first_rank", lambda action: action()
    )


def test_a_second_run_is_told_who_is_there(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path, "run.out")
    day = time.strftime("%Y-%m-%d")
    for folder in (tmp_path, tmp_path / "sub" / ".."):
        (tmp_path / "sub").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match="in use by another run") as refusal:
            FolderLock(folder, "run.out")
        holder = f"process {os.getpid()} on host {socket.gethostname()} since {day}"
        assert holder in str(refusal.value) and f"run.out={folder}" in str(refusal.value)
    link = tmp_path.parent / f"{tmp_path.name}_link"
    link.symlink_to(tmp_path)
    with pytest.raises(ValueError, match="in use by another run"):
        FolderLock(link, "run.out")
    lock.release()
    FolderLock(link, "run.out").release()
    assert not (tmp_path / LOCK).exists()


def test_a_killed_run_keeps_nobody_out_and_neither_do_its_forks(tmp_path: Path) -> None:
    read, write = os.pipe()
    holder = os.fork()
    if holder == 0:
        lock = FolderLock(tmp_path, "run.out")
        # A reward function, say, that forks: the fork lives on.
        os.write(write, f"{os.fork() or os.getpid()}\n".encode())
        time.sleep(60)
        lock.release()
        os._exit(0)
    told = b""
    while told.count(b"\n") < 2:
        told += os.read(read, 100)
    (fork,) = {int(pid) for pid in told.split()}
    try:
        with pytest.raises(ValueError, match=f"process {holder} on host"):
            FolderLock(tmp_path, "run.out")
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        os.kill(fork, 0)
        assert (tmp_path / LOCK).is_file()
        lock = FolderLock(tmp_path, "run.out")
        assert f"process {os.getpid()} " in (tmp_path / LOCK).read_text()
        lock.release()
    finally:
        os.kill(fork, signal.SIGKILL)


def test_a_lock_that_goes_while_it_is_taken_counts_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take, taken = fcntl.flock, []

    def slow(file: Any, operation: int) -> None:
        if not taken:
            # The run that held the folder releases it, and removes its file, in between.
            (tmp_path / LOCK).unlink()
        taken.append(file)
        take(file, operation)

    monkeypatch.setattr(fcntl, "flock", slow)
    lock = FolderLock(tmp_path, "run.out")
    assert len(taken) == 2
    with pytest.raises(ValueError, match="in use"):
        FolderLock(tmp_path, "run.out")
    lock.release()


def test_a_refused_run_leaves_nothing(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path / "runs" / "new", "run.out")
    assert (tmp_path / "runs" / "new" / LOCK).is_file()
    lock.release()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["file", "parent is a file", "nowhere", "locked file is a link"])
def test_a_folder_that_is_none_is_refused(kind: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    folder, reason = {
        "file": (tmp_path / "file", "it is a file"),
        "parent is a file": (tmp_path / "file" / "out", "Not a directory"),
        "nowhere": (Path("/proc/nowhere"), "No such file"),
        "locked file is a link": (tmp_path / "out", "symbolic link"),
    }[kind]
    if kind == "locked file is a link":
        folder.mkdir()
        (folder / LOCK).symlink_to(tmp_path / "file")
    with pytest.raises(ValueError, match=reason) as refusal:
        FolderLock(folder, "run.out")
    assert f"run.out={folder} cannot be written" in str(refusal.value)
    assert "choose another run.out" in str(refusal.value)
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_folder_that_takes_no_file_is_refused(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(ValueError, match=os.strerror(number)):
        FolderLock(tmp_path / "out", "run.out")
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_noticed_although_it_takes_empty_files(tmp_path: Path) -> None:
    def hold() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        try:
            FolderLock(tmp_path / "out", "run.out")
        except ValueError as error:
            assert "File too large" in str(error)
            assert not list(tmp_path.iterdir())
        else:
            raise AssertionError("an empty lock was taken")

    assert in_fork(hold) == 0


@pytest.mark.usefixtures("alone")
def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", fail)
    with hold_folders(TrainConfig(run=RunConfig(out=str(tmp_path)))) as (warning,):
        assert "file system without locks" in warning and str(tmp_path) in warning


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("shared", ["run.out", "rollout.server.export_dir"])
def test_every_folder_of_a_run_is_held(shared: str, tmp_path: Path) -> None:
    def config(number: int) -> TrainConfig:
        out, export = (
            str(tmp_path / (name if name == shared else f"{name}_{number}"))
            for name in ("run.out", "rollout.server.export_dir")
        )
        rollout = RolloutConfig(source="server", server=ServerConfig(export_dir=export))
        return TrainConfig(rollout=rollout, run=RunConfig(out=out))

    with hold_folders(config(1)):
        with (
            pytest.raises(ValueError, match=rf"{shared}=\S+ is in use by another run"),
            hold_folders(config(2)),
        ):
            pass
        # Nothing of the refused run stays held, or is left.
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
            {f"{name}{'' if name == shared else '_1'}" for name in ("run.out", shared)}
            | {f"{n}_1" for n in ("run.out", "rollout.server.export_dir") if n != shared}
        )
    with hold_folders(config(2)):
        pass


@pytest.mark.usefixtures("alone")
def test_checkpoints_that_cannot_be_written_are_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with (
        pytest.raises(ValueError, match="checkpoints cannot be written"),
        hold_folders(TrainConfig(run=RunConfig(out=str(tmp_path)))),
    ):
        pass
    FolderLock(tmp_path, "run.out").release()


def test_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="cannot be written") as error, writing(tmp_path / "a"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert error.value.filename == str(tmp_path / "a") and error.value.errno == errno.ENOSPC
    assert error.value.strerror == "cannot be written (No space left on device)"
    # The innermost name is the most exact one.
    with pytest.raises(OSError) as error, writing("outer"), writing("inner"):
        Path("/dev/full").write_text("x")
    assert error.value.filename == "inner" and error.value.strerror.count("cannot") == 1
    with pytest.raises(OSError) as error, writing("outer"):
        Path("/nowhere/file").write_text("")
    assert error.value.filename == "/nowhere/file"
    with pytest.raises(RuntimeError, match="a bug"), writing("outer"):
        raise RuntimeError("a bug")


@pytest.mark.parametrize("size", [1, 100_000])
@pytest.mark.parametrize("target", ["path", "stream"])
def test_errors_of_torch_name_the_file(target: str, size: int, tmp_path: Path) -> None:
    def save() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        path = tmp_path / "file"
        try:
            with writing("named"), path.open("wb", buffering=0) as stream:
                torch.save(torch.zeros(size), path if target == "path" else stream)
        except OSError as error:
            assert error.filename == "named" and "cannot be written" in str(error)
            assert target == "path" or error.errno == errno.EFBIG, error
            os._exit(3)

    assert in_fork(save) == 3


def test_a_file_is_complete_or_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_atomically(path, "old")

    def overwrite() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2, 2))
        try:
            write_atomically(path, "new, and longer")
        except OSError as error:
            assert error.filename == str(path) and "File too large" in str(error)
            os._exit(3)

    assert in_fork(overwrite) == 3
    assert path.read_text() == "old"


@pytest.mark.usefixtures("alone")
def test_weights_may_be_exported_into_the_run_folder(tmp_path: Path) -> None:
    """One run holds it once, however the two settings spell it."""
    out = tmp_path / "out"
    (tmp_path / "link").symlink_to(out)
    rollout = RolloutConfig(source="server", server=ServerConfig(export_dir=str(tmp_path / "link")))
    config = TrainConfig(rollout=rollout, run=RunConfig(out=str(out)))
    with hold_folders(config):
        assert (out / LOCK).is_file()
    assert not out.exists()


def test_name_that_no_file_system_takes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run\.out=.* cannot be written \(File name too long"):
        FolderLock(tmp_path / ("a" * 300), "run.out")
