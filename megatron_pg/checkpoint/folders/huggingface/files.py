"""Which safetensors files of a Hugging Face folder hold its model, if that is beyond doubt."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from ...files import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# The same weights once more in the format of Mistral's own programs.
_OTHER_FORMAT = "consolidated*.safetensors"


def find_weight_files(folder: Path) -> tuple[list[Path], dict[str, Path] | None]:
    """The files to read, and what the index says: tensor name -> file (None without an index).

    Equals what ``transformers`` reads, where that is all that the folder holds.

    Raises:
        ValueError: naming the files: none, an index that is damaged or leaves the folder, or more
            weights than those that the index (or the single file) stands for.
    """
    index, single = folder / INDEX, folder / SINGLE
    weight_map = _read_index(folder) if index.is_file() else None
    if weight_map is None and not single.is_file():
        raise ValueError(
            f"{folder}: neither {SINGLE} nor {INDEX}; other weight formats (pytorch_model.bin) are "
            "not read: save the model as safetensors"
        )
    files = [single] if weight_map is None else sorted(set(weight_map.values()))
    if single.is_file() and files != [single]:
        named = next(path.name for path in files if path != single)
        raise ValueError(
            f"{folder}: both {SINGLE} and {INDEX}, which names {named}; they are two sets of "
            "weights: remove the one that is out of date"
        )
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        raise ValueError(
            f"{adapter}: an adapter beside the weights, which transformers applies and a "
            "conversion does not; merge it into the model, or remove it"
        )
    other = set(folder.glob("*.safetensors")) - set(files) - set(folder.glob(_OTHER_FORMAT))
    if other:
        named = f"{INDEX} does not name it" if weight_map else f"it lies beside {SINGLE}"
        raise ValueError(
            f"{folder}: {', '.join(sorted(path.name for path in other)[:5])}: {named}; remove it, "
            "or download the index that belongs to it"
        )
    for path in files:
        if not path.is_file():
            raise ValueError(f"{path}: missing, although {INDEX} names it; download it again")
    return files, weight_map


def _read_index(folder: Path) -> dict[str, Path]:
    path = folder / INDEX
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path}: no weight_map; the index is damaged, download it again")
    return {name: _inside(folder, file, path, name) for name, file in weight_map.items()}


def _inside(folder: Path, file: Any, index: Path, name: str) -> Path:
    """A file by the name that an index gives it, which must lie in the index's folder.

    The file itself may be a link: that is how a hub's cache stores it.
    """
    plain = isinstance(file, str) and "\0" not in file and "\\" not in file
    parts = PurePosixPath(file).parts if plain else ()
    if not parts or "/".join(parts) != file or ".." in parts or file.startswith("/"):
        raise ValueError(
            f"{index}: {file!r}, the file of {name}, is no file name within the folder; put the "
            "shards beside the index and name them so"
        )
    below = folder
    for part in parts[:-1]:
        below /= part
        if below.is_symlink():
            raise ValueError(f"{below}: a link out of the folder, named by {index}; copy the files")
    return folder.joinpath(*parts)
