"""A run taken up again: a checkpoint is checked, compared with the run, and loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ...checkpoint import TorchDistReader, load_sharded_state
from ...parallel import from_all_ranks, on_all_ranks
from ..config import TrainConfig
from ..model import TrainedModel
from ..rollouts import SharedStream
from .checkpoints import PROGRESS, is_distributed, named_chunks, sharded_state
from .own_shards import with_own_shards
from .progress import Progress, changed_settings, course_settings, parse_progress
from .torch_adam import loading_torch_adam


@dataclass(frozen=True)
class SavedRun:
    """A checkpoint whose description and progress have been read.

    Attributes:
        reader: of weights and optimizer.
        progress: of the run.
    """

    reader: TorchDistReader
    progress: Progress

    @property
    def path(self) -> Path:
        """The folder."""
        return self.reader.folder


def resume_run(
    path: Path, config: TrainConfig, model: TrainedModel, stream: SharedStream
) -> tuple[Progress, str | None]:
    """Bring model and stream to where a checkpoint was taken.

    Returns:
        The progress, and what a person must know who takes the run up with this configuration.

    Raises:
        ValueError: on every rank, naming the file: what ``open_checkpoint`` and ``load_checkpoint``
            refuse, or a checkpoint of other rollouts.
    """
    saved = open_checkpoint(path)
    try:
        stream.load_state_dict(saved.progress.stream)
    except ValueError as error:
        raise ValueError(f"{path / PROGRESS}: {error}, or start in another run.out") from error
    load_checkpoint(saved, model)
    return saved.progress, note_changes(saved, config)


def open_checkpoint(path: Path) -> SavedRun:
    """Read description and progress of a checkpoint; nothing in it can run code.

    Raises:
        ValueError: on every rank, naming the file: damaged, edited, incomplete or not the same on
            all machines.
    """

    def read() -> SavedRun:
        reader = TorchDistReader(path)
        progress = parse_progress(reader.files.read(PROGRESS), path / PROGRESS)
        if reader.files.checksums is None and progress.settings is not None:
            raise ValueError(
                f"{path / 'manifest.json'}: missing, although every checkpoint of this version has "
                "one; restore it, or write the step of another checkpoint into the tracker"
            )
        return SavedRun(reader, progress)

    saved = on_all_ranks(read)
    view = saved.reader.tensors, saved.reader.objects, saved.reader.files.checksums, saved.progress
    views = from_all_ranks(lambda: view)
    if any(other != views[0] for other in views):
        raise ValueError(
            f"{path}: it differs between the ranks' machines; put the checkpoint on a file system "
            "that all of them share"
        )
    return saved


def load_checkpoint(saved: SavedRun, model: TrainedModel) -> None:
    """Load weights, optimizer and schedule in place.

    The parallel layout may differ from the one that saved. Learning rates, betas and their like
    are those of the running configuration, not the checkpoint's. All files are compared with their
    checksums first, each rank taking its share of them.

    Raises:
        ValueError: on every rank, naming the file: damaged or edited, or of another model; or if
            the optimizer is of the other kind, whose state has other names.
    """
    files, progress = saved.reader.files, saved.progress
    if progress.use_distributed_optimizer != is_distributed(model):
        kind = str(progress.use_distributed_optimizer).lower()
        raise ValueError(
            f"{saved.path / PROGRESS}: it was saved with "
            f"parallel.use_distributed_optimizer={kind}, and Megatron does not convert the "
            "optimizer's state; set it so, or start in another run.out"
        )
    on_all_ranks(lambda: files.verify(files.names[dist.get_rank() :: dist.get_world_size()]))
    files.accept()
    with loading_torch_adam(model.optimizer), with_own_shards(model.optimizer):
        loaded = load_sharded_state(sharded_state(model, is_loading=True), saved.reader)
        on_all_ranks(lambda: _take(loaded, model, saved))


def note_changes(saved: SavedRun, config: TrainConfig) -> str | None:
    """What a person must know who takes the run up with ``config``; None if all is as it was.

    Changed settings are added to the progress, which later checkpoints and the summary keep.
    """
    progress = saved.progress
    if progress.settings is None:
        return (
            f"{saved.path} is of an earlier version, which kept no checksums and did not record "
            "what it was trained with: whether files, recording and settings are as they were was "
            "not compared"
        )
    changed = changed_settings(progress.settings, course_settings(config))
    if not changed:
        return None
    progress.changes.append({"step": progress.step, "changed": changed})
    listed = "; ".join(f"{name} {old} -> {new}" for name, (old, new) in changed.items())
    return f"going on after step {progress.step} with other settings: {listed}"


def _take(loaded: Mapping[str, Any], model: TrainedModel, saved: SavedRun) -> None:
    """Hand a checkpoint's state to model, optimizer and schedule."""
    iteration = loaded.get("iteration")
    if type(iteration) is not int or iteration != saved.progress.step:
        raise ValueError(
            f"{saved.path}: the common state is of iteration {str(iteration)[:40]}, "
            f"{PROGRESS} of step {saved.progress.step}; restore the folder, or write the step of "
            "another checkpoint into the tracker"
        )
    own = [_settings(group) for group in model.optimizer.param_groups]
    try:
        _take_over_rates(loaded["optimizer"], own)
        for name, chunk in named_chunks(model).items():
            chunk.load_state_dict(loaded[name])
        model.optimizer.load_state_dict(loaded["optimizer"])
        for group, settings in zip(model.optimizer.param_groups, own, strict=True):
            group.update(settings)
        # Sets learning rates by the running configuration's schedule.
        model.scheduler.load_state_dict(loaded["opt_param_scheduler"])
    # What Megatron and torch find amiss in a state, they raise in many ways.
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        raise ValueError(
            f"{saved.path}: the state does not fit this model and optimizer ({reason}); restore "
            "the folder, or write the step of another checkpoint into the tracker"
        ) from error


# Of the configuration, the same for all groups; Megatron-Core 0.19 finds a saved group by them.
_RATES = ("max_lr", "min_lr", "start_wd", "end_wd")


def _take_over_rates(state: Any, own: Sequence[Mapping[str, Any]]) -> None:
    """Let saved parameter groups have the rates of the running optimizer's groups ``own``."""
    if not isinstance(state, dict):
        return
    for group in state.get("param_groups", ()):
        for name in _RATES:
            values = {settings.get(name) for settings in own}
            if name in group and len(values) == 1:
                group[name] = values.pop()
    for inner in state.values():
        _take_over_rates(inner, own)


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """What the configuration says about a parameter group; the step count is state."""
    return {name: value for name, value in group.items() if name not in ("params", "step")}
