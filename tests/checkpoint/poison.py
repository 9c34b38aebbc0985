"""Checkpoints with pickles that leave a mark when somebody runs them, and edits of descriptions."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp

from megatron_pg.checkpoint import write_manifest


class Attack:
    """Touches a file when it is unpickled without care."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def serialised(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def edit_metadata(folder: Path, edit: Callable[[Any], None]) -> None:
    """Change a description that is our own, so that plain pickle may read it."""
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    edit(metadata)
    path.write_bytes(pickle.dumps(metadata))


def replace_records(folder: Path, change: Callable[[str, bool, bytes], bytes]) -> None:
    """Rewrite every record of a folder: ``change(key, is_tensor, bytes) -> bytes``."""

    def rewrite(metadata: Any) -> None:
        files: dict[str, bytes] = {}
        sources = {path.name: path.read_bytes() for path in folder.glob("*.distcp")}
        for index, info in metadata.storage_data.items():
            entry = metadata.state_dict_metadata[index.fqn]
            record = sources[info.relative_path][info.offset : info.offset + info.length]
            record = change(index.fqn, isinstance(entry, dcp.TensorStorageMetadata), record)
            before = files.get(info.relative_path, b"")
            info.offset, info.length = len(before), len(record)
            files[info.relative_path] = before + record
        for name, content in files.items():
            (folder / name).write_bytes(content)

    edit_metadata(folder, rewrite)


def poison_metadata(folder: Path, attack: Attack) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(attack))


def poison_common(folder: Path, attack: Attack) -> None:
    """What is no tensor; an object from Megatron-Core 0.17 on."""
    if not (folder / "common.pt").is_file():

        def change(key: str, is_tensor: bool, record: bytes) -> bytes:
            return serialised([{"more": attack}]) if key.startswith("common_state/") else record

        return replace_records(folder, change)
    common = torch.load(folder / "common.pt", weights_only=False)
    torch.save(common | {"more": attack}, folder / "common.pt")


def poison_tensors(folder: Path, attack: Attack) -> None:
    # Padded, so that a record is as long as a tensor's.
    def change(key: str, is_tensor: bool, record: bytes) -> bytes:
        return serialised([attack, torch.zeros(len(record))]) if is_tensor else record

    replace_records(folder, change)


def poison_objects(folder: Path, attack: Attack) -> None:
    def change(key: str, is_tensor: bool, record: bytes) -> bytes:
        return record if is_tensor else serialised([attack])

    replace_records(folder, change)


def poison_extra_states(folder: Path, attack: Attack) -> None:
    """As Transformer Engine keeps them: a pickle as bytes of a tensor, which it would load."""
    hidden = torch.frombuffer(bytearray(pickle.dumps(attack)), dtype=torch.uint8)

    def change(key: str, is_tensor: bool, record: bytes) -> bytes:
        return serialised([hidden]) if "_extra_state" in key else record

    replace_records(folder, change)


def poison_buffers(folder: Path, attack: Attack) -> None:
    """As earlier versions of it did: a file within the file."""
    hidden = io.BytesIO(serialised(attack))

    def change(key: str, is_tensor: bool, record: bytes) -> bytes:
        return serialised([hidden]) if "_extra_state" in key else record

    replace_records(folder, change)


POISONS: dict[str, Callable[[Path, Attack], None]] = {
    "metadata": poison_metadata,
    "common": poison_common,
    "tensors": poison_tensors,
    "objects": poison_objects,
    "extra states": poison_extra_states,
    "buffers": poison_buffers,
}


def poison(folder: Path, kind: str, mark: Path, manifest: str) -> None:
    """Poison an iteration folder; its manifest is "kept" as it was, "renewed" or "removed"."""
    POISONS[kind](folder, Attack(mark))
    if manifest == "removed":
        (folder / "manifest.json").unlink()
    elif manifest == "renewed":
        write_manifest(folder)
