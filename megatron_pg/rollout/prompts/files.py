"""Files that names, patterns and folders mean, and their rows."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ...data import (
    Problems,
    read_json_records,
    read_jsonl_records,
    read_parquet_records,
)

Record = tuple[str, dict[str, Any]]

RECORD_READERS: dict[str, Callable[[Path, Problems], Iterator[Record]]] = {
    ".jsonl": read_jsonl_records,
    ".jsonl.gz": read_jsonl_records,
    ".json": read_json_records,
    ".json.gz": read_json_records,
    ".parquet": read_parquet_records,
}
"""How the rows of a file are read, by its suffix."""


def find_files(entries: Sequence[str], problems: Problems) -> list[Path]:
    """The files that entries name: themselves, what a pattern matches, what a folder holds.

    A pattern or a folder gives its files sorted by name; of a folder those of a known suffix, at
    any depth, hidden ones left out. A file that is named twice is a problem.
    """
    found: dict[Path, Path] = {}
    for file in (file for entry in entries for file in _files_of(entry, problems)):
        first = found.setdefault(file.resolve(), file)
        if first is not file:
            problems.add(str(file), f"is named twice (as {first}); name it once")
    return list(found.values())


def read_records(file: Path, problems: Problems) -> Iterator[Record]:
    """Rows of a file with the place where each stands."""
    suffix = known_suffix(file)
    if suffix is None:
        known = ", ".join(RECORD_READERS)
        problems.add(str(file), f"has no known suffix ({known}); convert or rename it")
        return
    yield from RECORD_READERS[suffix](file, problems)


def known_suffix(file: Path) -> str | None:
    """The suffix by which a file is read; None if there is no reader for it."""
    return next((suffix for suffix in RECORD_READERS if file.name.endswith(suffix)), None)


def _files_of(entry: str, problems: Problems) -> list[Path]:
    path = Path(entry).expanduser()
    if path.is_dir():
        held = [
            one
            for one in sorted(path.rglob("*"))
            if not any(part.startswith(".") for part in one.relative_to(path).parts)
        ]
        for link in (one for one in held if one.is_symlink() and one.is_dir()):
            problems.add(str(link), "is a link to a folder, which is not followed; name the folder")
        files = [one for one in held if one.is_file() and known_suffix(one)]
        if not files:
            problems.add(entry, f"holds no file of a known suffix ({', '.join(RECORD_READERS)})")
        return files
    # A name may hold such signs itself.
    if path.is_file() or not glob.has_magic(entry):
        if not path.is_file():
            problems.add(entry, "is missing")
            return []
        return [path]
    files = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
    files = [file for file in files if file.is_file()]
    if not files:
        problems.add(entry, "matches no file")
    return files
