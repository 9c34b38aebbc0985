"""Runs whose checkpoints take as long as a step, and that die while one is being written."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections import defaultdict
from pathlib import Path
from typing import Any
from unittest import mock

from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from megatron_pg.train import TrainConfig
from megatron_pg.train.trainer import Trainer
from tests.train.runs import train


def train_and_die(config: TrainConfig, last: int) -> None:
    """A run that dies while the checkpoint of step ``last`` is written.

    Written in the background, files of every checkpoint wait until the step that follows it is
    done; that of ``last`` is not reached any more, and what is there then is told in ``told.json``.
    """
    write, train_step = FileSystemWriterAsync.write_preloaded_data, Trainer.train_step
    is_async, done = config.run.async_save, defaultdict(threading.Event)

    def write_late(transforms: Any, number: int, bucket: Any, *rest: Any) -> Any:
        match = re.search(r"\.partial-(\d+)-", str(bucket[0]))
        assert match is not None
        step = int(match[1])
        if is_async:
            assert done[step + 1].wait(100)
        elif step == last:
            die()
        return write(transforms, number, bucket, *rest)

    def step_on(trainer: Trainer) -> dict[str, float]:
        metrics = train_step(trainer)
        if is_async and trainer.step == last + 1:
            is_done = trainer.checkpoints._write.is_done()
            if trainer.ranks.rank == 0:
                names = sorted(p.name for p in trainer.checkpoints.folder.iterdir())
                told = {"is_done": is_done, "names": names, "step": trainer.step}
                (trainer.folder / "told.json").write_text(json.dumps(told))
            die()
        done[trainer.step].set()
        return metrics

    with (
        mock.patch.object(FileSystemWriterAsync, "write_preloaded_data", staticmethod(write_late)),
        mock.patch.object(Trainer, "train_step", step_on),
    ):
        train(config)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def told(config: TrainConfig) -> dict[str, Any]:
    return json.loads((Path(config.run.out) / "told.json").read_text())
