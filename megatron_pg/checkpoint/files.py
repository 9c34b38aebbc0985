"""What the files of a checkpoint have in common: JSON, and the names of dtypes."""

from __future__ import annotations

import json
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
