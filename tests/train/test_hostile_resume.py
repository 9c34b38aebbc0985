"""Checkpoints that somebody or something changed: refused by name, or loaded bit for bit."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint import metadata as dcp

from megatron_pg.checkpoint import (
    TorchDistReader,
    load_sharded_state,
    reshard_checkpoint,
    write_manifest,
)
from megatron_pg.train import Trainer, dry_run
from megatron_pg.train.model import build_trained_model
from megatron_pg.train.model_plan import plan_model
from megatron_pg.train.state import TRACKER, Checkpoints, sharded_state
from megatron_pg.train.torch_adam import loading_torch_adam
from tests.checkpoint.poison import POISONS, edit_metadata, poison, replace_records, serialised
from tests.hostile import assert_both_occur, refused, seeds
from tests.train.saved_run import STEP, SavedRun, assert_state, saved_run

pytestmark = pytest.mark.megatron


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SavedRun]:
    with saved_run(tmp_path_factory.mktemp("run")) as saved:
        yield saved


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where copies go; two thousand of them would fill a small disk."""
    yield tmp_path / "checkpoints"
    shutil.rmtree(tmp_path)


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


# Damage to files: bits, lengths, names and places, whatever the file.


def pick(chance: random.Random, folder: Path) -> Path:
    """Any file of an iteration; large ones as often as small ones."""
    return chance.choice(sorted(path for path in folder.iterdir() if path.is_file()))


def flip(chance: random.Random, folder: Path) -> Path:
    path = pick(chance, folder)
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)
    return path


def overwrite(chance: random.Random, folder: Path) -> Path:
    path = pick(chance, folder)
    content = bytearray(path.read_bytes())
    at, length = chance.randrange(len(content)), chance.choice((1, 8, 100, 4096))
    content[at : at + length] = chance.randbytes(length)[: len(content) - at]
    path.write_bytes(content)
    return path


def truncate(chance: random.Random, folder: Path) -> Path:
    path = pick(chance, folder)
    path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size)])
    return path


def extend(chance: random.Random, folder: Path) -> Path:
    path = pick(chance, folder)
    path.write_bytes(path.read_bytes() + chance.choice((b"\n", b"\0", b"{}", chance.randbytes(9))))
    return path


def delete(chance: random.Random, folder: Path) -> Path:
    path = pick(chance, folder)
    path.unlink()
    return path


def rename(chance: random.Random, folder: Path) -> Path:
    path = pick(chance, folder)
    path.rename(folder / chance.choice(("__7_0.distcp", path.name.upper(), f"{path.name}.bak")))
    return path


def swap(chance: random.Random, folder: Path) -> Path:
    files = sorted(folder.iterdir())
    if len(files) == 1:
        return overwrite(chance, folder)
    first, second = chance.sample(files, 2)
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    return first


def duplicate(chance: random.Random, folder: Path) -> Path:
    path = pick(chance, folder)
    shutil.copy(path, folder / chance.choice(("__9_9.distcp", ".metadata.bck", "notes")))
    return folder


def make_folder(chance: random.Random, folder: Path) -> Path:
    path = delete(chance, folder)
    path.mkdir()
    return path


def link_away(chance: random.Random, folder: Path) -> Path:
    """The same bytes, but not in the folder."""
    path = pick(chance, folder)
    away = folder.parent.parent / f"away-{path.name}"
    path.rename(away)
    path.symlink_to(away)
    return path


def link_in_a_circle(chance: random.Random, folder: Path) -> Path:
    path = delete(chance, folder)
    path.symlink_to(path)
    return path


def make_pipe(chance: random.Random, folder: Path) -> Path:
    """Whoever reads it waits for ever."""
    path = delete(chance, folder)
    os.mkfifo(path)
    return path


DAMAGES = (
    *(flip, flip, flip, overwrite, truncate, extend, delete, rename, swap, duplicate),
    *(make_folder, link_away, link_in_a_circle, make_pipe),
)


@pytest.mark.parametrize("seed", seeds())
def test_hostile_files(seed: int, run: SavedRun, folder: Path) -> None:
    iteration, chance = run.copy(folder), random.Random(seed)
    path = chance.choice(DAMAGES)(chance, iteration)
    is_manifest = path.name == "manifest.json"
    is_right = resumes(run, folder, *(() if is_manifest else (folder,)))
    # Blanks of JSON are nobody's value, and a byte may be overwritten by itself.
    before = contents(run.checkpoints / iteration.name)
    assert is_right <= (contents(iteration) == before)


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the manifest, which holds nothing that is loaded."""
    files = [path for path in folder.iterdir() if path.name != "manifest.json"]
    return {p.name: p.read_bytes() if p.is_file() and not p.is_symlink() else b"" for p in files}


@pytest.mark.parametrize("damage", [*dict.fromkeys(DAMAGES)], ids=lambda damage: damage.__name__)
def test_damaged_tensor_file(damage: Callable, run: SavedRun, folder: Path) -> None:
    """Each kind once, at the file that holds most weights."""
    iteration = run.copy(folder)
    chance = random.Random(1)
    alone = folder.parent / "alone"
    alone.mkdir()
    names = sorted(path.name for path in iteration.glob("*.distcp"))
    for path in iteration.iterdir():
        if path.name not in names:
            path.rename(alone / path.name)
    damage(chance, iteration)
    for path in alone.iterdir():
        path.rename(iteration / path.name)
    assert not resumes(run, folder, iteration)


# Descriptions that contradict themselves, with a manifest that agrees or without one.


def any_tensor(chance: random.Random, metadata: Any) -> tuple[str, Any]:
    entries = metadata.state_dict_metadata
    kind = dcp.TensorStorageMetadata
    key = chance.choice(sorted(k for k, entry in entries.items() if isinstance(entry, kind)))
    return key, entries[key]


def any_place(chance: random.Random, metadata: Any) -> tuple[Any, Any]:
    places = metadata.storage_data
    index = chance.choice(sorted(places, key=lambda index: (index.fqn, str(index.offset))))
    return index, places[index]


def chunk_twice(chance: random.Random, metadata: Any) -> None:
    """One part listed twice, another of the same shape not at all."""
    for _ in range(1000):
        _, entry = any_tensor(chance, metadata)
        if len(entry.chunks) > 1:
            first, second = chance.sample(range(len(entry.chunks)), 2)
            entry.chunks[first] = entry.chunks[second]
            return
    raise AssertionError("no tensor has two parts")


def chunk_moved(chance: random.Random, metadata: Any) -> None:
    key, entry = any_tensor(chance, metadata)
    number = chance.randrange(len(entry.chunks))
    chunk = entry.chunks[number]
    place = metadata.storage_data.pop(dcp.MetadataIndex(key, chunk.offsets))
    moved = [o + chance.choice((-1, 1, size)) for o, size in zip(chunk.offsets, chunk.sizes)]
    offsets = torch.Size(max(0, o) for o in moved) if chance.random() < 0.9 else tuple(moved)
    if tuple(offsets) == tuple(chunk.offsets):
        offsets = torch.Size(o + 1 for o in offsets)
    entry.chunks[number] = dcp.ChunkStorageMetadata(offsets, chunk.sizes)
    metadata.storage_data[dcp.MetadataIndex(key, offsets)] = place


def chunk_resized(chance: random.Random, metadata: Any) -> None:
    _, entry = any_tensor(chance, metadata)
    number = chance.randrange(len(entry.chunks))
    chunk = entry.chunks[number]
    sizes = list(chunk.sizes)
    sizes[chance.randrange(len(sizes))] += chance.choice((-1, 1, 2**40))
    entry.chunks[number] = dcp.ChunkStorageMetadata(chunk.offsets, torch.Size(sizes))


def chunk_dropped(chance: random.Random, metadata: Any) -> None:
    key, entry = any_tensor(chance, metadata)
    chunk = entry.chunks.pop(chance.randrange(len(entry.chunks)))
    if chance.random() < 0.5:
        del metadata.storage_data[dcp.MetadataIndex(key, chunk.offsets)]


def shape_changed(chance: random.Random, metadata: Any) -> None:
    _, entry = any_tensor(chance, metadata)
    shape = list(entry.size)
    shape[chance.randrange(len(shape))] += chance.choice((-1, 1, 2**50))
    entry.size = torch.Size(shape)


def dtype_changed(chance: random.Random, metadata: Any) -> None:
    _, entry = any_tensor(chance, metadata)
    entry.properties.dtype = chance.choice((torch.float16, torch.float64, torch.int32, "float32"))


def key_renamed(chance: random.Random, metadata: Any) -> None:
    key, entry = any_tensor(chance, metadata)
    other = chance.choice((f"{key}.more", key.replace("decoder", "encoder") + "_", 7))
    metadata.state_dict_metadata[other] = metadata.state_dict_metadata.pop(key)
    for index in [index for index in metadata.storage_data if index.fqn == key]:
        info = metadata.storage_data.pop(index)
        metadata.storage_data[dcp.MetadataIndex(other, index.offset)] = info


def key_dropped(chance: random.Random, metadata: Any) -> None:
    """Tensor and bytes go; nothing within the folder misses them."""
    key, _ = any_tensor(chance, metadata)
    del metadata.state_dict_metadata[key]
    for index in [index for index in metadata.storage_data if index.fqn == key]:
        del metadata.storage_data[index]


def object_and_tensor(chance: random.Random, metadata: Any) -> None:
    key, _ = any_tensor(chance, metadata)
    metadata.state_dict_metadata[key] = dcp.BytesStorageMetadata()


def path_leads_out(chance: random.Random, metadata: Any) -> None:
    _, info = any_place(chance, metadata)
    up = f"../iter_{STEP:07d}/{info.relative_path}"
    info.relative_path = chance.choice(
        ("/etc/passwd", up, f"./{info.relative_path}", "..", "", "a\0b", "\\x", "x" * 999, 5, None)
    )


def path_to_other_file(chance: random.Random, metadata: Any) -> None:
    _, info = any_place(chance, metadata)
    others = ["common.pt", ".metadata", "progress.json", "__8_8.distcp"]
    info.relative_path = chance.choice(others)


def place_shifted(chance: random.Random, metadata: Any) -> None:
    _, info = any_place(chance, metadata)
    shift = chance.choice((1, -1, 64, 10**6, 2**62))
    if chance.random() < 0.5:
        info.offset += shift
    else:
        info.length += chance.choice((info.length, -info.length, 10**9, 2**62, 1.0))


def places_shared(chance: random.Random, metadata: Any) -> None:
    """Two parts at one place."""
    while True:
        (a, first), (b, second) = any_place(chance, metadata), any_place(chance, metadata)
        if a != b and first.length == second.length:
            metadata.storage_data[a] = metadata.storage_data[b]
            return


def place_dropped(chance: random.Random, metadata: Any) -> None:
    index, _ = any_place(chance, metadata)
    del metadata.storage_data[index]


def not_a_description(chance: random.Random, metadata: Any) -> None:
    name = chance.choice(("state_dict_metadata", "storage_data"))
    setattr(metadata, name, chance.choice((None, [], 3, {"a": 1}, {})))


EDITS = (
    *(chunk_twice, chunk_moved, chunk_resized, chunk_dropped, shape_changed, dtype_changed),
    *(key_renamed, key_dropped, object_and_tensor, path_leads_out, path_to_other_file),
    *(place_shifted, places_shared, place_dropped, not_a_description),
)


def forget_manifest(iteration: Path) -> None:
    """As an earlier version saved it: no checksums, no settings of the run."""
    (iteration / "manifest.json").unlink()
    progress = json.loads((iteration / "progress.json").read_text())
    del progress["settings"], progress["changes"], progress["stream"]["content"]
    (iteration / "progress.json").write_text(json.dumps(progress))


@pytest.mark.parametrize("seed", seeds())
def test_hostile_descriptions(seed: int, run: SavedRun, folder: Path) -> None:
    iteration, chance = run.copy(folder), random.Random(seed)
    edit = EDITS[seed % len(EDITS)]
    edit_metadata(iteration, lambda metadata: edit(chance, metadata))
    if chance.random() < 0.5:
        write_manifest(iteration)
    else:
        forget_manifest(iteration)
    assert not resumes(run, folder, iteration), edit.__name__


def test_an_earlier_version_s_checkpoint_is_taken_up_and_said(run: SavedRun, folder: Path) -> None:
    forget_manifest(run.copy(folder))
    loaded = run.resume(folder)
    assert "earlier version" in loaded["note"]
    kept = {"note": None, "progress": run.state["progress"]}
    assert_state(loaded | kept, run.state)


# Progress and tracker.

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
    if kind == "drop":
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
        Trainer(replace(run.config, run=own), run.ranks)
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
        run=replace(config.run, max_tokens_per_microbatch=90, num_steps=9, save_interval=5),
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
