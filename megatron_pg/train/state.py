"""Checkpoints of a run: complete or absent, and everything that a resumed run needs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing

from .model import TrainedModel

TRACKER = "latest_checkpointed_iteration.txt"


def save_checkpoint(
    folder: Path, model: TrainedModel, step: int, progress: Mapping[str, Any], keep: int
) -> Path:
    """Write ``iter_<step>`` in Megatron's torch_dist layout; every rank takes part.

    The folder is written under another name and renamed when every rank is done, then the tracker
    file is replaced: a killed job leaves the previous checkpoint as the newest.

    Args:
        folder: holds all checkpoints of the run.
        model: what is trained.
        step: steps done.
        progress: JSON-serializable state of the run (stream, counters).
        keep: how many of the newest are kept.
    """
    final = folder / f"iter_{step:07d}"
    partial = folder / f".partial_iter_{step:07d}"
    is_first = dist.get_rank() == 0
    if is_first:
        for stale in (partial, final):
            shutil.rmtree(stale, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    state = _sharded_state(model, is_loading=False)
    state |= {
        "iteration": step,
        "checkpoint_version": 3.0,
        "opt_param_scheduler": model.scheduler.state_dict(),
    }
    dist_checkpointing.save(state, str(partial))
    if is_first:
        _write_synced(partial / "progress.json", json.dumps(dict(progress) | {"step": step}))
    dist.barrier()
    if is_first:
        os.replace(partial, final)
        _write_synced(folder / f".{TRACKER}", str(step))
        os.replace(folder / f".{TRACKER}", folder / TRACKER)
        for old in sorted(folder.glob("iter_*"))[: -max(keep, 1)]:
            shutil.rmtree(old, ignore_errors=True)
    dist.barrier()
    return final


def find_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint, or None.

    Raises:
        ValueError: if the tracker names a checkpoint that is not there.
    """
    tracker = folder / TRACKER
    if not tracker.is_file():
        return None
    text = tracker.read_text().strip()
    path = folder / f"iter_{int(text):07d}" if text.isdigit() else folder / text
    if not (path / "progress.json").is_file():
        raise ValueError(
            f"{tracker} names {path.name}, which is missing or incomplete; restore it, write the "
            "step of a complete one into the tracker, or start in another run.out"
        )
    return path


def load_checkpoint(path: Path, model: TrainedModel) -> dict[str, Any]:
    """Load weights, optimizer and schedule in place; the saved ``progress`` comes back.

    The parallel layout may differ from the one that saved.
    """
    state = _sharded_state(model, is_loading=True)
    loaded = dist_checkpointing.load(state, str(path))
    for name, chunk in _named_chunks(model).items():
        chunk.load_state_dict(loaded[name])
    model.optimizer.load_state_dict(loaded["optimizer"])
    model.scheduler.load_state_dict(loaded["opt_param_scheduler"])
    progress: dict[str, Any] = json.loads((path / "progress.json").read_text())
    return progress


def _named_chunks(model: TrainedModel) -> dict[str, Any]:
    if len(model.chunks) == 1:
        return {"model": model.chunks[0].module}
    return {f"model{i}": chunk.module for i, chunk in enumerate(model.chunks)}


def _sharded_state(model: TrainedModel, is_loading: bool) -> dict[str, Any]:
    state: dict[str, Any] = {
        name: chunk.sharded_state_dict() for name, chunk in _named_chunks(model).items()
    }
    state["optimizer"] = model.optimizer.sharded_state_dict(
        dict(state), is_loading=is_loading, metadata=_METADATA
    )
    return state


# One file layout for every parallel layout, so that a run can continue on another.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
