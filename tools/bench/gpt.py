"""A Megatron-Core GPT model, and one row of work for it, packed or written out."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_pg import PackedLayout
from megatron_pg.data import CostModel
from megatron_pg.mcore import (
    Predictions,
    PrefixGroupedGPTModel,
    PrefixGroupedSeqParams,
    cpu,
    with_prefix_grouped_attention,
    with_sequence_parallel_norms,
)
from tools.bench.registry import Options
from tools.bench.shapes import Shape


@dataclass(frozen=True, kw_only=True)
class Dims:
    """Sizes of the model, and the ranks it is spread over."""

    num_layers: int = 4
    hidden_size: int = 512
    ffn_hidden_size: int = 1408
    num_heads: int = 8
    num_query_groups: int = 8
    vocab_size: int = 8192
    chunk_tokens: int = 512
    tp: int = 1
    pp: int = 1
    cp: int = 1

    @property
    def num_ranks(self) -> int:
        """That hold the model."""
        return self.tp * self.pp * self.cp

    @property
    def cost_model(self) -> CostModel:
        """Forward FLOPs of the whole model."""
        return CostModel.from_model_dims(
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            ffn_hidden_size=self.ffn_hidden_size,
            vocab_size=self.vocab_size,
            num_attention_heads=self.num_heads,
            num_query_groups=self.num_query_groups,
        )

    def describe(self) -> dict[str, int]:
        """Fields of a row's ``shape``."""
        return dict(
            layers=self.num_layers,
            hidden=self.hidden_size,
            ffn=self.ffn_hidden_size,
            heads=self.num_heads,
            vocab=self.vocab_size,
            query_groups=self.num_query_groups,
            chunk_tokens=self.chunk_tokens,
            tp=self.tp,
            pp=self.pp,
            cp=self.cp,
        )


TINY = dict(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_heads=2,
    num_query_groups=2,
    vocab_size=64,
)


# 1.5 billion parameters, 1.0 of them in layers.
GPU = dict(
    num_layers=16,
    hidden_size=2048,
    ffn_hidden_size=8192,
    num_heads=32,
    num_query_groups=8,
    vocab_size=128256,
    chunk_tokens=2048,
)


def make_dims(options: Options, **more: int) -> Dims:
    """The benchmarks' model: small on a CPU, larger on a GPU, tiny under ``--quick``."""
    sizes = TINY if options.quick else GPU if options.device.type == "cuda" else {}
    return Dims(**{**sizes, **more})


@contextmanager
def megatron(dims: Dims) -> Iterator[None]:
    """Megatron-Core ready to build models, on one process or on the ranks that run already."""
    alone = not dist.is_initialized()
    if alone:
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    emulation: AbstractContextManager[Any] = (
        nullcontext() if torch.cuda.is_available() else cpu.emulate_cuda()
    )
    try:
        with emulation:
            parallel_state.initialize_model_parallel(
                dims.tp, dims.pp, context_parallel_size=dims.cp
            )
            torch.manual_seed(1234)
            model_parallel_cuda_manual_seed(1234, inference_rng_tracker=True, force_reset_rng=True)
            yield
    finally:
        parallel_state.destroy_model_parallel()
        if alone:
            dist.destroy_process_group()


def make_config(dims: Dims, dtype: torch.dtype) -> TransformerConfig:
    """The settings that the benchmarks' models share."""
    settings: dict[str, Any] = dict(
        num_layers=dims.num_layers,
        hidden_size=dims.hidden_size,
        ffn_hidden_size=dims.ffn_hidden_size,
        num_attention_heads=dims.num_heads,
        num_query_groups=dims.num_query_groups,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=dims.tp,
        pipeline_model_parallel_size=dims.pp,
        context_parallel_size=dims.cp,
        sequence_parallel=dims.tp > 1,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        calculate_per_token_loss=True,
    )
    if not torch.cuda.is_available():
        settings |= cpu.transformer_config_defaults()
    elif importlib.util.find_spec("scaled_masked_softmax_cuda") is None:
        # Only the stock spec's attention would call it, and fail.
        settings["masked_softmax_fusion"] = False
    return TransformerConfig(**settings)


def build_model(
    dims: Dims,
    config: TransformerConfig,
    whole: bool = True,
    model_class: type[PrefixGroupedGPTModel] = PrefixGroupedGPTModel,
) -> PrefixGroupedGPTModel:
    """This rank's stage of the model; without embedding and output layer when not ``whole``."""
    model: PrefixGroupedGPTModel = _build(
        model_class, with_prefix_grouped_attention, dims, config, whole
    )
    return model


def build_stock_model(dims: Dims, config: TransformerConfig, whole: bool = True) -> GPTModel:
    """The same of Megatron-Core's local spec, whose attention is unfused."""
    return _build(GPTModel, lambda spec: spec, dims, config, whole)


def _build(
    model_class: type[GPTModel],
    wrap: Callable[[TransformerBlockSubmodules], TransformerBlockSubmodules],
    dims: Dims,
    config: TransformerConfig,
    whole: bool,
) -> Any:
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    model = model_class(
        config,
        wrap(with_sequence_parallel_norms(layer, config)),
        vocab_size=dims.vocab_size,
        max_sequence_length=32768,
        pre_process=whole and parallel_state.is_pipeline_first_stage(),
        post_process=whole and parallel_state.is_pipeline_last_stage(),
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
    model.to("cuda" if torch.cuda.is_available() else "cpu", config.params_dtype)
    return model


@dataclass(frozen=True, eq=False)
class Work:
    """One microbatch: its tokens, where they stand and the weight of every logprob in the loss.

    Attributes:
        num_predictions: written out: what a loss is divided by.
    """

    tokens: Tensor
    params: PrefixGroupedSeqParams
    is_trained: Tensor
    weights: Tensor
    num_predictions: int

    def forward(self, model: Any) -> Any:
        """What the model returns: logprobs on the last stage."""
        inputs = self.tokens[None], self.params.position_ids[None], None
        return model(*inputs, packed_seq_params=self.params)

    def loss(self, output: Tensor) -> Tensor:
        """Weighted sum of logprobs, equal for the packed row and the written-out ones."""
        return -(output * self.weights).sum()


def make_work(shape: Shape, dims: Dims, device: torch.device) -> dict[str, Work]:
    """``make_microbatches`` with all that is written out in one row."""
    works = make_microbatches(shape, dims, device)
    return {name: work for name, (work,) in works.items()}


def make_microbatches(
    shape: Shape, dims: Dims, device: torch.device, seed: int = 0, max_tokens: int | None = None
) -> dict[str, list[Work]]:
    """Random tokens of ``shape``, packed ("ours") and "written out" in rows of ``max_tokens``.

    Every token below a root is trained, with a random weight for each sample that holds it.
    """
    generator = torch.Generator().manual_seed(seed)
    layout = shape.packed
    tokens = torch.randint(0, dims.vocab_size, (layout.total_tokens,), generator=generator)
    weights = torch.rand(layout.logical_tokens, generator=generator) + 0.5
    is_root = torch.from_numpy(shape.tree.segment_parents < 0)
    is_trained = ~is_root[layout.segment_ids]
    rows = shape.written_out_rows(max_tokens)
    lens = [row.total_tokens for row in rows]
    parts = (layout.expand(tokens), layout.expand(is_trained), weights)
    written_out = [
        _make_work(row, tokens, is_trained, weights, dims, device)
        for row, tokens, is_trained, weights in zip(rows, *(x.split(lens) for x in parts))
    ]
    ours = _make_work(layout, tokens, is_trained, layout.reduce(weights), dims, device)
    return {"ours": [ours], "written out": written_out}


def per_sample_token(shape: Shape, work: Work, logprobs: Tensor) -> Tensor:
    """Packed logprobs in the order in which the written-out row has them."""
    per_token = logprobs.new_zeros(shape.packed.total_tokens)
    per_token[work.is_trained] = logprobs
    return shape.packed.expand(per_token)[shape.packed.expand(work.is_trained)]


def _make_work(
    layout: PackedLayout,
    tokens: Tensor,
    is_trained: Tensor,
    weights: Tensor,
    dims: Dims,
    device: torch.device,
) -> Work:
    predictions = Predictions(
        predictor_ids=layout.predictor_of[is_trained],
        target_tokens=tokens[is_trained],
        chunk_tokens=dims.chunk_tokens,
    )
    params = PrefixGroupedSeqParams.from_layout(layout, device, predictions=predictions)
    num_predictions = int(layout.multiplicity[is_trained].sum())
    weights = weights[is_trained].to(device)
    return Work(tokens.to(device), params, is_trained, weights, num_predictions)
