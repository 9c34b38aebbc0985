"""Runs that are disturbed at a counted event, or at a file.

The right end is that of a run that nobody disturbed.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_pg.checkpoint import TRACKER
from megatron_pg.train import TrainConfig, __main__, lifetime, load_config
from tests.ranks import Job, Pool
from tests.train.runs import assert_same, result

# Exit code of the rank that is hit; a full disk may be noticed by any rank, or by none.
KINDS: dict[str, int | None] = {
    "SIGKILL": -9,
    "SIGTERM": 143,
    "SIGINT": 130,
    "one failing write": 2,
    "full disk": 2,
    "read-only file system": 2,
    "files cut short": 2,
    "sys.exit": 7,
    "bug": 1,
    "second run": 0,
}
_WRITES = ("open", "replace", "mkdir")
_COLLECTIVES = ("barrier", "all_reduce", "all_gather_object", "broadcast_object_list")


@dataclass
class Disturbance:
    """What happens at the ``at``-th event of a rank; events of the run folder and collectives.

    Events of files count whose path holds ``file``.
    """

    kind: str
    at: int
    out: Path
    file: str = ""
    count: int = 0
    is_over: bool = False

    def install(self) -> None:
        """Count from now on, in this process."""
        self._wrap(builtins, "open", lambda path, mode="r", *_: self._writes(path, mode))
        io.open = builtins.open
        self._wrap(os, "replace", lambda path, *_: self._is_inside(path))
        self._wrap(os, "mkdir", lambda path, *_: self._is_inside(path))
        for name in _COLLECTIVES:
            self._wrap(dist, name, lambda *_: True)

    def _wrap(self, module: Any, name: str, counts: Callable[..., bool]) -> None:
        original = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            # The run begins when its folder is there.
            if self.out.is_dir() and counts(*args, **{k: kwargs[k] for k in kwargs if k == "mode"}):
                self._event(is_write=name in _WRITES)
            return original(*args, **kwargs)

        setattr(module, name, call)

    def _is_inside(self, path: Any) -> bool:
        path = os.fspath(path) if isinstance(path, str | os.PathLike) else ""
        inside = path.partition(f"{self.out}/")[2]
        return bool(inside) and self.file in inside

    def _writes(self, path: Any, mode: str) -> bool:
        return self._is_inside(path) and any(letter in mode for letter in "wax+")

    def _event(self, is_write: bool) -> None:
        self.count += 1
        if self.count < self.at or (self.is_over and self.kind != "full disk"):
            return
        number = {"full disk": errno.ENOSPC, "read-only file system": errno.EROFS}.get(self.kind)
        if number is not None or self.kind == "one failing write":
            if is_write:
                self.is_over = self.kind == "one failing write"
                raise OSError(number or errno.EIO, os.strerror(number or errno.EIO))
            return
        self.is_over = True
        if self.kind.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, self.kind))
            time.sleep(60)
        elif self.kind == "files cut short":
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
        elif self.kind == "sys.exit":
            sys.exit(7)
        elif self.kind == "bug":
            raise RuntimeError("a bug")
        elif self.kind == "second run":
            (self.out.parent / "paused").touch()
            while (self.out.parent / "paused").exists():
                time.sleep(0.01)


def program(
    config: Path,
    overrides: list[str],
    disturbance: Disturbance | None = None,
    victim: int | None = 0,
) -> int:
    """``python -m megatron_pg.train`` on this rank, disturbed if it is a victim; its events.

    Without a victim every rank is one.
    """
    sys.argv = ["megatron_pg.train", str(config), *overrides]
    # Ignored where a shell has put the tests into the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # There is no launcher that would end the other ranks meanwhile.
    lifetime._FIRST_RANK_SECONDS = lifetime._LOST_RANK_SECONDS = 0.2
    if disturbance is not None and victim in (None, int(os.environ["RANK"])):
        disturbance.install()
    __main__.main()
    return disturbance.count if disturbance is not None else 0


def kind_of(seed: int) -> str:
    return list(KINDS)[seed % len(KINDS)]


def check_disturbed(
    ranks: Pool, folder: Path, seed: int, events_of: Callable[[int], list[int]]
) -> None:
    """A run that is disturbed somewhere ends, and goes on, as it should."""
    kind, chance = kind_of(seed), random.Random(seed)
    num_ranks = chance.choice((1, 2))
    events = events_of(num_ranks)
    out, log = folder / f"out_{seed}", folder / f"{seed}.log"
    overrides = [f"run.out={out}", f"run.async_save={str(chance.random() < 0.5).lower()}"]
    victim = chance.randrange(num_ranks)
    at = chance.randrange(1, events[victim])
    config = folder / "config.yaml"

    job = ranks.start(
        num_ranks, program, config, overrides, Disturbance(kind, at, out), victim, log=log
    )
    if kind == "second run":
        refuse_second_run(ranks, folder, job, config, overrides)
    codes = job.wait(60)
    told = log.read_text()
    want = KINDS[kind]
    if want == 2 and set(codes.values()) == {0}:
        assert "error" not in told
    else:
        assert codes[victim] == want, (codes, told)
    assert told.count("Traceback") == (kind == "bug"), told
    if kind in ("SIGTERM", "SIGINT", "full disk", "read-only file system") and any(codes.values()):
        # One rank tells all; one that lost another says at most that.
        assert told.count("begins again at") + told.count("goes on after") <= num_ranks, told
    again = log.with_suffix(".again.log")
    ranks.run(num_ranks, program, config, overrides, log=again, timeout=60)
    straight = result(run_config(folder, folder / f"straight_{num_ranks}"))
    assert_same(result(run_config(folder, out)), straight)
    left = [p.name for p in out.rglob("*") if "partial" in p.name or p.name == "run.lock"]
    assert not left, left
    shutil.rmtree(out)


def check_full_disk(ranks: Pool, folder: Path, file: str) -> None:
    """A run for one of whose files there is no space ends with one message that names it."""
    name, _, save = file.partition(" ")
    out, log = folder / f"full_{file}", folder / f"full_{file}.log"
    overrides = [f"run.out={out}", f"run.async_save={str(save == 'in the background').lower()}"]
    full = Disturbance("full disk", 1, out, file=name)
    codes = ranks.start(1, program, folder / "config.yaml", overrides, full, log=log).wait(60)
    told = log.read_text()
    assert codes == {0: 2} and "Traceback" not in told and told.count("error: ") == 1, told
    (line,) = [line for line in told.splitlines() if line.startswith("error: ")]
    assert name in line and "No space left on device" in line, line
    if "4/4" in told:
        advice = "the same command goes on after step 4"
    elif list((out / "checkpoints").glob("iter_*")):
        # Published, but the tracker that would name it could not be written.
        assert name == TRACKER
        advice = "holds a checkpoint: the same command goes on after it"
    else:
        advice = "begins again at step 1"
    assert line.count(advice) == 1, line
    shutil.rmtree(out, ignore_errors=True)


def refuse_second_run(
    ranks: Pool, folder: Path, first: Job, config: Path, overrides: list[str]
) -> None:
    """While the first one waits; the second may have another number of ranks."""
    deadline = time.monotonic() + 60
    while not (folder / "paused").exists():
        assert not first.poll() and time.monotonic() < deadline, first.log.read_text()
        time.sleep(0.01)
    log = folder / "second.log"
    codes = ranks.start(3 - len(first.pids), program, config, overrides, log=log).wait(60)
    told = log.read_text()
    assert set(codes.values()) == {2} and "Traceback" not in told, (codes, told)
    holder = f"in use by another run (process {first.pids[0]} on host {os.uname().nodename} since "
    assert holder in told, told
    log.unlink()
    (folder / "paused").unlink()


def run_config(folder: Path, out: Path) -> TrainConfig:
    return load_config(folder / "config.yaml", [f"run.out={out}"])


def count_events(ranks: Pool, folder: Path, num_ranks: int) -> list[int]:
    """Of every rank of a run that nobody disturbs, whose end is the right one."""
    out = folder / f"straight_{num_ranks}"
    told = [f"run.out={out}"]
    config, nothing = folder / "config.yaml", Disturbance("", 0, out)
    return ranks.run(num_ranks, program, config, told, nothing, None, timeout=300)
