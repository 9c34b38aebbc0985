"""Tensors of layers that are not built (multi-token prediction): they go along bit by bit.

A Hugging Face folder has them among its weights. Beside a Megatron checkpoint they lie in a folder
of their own, within that of the configuration.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ...description import HfModel
from .files import INDEX, SINGLE
from .tensors import TensorFiles
from .writing import HfWriter, make_weight_files, write_index

FOLDER = "mtp"


def _no_tensor(name: str) -> Tensor:
    raise KeyError(name)


@dataclass(frozen=True)
class CarriedTensors:
    """By name, as stored; none where a folder has none.

    Attributes:
        shapes: of every tensor.
        dtypes: likewise.
        read: one of them.
    """

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    read: Callable[[str], Tensor] = _no_tensor

    @classmethod
    def of(cls, files: TensorFiles, model: HfModel) -> CarriedTensors:
        """Those among the tensors of files."""
        shapes = {name: x for name, x in files.shapes.items() if model.goes_along(name)}
        return cls(shapes, {name: files.dtypes[name] for name in shapes}, files.read)


def open_carried(folder: Path | None, model: HfModel) -> CarriedTensors:
    """Those of a model's folder, whether it holds all weights or the configuration alone.

    Raises:
        ValueError: naming the file: damaged files, or a tensor that is of no such layer.
    """
    if folder is None or not model.may_carry:
        return CarriedTensors()
    kept = folder / FOLDER
    if kept.is_symlink():
        raise ValueError(f"{kept}: a link out of the folder; put the folder itself there")
    if not kept.is_dir():
        if not any((folder / name).is_file() for name in (INDEX, SINGLE)):
            return CarriedTensors()
        # All others are the concern of who reads the weights.
        files = TensorFiles(folder, skip=lambda name: not model.goes_along(name))
        return CarriedTensors.of(files, model)
    files = TensorFiles(kept)
    carried = CarriedTensors.of(files, model)
    for name in files.shapes.keys() - carried.shapes.keys():
        raise ValueError(
            f"{files.path(name)}: tensor {name} is of no layer beyond the model's "
            f"{model.num_layers}; remove it"
        )
    return carried


def write_carried(carried: CarriedTensors, folder: Path) -> None:
    """Keep them within the folder of a configuration; nothing where there are none."""
    if not carried.shapes:
        return
    out = folder / FOLDER
    out.mkdir()
    files = make_weight_files(carried.shapes, carried.dtypes)
    writer = HfWriter(out, files, carried.dtypes)
    for name in carried.shapes:
        writer.add(name, carried.read(name))
    writer.finish()
    write_index(out, files)
