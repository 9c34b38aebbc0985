"""Files as records: one dict per row with the place where it stands."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .problems import Problems

Record = tuple[str, dict[str, Any]]


def read_jsonl_records(path: Path, problems: Problems) -> Iterator[Record]:
    """Objects of a JSONL file, one a line; blank lines are no rows."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8"), object_pairs_hook=_unique_keys)
            except UnicodeDecodeError as error:
                problems.add(where, f"is not UTF-8 (byte {error.start}); re-encode the file")
            except RecursionError:
                problems.add(where, "is nested too deeply")
            except ValueError as error:
                problems.add(where, f"is no JSON: {error}")
            else:
                if isinstance(record, dict):
                    yield where, record
                else:
                    problems.add(where, f"must be an object, got a JSON {type(record).__name__}")


def read_parquet_records(path: Path, problems: Problems) -> Iterator[Record]:
    """Rows of a parquet file, counted from 0.

    Raises:
        ImportError: if pyarrow is not installed.
    """
    pyarrow = _import_pyarrow()
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for record in batch.to_pylist():
                    yield f"{path}, row {number}", record
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        problems.add(str(path), f"is no readable parquet file: {error}")


def parquet_columns(path: Path) -> set[str]:
    """Names of the columns; empty when the file cannot be read."""
    pyarrow = _import_pyarrow()
    try:
        return set(pyarrow.parquet.read_schema(path).names)
    except (pyarrow.ArrowException, OSError):
        return set()


def read_slime_records(path: Path, problems: Problems) -> Iterator[Record]:
    """Samples of a slime debug file, counted from 0, each with its ``rollout_id``.

    Only plain data is loaded: a pickle that names other classes could run code.
    """
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # truncated archives and unsafe pickles raise many kinds
        reason = str(error).strip().split("\n")[0][:200]
        problems.add(
            str(path),
            "does not load as plain data (torch.load with weights_only=True); a pickle that "
            f"names classes can run code and is refused. Write it again from dicts. {reason}",
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
            plain = {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in sample.items()}
            yield where, {"rollout_id": data.get("rollout_id"), **plain}
        else:
            problems.add(where, f"must be a dict, got {type(sample).__name__}")


def _import_pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        message = "parquet files need pyarrow: pip install 'megatron_pg[train]'"
        raise ImportError(message) from error
    return pyarrow


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return record
