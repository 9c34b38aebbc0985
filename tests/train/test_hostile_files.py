"""Checkpoints whose files were damaged: refused by name, or loaded bit for bit."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hostile import seeds
from tests.train.saved_run import SavedRun, resumes

pytestmark = pytest.mark.megatron


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
