"""The files of one iteration folder, and the checksums that are kept and compared with them."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ...files import read_json

MANIFEST = "manifest.json"
_FORMAT = 1


@dataclass(frozen=True)
class FileChecksum:
    """Length and SHA-256 (hexadecimal) of a file."""

    num_bytes: int
    sha256: str


def file_checksum(path: Path) -> FileChecksum:
    """Length and SHA-256 of a file; memory is bounded."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return FileChecksum(file.tell(), digest.hexdigest())


def write_manifest(folder: Path, checksums: Mapping[str, FileChecksum] | None = None) -> None:
    """Keep the checksums of a complete folder's files in it.

    Args:
        folder: of an iteration.
        checksums: by file name; None computes those of all files there.
    """
    if checksums is None:
        files = sorted(path for path in folder.iterdir() if path.name != MANIFEST)
        checksums = {path.name: file_checksum(path) for path in files}
    entries = {
        name: {"bytes": entry.num_bytes, "sha256": entry.sha256}
        for name, entry in sorted(checksums.items())
    }
    with (folder / MANIFEST).open("w") as file:
        file.write(json.dumps({"format": _FORMAT, "files": entries}, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())


class CheckpointFiles:
    """The files of an iteration folder; each is compared with the manifest before it is used.

    A folder without a manifest, as Megatron-LM writes it, has only its names checked: no name leads
    out of the folder.

    Attributes:
        folder: of the iteration.
        checksums: by file name; None without a manifest.

    Raises:
        ValueError: naming the file: a manifest that is damaged, a file that is missing, has another
            length or is not listed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checksums: dict[str, FileChecksum] | None = None
        if os.path.lexists(folder / MANIFEST):
            self.checksums = _read_manifest(self.path(MANIFEST))
        self._verified: set[str] = set()
        if self.checksums is not None:
            self._check_names(self.checksums)

    @property
    def names(self) -> list[str]:
        """Names of all files but the manifest, sorted."""
        try:
            return sorted(path.name for path in self.folder.iterdir() if path.name != MANIFEST)
        except OSError as error:
            raise ValueError(
                f"{self.folder}: not readable ({error.strerror}); mend its permissions, or take "
                "another checkpoint"
            ) from error

    def path(self, name: str) -> Path:
        """Where a file is.

        Raises:
            ValueError: if the name, or a link, leads out of the folder, or if nothing is there.
        """
        path = self.folder / name
        try:
            is_inside = is_file_name(name) and path.resolve().parent == self.folder.resolve()
            is_there = path.is_file()
        # Links may lead in a circle.
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{path}: not readable ({error}); restore the file") from error
        if not is_inside:
            raise ValueError(
                f"{self.folder}: the file {name[:200]!r} lies outside of this folder; a checkpoint "
                "holds its files itself, restore them there"
            )
        if not is_there:
            raise ValueError(f"{path}: missing; the checkpoint is incomplete, restore the file")
        return path

    def read(self, name: str) -> bytes:
        """All bytes of a file, exactly those that the manifest lists.

        Raises:
            ValueError: naming the file, if they differ or cannot be read.
        """
        path = self.path(name)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ValueError(f"{path}: not readable ({error.strerror}); restore it") from error
        self._compare(name, FileChecksum(len(content), hashlib.sha256(content).hexdigest()))
        return content

    def open(self, name: str) -> BinaryIO:
        """A file for reading, compared with the manifest when it is first asked for.

        Raises:
            ValueError: naming the file, if it differs or cannot be read.
        """
        self.verify([name])
        try:
            return self.path(name).open("rb")
        except OSError as error:
            raise ValueError(
                f"{self.folder / name}: not readable ({error.strerror}); restore it"
            ) from error

    def verify(self, names: Iterable[str]) -> None:
        """Compare files with the manifest, each once.

        Raises:
            ValueError: naming the file, if one differs or cannot be read.
        """
        for name in names:
            path = self.path(name)
            if self.checksums is None or name in self._verified:
                continue
            try:
                self._compare(name, file_checksum(path))
            except OSError as error:
                raise ValueError(f"{path}: not readable ({error.strerror}); restore it") from error

    def accept(self) -> None:
        """Take all files as compared: other processes have done so."""
        self._verified.update(self.checksums or ())

    def _compare(self, name: str, found: FileChecksum) -> None:
        if self.checksums is None or name == MANIFEST:
            return
        if found != self.checksums.get(name):
            raise ValueError(
                f"{self.folder / name}: its bytes are not those that {MANIFEST} lists; the file "
                "was damaged or edited, restore it or take another checkpoint"
            )
        self._verified.add(name)

    def _check_names(self, checksums: Mapping[str, FileChecksum]) -> None:
        manifest = self.folder / MANIFEST
        for name, listed in checksums.items():
            num_bytes = self.path(name).stat().st_size
            if num_bytes != listed.num_bytes:
                raise ValueError(
                    f"{self.folder / name}: {num_bytes} bytes, {manifest} lists "
                    f"{listed.num_bytes}; the file was cut off or replaced, restore it or take "
                    "another checkpoint"
                )
        for name in self.names:
            if name not in checksums:
                raise ValueError(
                    f"{self.folder / name}: not listed in {manifest}; it is no part of the "
                    "checkpoint, move it elsewhere"
                )


def is_file_name(name: Any) -> bool:
    """Whether something is the name of a file in a folder, and no path."""
    if not isinstance(name, str) or "\0" in name or len(name) > 255:
        return False
    return name not in ("", ".", "..") and not re.search(r"[/\\]", name)


def _read_manifest(path: Path) -> dict[str, FileChecksum]:
    content = read_json(path)
    files = content.get("files")
    if content.keys() != {"format", "files"} or content["format"] != _FORMAT:
        raise ValueError(
            f"{path}: holds {sorted(content)} in format {content.get('format')!r}, this version "
            f"reads 'files' in format {_FORMAT}; restore the file, or read it with the version "
            "that wrote it"
        )
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{path}: lists no files; restore it")
    checksums = {}
    for name, entry in files.items():
        if not is_file_name(name) or not _is_entry(entry):
            raise ValueError(
                f"{path}: {name[:200]!r} is listed as {str(entry)[:200]}, must be a file name with "
                "its 'bytes' and 'sha256'; restore the file"
            )
        checksums[name] = FileChecksum(entry["bytes"], entry["sha256"])
    return checksums


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or entry.keys() != {"bytes", "sha256"}:
        return False
    digest = entry["sha256"]
    return (
        type(entry["bytes"]) is int
        and isinstance(digest, str)
        and bool(re.fullmatch("[0-9a-f]{64}", digest))
    )
