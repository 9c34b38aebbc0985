"""Checkpoints of a run: complete or absent, and everything that a resumed run needs."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from ..checkpoint import HF_FOLDER, write_hf_metadata_folder
from .metrics import write_atomically
from .model import TrainedModel
from .model_plan import Origin
from .ranks import from_first_rank
from .torch_adam import loading_torch_adam

TRACKER = "latest_checkpointed_iteration.txt"
_PARTIAL = ".partial-"
_DISTRIBUTED = "use_distributed_optimizer"


class Checkpoints:
    """The checkpoints of a run, ``iter_<step>`` in Megatron's torch_dist layout.

    A checkpoint is written under another name and renamed when every rank is done, then the
    tracker file is replaced: a job that is killed leaves the previous checkpoint as the newest.
    Every rank takes part in each call.

    Args:
        folder: holds all checkpoints of the run.
        keep: how many of the newest are kept.
        is_async: write beside the next steps, by Megatron's own writer processes.
    """

    def __init__(self, folder: Path, *, keep: int, is_async: bool = False) -> None:
        self.folder = folder
        self.keep = keep
        self._queue = AsyncCallsQueue() if is_async else None

    def save(self, model: TrainedModel, step: int, progress: Mapping[str, Any]) -> None:
        """Write the state after ``step`` steps; waits for an earlier write first.

        Args:
            model: what is trained.
            step: steps done.
            progress: JSON-serializable state of the run (stream, counters).
        """
        self.wait()
        # A name of its own: a writer that outlived its killed rank still has the old one.
        partial = self.folder / from_first_rank(f"{_PARTIAL}{step}-{uuid.uuid4().hex[:8]}")
        if dist.get_rank() == 0:
            for stale in self.folder.glob(f"{_PARTIAL}*"):
                shutil.rmtree(stale, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        kind = {_DISTRIBUTED: _is_distributed(model)}
        text = json.dumps(dict(progress) | kind | {"step": step})
        state = _sharded_state(model, is_loading=False) | {
            "iteration": step,
            "checkpoint_version": 3.0,
            "opt_param_scheduler": model.scheduler.state_dict(),
        }
        if model.plan.origin is not None:
            state["args"] = model.plan.origin.megatron_args
            self._keep_origin(model.plan.origin)
        request = dist_checkpointing.save(
            state,
            str(partial),
            async_sharded_save=self._queue is not None,
        )
        if self._queue is None:
            self._publish(partial, step, text)
            return
        request.add_finalize_fn(lambda: self._publish(partial, step, text))
        self._queue.schedule_async_request(request)

    def poll(self) -> None:
        """Publish a checkpoint that has been written meanwhile."""
        if self._queue is not None:
            self._queue.maybe_finalize_async_calls(blocking=False)

    def wait(self) -> None:
        """Publish what is still being written."""
        if self._queue is not None:
            self._queue.maybe_finalize_async_calls(blocking=True)

    def find(self) -> Path | None:
        """The newest complete checkpoint as the first rank sees it, or None.

        Raises:
            ValueError: if the tracker names a checkpoint that is not there, on some rank.
        """
        newest: str | None = None
        tracker = self.folder / TRACKER
        if dist.get_rank() == 0 and tracker.is_file():
            newest = tracker.read_text().strip()
        newest = from_first_rank(newest)
        if newest is None:
            return None
        path = self._path(int(newest)) if newest.isdigit() else self.folder / newest
        if not (path / "progress.json").is_file():
            complete = sorted(p.parent.name for p in self.folder.glob("iter_*/progress.json"))
            raise ValueError(
                f"{tracker} names {path.name}, which is missing or incomplete on this machine "
                f"(complete are {', '.join(complete) or 'none'}); restore it, write the step of a "
                "complete one into the tracker, or start in another run.out"
            )
        return path

    def _keep_origin(self, origin: Origin) -> None:
        """Keep configuration and tokenizer beside the checkpoints, for conversion back."""
        final = self.folder / HF_FOLDER
        if dist.get_rank() == 0 and not final.exists():
            partial = self.folder / f"{_PARTIAL}origin-{uuid.uuid4().hex[:8]}"
            write_hf_metadata_folder(partial, origin.folder)
            os.replace(partial / HF_FOLDER, final)
            partial.rmdir()

    def _path(self, step: int) -> Path:
        return self.folder / f"iter_{step:07d}"

    def _publish(self, partial: Path, step: int, progress: str) -> None:
        dist.barrier()
        if dist.get_rank() == 0:
            write_atomically(partial / "progress.json", progress)
            final = self._path(step)
            if final.exists():
                # Left by a run that went on from an earlier checkpoint; the tracker is not on it.
                os.replace(final, self.folder / f"{_PARTIAL}replaced-{uuid.uuid4().hex[:8]}")
            os.replace(partial, final)
            write_atomically(self.folder / TRACKER, str(step))
            done = [p for p in sorted(self.folder.glob("iter_*")) if p.name <= final.name]
            for old in done[: -self.keep]:
                shutil.rmtree(old, ignore_errors=True)
        dist.barrier()


def load_checkpoint(path: Path, model: TrainedModel) -> dict[str, Any]:
    """Load weights, optimizer and schedule in place; the saved ``progress`` comes back.

    The parallel layout may differ from the one that saved. Learning rates, betas and their like
    are those of the running configuration, not the checkpoint's.

    Raises:
        ValueError: if the optimizer is of the other kind, whose state has other names.
    """
    progress: dict[str, Any] = json.loads((path / "progress.json").read_text())
    if progress[_DISTRIBUTED] != _is_distributed(model):
        raise ValueError(
            f"{path} was saved with parallel.{_DISTRIBUTED}={str(progress[_DISTRIBUTED]).lower()}, "
            "and Megatron does not convert the optimizer's state; set it so, or start in another "
            "run.out"
        )
    own = [_settings(group) for group in model.optimizer.param_groups]
    with loading_torch_adam(model.optimizer):
        loaded = dist_checkpointing.load(_sharded_state(model, is_loading=True), str(path))
        for name, chunk in _named_chunks(model).items():
            chunk.load_state_dict(loaded[name])
        model.optimizer.load_state_dict(loaded["optimizer"])
    for group, settings in zip(model.optimizer.param_groups, own, strict=True):
        group.update(settings)
    model.scheduler.load_state_dict(loaded["opt_param_scheduler"])
    return progress


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """What the configuration says about a parameter group; the step count is state."""
    return {name: value for name, value in group.items() if name not in ("params", "step")}


def _is_distributed(model: TrainedModel) -> bool:
    return any(isinstance(x, DistributedOptimizer) for x in model.optimizer.chained_optimizers)


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
