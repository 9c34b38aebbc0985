"""What is in a checkpoint, without a model and without unpickling foreign objects."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .contents import is_optimizer_state
from .hf_folder import HfFolder
from .layout import find_iteration, refuse_both_kinds
from .torch_dist import TorchDistReader, is_torch_dist

_SHOWN_ARGS = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups"),
    *("kv_channels", "num_experts", "vocab_size", "padded_vocab_size", "rotary_base"),
    *("max_position_embeddings", "untie_embeddings_and_output_weights", "qk_layernorm"),
    *("add_qkv_bias", "tensor_model_parallel_size", "pipeline_model_parallel_size"),
    *("virtual_pipeline_model_parallel_size", "params_dtype", "consumed_train_samples"),
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
        """Of all tensors."""
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
    if (path / "config.json").is_file():
        refuse_both_kinds(path)
        hf = HfFolder(path)
        facts = dict(vars(hf.model))
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
        args = vars(common["args"]) if common.get("args") is not None else {}
        facts |= {key: args[key] for key in _SHOWN_ARGS if key in args}
        facts["common state"] = ", ".join(sorted(map(str, common)))
    except ValueError as error:
        notes.append(str(error))
    facts["checksums"] = (
        "none" if reader.files.checksums is None else "there; only those of descriptions compared"
    )
    facts["optimizer state"] = any(map(is_optimizer_state, tensors))
    objects = tuple(reader.objects)
    return CheckpointSummary("torch_dist", folder, facts, tensors, objects, tuple(notes))
