"""A folder is written by one process at a time, whatever ends it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

pytest.importorskip("megatron.core")

from megatron_pg.checkpoint import new_folder  # noqa: E402
from megatron_pg.checkpoint.new_folder import NewFolder, atomic_folder  # noqa: E402


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def test_a_second_process_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    """Two conversions at once, as every task of a job makes one, would mix their files."""
    out = tmp_path / "out"
    with atomic_folder(out) as partial:
        (partial / "a").touch()
        told = f"out: another process writes it .process {os.getpid()} on host"
        with pytest.raises(ValueError, match=told), atomic_folder(out):
            pytest.fail("the folder is taken")
        (partial / "b").touch()
    assert names(tmp_path) == ["a", "b", "out"]


def test_what_was_finished_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, take = tmp_path / "out", new_folder.lock_file
    first = NewFolder(out)
    (first.partial / "a").touch()

    def late(path: Path) -> new_folder.LockedFile | None:
        # The folder was not there when it was looked for.
        first.publish()
        first.close()
        monkeypatch.setattr(new_folder, "lock_file", take)
        return take(path)

    monkeypatch.setattr(new_folder, "lock_file", late)
    with pytest.raises(ValueError, match="exists and is not empty"), atomic_folder(out):
        pytest.fail("the folder is complete")
    assert names(tmp_path) == ["a", "out"]


def test_a_killed_process_keeps_nobody_out(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    read, write = os.pipe()
    holder = os.fork()
    if holder == 0:
        with atomic_folder(out) as partial:
            (partial / "a").touch()
            os.write(write, b".")
            time.sleep(60)
        os._exit(1)
    os.read(read, 1)
    with pytest.raises(ValueError, match=f"process {holder} on host"):
        NewFolder(out)
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    with atomic_folder(out) as partial:
        assert names(partial) == []
        (partial / "b").touch()
    assert names(tmp_path / "deep") == ["b", "out"]
