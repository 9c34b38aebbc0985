"""What is in a checkpoint, without a model and without unpickling foreign objects."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from .arguments import LAYOUT_ARGUMENTS
from .families import FAMILIES
from .folders import (
    HfFolder,
    TorchDistReader,
    find_iteration,
    is_hf_folder,
    is_optimizer_state,
    is_torch_dist,
)

# Arguments that are shown besides those that are fields of some family.
_SHOWN_ARGS = (
    *LAYOUT_ARGUMENTS,
    *("max_position_embeddings", "untie_embeddings_and_output_weights", "qk_layernorm"),
    *("add_qkv_bias", "padded_vocab_size", "params_dtype"),
    *("consumed_train_samples", "hf_architecture"),
)


@dataclass(frozen=True)
class CheckpointSummary:
    """What ``inspect_checkpoint`` finds.

    Attributes:
        kind: "huggingface", "torch_dist" or "legacy".
        folder: where the data is.
        facts: layout, architecture, iteration and the like, in order.
        tensors: name -> (shape, dtype); empty for legacy folders, which need unpickling.
        objects: names of pickled objects, which were not opened.
        notes: what could not be read, and why.
    """

    kind: str
    folder: Path
    facts: dict[str, Any]
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]
    objects: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Size of all tensors, of the optimizer's too."""
        return sum(torch.Size(s).numel() * d.itemsize for s, d in self.tensors.values())

    @property
    def num_parameters(self) -> int:
        """Elements of the model's tensors, padding of the vocabulary included."""
        model = {k: v for k, v in self.tensors.items() if not is_optimizer_state(k)}
        return sum(torch.Size(shape).numel() for shape, _ in model.values())


def inspect_checkpoint(path: str | Path) -> CheckpointSummary:
    """Describe a Hugging Face folder or a Megatron checkpoint; only descriptions are read.

    Raises:
        ValueError: naming the file: neither kind, or damaged.
        NotImplementedError: a Hugging Face folder of an unsupported architecture or setting.
    """
    path = Path(path)
    if is_hf_folder(path):
        hf = HfFolder(path)
        facts = dict(architecture=hf.model.architecture, **vars(hf.model))
        tensors = {name: (shape, hf.dtypes[name]) for name, shape in hf.shapes.items()}
        return CheckpointSummary("huggingface", path, facts, tensors)
    folder = find_iteration(path)
    if not is_torch_dist(folder):
        files = sorted(folder.glob("mp_rank_*/model_optim_rng.pt"))
        if not files:
            raise ValueError(f"{folder}: neither torch_dist, nor legacy, nor Hugging Face")
        facts = {str(file.relative_to(folder)): f"{file.stat().st_size} bytes" for file in files}
        note = "legacy files are pickles; they were not opened, because that runs their code"
        return CheckpointSummary("legacy", folder, facts, {}, notes=(note,))
    reader = TorchDistReader(folder)
    tensors = {key: (tensor.shape, tensor.dtype) for key, tensor in reader.tensors.items()}
    facts, notes = {}, []
    try:
        common = reader.read_common()
        facts["iteration"] = common.get("iteration")
        facts["common state"] = ", ".join(sorted(map(str, common)))
        args = vars(common["args"]) if common.get("args") is not None else {}
        names = {field.name for family in FAMILIES.values() for field in fields(family)}
        facts |= {key: args[key] for key in args if key in names or key in _SHOWN_ARGS}
    except ValueError as error:
        notes.append(str(error))
    facts["checksums"] = (
        "none" if reader.files.checksums is None else "there; only those of descriptions compared"
    )
    facts["optimizer state"] = any(map(is_optimizer_state, tensors))
    objects = tuple(reader.objects)
    return CheckpointSummary("torch_dist", folder, facts, tensors, objects, tuple(notes))
