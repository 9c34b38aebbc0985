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

NAMED_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
# What makes a Hugging Face folder usable besides its weights.
SIDE_FILES = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("chat_template.jinja", "chat_template.json"),
)


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
        ValueError: naming the file, if it cannot be read or holds no object.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: not readable as JSON ({error}); restore the file") from error
    return parse_json(text, path)


def parse_json(text: bytes, path: Path) -> dict[str, Any]:
    """The object in the bytes of a JSON file.

    Raises:
        ValueError: naming the file, if they are no JSON or hold no object.
    """
    try:
        content = json.loads(text)
    # Deep nesting ends in a RecursionError.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error}); restore the file") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}: expected a JSON object, got {type(content).__name__}; restore the file"
        )
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write an object as indented JSON with a final newline."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def copy_side_files(source: Path, target: Path) -> None:
    """Copy tokenizer, chat template and generation config, those that exist."""
    for name in SIDE_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def has_tokenizer(folder: Path) -> bool:
    """Whether one of the files is there from which ``transformers`` makes a tokenizer."""
    vocabularies = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
    return any((folder / name).is_file() for name in vocabularies)


def require_absent(path: Path) -> None:
    """Refuse an output folder that holds something, or that cannot be made.

    Raises:
        ValueError: naming the folder and the remedy.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path}: exists and is not empty; remove it or name another --out")
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"{parent}: no permission to write; choose another --out")


def partial_path(path: Path) -> Path:
    """Where a folder is written before it is complete: beside it, under a hidden name."""
    path = path.absolute()
    return path.parent / f".{path.name}.partial"


def start_folder(path: Path) -> Path:
    """Make the empty partial folder of ``path``; what an interrupted run left there goes."""
    require_absent(path)
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
