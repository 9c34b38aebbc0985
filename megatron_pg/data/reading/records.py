"""Files as records: one dict per row with the place where it stands."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch

from ..json_text import unique_keys
from ..values import TOO_DEEP, nesting_problem
from .problems import Problems

Record = tuple[str, dict[str, Any]]
Reader = Callable[[Path, Problems], Iterator[Record]]

# What numpy's numbers and arrays of them are pickled as.
_ARRAYS: list[Any] = [
    np.ndarray,
    np.dtype,
    np.array([0]).__reduce__()[0],
    np.float64(0).__reduce__()[0],
    *{type(np.dtype(kind)) for kind in "?bhilqBHILQefd"},
]
# Some editors write it before the first line, and joined files keep it.
_MARK = b"\xef\xbb\xbf"
_PANDAS_INDEX = re.compile(r"__index_level_\d+__$")


def _shallow(read: Reader) -> Reader:
    """A reader without the records that are nested too deeply, which become problems."""

    @wraps(read)
    def checked(path: Path, problems: Problems) -> Iterator[Record]:
        for where, record in read(path, problems):
            if wrong := nesting_problem(record):
                problems.add(where, wrong)
            else:
                yield where, record

    return checked


@_shallow
def read_jsonl_records(path: Path, problems: Problems) -> Iterator[Record]:
    """Objects of a JSONL file, gzipped or not; blank lines are no rows."""
    try:
        with _open_lines(path) as file:
            is_first = True
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                record = _parse_line(line)
                if isinstance(record, dict):
                    yield f"{path}, line {number}", record
                else:
                    problems.add(f"{path}, line {number}", record)
                    if is_first and _goes_on(line):
                        return
                is_first = False
    except (OSError, EOFError, zlib.error) as error:
        problems.add(str(path), f"cannot be read to its end ({error}); copy it again")


@_shallow
def read_json_records(path: Path, problems: Problems) -> Iterator[Record]:
    """Objects of a JSON array, counted from 0; of a JSONL file where there is no array."""
    try:
        with _open_lines(path) as file:
            start = file.read(64)
            is_array = start.removeprefix(_MARK).lstrip().startswith(b"[")
            content = start + file.read() if is_array else b""
    except (OSError, EOFError, zlib.error) as error:
        problems.add(str(path), f"cannot be read to its end ({error}); copy it again")
        return
    if not is_array:
        yield from read_jsonl_records(path, problems)
        return
    try:
        text = content.removeprefix(_MARK).decode("utf-8")
        records = json.loads(text, object_pairs_hook=unique_keys)
    except UnicodeDecodeError as error:
        problems.add(str(path), f"is not UTF-8 (byte {error.start}); re-encode the file")
        return
    except RecursionError:
        problems.add(str(path), TOO_DEEP)
        return
    except ValueError as error:
        problems.add(str(path), f"is no JSON: {error}")
        return
    for number, record in enumerate(records):
        if isinstance(record, dict):
            yield f"{path}, item {number}", record
        else:
            told = f"must be an object, got a JSON {type(record).__name__}"
            problems.add(f"{path}, item {number}", told)


@_shallow
def read_parquet_records(path: Path, problems: Problems) -> Iterator[Record]:
    """Rows of a parquet file, counted from 0; the index that pandas stores is no field.

    Raises:
        ImportError: if pyarrow is not installed.
    """
    pyarrow = _import_pyarrow()
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if twice := sorted({name for name in names if names.count(name) > 1}):
                problems.add(str(path), f"has the column {twice[0]!r} twice; rename or drop one")
                return
            number = 0
            for batch in file.iter_batches():
                columns = [name for name in batch.schema.names if not _PANDAS_INDEX.match(name)]
                for record in batch.select(columns).to_pylist():
                    yield f"{path}, row {number}", record
                    number += 1
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        problems.add(str(path), f"is no readable parquet file: {error}")


def parquet_columns(path: Path) -> set[str]:
    """Names of the columns; empty when the file cannot be read."""
    pyarrow = _import_pyarrow()
    try:
        return set(pyarrow.parquet.read_schema(path).names)
    except (pyarrow.ArrowException, OSError):
        return set()


@_shallow
def read_slime_records(path: Path, problems: Problems) -> Iterator[Record]:
    """Samples of a slime debug file, counted from 0, each beside the file's ``rollout_id``.

    Only plain data is loaded, numpy's numbers included: a pickle that names other classes could
    run code. Arrays of several dims (miles stores routes and top-k choices) stay what they are.
    """
    try:
        with torch.serialization.safe_globals(_ARRAYS):
            data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # truncated archives and unsafe pickles raise many kinds
        # torch's own text recommends what would execute the file.
        told = re.search(r"GLOBAL \S+|failed finding.*|[Ii]nvalid .*", str(error))
        problems.add(
            str(path),
            "does not load as plain data (torch.load with weights_only=True); a pickle that "
            "names classes can run code and is refused. Write it from dicts, lists and numbers"
            f" ({told[0] if told else type(error).__name__})",
        )
        return
    samples = data.get("samples") if isinstance(data, dict) else None
    if not isinstance(samples, list):
        problems.add(
            str(path), "is no slime rollout: it must hold {'rollout_id', 'samples': [...]}"
        )
        return
    for number, sample in enumerate(samples):
        where = f"{path}, sample {number}"
        if isinstance(sample, dict):
            plain = {name: _as_plain(value) for name, value in sample.items()}
            yield where, {"rollout_id": data.get("rollout_id"), "sample": plain}
        else:
            problems.add(where, f"must be a dict, got {type(sample).__name__}")


def _as_plain(value: Any) -> Any:
    is_flat = isinstance(value, torch.Tensor | np.ndarray | np.generic) and value.ndim < 2
    return value.tolist() if is_flat else value


def _open_lines(path: Path) -> IO[bytes]:
    with path.open("rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
    return cast("IO[bytes]", gzip.open(path, "rb")) if is_gzip else path.open("rb")


def _parse_line(line: bytes) -> dict[str, Any] | str:
    """The object of a line, or what is wrong with it."""
    line = line.removeprefix(_MARK).strip()
    try:
        record = json.loads(line.decode("utf-8"), object_pairs_hook=unique_keys)
    except UnicodeDecodeError as error:
        return f"is not UTF-8 (byte {error.start}); re-encode the file"
    except RecursionError:
        return TOO_DEEP
    except ValueError as error:
        if b"\0" in line:
            return "is not UTF-8 but perhaps UTF-16; re-encode the file"
        if line == b"{":
            return "begins an object of several lines; write one object a line"
        if not line.startswith(b"["):
            return f"is no JSON: {error}"
        record = []
    if isinstance(record, dict):
        return record
    hint = " (JSON array: one object a line)" if isinstance(record, list) else ""
    return f"must be an object, got a JSON {type(record).__name__}{hint}"


def _goes_on(line: bytes) -> bool:
    """Whether a wrong first line makes all that follow wrong for the same reason."""
    return line.lstrip(_MARK + b" \t").startswith(b"[") or b"\0" in line or line.strip() == b"{"


def _import_pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        message = "parquet files need pyarrow: pip install 'megatron_pg[train]'"
        raise ImportError(message) from error
    return pyarrow
