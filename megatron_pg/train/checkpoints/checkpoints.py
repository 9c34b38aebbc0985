"""Checkpoints of a run: complete or absent, and everything that a resumed run needs."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from ...checkpoint import (
    HF_FOLDER,
    TRACKER,
    FileChecksum,
    file_checksum,
    iteration_name,
    read_tracker,
    write_hf_metadata_folder,
    write_manifest,
)
from ...parallel import from_all_ranks, on_all_ranks, on_first_rank
from ..model import Origin, TrainedModel
from .own_shards import with_own_shards
from .progress import Progress
from .run_folder import write_atomically
from .torch_adam import make_first_state
from .write import CheckpointWrite, SaveStrategy

PROGRESS = "progress.json"
_PARTIAL = ".partial-"


class Checkpoints:
    """The checkpoints of a run, ``iter_<step>`` in Megatron's torch_dist layout.

    A checkpoint is written under another name and renamed when every rank is done, then the
    tracker file is replaced: a job that is killed leaves the previous checkpoint as the newest. The
    checksum of each of its files is kept with it. Every rank takes part in each call.

    Args:
        folder: holds all checkpoints of the run.
        keep: how many of the newest are kept.
        is_async: write beside the next steps, by a thread.
    """

    def __init__(self, folder: Path, *, keep: int, is_async: bool = False) -> None:
        self.folder = folder
        self.keep = keep
        self.is_async = is_async
        self._write: CheckpointWrite | None = None

    @cached_property
    def _strategy(self) -> SaveStrategy:
        # Not before there are parallel groups.
        return SaveStrategy()

    def save(self, model: TrainedModel, progress: Progress) -> None:
        """Write the state after ``progress.step`` steps; waits for an earlier write first.

        Args:
            model: what is trained.
            progress: of the run, whose best checkpoint is kept beside the newest ones.
        """
        self.wait()
        step, text = progress.step, progress.to_json()
        best = None if progress.best is None else iteration_name(progress.best.step)
        # A name of its own: a rank of a killed run may still be writing under the old one.
        partial = self.folder / on_first_rank(lambda: f"{_PARTIAL}{step}-{uuid.uuid4().hex[:8]}")
        if dist.get_rank() == 0:
            self._remove_partial()
            partial.mkdir(parents=True)
        dist.barrier()
        make_first_state(model.optimizer)
        state = sharded_state(model, is_loading=False) | {
            "iteration": step,
            "checkpoint_version": 3.0,
            "opt_param_scheduler": model.scheduler.state_dict(),
        }
        if model.plan.origin is not None:
            state["args"] = model.plan.origin.megatron_args
            self._keep_origin(model.plan.origin)
        self._write = CheckpointWrite(
            state,
            partial,
            self._strategy,
            in_background=self.is_async,
            publish=lambda own: self._publish(partial, step, text, best, own),
        )
        if not self.is_async:
            self.wait()

    def poll(self) -> None:
        """Publish a checkpoint that has been written meanwhile."""
        if self._write is not None and self._write.is_done():
            self.wait()

    def wait(self) -> None:
        """Publish what is still being written."""
        write, self._write = self._write, None
        if write is not None:
            write.finish()

    def find(self) -> Path | None:
        """The newest complete checkpoint as the first rank sees it, or None.

        Raises:
            ValueError: naming the file, on every rank: a tracker that names no checkpoint, or
                checkpoints without a tracker that says which of them is the newest.
        """
        name: str | None = on_first_rank(self._newest)
        if name is None:
            return None
        path = self.folder / name
        on_all_ranks(lambda: self._check_complete(path))
        return path

    def has(self, step: int) -> bool:
        """Whether there is a complete checkpoint of ``step``, as the first rank sees it."""
        return on_first_rank(lambda: iteration_name(step) in self._complete())

    def _newest(self) -> str | None:
        """Name of the newest checkpoint, complete or not; what was left half-written goes."""
        self._remove_partial()
        tracker, complete = self.folder / TRACKER, self._complete()
        if os.path.lexists(tracker):
            step = read_tracker(self.folder)
            if step is not None:
                return iteration_name(step)
            raise ValueError(
                f"{tracker} names a release, which has no state of a run; give its folder as "
                "model.pretrained_checkpoint, and start in another run.out"
            )
        if len(complete) > 1:
            raise ValueError(
                f"{tracker} is missing, and {', '.join(complete)} are there; write the step of one "
                "of them into it, or start in another run.out"
            )
        # One without a tracker: the run was killed before it had published its first checkpoint.
        return complete[0] if complete else None

    def _complete(self) -> list[str]:
        return sorted(path.parent.name for path in self.folder.glob(f"iter_*/{PROGRESS}"))

    def _check_complete(self, path: Path) -> None:
        if not (path / PROGRESS).is_file():
            raise ValueError(
                f"{self.folder / TRACKER} names {path.name}, which is missing or incomplete on "
                f"this machine (complete are {', '.join(self._complete()) or 'none'}); restore it, "
                "write the step of a complete one into the tracker, or start in another run.out"
            )

    def _keep_origin(self, origin: Origin) -> None:
        """Keep configuration and tokenizer beside the checkpoints, for conversion back."""
        final = self.folder / HF_FOLDER
        if dist.get_rank() == 0 and not final.exists():
            partial = self.folder / f"{_PARTIAL}origin-{uuid.uuid4().hex[:8]}"
            write_hf_metadata_folder(partial, origin.folder)
            os.replace(partial / HF_FOLDER, final)
            partial.rmdir()

    def _publish(
        self,
        partial: Path,
        step: int,
        progress: str,
        best: str | None,
        own: Mapping[str, FileChecksum],
    ) -> None:
        parts = from_all_ranks(lambda: own)
        known = {name: checksum for part in parts for name, checksum in part.items()}
        on_first_rank(lambda: self._complete_and_rename(partial, step, progress, known))
        on_first_rank(lambda: self._remove_old(step, best))

    def _complete_and_rename(
        self, partial: Path, step: int, progress: str, checksums: Mapping[str, FileChecksum]
    ) -> None:
        write_atomically(partial / PROGRESS, progress)
        shared = {path.name for path in partial.iterdir()} - checksums.keys()
        write_manifest(partial, {**checksums, **_checksums(partial, shared)})
        final = self.folder / iteration_name(step)
        if final.exists():
            # Left by a run that went on from an earlier checkpoint; the tracker is not on it.
            os.replace(final, self.folder / f"{_PARTIAL}replaced-{uuid.uuid4().hex[:8]}")
        os.replace(partial, final)
        write_atomically(self.folder / TRACKER, str(step))

    def _remove_old(self, step: int, best: str | None) -> None:
        """What is neither among the newest up to ``step`` nor the best."""
        self._remove_partial()
        newest = iteration_name(step)
        done = [p for p in sorted(self.folder.glob("iter_*")) if p.name <= newest]
        for old in done[: -self.keep]:
            if old.name != best:
                shutil.rmtree(old, ignore_errors=True)

    def _remove_partial(self) -> None:
        """What was left incomplete, or has been replaced."""
        for stale in self.folder.glob(f"{_PARTIAL}*"):
            shutil.rmtree(stale, ignore_errors=True)


def _checksums(folder: Path, names: Iterable[str]) -> dict[str, FileChecksum]:
    return {name: file_checksum(folder / name) for name in names}


def is_distributed(model: TrainedModel) -> bool:
    """Whether the optimizer's state is spread over the data-parallel ranks."""
    return any(isinstance(x, DistributedOptimizer) for x in model.optimizer.chained_optimizers)


def named_chunks(model: TrainedModel) -> dict[str, Any]:
    """This rank's chunks by the names that Megatron-LM gives them in a checkpoint."""
    if len(model.chunks) == 1:
        return {"model": model.chunks[0].module}
    return {f"model{i}": chunk.module for i, chunk in enumerate(model.chunks)}


def sharded_state(model: TrainedModel, is_loading: bool) -> dict[str, Any]:
    """Weights and optimizer as Megatron-Core's sharded state dict, to save or to be filled."""
    state: dict[str, Any] = {
        name: chunk.sharded_state_dict() for name, chunk in named_chunks(model).items()
    }
    with with_own_shards(model.optimizer):
        state["optimizer"] = model.optimizer.sharded_state_dict(
            dict(state), is_loading=is_loading, metadata=_METADATA
        )
    return state


# One file layout for every parallel layout, so that a run can continue on another.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}
