"""Megatron's configuration of a run, checked without building weights."""

from __future__ import annotations

import importlib
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from ...attention import AttentionInputs, AttentionKind, select_backend
from ...checkpoint import HfModel, make_megatron_args, read_hf_config
from ...data import AttentionSizes, LayerKind, layer_kinds
from ...grpo import PackingConfig, PrefixGroupConfig, row_cost_model
from ...mcore import cpu, layer_windows, make_transformer_config, validate_config
from ...parallel import ParallelSizes, PipelineSplit
from ..config import ModelConfig, ParallelConfig, needs_vocab_size_message, raise_problems
from .expert_rules import check_expert_biases
from .fusions import OF_TE, Machine, fusion_defaults
from .linear_rules import kernel_problems, undivided_problems
from .megatron_rules import megatron_problems, position_problems
from .transformer_settings import refused_settings, transformer_settings


@dataclass(frozen=True)
class ModelPlan:
    """Everything needed to build the model, and nothing built yet.

    Attributes:
        config: Megatron's configuration.
        gpt: keyword arguments of ``GPTModel``, or of ``HybridModel``.
        vocab_size: entries of the vocabulary without padding.
        use_te: whether layers are Transformer Engine's.
        origin: the Hugging Face folder it comes from; None for a model from scratch.
        on_cuda: whether it runs on CUDA.
        card: key of ``data.CARDS`` that ranks will have; None for those of this machine.
    """

    config: TransformerConfig
    gpt: dict[str, Any]
    vocab_size: int
    use_te: bool
    origin: Origin | None = None
    on_cuda: bool = False
    card: str | None = None

    def packing(self, settings: PrefixGroupConfig) -> PackingConfig:
        """How rows of this model are packed."""
        cost_model = row_cost_model(
            self.config, self.vocab_size, self.card, self.hybrid_layer_pattern
        )
        return PackingConfig.from_config(settings, self.config, cost_model)

    @property
    def hybrid_layer_pattern(self) -> str | None:
        """What names the layers of a ``HybridModel``; None of a ``GPTModel``."""
        return self.gpt.get("hybrid_layer_pattern")

    @property
    def layer_kinds(self) -> list[LayerKind]:
        """Of every layer of the model."""
        return layer_kinds(self.config, self.hybrid_layer_pattern)

    @property
    def max_positions(self) -> int | None:
        """Longest sample that the positions of the model were made for; None without positions."""
        if self.gpt["position_embedding_type"] == "none":
            return None
        return int(self.gpt["max_sequence_length"])

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


def plan_model(
    model: ModelConfig, parallel: ParallelConfig, *, card: str | None = None
) -> ModelPlan:
    """Megatron's configuration of a run, checked without building weights.

    Args:
        model: the section of the run's configuration.
        parallel: likewise.
        card: plan for such cards, with CUDA and Transformer Engine where this machine has no CUDA;
            None for machines like this one.

    Raises:
        ValueError: on ``model.transformer`` keys that are not a run's to set, settings that
            Megatron-Core or prefix grouping refuses, a model from scratch without ``vocab_size``,
            or a folder without a readable ``config.json``.
        NotImplementedError: on a Hugging Face model that is not supported (``read_hf_config``).
    """
    sizes = parallel.sizes
    hf: HfModel | None = None if model.hf is None else read_hf_config(model.hf)
    settings: dict[str, Any] = {"attention_dropout": 0.0, "hidden_dropout": 0.0}
    if hf is None:
        gpt, vocab_size = _from_scratch(model, sizes.tp)
    else:
        gpt, vocab_size = _of_folder(hf, model, sizes.tp)
        settings |= hf.transformer_config()
    of_hf = None if hf is None else dict(settings)
    machine = _machine(model.transformer_impl, card is not None)
    settings |= _settings_of_run(sizes, machine)
    overrides = transformer_settings(model.transformer, of_hf)
    settings |= overrides
    fused = fusion_defaults(settings, gpt["position_embedding_type"], machine)
    settings |= {name: value for name, value in fused.items() if name not in overrides}
    # Megatron-Core refuses kernels that are not installed here, wherever the model is to run.
    elsewhere = {} if machine.is_here else {n: settings.pop(n) for n in OF_TE if n in settings}
    if settings.get("multi_latent_attention") and hf is None:
        # Its layers have rotary embeddings of their own.
        settings["rotary_base"] = model.rotary_base
    settings["pipeline_dtype"] = settings["params_dtype"]
    settings["bf16"] = settings["params_dtype"] is torch.bfloat16
    check_expert_biases(settings, sizes)
    config = _make_config(settings, overrides, parallel)
    for name, value in elsewhere.items():
        setattr(config, name, value)
    problems = list(megatron_problems(config, overrides, sizes.vpp, machine))
    problems += position_problems(config, gpt["position_embedding_type"])
    if machine.has_cuda and machine.is_here:
        problems += kernel_problems(config, gpt.get("hybrid_layer_pattern") or "")
    raise_problems("with the model's settings", problems)
    validate_config(config)
    origin = None
    if hf is not None and model.hf is not None:
        args = make_megatron_args(
            hf,
            sizes,
            PipelineSplit.from_config(config),
            make_vocab_size_divisible_by=model.make_vocab_size_divisible_by,
            dtype=config.params_dtype,
        )
        origin = Origin(Path(model.hf), args)
    return ModelPlan(config, gpt, vocab_size, machine.has_te_layers, origin, machine.has_cuda, card)


def _settings_of_run(sizes: ParallelSizes, machine: Machine) -> dict[str, Any]:
    """Fields of ``TransformerConfig`` that are the run's, whatever the model."""
    settings = {
        "transformer_impl": "transformer_engine" if machine.has_te_layers else "local",
        **sizes.group_arguments(),
        "sequence_parallel": sizes.sp,
        # The loss carries its own global denominators; Megatron must not divide again.
        "calculate_per_token_loss": True,
        "variable_seq_lengths": True,
        "moe_token_dispatcher_type": "alltoall",
        "params_dtype": torch.bfloat16 if machine.has_cuda else torch.float32,
    }
    if sizes.vpp is not None:
        # Two stages exchange in both directions at once; batched calls would mix them up.
        settings |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    return settings if machine.has_cuda else settings | cpu.transformer_config_defaults()


def _make_config(
    settings: Mapping[str, Any], overrides: Mapping[str, Any], parallel: ParallelConfig
) -> TransformerConfig:
    """Megatron-Core's configuration; what it refuses, in words of the run's."""
    try:
        return make_transformer_config(settings)
    except Exception as error:  # whatever Megatron-Core's checks run into
        refused = [*refused_settings(overrides), *undivided_problems(settings)]
        raise_problems("with the model's settings", refused)
        named = [n for n, v in vars(parallel).items() if v != getattr(ParallelConfig, n)]
        raise ValueError(
            f"Megatron-Core refuses the model settings: {str(error) or type(error).__name__}; "
            f"change of parallel {', '.join(named) or 'a size'}, or of model.transformer "
            f"{', '.join(overrides) or 'a field'}"
        ) from error


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


def check_attention(plan: ModelPlan, backend_name: str, device: torch.device) -> None:
    """Refuse a backend that cannot train the model on this device.

    Args:
        plan: of the model.
        backend_name: ``prefix_group.attention_backend``.
        device: of this rank.

    Raises:
        ValueError: naming what it cannot do.
    """
    model, heads = plan.config, AttentionSizes.from_config(plan.config)
    has_sink = model.softmax_type != "vanilla"
    for window in dict.fromkeys(layer_windows(model)):
        inputs = AttentionInputs(
            device=device,
            dtype=model.params_dtype,
            head_dim=heads.head_dim,
            num_heads=heads.num_heads,
            num_kv_heads=heads.num_kv_heads,
            kind=AttentionKind(window=window, has_sink=has_sink, value_dim=heads.value_dim),
        )
        select_backend(inputs, backend_name)


def _of_folder(hf: HfModel, model: ModelConfig, tp_size: int) -> tuple[dict[str, Any], int]:
    """Arguments of the model that a folder describes, and its vocabulary without padding."""
    gpt = hf.gpt_model(
        tp_size=tp_size, make_vocab_size_divisible_by=model.make_vocab_size_divisible_by
    )
    if model.max_position_embeddings is not None:
        hf.check_positions(model.max_position_embeddings)
        gpt["max_sequence_length"] = model.max_position_embeddings
    return gpt, hf.vocab_size


def _from_scratch(model: ModelConfig, tp_size: int) -> tuple[dict[str, Any], int]:
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
        "max_sequence_length": model.max_position_embeddings or 4096,
        "position_embedding_type": model.position_embedding_type,
        "rotary_base": model.rotary_base,
        "share_embeddings_and_output_weights": not model.untie_embeddings_and_output_weights,
    }
    return gpt, model.vocab_size


def _machine(transformer_impl: str, on_cuda: bool) -> Machine:
    if on_cuda and not torch.cuda.is_available():
        return Machine.with_cuda(has_te_layers=transformer_impl != "local")
    return Machine.here(has_te_layers=_uses_te(transformer_impl))


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
