"""A run that was stopped, and how the same run takes up copies of its checkpoint in one process."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_pg.data import read_rollouts
from megatron_pg.grpo import Ranks
from megatron_pg.rollout import RecordedRollouts
from megatron_pg.train import TrainConfig, load_config, parallel_run
from megatron_pg.train.checkpoints.checkpoints import Checkpoints
from megatron_pg.train.checkpoints.progress import Progress
from megatron_pg.train.checkpoints.resume import resume_run
from megatron_pg.train.model import TrainedModel, build_trained_model
from megatron_pg.train.model.plan import plan_model
from megatron_pg.train.rollouts.shared_stream import SharedStream
from tests.train import tiny

STEP = 2


@dataclass
class SavedRun:
    """A checkpoint of two steps, and a model to load copies of it into.

    Attributes:
        checkpoints: folder with tracker and iteration.
        config: of the run.
        ranks: of this process.
        model: of the run, as it was built.
        state: what a clean resume ends with, by name.
    """

    checkpoints: Path
    config: TrainConfig
    ranks: Ranks
    model: TrainedModel
    state: dict[str, Any]

    def copy(self, folder: Path) -> Path:
        """A copy of all checkpoints; the iteration's folder in it."""
        shutil.copytree(self.checkpoints, folder)
        return folder / f"iter_{STEP:07d}"

    def resume(self, folder: Path, config: TrainConfig | None = None) -> dict[str, Any]:
        """Find the newest checkpoint of a folder and take it up; everything that was loaded."""
        config = config or self.config
        path = Checkpoints(folder, keep=1).find()
        assert path is not None, "a fresh start beside checkpoints"
        for name, tensor in _tensors(self.model).items():
            # Step counts of all parameters must be equal, which NaN is not.
            tensor.fill_(-7 if name.endswith(".step") else torch.nan)
        # It counts on from where it is.
        self.model.scheduler.num_steps = 0
        progress, note = resume_run(path, config, self.model, self._stream(config))
        return _state(self.model, progress) | {"note": note}

    def _stream(self, config: TrainConfig) -> SharedStream:
        groups = read_rollouts(config.rollout.files, vocab_size=tiny.VOCAB)
        self.stream = RecordedRollouts(groups, shuffle=config.rollout.shuffle, seed=config.run.seed)
        return SharedStream(self.stream, is_first=True)


def _tensors(model: TrainedModel) -> dict[str, torch.Tensor]:
    tensors = dict(model.chunks[0].named_parameters())
    for number, (_, state) in enumerate(
        model.optimizer.chained_optimizers[0].optimizer.state.items()
    ):
        tensors |= {f"{number}.{name}": value for name, value in state.items()}
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _state(model: TrainedModel, progress: Progress) -> dict[str, Any]:
    values: dict[str, Any] = {name: t.clone() for name, t in _tensors(model).items()}
    return values | {
        "lr": [group["lr"] for group in model.optimizer.param_groups],
        "schedule": model.scheduler.state_dict(),
        "progress": progress,
    }


def assert_state(got: dict[str, Any], want: dict[str, Any]) -> None:
    """Bit for bit."""
    assert got.keys() == want.keys()
    for name, value in want.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(got[name], value), name
        else:
            assert got[name] == value, name


def forget_manifest(iteration: Path) -> None:
    """As an earlier version saved it: no checksums, no settings of the run."""
    (iteration / "manifest.json").unlink()
    progress = json.loads((iteration / "progress.json").read_text())
    del progress["settings"], progress["changes"], progress["stream"]["content"]
    (iteration / "progress.json").write_text(json.dumps(progress))


def resumes(run: SavedRun, folder: Path, *names: object) -> bool:
    """Whether a copy is taken up, and then right; else the refusal holds each of ``names``."""
    try:
        loaded = run.resume(folder)
    except (ValueError, NotImplementedError) as error:
        message = str(error)
        missing = [str(name) for name in names if str(name) not in message]
        assert not missing, f"the refusal does not name {missing}: {message}"
        assert re.search("restore|write the|put the|move it|start in another|go on with", message)
        return False
    assert_state(loaded, run.state)
    return True


def train_and_save(folder: Path, commands: Path) -> TrainConfig:
    """Two steps and a checkpoint, in a process of its own."""
    sections = tiny.run_sections(folder, tiny.make_groups(7, has_rollout_logprobs=True))
    sections["run"] |= {"num_steps": STEP, "save_interval": STEP, "self_check_interval": None}
    path = tiny.write_config(folder / "config.yaml", sections)
    done = tiny.launch([str(path)], commands=commands)
    assert done.returncode == 0, done.stderr
    return load_config(path)


@contextmanager
def saved_run(config: TrainConfig) -> Iterator[SavedRun]:
    """The model to resume with, built in this process."""
    with parallel_run(config.parallel, config.run.seed) as ranks:
        model = build_trained_model(config, plan_model(config.model, config.parallel), STEP)
        checkpoints = Path(config.run.out) / "checkpoints"
        saved = SavedRun(checkpoints, config, ranks, model, {})
        # The first load makes the optimizer's state, which later ones fill with NaN before.
        saved.resume(saved.checkpoints)
        saved.state = saved.resume(saved.checkpoints)
        weights = [v for v in saved.state.values() if isinstance(v, torch.Tensor)]
        assert len(weights) > 100 and not any(w.isnan().any() for w in weights)
        yield saved
