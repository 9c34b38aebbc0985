"""The model of a run: chunks of this rank, wrapped for training, and its optimizer."""

from __future__ import annotations

import dataclasses
import importlib
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from ..checkpoint import HfModel, load_hf, read_hf_config
from ..mcore import (
    PrefixGroupedGPTModel,
    cpu,
    with_prefix_grouped_attention,
    with_sequence_parallel_norms,
)
from .config import ModelConfig, ParallelConfig, TrainConfig, nearest
from .ranks import seed_everything


@dataclass(frozen=True)
class ModelPlan:
    """Everything needed to build the model, and nothing built yet.

    Attributes:
        config: Megatron's configuration.
        gpt: keyword arguments of ``GPTModel``.
        spec: keyword arguments of the layer spec.
        vocab_size: entries of the vocabulary without padding.
        use_te: whether layers are Transformer Engine's.
    """

    config: TransformerConfig
    gpt: dict[str, Any]
    spec: dict[str, Any]
    vocab_size: int
    use_te: bool


def plan_model(model: ModelConfig, parallel: ParallelConfig) -> ModelPlan:
    """Megatron's configuration of a run, checked without building weights.

    Raises:
        ValueError: on an unknown ``model.transformer`` key (with the nearest valid one), settings
            that Megatron-Core refuses, or a model from scratch without ``vocab_size``.
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
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"Megatron-Core refuses the model settings: {error}") from error
    if model.hf is None:
        spec |= {"qk_layernorm": config.qk_layernorm}
        if config.num_moe_experts:
            spec |= {"num_experts": config.num_moe_experts, "moe_grouped_gemm": False}
    return ModelPlan(config, gpt, spec, vocab_size, _uses_te(model.transformer_impl))


def _from_scratch(model: ModelConfig, tp_size: int) -> tuple[dict[str, Any], dict[str, Any], int]:
    if model.vocab_size is None:
        raise ValueError("model.vocab_size is needed for a model from scratch; or set model.hf")
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
    for name in ("params_dtype", "pipeline_dtype"):
        if isinstance(values.get(name), str):
            values[name] = getattr(torch, values[name])
    if isinstance(values.get("activation_func"), str):
        values["activation_func"] = getattr(torch.nn.functional, values["activation_func"])
    return values


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
    return torch.cuda.is_available()


def build_chunks(plan: ModelPlan, attention_backend: str = "auto") -> list[torch.nn.Module]:
    """This rank's model chunks (several under an interleaved schedule), randomly initialised."""
    vpp = plan.config.virtual_pipeline_model_parallel_size
    chunks = []
    for stage in range(vpp or 1):
        vp_stage = stage if vpp else None
        if plan.use_te:
            spec: Any = get_gpt_layer_with_transformer_engine_spec(**plan.spec)
        else:
            local = get_gpt_layer_local_spec(normalization=plan.config.normalization, **plan.spec)
            spec = with_sequence_parallel_norms(local, plan.config, vp_stage=vp_stage)
        chunk = PrefixGroupedGPTModel(
            plan.config,
            with_prefix_grouped_attention(spec, attention_backend),
            pre_process=parallel_state.is_pipeline_first_stage(
                ignore_virtual=False, vp_stage=vp_stage
            ),
            post_process=parallel_state.is_pipeline_last_stage(
                ignore_virtual=False, vp_stage=vp_stage
            ),
            vp_stage=vp_stage,
            **plan.gpt,
        )
        chunks.append(chunk.to(plan.config.params_dtype))
    return chunks


@dataclass
class TrainedModel:
    """A model in training.

    Attributes:
        plan: what it was built from.
        chunks: this rank's chunks as Megatron's schedules take them.
        optimizer: Megatron's.
        scheduler: Megatron's learning-rate schedule.
    """

    plan: ModelPlan
    chunks: list[Any]
    optimizer: Any
    scheduler: OptimizerParamScheduler


def build_trained_model(config: TrainConfig, num_updates: int) -> TrainedModel:
    """Build, load, wrap; every rank of the job takes part."""
    plan = plan_model(config.model, config.parallel)
    chunks = _initial_chunks(config, plan, config.model.hf)
    parallel, section = config.parallel, config.optimizer
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=plan.config.params_dtype.itemsize < 4,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
    )
    wrapped = [
        DistributedDataParallel(
            plan.config,
            ddp_config,
            chunk,
            disable_bucketing=i > 0 and not parallel.overlap_grad_reduce,
        )
        for i, chunk in enumerate(chunks)
    ]
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer=section.optimizer,
            lr=section.lr,
            min_lr=section.min_lr,
            weight_decay=section.weight_decay,
            adam_beta1=section.adam_beta1,
            adam_beta2=section.adam_beta2,
            adam_eps=section.adam_eps,
            clip_grad=section.clip_grad,
            bf16=plan.config.bf16,
            fp16=plan.config.fp16,
            params_dtype=plan.config.params_dtype,
            use_distributed_optimizer=parallel.use_distributed_optimizer,
        ),
        wrapped,
    )
    plan.config.finalize_model_grads_func = finalize_model_grads
    plan.config.grad_scale_func = optimizer.scale_loss
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=section.lr,
        min_lr=section.min_lr,
        lr_warmup_steps=section.lr_warmup_iters,
        lr_decay_steps=max(num_updates, section.lr_warmup_iters + 1),
        lr_decay_style=section.lr_decay_style,
        start_wd=section.weight_decay,
        end_wd=section.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    return TrainedModel(plan, wrapped, optimizer, scheduler)


def build_reference(config: TrainConfig) -> list[Any]:
    """The frozen reference model on this rank: ``algorithm.ref_hf``, or the initial policy."""
    plan = plan_model(config.model, config.parallel)
    chunks = _initial_chunks(config, plan, config.algorithm.ref_hf or config.model.hf)
    for chunk in chunks:
        chunk.requires_grad_(False)
        chunk.eval()
    return chunks


def _initial_chunks(config: TrainConfig, plan: ModelPlan, hf: str | None) -> list[Any]:
    """Chunks with the weights of a Hugging Face folder, or those that the seed gives."""
    seed_everything(config.run.seed)
    chunks: list[Any] = build_chunks(plan, config.model.attention_backend)
    if hf is not None:
        load_hf(chunks, hf)
    if torch.cuda.is_available():
        chunks = [chunk.cuda() for chunk in chunks]
    if plan.config.bf16 or plan.config.fp16:
        chunks = [Float16Module(plan.config, chunk) for chunk in chunks]
    return chunks
