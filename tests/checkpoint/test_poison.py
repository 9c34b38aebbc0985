"""Pickles in any file that a command opens: none of them runs, and none travels on."""

from __future__ import annotations

import io
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_pg.checkpoint import (
    MegatronFolder,
    TorchDistReader,
    compare_training_state,
    compare_weights,
    hf_to_megatron,
    inspect_checkpoint,
    megatron_to_hf,
    open_weights,
    reshard_checkpoint,
    write_manifest,
)
from megatron_pg.data import read_rollouts
from tests.checkpoint.poison import (
    POISONS,
    Attack,
    edit_metadata,
    poison,
    replace_records,
    serialised,
)
from tests.checkpoint.round_trip import same_weights
from tests.hostile import refused

pytestmark = pytest.mark.megatron


def verify(folder: Path, out: Path) -> None:
    clean = folder.parent / "clean"
    a, b = MegatronFolder(folder), MegatronFolder(clean)
    assert not [*compare_weights(a, b), *compare_training_state(a, b)]


def to_hf(folder: Path, out: Path) -> None:
    megatron_to_hf(folder, out)
    same_weights(open_weights(out), folder.parent / "hf")


COMMANDS: dict[str, Callable[[Path, Path], Any]] = {
    "inspect": lambda folder, out: inspect_checkpoint(folder),
    "verify": verify,
    "megatron_to_hf": to_hf,
    "pretrained": lambda folder, out: same_weights(open_weights(folder), folder.parent / "hf"),
    "reshard": lambda folder, out: reshard_checkpoint(folder, out, tp_size=1, pp_size=2),
    "reshard weights": lambda folder, out: reshard_checkpoint(
        folder, out, tp_size=2, pp_size=1, weights_only=True
    ),
}
# What inspect_checkpoint does not open.
UNOPENED = {"objects", "extra states", "buffers", "tensors", "common"}


@pytest.fixture
def checkpoint(models: Path, tmp_path: Path) -> Path:
    """A checkpoint to damage, beside the same one undamaged and the model that it was made from."""
    shutil.copytree(models / "llama", tmp_path / "hf")
    shutil.copytree(models / "llama-megatron", tmp_path / "clean")
    shutil.copytree(models / "llama-megatron", tmp_path / "in")
    return tmp_path / "in"


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", POISONS)
def test_nothing_runs(command: str, kind: str, checkpoint: Path, tmp_path: Path) -> None:
    mark, out = tmp_path / "mark", tmp_path / "out"
    poison(checkpoint / "release", kind, mark, "renewed")
    if command == "inspect" and kind in UNOPENED:
        COMMANDS[command](checkpoint, out)
    else:
        with refused(checkpoint / "release", "estore"):
            COMMANDS[command](checkpoint, out)
        assert not out.exists()
    assert not mark.exists()


@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - {"inspect"}))
@pytest.mark.parametrize("kind", POISONS)
def test_a_manifest_knows(command: str, kind: str, checkpoint: Path, tmp_path: Path) -> None:
    """Whatever was changed after the checkpoint had been written."""
    poison(checkpoint / "release", kind, tmp_path / "mark", "kept")
    with refused(checkpoint / "release", "manifest.json"):
        COMMANDS[command](checkpoint, tmp_path / "out")
    assert not (tmp_path / "mark").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_that_is_not_listed(command: str, checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "release/__1_0.distcp").write_bytes(b"left by another save")
    with refused(checkpoint / "release/__1_0.distcp", "not listed", "move it"):
        COMMANDS[command](checkpoint, tmp_path / "out")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("trust", [False, True])
def test_legacy_files_run_with_trust_only(command: str, trust: bool, tmp_path: Path) -> None:
    """Also in a part that holds no weights."""
    rank = tmp_path / "in/iter_0000001/mp_rank_00"
    rank.mkdir(parents=True)
    state = {"model": {"output_layer.weight": torch.zeros(2, 2)}}
    state["optimizer"] = Attack(tmp_path / "mark")
    torch.save(state, rank / "model_optim_rng.pt")
    (tmp_path / "in/latest_checkpointed_iteration.txt").write_text("1")
    if trust:
        with pytest.raises(ValueError):
            MegatronFolder(tmp_path / "in", trust_pickle=True)
        assert (tmp_path / "mark").exists(), "the attack is none"
        return
    if command == "inspect":
        assert "not opened" in inspect_checkpoint(tmp_path / "in").notes[0]
    else:
        with refused(rank / "model_optim_rng.pt", "trust_pickle=True"):
            COMMANDS[command](tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "mark").exists()


def test_other_pickles(models: Path, tmp_path: Path) -> None:
    """A model folder with PyTorch's own weights, and rollouts saved by torch."""
    mark = tmp_path / "mark"
    shutil.copytree(models / "llama", tmp_path / "hf")
    (tmp_path / "hf/model.safetensors").unlink()
    torch.save({"lm_head.weight": Attack(mark)}, tmp_path / "hf/pytorch_model.bin")
    with refused(tmp_path / "hf"):
        hf_to_megatron(tmp_path / "hf", tmp_path / "out")
    torch.save({"samples": [Attack(mark)]}, tmp_path / "rollouts.pt")
    with refused(tmp_path / "rollouts.pt"):
        read_rollouts([tmp_path / "rollouts.pt"], format="slime")
    assert not mark.exists()


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", ["path", "parent", "link"])
def test_no_way_out(command: str, kind: str, checkpoint: Path, tmp_path: Path) -> None:
    """Names and links that lead out of the folder are not followed."""
    release, secret = checkpoint / "release", tmp_path / "secret"
    shutil.copy(release / "__0_0.distcp", secret)

    def lead_out(metadata: Any) -> None:
        for index, info in metadata.storage_data.items():
            if "_extra_state" in index.fqn:
                info.relative_path = str(secret) if kind == "path" else "../../secret"

    if kind == "link":
        (release / "__0_0.distcp").unlink()
        (release / "__0_0.distcp").symlink_to(secret)
    else:
        edit_metadata(release, lead_out)
    write_manifest(release)
    with refused(release, "outside of th"):
        COMMANDS[command](checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


EMPTY: dict[str, Any] = {
    "None": None,
    "empty tensor": torch.empty(0, dtype=torch.uint8),
    "bytes of None": torch.frombuffer(bytearray(pickle.dumps(None)), dtype=torch.uint8),
    "None in a buffer": io.BytesIO(serialised(None)),
}


@pytest.mark.parametrize("kind", EMPTY)
def test_empty_extra_states_travel(kind: str, checkpoint: Path, tmp_path: Path) -> None:
    """What layers save that are not quantised, by whichever version."""
    state = serialised([EMPTY[kind]])
    changed = []

    def change(key: str, is_tensor: bool, record: bytes) -> bytes:
        changed.append(key) if "_extra_state" in key else None
        return state if "_extra_state" in key else record

    replace_records(checkpoint / "release", change)
    write_manifest(checkpoint / "release")
    reshard_checkpoint(checkpoint, tmp_path / "out", tp_size=1, pp_size=2)
    reader = TorchDistReader(tmp_path / "out/release")
    assert changed and reader.read_bytes(changed[0]) == state
    verify(tmp_path / "out", tmp_path / "nothing")


def test_records_that_lie_elsewhere_are_not_copied(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text("{}")
    (checkpoint / "release/progress.json").symlink_to(tmp_path / "secret.json")
    (checkpoint / "release/manifest.json").unlink()
    with refused(checkpoint / "release", "progress.json", "outside of this folder"):
        reshard_checkpoint(checkpoint, tmp_path / "out", tp_size=1, pp_size=1)
    assert not (tmp_path / "out").exists()


def test_what_is_written_has_its_checksums(checkpoint: Path, tmp_path: Path) -> None:
    """A copy of the tools' own is compared when it is read; its records too."""
    (checkpoint / "release/progress.json").write_text("{}")
    write_manifest(checkpoint / "release")
    folder = reshard_checkpoint(checkpoint, tmp_path / "out", tp_size=1, pp_size=2)
    assert (folder / "progress.json").read_text() == "{}"
    assert inspect_checkpoint(folder).facts["checksums"].startswith("there")
    verify(tmp_path / "out", tmp_path / "nothing")
    (folder / "progress.json").write_text("[]")
    with refused(folder / "progress.json", "manifest.json"):
        reshard_checkpoint(tmp_path / "out", tmp_path / "again", tp_size=1, pp_size=1)
