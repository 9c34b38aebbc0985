"""A checkpoint of tensors on the fake device."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor

from megatron_pg.train.checkpoints.write import CheckpointWrite, SaveStrategy
from tests.fake_h100.record import Record
from tests.fake_h100.steps import Case, built

NUM_TENSORS = 5


def save(folder: Path) -> list[tuple[Record, Record, list[str]]]:
    """Of two checkpoints: what begins one, what ends it, and its files."""
    found = []
    with built(Case()) as model:
        strategy = SaveStrategy()
        for number in range(2):
            tensors = {f"weight{i}": torch.zeros(64, 32, device="cuda") for i in range(NUM_TENSORS)}
            state: dict[str, Any] = {
                name: ShardedTensor.from_rank_offsets(name, x) for name, x in tensors.items()
            }
            own, writes = folder / str(number), []
            own.mkdir()

            def begin(
                state: dict[str, Any] = state, own: Path = own, writes: list[Any] = writes
            ) -> None:
                writes.append(
                    CheckpointWrite(
                        state | {"iteration": 3},
                        own,
                        strategy,
                        in_background=True,
                        publish=lambda checksums: None,
                    )
                )

            begun = model.device.record(begin)
            ended = model.device.record(writes[0].finish)
            found.append((begun, ended, sorted(os.listdir(own))))
    return found
