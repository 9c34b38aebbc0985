"""The model of a run: chunks of this rank, wrapped for training, and its optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module

from ...checkpoint import TRACKER, load_weights, open_weights, read_hf_config
from ...mcore import build_gpt_chunks
from ..config import TrainConfig
from ..ranks import seed_everything
from .plan import ModelPlan, plan_model


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


def build_trained_model(config: TrainConfig, plan: ModelPlan, num_updates: int) -> TrainedModel:
    """Build, load, wrap; every rank of the job takes part.

    Args:
        config: of the run.
        plan: ``plan_model`` of it.
        num_updates: after which the learning rate has decayed.
    """
    chunks = _initial_chunks(config, plan, _initial_weights(config))
    parallel, section = config.parallel, config.optimizer
    ddp_config, optimizer_config = training_configs(config, plan)
    wrapped = [
        DistributedDataParallel(
            plan.config,
            ddp_config,
            chunk,
            disable_bucketing=i > 0 and not parallel.overlap_grad_reduce,
        )
        for i, chunk in enumerate(chunks)
    ]
    optimizer = get_megatron_optimizer(optimizer_config, wrapped)
    if parallel.overlap_grad_reduce:
        # Without it the first step's number of microbatches decides when the reduction starts.
        hooks = [chunk.no_sync for chunk in wrapped]
        plan.config.no_sync_func = hooks if len(hooks) > 1 else hooks[0]
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
        # A resumed run follows its own configuration; only the position is the checkpoint's.
        override_opt_param_scheduler=True,
        use_checkpoint_opt_param_scheduler=False,
    )
    return TrainedModel(plan, wrapped, optimizer, scheduler)


def training_configs(
    config: TrainConfig, plan: ModelPlan
) -> tuple[DistributedDataParallelConfig, OptimizerConfig]:
    """Megatron's configurations of gradients and optimizer.

    Raises:
        ValueError: with what Megatron-Core says of settings that it refuses.
    """
    parallel, section = config.parallel, config.optimizer
    try:
        return DistributedDataParallelConfig(
            grad_reduce_in_fp32=plan.config.params_dtype.itemsize < 4,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            use_distributed_optimizer=parallel.use_distributed_optimizer,
        ), OptimizerConfig(
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
        )
    except (AssertionError, ValueError) as error:
        raise ValueError(
            f"Megatron-Core refuses the settings of optimizer or parallel: {error}"
        ) from error


def build_reference(config: TrainConfig) -> list[Any]:
    """The frozen reference model on this rank: ``algorithm.ref_hf``, or the initial policy."""
    # A plan of its own: the trained model's holds the hooks of its gradients.
    plan = plan_model(config.model, config.parallel)
    chunks = _initial_chunks(config, plan, config.algorithm.ref_hf or _initial_weights(config))
    for chunk in chunks:
        chunk.requires_grad_(False)
        chunk.eval()
    return chunks


def validate_weights(config: TrainConfig, *, may_be_bare: bool = False) -> list[str]:
    """Open every folder of weights that a run names; only headers are read.

    Args:
        config: of the run.
        may_be_bare: let folders pass that hold a ``config.json`` and no weights.

    Returns:
        Those folders.

    Raises:
        ValueError: naming the file that is missing, damaged, or not what its configuration says.
        NotImplementedError: on a model that is not supported.
    """
    bare = []
    for folder in (_initial_weights(config), config.algorithm.ref_hf):
        if folder is None:
            continue
        if may_be_bare and _is_bare(Path(folder)):
            read_hf_config(folder)
            bare.append(folder)
        else:
            open_weights(folder)
    return bare


def _is_bare(folder: Path) -> bool:
    """Whether it describes a model, and nothing in it looks like weights."""
    weights = ("*.safetensors*", "*.bin*", "*.pt*", TRACKER)
    has_weights = any(any(folder.glob(pattern)) for pattern in weights)
    return (folder / "config.json").is_file() and not has_weights


def _initial_weights(config: TrainConfig) -> str | None:
    return config.model.pretrained_checkpoint or config.model.hf


def _initial_chunks(config: TrainConfig, plan: ModelPlan, weights: str | None) -> list[Any]:
    """Chunks with the weights of a folder of either kind, or those that the seed gives."""
    seed_everything(config.run.seed)
    chunks: list[Any] = build_gpt_chunks(
        plan.config,
        gpt=plan.gpt,
        use_te=plan.use_te,
        attention_backend=config.prefix_group.attention_backend,
    )
    if torch.cuda.is_available():
        chunks = [chunk.cuda() for chunk in chunks]
    if plan.config.bf16 or plan.config.fp16:
        chunks = [Float16Module(plan.config, chunk) for chunk in chunks]
    # Last: what stays fp32 in such a model was cast with everything else.
    if weights is not None:
        load_weights(chunks, open_weights(weights))
    return chunks
