"""Parameters of every rank, counted on the model's own modules, which take no memory meanwhile."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from ...checkpoint import one_rank
from ...data import LayerKind
from ...mcore import build_gpt_chunks, layers_of_stages
from ...parallel import ParallelSizes
from ..model import ModelPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameters:
    """Their numbers on one rank.

    Attributes:
        shared: that every data-parallel rank has alike.
        experts: that differ over expert-parallel ranks.
    """

    shared: int = 0
    experts: int = 0

    def __add__(self, other: Parameters) -> Parameters:
        return Parameters(shared=self.shared + other.shared, experts=self.experts + other.experts)

    @property
    def total(self) -> int:
        """Of the rank."""
        return self.shared + self.experts


@dataclass(frozen=True, eq=False)
class ModelModules:
    """One layer of each kind that a model has, and what stands before and behind them.

    Attributes:
        chunk: of the whole model on one rank, without memory for its weights.
        kinds: of its layers.
    """

    chunk: Any
    kinds: tuple[LayerKind, ...]

    @classmethod
    def of_plan(cls, plan: ModelPlan) -> ModelModules:
        """Of a model; which layout and kernels it is planned for makes no difference."""
        of_layers = plan.layer_kinds
        kinds = tuple(dict.fromkeys(of_layers))
        chosen = [of_layers.index(kind) for kind in kinds]
        gpt = dict(plan.gpt)
        if (pattern := plan.hybrid_layer_pattern) is not None:
            gpt["hybrid_layer_pattern"] = "".join(pattern[number] for number in chosen)
        config = _on_one_rank(plan, chosen)
        with one_rank(), torch.device("meta"):
            (chunk,) = build_gpt_chunks(config, gpt=gpt)
        return cls(chunk, kinds)

    def stage_parameters(self, plan: ModelPlan) -> list[Parameters]:
        """Of a rank of every stage; embedding, last norm and output layer are with theirs."""
        sizes, chunk = ParallelSizes.from_config(plan.config), self.chunk
        count = partial(_count, sizes=sizes, is_te=plan.use_te)
        layers = dict(zip(self.kinds, map(count, chunk.decoder.layers)))
        of_layers = plan.layer_kinds
        stages = [
            sum((layers[of_layers[n]] for part in stage for n in part), Parameters())
            for stage in layers_of_stages(plan.config)
        ]
        stages[0] += count(chunk.embedding)
        stages[-1] += count(_last_norm(chunk.decoder))
        if not plan.gpt["share_embeddings_and_output_weights"]:
            stages[-1] += count(chunk.output_layer)
        elif len(stages) > 1:
            # A tied output keeps a copy of the embedding on a last stage of its own.
            stages[-1] += count(chunk.embedding.word_embeddings)
        return stages


def _last_norm(decoder: Any) -> torch.nn.Module:
    """Of a ``GPTModel``, or of a ``HybridModel``."""
    norm: torch.nn.Module = getattr(decoder, "final_layernorm", None) or decoder.final_norm
    return norm


def _on_one_rank(plan: ModelPlan, chosen: list[int]) -> TransformerConfig:
    """Of some of the layers, by their numbers."""
    config, kinds = plan.config, plan.layer_kinds
    fewer = copy(config)
    for name, value in ParallelSizes().group_arguments().items():
        setattr(fewer, name, value)
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == config.num_layers:
            setattr(fewer, name, [value[number] for number in chosen])
    fewer.num_layers = len(chosen)
    if config.experimental_attention_variant is not None:
        fewer.linear_attention_freq = [int(kinds[number].is_linear) for number in chosen]
    if config.num_moe_experts:
        fewer.moe_layer_freq = [int(kinds[number].has_experts) for number in chosen]
    fewer.sequence_parallel = False
    fewer.pipeline_model_parallel_layout = None
    fewer.num_layers_in_first_pipeline_stage = fewer.num_layers_in_last_pipeline_stage = None
    fewer.account_for_embedding_in_pipeline_split = False
    fewer.account_for_loss_in_pipeline_split = False
    # Local modules have the parameters of all others, whose kernels may not be installed here.
    fewer.apply_rope_fusion = fewer.gradient_accumulation_fusion = False
    fewer.moe_grouped_gemm = False
    fewer.transformer_impl = "local"
    fewer.use_cpu_initialization = True
    return fewer


def _count(module: torch.nn.Module, sizes: ParallelSizes, is_te: bool) -> Parameters:
    shared = experts = 0
    for name, parameter in module.named_parameters():
        # Transformer Engine's projections onto latents are on every rank.
        is_whole = is_te and "_down_proj." in name
        is_divided = getattr(parameter, "tensor_model_parallel", False) and not is_whole
        if ".experts." in f".{name}":
            shards = sizes.expert_tp if is_divided else 1
            experts += parameter.numel() // (shards * sizes.ep)
        else:
            shared += parameter.numel() // (sizes.tp if is_divided else 1)
    return Parameters(shared=shared, experts=experts)
