"""Files: JSON, dtype names, and folders that appear complete or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..data import parse_json_text

NAMED_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def parse_dtype(name: str | None) -> torch.dtype | None:
    """``"bfloat16"`` (or bf16, fp16, fp32) -> ``torch.bfloat16``; None stays None."""
    if name is None:
        return None
    short = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}
    dtype = NAMED_DTYPES.get(short.get(name, name))
    if dtype is None:
        raise ValueError(f"dtype {name!r}: use one of {', '.join(NAMED_DTYPES)}")
    return dtype


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: naming the file, if it cannot be read; see also ``parse_json``.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: not readable as JSON ({error}); restore the file") from error
    return parse_json(text, path)


def parse_json(text: bytes, path: Path) -> dict[str, Any]:
    """The object in the bytes of a JSON file.

    Raises:
        ValueError: naming the file, if they hold no object, or ``parse_json_text`` refuses them.
    """
    try:
        content = parse_json_text(text)
    except ValueError as error:
        raise ValueError(f"{path}: not readable as JSON ({error}); restore the file") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}: expected a JSON object, got {type(content).__name__}; restore the file"
        )
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write an object as indented JSON with a final newline."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def with_dtype(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """A ``config.json``'s content that names another dtype."""
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    return config | dict.fromkeys(keys, str(dtype).removeprefix("torch."))


def check_absent(path: Path) -> None:
    """Refuse an output folder that holds something, or that cannot be made.

    Raises:
        ValueError: naming the folder and the remedy.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path}: exists and is not empty; remove it or pass another out_dir=DIR")
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"{parent}: no permission to write; pass another out_dir=DIR")


def partial_path(path: Path) -> Path:
    """Where a folder is written before it is complete: beside it, under a hidden name."""
    path = path.absolute()
    return path.parent / f".{path.name}.partial"


def start_folder(path: Path) -> Path:
    """Make the empty partial folder of ``path``; what an interrupted run left there goes."""
    check_absent(path)
    partial = partial_path(path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def finish_folder(path: Path) -> None:
    """Rename the partial folder to ``path``, in one step; files get ordinary permissions."""
    umask = os.umask(0)
    os.umask(umask)
    for file in partial_path(path).rglob("*"):
        if file.is_file():
            # safetensors makes files that only their owner may read.
            file.chmod(0o666 & ~umask)
    if path.is_dir():
        path.rmdir()
    os.replace(partial_path(path), path.absolute())


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A folder that appears at ``path`` when the block ends well, and not at all otherwise.

    Raises:
        ValueError: if ``path`` holds something, cannot be written, or the disk is full.
    """
    path = Path(path)
    partial = partial_path(path)
    try:
        yield start_folder(path)
        finish_folder(path)
    except OSError as error:
        raise ValueError(f"{path}: writing failed ({error}); nothing was kept") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
