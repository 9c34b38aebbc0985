"""Descriptions that contradict themselves, with a manifest that agrees or without one."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import metadata as dcp

from megatron_pg.checkpoint import (
    write_manifest,
)
from tests.checkpoint.poison import edit_metadata
from tests.hostile import seeds
from tests.train.saved_run import STEP, SavedRun, forget_manifest, resumes

pytestmark = pytest.mark.megatron


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
