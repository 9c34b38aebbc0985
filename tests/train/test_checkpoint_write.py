"""Checkpoints that the rank writes itself: what they hold, and what a failed one leaves."""

from __future__ import annotations

import builtins
import errno
import os
import threading
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("megatron.core")

from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core.dist_checkpointing import ShardedTensor  # noqa: E402
from megatron.core.dist_checkpointing.strategies.filesystem_async import (  # noqa: E402
    FileSystemWriterAsync,
)

from megatron_pg.checkpoint import TorchDistReader, file_checksum  # noqa: E402
from megatron_pg.train import parallel_run  # noqa: E402
from megatron_pg.train.checkpoints.write import CheckpointWrite, SaveStrategy  # noqa: E402
from megatron_pg.train.config import ParallelConfig  # noqa: E402

NAMES = [f"weight{i}" for i in range(5)]


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    with parallel_run(ParallelConfig(), 0):
        yield


@pytest.fixture(autouse=True)
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(process: BaseProcess) -> None:
        raise AssertionError(f"{process} would outlive the rank")

    monkeypatch.setattr(BaseProcess, "start", refuse)


def make_tensors() -> dict[str, torch.Tensor]:
    # One is a view of a larger storage.
    tensors = {name: torch.randn(8, 6) for name in NAMES}
    return tensors | {NAMES[0]: torch.randn(8, 12)[:, :6]}


def state_of(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    sharded = {name: ShardedTensor.from_rank_offsets(name, t) for name, t in tensors.items()}
    return sharded | {"iteration": 3, "schedule": {"lr": 1.5}}


def load(folder: Path) -> dict[str, Any]:
    return dist_checkpointing.load(
        {name: ShardedTensor.from_rank_offsets(name, torch.zeros(8, 6)) for name in NAMES},
        str(folder),
    )


@pytest.mark.parametrize("in_background", [False, True])
def test_what_changes_meanwhile_is_not_in_the_checkpoint(
    in_background: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write = threading.Event()
    original = FileSystemWriterAsync.write_preloaded_data

    def gated(*arguments: Any) -> Any:
        assert may_write.wait(60)
        return original(*arguments)

    monkeypatch.setattr(FileSystemWriterAsync, "write_preloaded_data", staticmethod(gated))
    tensors, published = make_tensors(), []
    saved = {name: tensor.clone() for name, tensor in tensors.items()}
    write = CheckpointWrite(
        state_of(tensors),
        tmp_path,
        SaveStrategy(),
        in_background=in_background,
        publish=lambda own: published.append((own, (tmp_path / "metadata.json").is_file())),
    )
    assert not write.is_done() and not published
    if in_background:
        for tensor in tensors.values():
            tensor.add_(1)
    may_write.set()
    write.finish()
    ((checksums, is_described),) = published
    files = sorted(path.name for path in tmp_path.glob("*.distcp"))
    assert write.is_done() and is_described and sorted(checksums) == files
    assert all(file_checksum(tmp_path / name) == checksums[name] for name in files)
    loaded = load(tmp_path)
    assert all(torch.equal(loaded[name], saved[name]) for name in NAMES)
    assert loaded["iteration"] == 3 and loaded["schedule"] == {"lr": 1.5}


def noted(function: Any, calls: list[str]) -> Any:
    def call(*arguments: Any, **settings: Any) -> Any:
        calls.append(function.__name__)
        return function(*arguments, **settings)

    return call


def test_the_files_are_those_that_megatron_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchanges = []
    for name in ("all_gather_object", "gather_object", "scatter_object_list"):
        monkeypatch.setattr(dist, name, noted(getattr(dist, name), exchanges))
    tensors = make_tensors()
    ours, theirs = tmp_path / "ours__", tmp_path / "theirs"
    for folder in (ours, theirs):
        folder.mkdir()
    strategy = SaveStrategy()
    # The later ones as the first was settled.
    for again in range(4):
        folder = ours if again == 3 else tmp_path / str(again)
        folder.mkdir(exist_ok=True)
        state = state_of(tensors)
        exchanges.clear()
        write = CheckpointWrite(
            state, folder, strategy, in_background=False, publish=lambda own: None
        )
        assert bool(exchanges) == (again < 2)
        write.finish()
        reader = TorchDistReader(folder)
        assert all(torch.equal(reader.read(name), tensors[name]) for name in NAMES)
    monkeypatch.undo()
    dist_checkpointing.save(state_of(tensors), str(theirs))
    names = sorted(path.name for path in theirs.iterdir())
    assert sorted(path.name for path in ours.iterdir()) == names and len(names) >= 3
    for name in names:
        written = (theirs / name).read_bytes().replace(b"theirs", b"ours__")
        # What describes the whole also says when it was written.
        assert (ours / name).read_bytes() == written or name == ".metadata"


@pytest.mark.parametrize("file", [".distcp", ".metadata", "metadata.json"])
def test_a_failed_write_names_its_file_and_gives_the_space_back(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, folder = builtins.open, tmp_path / ".partial-3"
    folder.mkdir()

    def full(path: Any, *arguments: Any, **settings: Any) -> Any:
        if str(path).startswith(str(folder)) and file in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(path, *arguments, **settings)

    monkeypatch.setattr(builtins, "open", full)
    monkeypatch.setattr("io.open", full)
    write = CheckpointWrite(
        state_of(make_tensors()),
        folder,
        SaveStrategy(),
        in_background=True,
        publish=lambda own: pytest.fail("published"),
    )
    with pytest.raises(OSError, match="No space left") as error:
        write.finish()
    assert str(error.value.filename).startswith(str(folder))
    assert file != ".distcp" or file in error.value.filename
    assert not folder.exists()
