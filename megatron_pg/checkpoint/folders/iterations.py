"""Where things are in a Megatron-LM checkpoint folder.

::

    DIR/latest_checkpointed_iteration.txt     "release" or a number
    DIR/release/ or DIR/iter_0000100/         .metadata, *.distcp, common.pt, metadata.json
                                              or mp_rank_00[_000]/model_optim_rng.pt (legacy)
    DIR/huggingface/                          config.json and tokenizer of the model
    DIR/huggingface/mtp/                      tensors of layers that are not built
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from ..description import parse_hf_config
from ..files import read_json, with_dtype, write_json
from .huggingface import copy_side_files, open_carried, write_carried

TRACKER = "latest_checkpointed_iteration.txt"
HF_FOLDER = "huggingface"
_EITHER = (
    "a Hugging Face folder, or a Megatron checkpoint: the folder that holds its tracker, or one "
    "iter_XXXXXXX/ or release/"
)


def iteration_name(iteration: int | None) -> str:
    """``iter_0000100``, or ``release`` for weights that no training produced (None)."""
    return "release" if iteration is None else f"iter_{iteration:07d}"


def find_iteration(path: str | Path) -> Path:
    """The folder with the data: the tracker's iteration of ``path``, or ``path`` itself.

    Raises:
        ValueError: naming the file: no folder, no tracker, or a tracker that points nowhere.
    """
    root = Path(path)
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder; pass a Megatron checkpoint folder")
    tracker = root / TRACKER
    if not tracker.is_file():
        if _is_iteration(root):
            return root
        if (root / "config.json").is_file():
            raise ValueError(f"{root}: a Hugging Face folder; pass a Megatron checkpoint folder")
        raise ValueError(
            f"{tracker}: missing; pass the folder that holds it, or one iter_XXXXXXX/ or release/"
        )
    folder = root / iteration_name(read_tracker(root))
    if not folder.is_dir():
        raise ValueError(
            f"{folder}: missing, although {tracker} names it; restore it, or write the number of "
            "another iteration into the tracker"
        )
    return folder


def _is_iteration(folder: Path) -> bool:
    parts = ("metadata.json", ".metadata", "common.pt")
    return any((folder / name).is_file() for name in parts) or any(folder.glob("mp_rank_*"))


def read_tracker(root: Path) -> int | None:
    """The iteration that the tracker of ``root`` names; None for a release.

    Raises:
        ValueError: naming the file, if it holds anything else.
    """
    tracker = root / TRACKER
    if not tracker.is_file():
        raise ValueError(f"{tracker}: no file; write the number of an iteration into one")
    try:
        content = tracker.read_bytes().decode(errors="replace").strip()
    except OSError as error:
        raise ValueError(f"{tracker}: not readable ({error.strerror}); write it anew") from error
    if content == "release":
        return None
    # A path here would lead out of the folder.
    if not re.fullmatch("[0-9]{1,15}", content):
        raise ValueError(
            f"{tracker}: holds {content[:40]!r}, must be 'release' or a number; write the number "
            "of an iteration that is there"
        )
    return int(content)


def is_hf_folder(path: Path) -> bool:
    """Whether a folder that may be of either kind is Hugging Face's.

    Raises:
        ValueError: if there is no such folder, or none of either kind, or it is one of both.
    """
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder; pass {_EITHER}")
    if not (path / "config.json").is_file():
        if not ((path / TRACKER).is_file() or _is_iteration(path)):
            raise ValueError(f"{path}: neither config.json nor {TRACKER} is in it; pass {_EITHER}")
        return False
    for name in (TRACKER, "common.pt", "metadata.json"):
        if (path / name).is_file():
            raise ValueError(
                f"{path}: holds config.json of a Hugging Face folder and {name} of a Megatron "
                "checkpoint; keep them in two folders, or pass that of the iteration"
            )
    return True


def write_tracker(root: Path, iteration: int | None) -> None:
    """Point the tracker to an iteration."""
    (root / TRACKER).write_text("release" if iteration is None else str(iteration))


def write_hf_metadata_folder(root: Path, source: Path, dtype: torch.dtype | None = None) -> None:
    """Keep a model folder's configuration and tokenizer beside the weights, to leave with them.

    The configuration names the weights' ``dtype`` where one is given. Tensors of layers that are
    not built are kept too.
    """
    folder = root / HF_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    config = read_json(source / "config.json")
    write_json(folder / "config.json", with_dtype(config, dtype) if dtype else config)
    copy_side_files(source, folder)
    write_carried(open_carried(source, parse_hf_config(config, str(source))), folder)


def find_hf_config(iteration_folder: Path, hf_config: str | Path | None) -> Path | None:
    """The folder of configuration and tokenizer: the given one, or the one kept beside."""
    if hf_config is not None:
        folder = Path(hf_config)
        parse_hf_config(read_json(folder / "config.json"), str(folder / "config.json"))
        return folder
    for root in (iteration_folder, iteration_folder.parent):
        if (root / HF_FOLDER / "config.json").is_file():
            return root / HF_FOLDER
    return None
