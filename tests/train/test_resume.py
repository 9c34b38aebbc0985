"""What resuming loads, what it says, and that nothing of a checkpoint runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing

from megatron_pg.checkpoint import (
    TorchDistReader,
    load_sharded_state,
    reshard_checkpoint,
    write_manifest,
)
from megatron_pg.data import Group
from megatron_pg.train import dry_run, load_config, open_run
from megatron_pg.train.checkpoints.checkpoints import sharded_state
from megatron_pg.train.checkpoints.resume import _take_over_rates
from megatron_pg.train.checkpoints.torch_adam import loading_torch_adam
from megatron_pg.train.model import build_trained_model
from megatron_pg.train.model.plan import plan_model
from tests.checkpoint.poison import POISONS, poison, replace_records, serialised
from tests.hostile import refused
from tests.ranks import Pool
from tests.train import runs, tiny
from tests.train.saved_run import STEP, SavedRun, assert_state, forget_manifest, resumes

pytestmark = pytest.mark.megatron


def test_an_unchanged_copy_is_taken_up(run: SavedRun, folder: Path) -> None:
    run.copy(folder)
    assert resumes(run, folder)
    assert run.state["note"] is None and run.stream.state_dict()["num_taken"] == 5 * STEP


@pytest.mark.parametrize("divisible_by", [1, 16])
def test_equals_megatron_s_own_load(divisible_by: int, run: SavedRun) -> None:
    """Which unpickles; also into a vocabulary that is padded otherwise."""
    model_config = replace(run.config.model, make_vocab_size_divisible_by=divisible_by)
    config = replace(run.config, model=model_config)
    path = run.checkpoints / f"iter_{STEP:07d}"
    loaded = []
    for load in (
        lambda state: dist_checkpointing.load(state, str(path)),
        lambda state: load_sharded_state(state, TorchDistReader(path)),
    ):
        model = build_trained_model(config, plan_model(config.model, config.parallel), STEP)
        with loading_torch_adam(model.optimizer):
            loaded.append(dict(flattened(load(sharded_state(model, is_loading=True)))))
    theirs, ours = loaded
    rows = {
        len(value)
        for name, value in ours.items()
        if str(name[-1]).endswith("word_embeddings.weight")
    }
    assert rows == {50 if divisible_by == 1 else 64} and len(theirs) > 100
    assert_state(ours, theirs)


def flattened(state: Any, name: tuple[Any, ...] = ()) -> Iterator[tuple[Any, Any]]:
    if isinstance(state, dict | list):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from flattened(value, (*name, key))
    elif not name or name[-1] != "args":
        yield name, state.detach() if isinstance(state, torch.Tensor) else state


def test_a_resharded_copy_is_taken_up(run: SavedRun, folder: Path) -> None:
    reshard_checkpoint(run.checkpoints, folder, tp_size=2, pp_size=2)
    assert (folder / f"iter_{STEP:07d}" / "manifest.json").is_file()
    assert resumes(run, folder)


def test_an_earlier_version_s_checkpoint_is_taken_up_and_said(run: SavedRun, folder: Path) -> None:
    forget_manifest(run.copy(folder))
    loaded = run.resume(folder)
    assert "earlier version" in loaded["note"]
    kept = {"note": None, "progress": run.state["progress"]}
    assert_state(loaded | kept, run.state)


# Pickles that run code.


@pytest.mark.parametrize("kind", POISONS)
@pytest.mark.parametrize("manifest", ["kept", "renewed", "removed"])
def test_nothing_runs_on_resume(kind: str, manifest: str, run: SavedRun, folder: Path) -> None:
    iteration, mark = run.copy(folder), folder.parent / "mark"
    poison(iteration, kind, mark, manifest)
    if manifest == "removed":
        (iteration / "manifest.json").touch()
        forget_manifest(iteration)
    with refused(iteration, "estore"):
        run.resume(folder)
    assert not mark.exists()


@pytest.mark.parametrize("kind", POISONS)
def test_nothing_runs_beside_a_fresh_start(kind: str, run: SavedRun, folder: Path) -> None:
    """A dry run looks at no checkpoint, and run.load=false at no more than the names."""
    mark = folder.parent / "mark"
    poison(run.copy(folder), kind, mark, "renewed")
    own = replace(run.config.run, out=str(folder.parent), load=False)
    assert folder.name == "checkpoints" and dry_run(replace(run.config, run=own), 1).lines
    with refused("run.load=false", folder):
        open_run(replace(run.config, run=own), run.ranks).__enter__()
    assert not mark.exists()


def test_a_tensor_of_another_kind(run: SavedRun, folder: Path) -> None:
    """Bytes that load, but as something else than the description says."""
    iteration = run.copy(folder)

    def change(key: str, is_tensor: bool, record: bytes) -> bytes:
        if key != "decoder.final_layernorm.weight":
            return record
        return serialised(torch.zeros(32, dtype=torch.float64))

    replace_records(iteration, change)
    write_manifest(iteration)
    with refused(iteration, "decoder.final_layernorm.weight", "torch.float64"):
        run.resume(folder)


# What a run is taken up with.


@pytest.mark.parametrize(
    "section,changes,words",
    [
        ("optimizer", {"lr": 0.01}, "optimizer.lr 0.001 -> 0.01"),
        ("rollout", {"num_generations": 4}, "rollout.num_generations 8 -> 4"),
        ("algorithm", {"ppo_epochs": 2}, "algorithm.ppo_epochs 1 -> 2"),
        ("run", {"groups_per_step": 3}, "run.groups_per_step 5 -> 3"),
        # An evaluation is compared with those of before.
        ("run", {"eval_generations": 2}, "run.eval_generations 1 -> 2"),
    ],
)
def test_changed_settings_are_said(
    section: str, changes: dict[str, Any], words: str, run: SavedRun, folder: Path
) -> None:
    run.copy(folder)
    config = replace(run.config, **{section: replace(getattr(run.config, section), **changes)})
    loaded = run.resume(folder, config)
    assert loaded["note"] == f"going on after step {STEP} with other settings: {words}"
    name, before, _, now = words.split()
    changed = {name: [json.loads(before), json.loads(now)]}
    assert loaded["progress"].changes == [{"step": STEP, "changed": changed}]


def test_layout_and_length_need_not_be_said(run: SavedRun, folder: Path) -> None:
    run.copy(folder)
    config = run.config
    config = replace(
        config,
        parallel=replace(config.parallel, overlap_grad_reduce=True),
        prefix_group=replace(config.prefix_group, max_tokens_per_microbatch=90),
        run=replace(config.run, num_steps=9, save_interval=5),
    )
    assert run.resume(folder, config)["note"] is None


def test_another_recording(run: SavedRun, folder: Path) -> None:
    """As many groups, one token of them another: nothing is loaded."""
    run.copy(folder)
    rows = Path(run.config.rollout.files[0]).read_text().splitlines()
    row = json.loads(rows[3])
    row["response_ids"][0] = (row["response_ids"][0] + 1) % 50
    rows[3] = json.dumps(row)
    other = folder.parent / "other.jsonl"
    other.write_text("\n".join(rows) + "\n")
    config = replace(run.config, rollout=replace(run.config.rollout, files=[str(other)]))
    with refused(folder, "another recording", "start in another run.out"):
        run.resume(folder, config)
    other.write_text(Path(run.config.rollout.files[0]).read_text())
    assert run.resume(folder, config)["note"] is None


def test_saved_groups_are_found_by_the_running_rates() -> None:
    """Megatron-Core 0.19 looks for groups by rates, which a resumed run may change."""
    saved = {"max_lr": 0.1, "min_lr": 0.0, "wd_mult": 1.0, "step": 3}
    state = {0: {"optimizer": {"param_groups": [dict(saved), dict(saved, wd_mult=0.0)]}}, "x": 1}
    _take_over_rates(state, [{"max_lr": 0.5, "min_lr": 0.1}, {"max_lr": 0.5, "min_lr": 0.2}])
    first, second = state[0]["optimizer"]["param_groups"]
    assert first == saved | {"max_lr": 0.5}
    assert second == saved | {"max_lr": 0.5, "wd_mult": 0.0}


@pytest.mark.parametrize("layout", ["pp2", "tp2_sp_distributed"])
def test_a_run_that_has_trained_nothing_yet_is_taken_up(
    ranks: Pool, tmp_path: Path, layout: str
) -> None:
    """Its first group has no spread, so the optimizer has made no step when it is saved."""
    first, *others = tiny.make_groups(2)
    even = Group("even", tuple(replace(sample, reward=0.5) for sample in first.samples))
    sections = tiny.run_sections(tmp_path, [even, first, *others])
    sections["rollout"]["shuffle"] = False
    sections["algorithm"] = dict(skip_groups_without_spread=True)
    sections["run"] |= dict(groups_per_step=1, num_steps=3, save_interval=1)
    config = load_config(tiny.write_config(tmp_path / "run.yaml", sections))
    want, steps = runs.run(ranks, config, layout, tmp_path / "whole")
    assert [step["actor/updates"] for step in steps] == [0, 1, 1]
    once = replace(config, run=replace(config.run, num_steps=1))
    runs.run(ranks, once, layout, tmp_path / "parts")
    got, others = runs.run(ranks, config, layout, tmp_path / "parts")
    runs.assert_same((got, others[1:]), (want, steps[1:]))
