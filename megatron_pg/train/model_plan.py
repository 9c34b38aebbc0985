"""Megatron's configuration of a run, checked without building weights."""

from __future__ import annotations

import dataclasses
import importlib
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from ..attention import AttentionInputs, merge_implementation, select_backend
from ..checkpoint import HfModel, make_megatron_args, read_hf_config
from ..mcore import cpu
from .config import ModelConfig, ParallelConfig
from .config_checks import nearest, needs_vocab_size_message


@dataclass(frozen=True)
class ModelPlan:
    """Everything needed to build the model, and nothing built yet.

    Attributes:
        config: Megatron's configuration.
        gpt: keyword arguments of ``GPTModel``.
        spec: keyword arguments of the layer spec.
        vocab_size: entries of the vocabulary without padding.
        use_te: whether layers are Transformer Engine's.
        origin: the Hugging Face folder it comes from; None for a model from scratch.
    """

    config: TransformerConfig
    gpt: dict[str, Any]
    spec: dict[str, Any]
    vocab_size: int
    use_te: bool
    origin: Origin | None = None

    @property
    def layers(self) -> str:
        """Whose layers they are, in the words of ``model.transformer_impl``."""
        return "transformer_engine" if self.use_te else "local"


@dataclass(frozen=True)
class Origin:
    """What lets checkpoints of a run leave again as Hugging Face folders.

    Attributes:
        folder: the Hugging Face folder.
        megatron_args: what Megatron-LM stores as ``args`` in a checkpoint.
    """

    folder: Path
    megatron_args: Namespace


def plan_model(model: ModelConfig, parallel: ParallelConfig) -> ModelPlan:
    """Megatron's configuration of a run, checked without building weights.

    Raises:
        ValueError: on an unknown ``model.transformer`` key (with the nearest valid one), settings
            that Megatron-Core refuses, a model from scratch without ``vocab_size``, or a folder
            without a readable ``config.json``.
        NotImplementedError: on a Hugging Face model that is not supported (``read_hf_config``).
    """
    tp_size = parallel.tensor_model_parallel_size
    settings: dict[str, Any] = {"attention_dropout": 0.0, "hidden_dropout": 0.0}
    if model.hf is not None:
        hf: HfModel = read_hf_config(model.hf)
        settings |= hf.transformer_config()
        gpt = hf.gpt_model(
            tp_size=tp_size, make_vocab_size_divisible_by=model.make_vocab_size_divisible_by
        )
        spec, vocab_size = hf.spec(), hf.vocab_size
    else:
        gpt, spec, vocab_size = _from_scratch(model, tp_size)
    has_cuda = torch.cuda.is_available()
    vpp = parallel.virtual_pipeline_model_parallel_size
    settings |= {
        "tensor_model_parallel_size": tp_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": vpp,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "sequence_parallel": parallel.sequence_parallel,
        # The loss carries its own global denominators; Megatron must not divide again.
        "calculate_per_token_loss": True,
        "variable_seq_lengths": True,
        "moe_token_dispatcher_type": "alltoall",
        "params_dtype": torch.bfloat16 if has_cuda else torch.float32,
    }
    if vpp is not None:
        # Two stages exchange in both directions at once; batched calls would mix them up.
        settings |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    if not has_cuda:
        settings |= cpu.transformer_config_defaults()
    settings |= _transformer_overrides(model.transformer)
    settings.setdefault("pipeline_dtype", settings["params_dtype"])
    settings.setdefault("bf16", settings["params_dtype"] is torch.bfloat16)
    try:
        config = TransformerConfig(**settings)
    except (AssertionError, ArithmeticError, TypeError, ValueError) as error:
        raise ValueError(f"Megatron-Core refuses the model settings: {error}") from error
    _check_stages(config)
    if model.hf is None:
        spec |= {"qk_layernorm": config.qk_layernorm}
        if config.num_moe_experts:
            spec |= {"num_experts": config.num_moe_experts, "moe_grouped_gemm": False}
    origin = None
    if model.hf is not None:
        args = make_megatron_args(
            hf,
            tp_size=tp_size,
            pp_size=parallel.pipeline_model_parallel_size,
            vpp_size=vpp,
            make_vocab_size_divisible_by=model.make_vocab_size_divisible_by,
            dtype=config.params_dtype,
        )
        origin = Origin(Path(model.hf), args)
    return ModelPlan(config, gpt, spec, vocab_size, _uses_te(model.transformer_impl), origin)


def validate_trainable(plan: ModelPlan) -> None:
    """Refuse what can be planned and computed, but not trained.

    Raises:
        ValueError: on float64 parameters.
    """
    if plan.config.params_dtype == torch.float64:
        raise ValueError(
            "model.transformer.params_dtype=float64: Megatron's optimizer takes no gradients in "
            "float64; use float32"
        )


def select_attention(plan: ModelPlan, backend_name: str, device: torch.device) -> str:
    """Names of the backend that will train the model, and of its merge if it has one.

    Args:
        plan: of the model.
        backend_name: ``model.attention_backend``.
        device: of this rank.

    Raises:
        ValueError: if this device cannot train the model with that backend.
    """
    model = plan.config
    backend = select_backend(
        AttentionInputs(
            device=device,
            dtype=model.params_dtype,
            head_dim=model.kv_channels,
            num_heads=model.num_attention_heads,
            num_kv_heads=model.num_query_groups or model.num_attention_heads,
        ),
        backend_name,
    )
    if not backend.merges:
        return backend.name
    return f"{backend.name}, {merge_implementation(device)} merge"


def _check_stages(config: TransformerConfig) -> None:
    """Even stages; Megatron's settings for uneven ones are checked by Megatron."""
    uneven = (
        "num_layers_in_first_pipeline_stage",
        "num_layers_in_last_pipeline_stage",
        "pipeline_model_parallel_layout",
        "account_for_embedding_in_pipeline_split",
        "account_for_loss_in_pipeline_split",
    )
    stages = config.pipeline_model_parallel_size * (
        config.virtual_pipeline_model_parallel_size or 1
    )
    if config.num_layers % stages and not any(getattr(config, name, None) for name in uneven):
        raise ValueError(
            f"num_layers={config.num_layers} is no multiple of {stages} pipeline stages (virtual "
            "ones included); choose other pipeline sizes"
        )


def _from_scratch(model: ModelConfig, tp_size: int) -> tuple[dict[str, Any], dict[str, Any], int]:
    if model.vocab_size is None:
        raise ValueError(needs_vocab_size_message())
    sizes = ("num_layers", "hidden_size", "num_attention_heads")
    if missing := [f"model.transformer.{n}" for n in sizes if not model.transformer.get(n)]:
        raise ValueError(
            f"a model from scratch needs {', '.join(missing)}; or set model.hf to a Hugging Face "
            "folder"
        )
    multiple = model.make_vocab_size_divisible_by * tp_size
    gpt = {
        "vocab_size": -(-model.vocab_size // multiple) * multiple,
        "max_sequence_length": model.max_position_embeddings,
        "position_embedding_type": model.position_embedding_type,
        "rotary_base": model.rotary_base,
        "share_embeddings_and_output_weights": not model.untie_embeddings_and_output_weights,
    }
    return gpt, {}, model.vocab_size


def _transformer_overrides(overrides: dict[str, Any]) -> dict[str, Any]:
    valid = [f.name for f in dataclasses.fields(TransformerConfig)]
    values = dict(overrides)
    for name in values:
        if name not in valid:
            raise ValueError(f"model.transformer.{name} is unknown{nearest(name, valid)}")
        if name in _OWNED:
            raise ValueError(f"model.transformer.{name} {_OWNED[name]}")
    if values.get("fp16"):
        raise ValueError("model.transformer.fp16 is not supported; use params_dtype: bfloat16")
    for name in ("params_dtype", "pipeline_dtype"):
        if name in values:
            values[name] = _named(f"model.transformer.{name}", _DTYPES, values[name])
    if "activation_func" in values:
        values["activation_func"] = _named(
            "model.transformer.activation_func", _ACTIVATIONS, values["activation_func"]
        )
    return values


_DTYPES: dict[str, Any] = {
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    # Exact to more digits than an optimizer of Megatron's takes: for checks of gradients.
    "float64": torch.float64,
}
_ACTIVATIONS: dict[str, Any] = {
    "gelu": torch.nn.functional.gelu,
    "silu": torch.nn.functional.silu,
    "relu": torch.nn.functional.relu,
}
# Settings that have one place elsewhere, or that the recipe depends on.
_OWNED = {
    name: f"is set by parallel.{name}; set it there"
    for name in (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "virtual_pipeline_model_parallel_size",
        "expert_model_parallel_size",
        "sequence_parallel",
    )
} | {
    "calculate_per_token_loss": "must stay true: the loss carries its own denominators; omit it",
    "variable_seq_lengths": "must stay true: packed rows differ in length; omit it",
}


def _named(what: str, valid: dict[str, Any], name: Any) -> Any:
    if name not in valid:
        hint = nearest(str(name), list(valid))
        raise ValueError(f"{what}={name!r} must be one of {', '.join(valid)}{hint}")
    return valid[name]


def _uses_te(transformer_impl: str) -> bool:
    if transformer_impl == "local":
        return False
    try:
        importlib.import_module("transformer_engine.pytorch")
    except ImportError as error:
        if transformer_impl == "transformer_engine":
            raise ValueError(
                "model.transformer_impl=transformer_engine, but it does not import: "
                f'{error}; pip install "megatron_pg[te]" or set transformer_impl: local'
            ) from error
        return False
    if transformer_impl == "transformer_engine" and not torch.cuda.is_available():
        raise ValueError(
            "model.transformer_impl=transformer_engine needs a CUDA device, this machine has none; "
            "set transformer_impl: auto"
        )
    return torch.cuda.is_available()
