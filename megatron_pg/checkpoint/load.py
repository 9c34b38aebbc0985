"""Weights into a running, sharded ``GPTModel``, from a folder of either kind."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .description import HfModel
from .folders import HfFolder, WeightSource, is_extra_state
from .table import FUSED_NORMS, RENAMED, copy_into_shard

_DOWN_PROJECTION = re.compile(r"\.linear_(q|kv)_down_proj\.weight$")
# How experts are run and balanced is the caller's choice.
_RUN = {
    *("moe_router_load_balancing_type", "moe_token_dispatcher_type", "moe_grouped_gemm"),
    *("moe_router_bias_update_rate", "moe_router_dtype"),
}


def load_hf(models: Sequence[torch.nn.Module], hf_dir: str | Path) -> HfModel:
    """Load a Hugging Face folder into this rank's model chunks.

    Equals loading the whole model on one rank and resharding it. Every rank reads only its own
    rows from the files; nothing is communicated. An optimizer that was built before keeps its
    own copies: call its ``reload_model_params()`` afterwards.

    Args:
        models: the chunks of this pipeline rank (one, or one per virtual stage), bare or wrapped
            (``DistributedDataParallel``, ``Float16Module``), on any device, with the local or the
            Transformer Engine spec.
        hf_dir: folder with ``config.json`` and safetensors; cast to the parameters' dtype.

    Returns:
        What the folder's ``config.json`` says.

    Raises:
        ValueError: naming the file: a folder that is incomplete or damaged, or a model that was
            built for another configuration. Nothing has been written to the model then.
        NotImplementedError: an unsupported architecture or setting, or experts in the layout of
            the legacy grouped GEMM; likewise.
    """
    folder = HfFolder(hf_dir)
    load_weights(models, folder)
    return folder.model


def load_weights(models: Sequence[torch.nn.Module], source: WeightSource) -> None:
    """As ``load_hf``, from an opened Hugging Face folder or Megatron checkpoint of any layout.

    Raises:
        ValueError: a model that was built for another configuration; it is left as it was.
        NotImplementedError: experts in the layout of the legacy grouped GEMM; likewise.
    """
    chunks = [unwrap(model) for model in models]
    for chunk in chunks:
        check_built_for(chunk, source.model, source.path)
    with torch.no_grad():
        for chunk in chunks:
            table = source.model.weight_table(chunk.vocab_size)
            for name, parameter in named_weights(chunk):
                rank, size = shard_position(chunk, name, parameter)
                shard = table.shard(global_name(chunk, name), rank, size)
                copy_into_shard(parameter.data, shard, source.read, name)


def unwrap(model: Any) -> Any:
    """The ``GPTModel`` inside ``DistributedDataParallel`` and ``Float16Module``."""
    while not hasattr(model, "decoder") and hasattr(model, "module"):
        model = model.module
    return model


def named_weights(chunk: Any) -> list[tuple[str, Tensor]]:
    """Parameters and buffers that a checkpoint holds, by local name, in the model's order.

    Making the state dict returns biases of experts to fp32, whatever dtype they were cast to.
    """
    state = chunk.state_dict(keep_vars=True)
    return [(name, tensor) for name, tensor in state.items() if not is_extra_state(name)]


def is_expert(name: str) -> bool:
    """Whether a parameter belongs to one expert."""
    return ".mlp.experts." in name


def shard_position(chunk: Any, name: str, weight: Tensor) -> tuple[int, int]:
    """Rank and size of the group over which a parameter is cut.

    What leads to a latent is cut by the local spec, and whole on every rank by Transformer
    Engine's.
    """
    groups = chunk.pg_collection
    group = groups.expt_tp if is_expert(name) else groups.tp
    if _DOWN_PROJECTION.search(name) and not getattr(weight, "tensor_model_parallel", False):
        return 0, 1
    return group.rank(), group.size()


def global_name(chunk: Any, name: str) -> str:
    """Local-spec name with the layer and the expert numbered over the whole model."""
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
    if not match:
        return name
    layer = chunk.decoder.layers[int(match[1])]
    leaf = (FUSED_NORMS | RENAMED).get(match[2], match[2])
    if leaf in ("mlp.experts.weight1", "mlp.experts.weight2"):
        raise NotImplementedError(
            f"{name}: the legacy grouped GEMM layout of experts is not supported; set "
            "moe_grouped_gemm=False or use Transformer Engine's grouped layers"
        )
    leaf = re.sub(
        r"^mlp\.experts\.(linear_fc[12])\.(weight|bias)(\d+)$",
        r"mlp.experts.local_experts.\3.\1.\2",
        leaf,
    )
    expert = re.fullmatch(r"(mlp\.experts\.local_experts\.)(\d+)(\..+)", leaf)
    if expert:
        number = int(expert[2]) + chunk.pg_collection.ep.rank() * layer.mlp.num_local_experts
        leaf = f"{expert[1]}{number}{expert[3]}"
    return f"decoder.layers.{layer.layer_number - 1}.{leaf}"


def gathered_names(chunk: Any, name: str) -> list[str]:
    """Global names of what the expert-parallel ranks hold under one local name."""
    own = global_name(chunk, name)
    if not is_expert(name):
        return [own]
    layer = int(own.split(".")[2])
    local = next(x for x in chunk.decoder.layers if x.layer_number - 1 == layer)
    count, groups = local.mlp.num_local_experts, chunk.pg_collection
    head, number, tail = re.fullmatch(r"(.+local_experts\.)(\d+)(\..+)", own).groups()  # type: ignore[union-attr]
    first = int(number) - groups.ep.rank() * count
    return [f"{head}{first + rank * count}{tail}" for rank in range(groups.ep.size())]


def _built(chunk: Any, hf_model: HfModel) -> dict[str, Any]:
    """What the model was given beside its configuration, by the names of ``gpt_model``."""
    built = dict(
        position_embedding_type=chunk.position_embedding_type,
        share_embeddings_and_output_weights=chunk.share_embeddings_and_output_weights,
    )
    pattern = getattr(chunk, "hybrid_layer_pattern", None)
    if hf_model.is_hybrid:
        return built | dict(hybrid_layer_pattern=pattern and pattern.replace("|", ""))
    if pattern is not None:
        raise ValueError(f"{hf_model.architecture} is no HybridModel; build a GPTModel")
    built |= dict(
        rotary_base=chunk.rotary_base,
        rotary_percent=chunk.rotary_percent,
        rope_scaling=bool(chunk.rotary_scaling),
    )
    # Latent attention makes its own positions, as its configuration says.
    if not hf_model.is_latent:
        factor = chunk.rotary_pos_emb.seq_len_interpolation_factor
        built["seq_len_interpolation_factor"] = factor
    return built


def check_built_for(chunk: Any, hf_model: HfModel, where: object) -> None:
    """The model must be the configuration's: shapes alone would not show another rope base.

    Raises:
        ValueError: settings, parameters or buffers that it does not describe; ``where`` names it.
        NotImplementedError: experts in the layout of the legacy grouped GEMM.
    """
    want = hf_model.transformer_config()
    pairs = {
        key: (getattr(chunk.config, key, None), value)
        for key, value in want.items()
        if key not in _RUN and not key.endswith("dropout")
    }
    gpt, built = hf_model.gpt_model(), _built(chunk, hf_model)
    pairs |= {key: (value, gpt[key]) for key, value in built.items()}
    wrong = [f"{key}={got!r} must be {need!r}" for key, (got, need) in pairs.items() if got != need]
    if chunk.vocab_size < hf_model.vocab_size:
        wrong.append(f"vocab_size={chunk.vocab_size} must be at least {hf_model.vocab_size}")
    if wrong:
        raise ValueError(
            f"{where}: the model was built for another configuration: "
            + "; ".join(wrong)
            + ". Build it from read_hf_config()"
        )
    # Refused before anything is written.
    table = hf_model.weight_table(chunk.vocab_size)
    unknown = [name for name, _ in named_weights(chunk) if global_name(chunk, name) not in table]
    if unknown:
        raise ValueError(
            f"{where}: the model has {len(unknown)} parameter(s) or buffer(s) without a "
            f"Hugging Face tensor: {', '.join(unknown[:5])}. Build it from read_hf_config()"
        )
