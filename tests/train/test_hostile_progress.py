"""Edited progress files and trackers: only what a run writes is taken up."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_pg.checkpoint import (
    write_manifest,
)
from megatron_pg.train.checkpoints.checkpoints import TRACKER, Checkpoints
from tests.hostile import assert_both_occur, refused, seeds
from tests.train.saved_run import STEP, SavedRun

pytestmark = pytest.mark.megatron


ODD = (
    None,
    True,
    -1,
    0,
    1,
    3,
    -7,
    2.5,
    99,
    "2",
    "",
    [],
    {},
    [2],
    10**30,
    float("nan"),
    float("inf"),
)
STRANGE = ("../../x", "__class__", "step ", "num_groups2", "")


def edit_progress(chance: random.Random, progress: dict[str, Any]) -> str:
    """Give a field what it never holds; the field's name."""
    section = chance.choice((progress, progress, progress["stream"], progress["totals"]))
    kind = chance.choice(("set", "set", "set", "drop", "add"))
    if kind == "add":
        name = chance.choice(STRANGE)
        section[name] = chance.choice(ODD)
        return name.strip()
    name = chance.choice(sorted(section.keys() - {"settings", "changes", "content"}))
    # Earlier versions kept no best one.
    if kind == "drop" and name != "best":
        del section[name]
    else:
        section[name] = chance.choice(ODD)
    return name


@pytest.mark.parametrize("seed", seeds())
def test_hostile_progress(seed: int, run: SavedRun, folder: Path) -> None:
    """With a manifest that agrees, so that the fields themselves are looked at."""
    iteration, chance = run.copy(folder), random.Random(seed)
    path = iteration / "progress.json"
    before = json.loads(path.read_text())
    progress = json.loads(path.read_text())
    edit_progress(chance, progress)
    text = json.dumps(progress)
    if chance.random() < 0.1:
        text = chance.choice(("", "null", "[" * 9000, text[:-1], f"[{text}]", "\ufeff" + text))
    path.write_text(text)
    if chance.random() < 0.8:
        write_manifest(iteration)
    try:
        loaded = run.resume(folder)
    except ValueError as error:
        assert str(path) in str(error)
        return
    # What a run might have written, and it comes back as it stands there.
    kept = loaded["progress"]
    assert json.loads(kept.to_json()) == progress and progress.keys() == before.keys()
    assert type(kept.step) is int and kept.step == STEP
    assert type(kept.stream["num_taken"]) is int and kept.stream["num_taken"] >= STEP
    assert all(type(value) in (int, float) and value >= 0 for value in kept.totals.values())


EVALUATION = {"mean": 1.0, "standard_error": 0.5, "num_prompts": 2}
PROGRESS_EDITS: dict[str, tuple[dict[str, Any], str]] = {
    "earlier step": ({"step": 1}, "step=1 must be the number in iter_0000002"),
    "step below zero": ({"step": -3}, "step=-3"),
    "half a step": ({"step": 2.5}, "step=2.5"),
    "step too far": ({"step": 99}, "step=99"),
    "nothing taken": ({"stream": {"num_taken": 0}}, "num_taken=0"),
    "less than nothing": ({"stream": {"num_taken": -7}}, "num_taken=-7"),
    "true": ({"stream": {"num_taken": True}}, "num_taken=True"),
    "other optimizer": ({"use_distributed_optimizer": True}, "use_distributed_optimizer=true"),
    "unknown": ({"epoch": 1}, "'epoch' is unknown"),
    "totals": ({"totals": {"seconds": -1.0}}, "totals="),
    "evaluations": ({"evaluations": {"before": {"mean": 1.0}}}, "evaluations.before="),
    "metrics": (
        {"evaluations": {"after": {**EVALUATION, "metrics": {"eval/reward/mean@1": "1"}}}},
        "evaluations.after.metrics must be an object of numbers",
    ),
    "best of no step": ({"best": {"value": 1.0}}, "best={'value': 1.0} must be an object of step"),
    "best of nothing": (
        {"best": {"step": 1, "value": None}},
        "must be an object of step and value",
    ),
    "best to come": ({"best": {"step": 3, "value": 1.0}}, "best.step=3 must be a step of the run"),
    "best before": ({"best": {"step": 0, "value": 1.0}}, "best.step=0 must be a step of the run"),
    "best of half a step": ({"best": {"step": 1.5, "value": 1.0}}, "must be an object of step"),
    "other seed": ({"stream": {"seed": 5}}, "seed=5, these rollouts have seed="),
    "other recording": ({"stream": {"content": "0" * 64}}, "another recording"),
    "another source": ({"stream": {"cursor": 1}}, "cursor"),
}


@pytest.mark.parametrize("case", PROGRESS_EDITS)
@pytest.mark.parametrize("manifest", ["kept", "renewed"])
def test_edited_progress(case: str, manifest: str, run: SavedRun, folder: Path) -> None:
    iteration = run.copy(folder)
    path = iteration / "progress.json"
    changes, message = PROGRESS_EDITS[case]
    progress = json.loads(path.read_text())
    for name, value in changes.items():
        old = progress.get(name)
        progress[name] = old | value if isinstance(old, dict) else value
    path.write_text(json.dumps(progress))
    if manifest == "renewed":
        write_manifest(iteration)
    with refused(iteration, message if manifest == "renewed" else path):
        run.resume(folder)


TRACKERS = (
    *("2", " 2\n", "0002", "1", "3", "-2", "+2", "2.0", "2e0", "٢", "²", "release", "", "latest"),
    *("../x/iter_2", "/tmp", "iter_0000002", "2\n1", "2 ", "0x2", "9" * 5000, "\0", "True", "∞"),
)


@pytest.mark.parametrize("seed", seeds())
def test_hostile_trackers(seed: int, run: SavedRun, folder: Path) -> None:
    """Only the number of a checkpoint that is there is followed."""
    run.copy(folder)
    chance = random.Random(seed)
    text = chance.choice(TRACKERS)
    if seed >= len(TRACKERS) and chance.random() < 0.5:
        text = text[: chance.randrange(9)] + chance.choice(("..", "/", "2", " ", "~", "%", "é"))
    elif seed < len(TRACKERS):
        text = TRACKERS[seed]
    (folder / TRACKER).write_text(text)
    names_it = re.fullmatch(r"0{0,14}2", text.strip()) is not None
    if names_it:
        assert Checkpoints(folder, keep=1).find() == folder / "iter_0000002"
    else:
        with refused(folder / TRACKER):
            Checkpoints(folder, keep=1).find()


def test_trackers_of_both_kinds() -> None:
    assert_both_occur([re.fullmatch("0*2", text.strip()) is not None for text in TRACKERS])


@pytest.mark.parametrize("case", ["bytes", "folder", "dangling link", "pipe"])
def test_tracker_that_is_no_text(case: str, run: SavedRun, folder: Path) -> None:
    run.copy(folder)
    tracker = folder / TRACKER
    tracker.unlink()
    if case == "bytes":
        tracker.write_bytes(b"\xff\xfe2\0")
    elif case == "folder":
        tracker.mkdir()
    elif case == "pipe":
        os.mkfifo(tracker)
    else:
        tracker.symlink_to(folder / "nothing")
    with refused(tracker):
        Checkpoints(folder, keep=1).find()


def test_missing_tracker(run: SavedRun, folder: Path) -> None:
    """One checkpoint is the newest; of two, nobody knows."""
    iteration = run.copy(folder)
    (folder / TRACKER).unlink()
    assert Checkpoints(folder, keep=1).find() == iteration
    shutil.copytree(iteration, folder / "iter_0000004")
    with refused(folder / TRACKER, "iter_0000002, iter_0000004", "write the step"):
        Checkpoints(folder, keep=1).find()


def test_a_checkpoint_without_its_manifest(run: SavedRun, folder: Path) -> None:
    iteration = run.copy(folder)
    (iteration / "manifest.json").unlink()
    with refused(iteration / "manifest.json", "restore it"):
        run.resume(folder)
