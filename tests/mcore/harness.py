"""One step on packed groups and the same step on written-out samples with the stock spec."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_pg import PackedLayout, PrefixTree, pack_trees
from megatron_pg.mcore import (
    Predictions,
    PrefixGroupedGPTModel,
    PrefixGroupedHybridModel,
    PrefixGroupedSeqParams,
    cpu,
    hybrid_stack_local_spec,
    make_transformer_config,
    with_local_linear_layers,
    with_prefix_grouped_attention,
    with_sequence_parallel_norms,
)
from tests.mcore.grouped_experts import with_grouped_experts
from tests.mcore.linear_rules import in_fp64
from tests.mcore.mamba_rules import step_by_step
from tests.ranks import process_group

VOCAB = 64
HIDDEN_SIZE = 32
YARN = dict(
    yarn_rotary_scaling_factor=4.0,
    yarn_original_max_position_embeddings=16,
    yarn_beta_fast=32.0,
    yarn_beta_slow=1.0,
    yarn_mscale=1.0,
    yarn_mscale_all_dim=0.0,
    yarn_correction_range_round_to_int=True,
)
MAX_LEN = 128


@dataclass(frozen=True, kw_only=True)
class Case:
    """A parallel layout and a model; everything else is fixed."""

    tp: int = 1
    sp: bool = False
    pp: int = 1
    vpp: int | None = None
    dp: int = 1
    dtype: torch.dtype = torch.float64
    num_layers: int = 2
    num_query_groups: int = 2
    tied: bool = False
    predictions: bool = True
    distributed_optimizer: bool = False
    num_steps: int = 20
    cp: int = 1
    ep: int = 1
    etp: int | None = None
    position_embedding_type: str = "rope"
    bound: float = 1e-9
    # (pipeline stage, chunk, parameter name) -> whether it is trained; None trains all.
    trains: Callable[[int, int, str], bool] | None = None
    loss_bound: float = 1e-9
    backend: str = "auto"
    config: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    spec: dict[str, Any] = field(default_factory=dict)
    # Of a HybridModel, whose layers its symbols name.
    pattern: str | None = None

    @property
    def world_size(self) -> int:
        return self.tp * self.cp * self.pp * self.dp

    @property
    def is_linear(self) -> bool:
        """Whether layers carry a state."""
        has_variant = self.config.get("experimental_attention_variant") is not None
        return has_variant or bool(set("GM") & set(self.pattern or ""))

    @property
    def row_multiple(self) -> int:
        """What ranks divide a row into."""
        return self.cp * (self.tp if self.sp else 1)

    @property
    def without_context(self) -> Case:
        """The same ranks, replicas in the place of those that divide a row."""
        return replace(self, cp=1, dp=self.dp * self.cp)


@contextmanager
def on_cpu(case: Case | None = None) -> Iterator[None]:
    """The ranks of a case, with Megatron-Core's stand-ins for CUDA."""
    is_exact = case is not None and case.is_linear and case.dtype == torch.float64
    exact = in_fp64() if is_exact else nullcontext()
    mamba = step_by_step() if case is not None and "M" in (case.pattern or "") else nullcontext()
    with process_group(), cpu.emulate_cuda(), exact, mamba:
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()


def initialize(case: Case) -> None:
    """Lay model-parallel groups over the running process group, unless they lie so already.

    Groups of gloo last as long as the process group, and each has a thread that never sleeps long.
    """
    if not _is_laid_out(case):
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(
            case.tp,
            case.pp,
            virtual_pipeline_model_parallel_size=case.vpp,
            context_parallel_size=case.cp,
            expert_model_parallel_size=case.ep,
            expert_tensor_parallel_size=case.etp,
        )
    torch.manual_seed(1234)
    model_parallel_cuda_manual_seed(1234, inference_rng_tracker=True, force_reset_rng=True)


def _is_laid_out(case: Case) -> bool:
    if not parallel_state.model_parallel_is_initialized():
        return False
    return (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_virtual_pipeline_model_parallel_world_size(),
        parallel_state.get_context_parallel_world_size(),
        parallel_state.get_expert_model_parallel_world_size(),
        parallel_state.get_expert_tensor_parallel_world_size(),
    ) == (case.tp, case.pp, case.vpp, case.cp, case.ep, case.tp if case.etp is None else case.etp)


def make_config(case: Case) -> TransformerConfig:
    settings: dict[str, Any] = dict(
        num_layers=case.num_layers,
        hidden_size=HIDDEN_SIZE,
        ffn_hidden_size=48,
        num_attention_heads=4,
        num_query_groups=case.num_query_groups,
        params_dtype=case.dtype,
        pipeline_dtype=case.dtype,
        tensor_model_parallel_size=case.tp,
        pipeline_model_parallel_size=case.pp,
        virtual_pipeline_model_parallel_size=case.vpp,
        sequence_parallel=case.sp,
        context_parallel_size=case.cp,
        expert_model_parallel_size=case.ep,
        expert_tensor_parallel_size=case.etp,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        # Large enough that attention is far from uniform.
        init_method_std=0.3,
        calculate_per_token_loss=True,
        # Two stages exchange in both directions at once under the interleaved schedule.
        overlap_p2p_comm=case.vpp is not None,
        batch_p2p_comm=case.vpp is None,
    )
    settings |= cpu.transformer_config_defaults() | case.config
    if settings.get("multi_latent_attention"):
        settings["num_query_groups"] = None
    config = make_transformer_config(settings)
    # GPTModel reads these off the config although TransformerConfig does not declare them.
    for name, value in YARN.items() if case.position_embedding_type == "yarn" else ():
        setattr(config, name, value)
    return config


def build(case: Case, config: TransformerConfig, packed: bool) -> list[torch.nn.Module]:
    """The chunks of this rank: ours on the wrapped spec, or the stock model on the stock spec."""
    chunks = []
    if not packed and config.recompute_modules:
        # The stock layer asks Transformer Engine for it.
        config.recompute_modules = [m for m in config.recompute_modules if m != "gdn_norm_out"]
    for stage in range(case.vpp or 1):
        vp_stage = stage if case.vpp else None
        place = dict(
            pre_process=parallel_state.is_pipeline_first_stage(
                ignore_virtual=False, vp_stage=vp_stage
            ),
            post_process=parallel_state.is_pipeline_last_stage(
                ignore_virtual=False, vp_stage=vp_stage
            ),
            position_embedding_type=case.position_embedding_type,
            share_embeddings_and_output_weights=case.tied,
            vp_stage=vp_stage,
            **case.model,
        )
        if case.pattern is not None:
            chunks.append(build_hybrid(case, config, packed, place))
            continue
        layer = get_gpt_layer_local_spec(normalization=config.normalization, **case.spec)
        block: Any = with_sequence_parallel_norms(layer, config, vp_stage=vp_stage)
        if isinstance(config.moe_layer_freq, list):
            block = get_gpt_decoder_block_spec(
                config, False, normalization=config.normalization, vp_stage=vp_stage
            )
            block = with_sequence_parallel_norms(block, config, vp_stage=vp_stage)
        block = with_local_linear_layers(block, config, vp_stage)
        if config.moe_grouped_gemm:
            block = with_grouped_experts(block)
        if packed:
            block = with_prefix_grouped_attention(block, case.backend)
        elif config.multi_latent_attention:
            block = with_value_sizes(block)
        chunks.append(
            (PrefixGroupedGPTModel if packed else GPTModel)(
                config,
                block,
                vocab_size=VOCAB,
                max_sequence_length=MAX_LEN,
                **place,
            ).to(case.dtype)  # Megatron makes position embeddings in fp32
        )
    return chunks


def build_hybrid(
    case: Case, config: TransformerConfig, packed: bool, place: dict[str, Any]
) -> torch.nn.Module:
    """A chunk of a HybridModel: ours on the wrapped stack, or the stock model on the stock one."""
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    stack = hybrid_stack_local_spec(config)
    if packed:
        stack = with_prefix_grouped_attention(stack, case.backend)
    return (PrefixGroupedHybridModel if packed else HybridModel)(
        config,
        stack,
        vocab_size=VOCAB,
        max_sequence_length=MAX_LEN,
        hybrid_layer_pattern=case.pattern,
        **place,
    ).to(case.dtype)


def make_states_reach_far(chunks: list[torch.nn.Module]) -> None:
    """Decays from fast to slow: as they begin, states are forgotten within a few tokens."""
    gen = torch.Generator().manual_seed(7)
    for name, weight in (p for c in chunks for p in c.named_parameters()):
        if name.endswith(("A_log", "dt_bias")):
            low, high = (-5.0, 0.5) if name.endswith("A_log") else (-2.0, 1.0)
            draw = torch.rand(weight.shape, generator=gen, dtype=weight.dtype)
            weight.data.copy_(low + (high - low) * draw)


def make_experts_differ(chunks: list[torch.nn.Module]) -> None:
    """On the CPU every expert-parallel rank draws the same ones, which no router tells apart."""
    rank = parallel_state.get_expert_model_parallel_rank()
    for i, (name, weight) in enumerate(p for c in chunks for p in c.named_parameters()):
        if ".experts." in name:
            generator = torch.Generator().manual_seed(1000 * rank + i)
            noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
            weight.data.add_(noise, alpha=0.3)


class SizedDotProductAttention(DotProductAttention):
    """What the stock local spec of latent attention needs to be built at all."""

    def __init__(self, *args: Any, k_channels: Any = None, v_channels: Any = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if v_channels is not None:
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition


def with_value_sizes(block: Any) -> Any:
    def layer(spec: Any) -> Any:
        attention = spec.submodules.self_attention
        parts = replace(attention.submodules, core_attention=SizedDotProductAttention)
        attention = replace(attention, submodules=parts)
        return replace(spec, submodules=replace(spec.submodules, self_attention=attention))

    return replace(block, layer_specs=[layer(spec) for spec in block.layer_specs])


def wrap_ddp(case: Case, config: TransformerConfig, chunks: list[Any]) -> list[Any]:
    if case.trains is not None:
        stage = parallel_state.get_pipeline_model_parallel_rank()
        for i, chunk in enumerate(chunks):
            for name, parameter in chunk.named_parameters():
                parameter.requires_grad_(case.trains(stage, i, name))
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=False,
        overlap_grad_reduce=False,
        use_distributed_optimizer=case.distributed_optimizer,
    )
    config.finalize_model_grads_func = finalize_model_grads
    return [DistributedDataParallel(config, ddp_config, chunk) for chunk in chunks]


@dataclass(frozen=True)
class Rows:
    """One microbatch of groups: packed, and written out with a random weight per target."""

    layout: PackedLayout
    sequences: list[Tensor]
    weights: list[Tensor]  # per sample, [L - 1]: weight of predicting tokens 1..L-1


def make_rows(seed: int, pad_to_multiple: int, shared_length: int = 0) -> Rows:
    """Ragged star, a deeper tree with an equal pair and a prefix sample, and two lone turns."""
    g = torch.Generator().manual_seed(seed)

    def tokens(n: int) -> list[int]:
        return torch.randint(0, VOCAB, (n,), generator=g).tolist()

    extra = int(torch.randint(0, 5, (1,), generator=g)) + shared_length
    prompt = tokens(9 + extra)
    star = [prompt + tokens(n) for n in (4, 7, 1)]
    stem, fork = tokens(5), tokens(3)
    deep = [stem + fork + tokens(4), stem + fork + tokens(2), stem + tokens(3), stem + fork]
    deep += [deep[0]]
    lone = [tokens(6)]
    star_tree = PrefixTree.from_group(len(prompt), [len(s) - len(prompt) for s in star])
    turns = PrefixTree(np.array([4, 2]), np.array([-1, 0]), np.array([1]))
    trees = [star_tree, PrefixTree.from_sequences(deep), turns]
    sequences = [torch.tensor(s) for s in star + deep + lone]
    weights = [torch.randn(len(s) - 1, generator=g, dtype=torch.float64) for s in sequences]
    return Rows(pack_trees(trees, pad_to_multiple), sequences, weights)


def packed_microbatches(case: Case, rows: list[Rows]) -> list[dict[str, Any]]:
    batches = []
    for row in rows:
        layout = row.layout
        tokens = layout.pack_tokens(row.sequences)
        # Every target's weight is summed over the samples that predict it.
        per_token = torch.cat(
            [torch.cat([torch.zeros(1, dtype=torch.float64), w]) for w in row.weights]
        )
        weights = layout.reduce(per_token)[layout.target_ids]
        predictions = None
        if case.predictions:
            predictions = Predictions(
                predictor_ids=layout.predictor_ids,
                target_tokens=tokens[layout.target_ids],
                chunk_tokens=7,
            )
        params = PrefixGroupedSeqParams.from_layout(layout, "cpu", predictions=predictions)
        batches.append(dict(tokens=tokens, params=params, weights=weights.to(case.dtype)))
    return batches


def packed_step(batch_iterator: Any, model: Any) -> Any:
    """A ``forward_step_func`` on packed groups."""
    batch = next(batch_iterator)
    params = batch["params"]
    output = model(batch["tokens"][None], params.position_ids[None], None, packed_seq_params=params)

    def loss_func(output: Any) -> Any:
        layout = params.layout
        if params.predictions is not None:
            logprobs, _ = output
        else:
            logits = gather_from_tensor_model_parallel_region(output)[0]
            rows = logits[layout.predictor_ids]
            logprobs = rows.log_softmax(-1).gather(1, batch["tokens"][layout.target_ids][:, None])[
                :, 0
            ]
        loss = -(logprobs * batch["weights"]).sum()
        num_tokens = int(layout.sample_lens.sum()) - layout.num_samples
        return *counted(model, loss, num_tokens), {"loss": loss.detach().clone()}

    return output, loss_func


def counted(model: Any, loss: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Loss and tokens as a rank returns them that divides a row with others.

    Megatron adds up the tokens of those ranks, so the first counts them all; where it averages, it
    divides each rank's loss by that rank's tokens, and all by the ranks.
    """
    config = get_model_config(model)
    if not config.calculate_per_token_loss:
        return loss * config.context_parallel_size, torch.tensor(num_tokens, dtype=torch.int)
    is_first = parallel_state.get_context_parallel_rank() == 0
    return loss, torch.tensor(num_tokens if is_first else 0, dtype=torch.int)


def written_out_microbatches(case: Case, rows: list[Rows]) -> list[dict[str, Any]]:
    batches = []
    for row in rows:
        for sequence, weights in zip(row.sequences, row.weights):
            tail = -len(sequence) % (case.tp if case.sp else 1)
            tokens = torch.cat([sequence, sequence.new_zeros(tail)])
            batches.append(dict(tokens=tokens, length=len(sequence), weights=weights))
    return batches


def written_out_step(batch_iterator: Any, model: Any) -> Any:
    """A ``forward_step_func`` on one written-out sample."""
    batch = next(batch_iterator)
    tokens = batch["tokens"]
    n = len(tokens)
    mask = torch.triu(torch.ones(n, n, dtype=torch.bool), 1)[None, None]
    output = model(tokens[None], torch.arange(n)[None], mask)

    def loss_func(output: Tensor) -> Any:
        length = batch["length"]
        logits = gather_from_tensor_model_parallel_region(output)[0, : length - 1]
        logprobs = logits.log_softmax(-1).gather(1, tokens[1:length, None])[:, 0]
        loss = -(logprobs * batch["weights"].to(logprobs.dtype)).sum()
        return loss, torch.tensor(length - 1, dtype=torch.int), {"loss": loss.detach().clone()}

    return output, loss_func


def run_step(case: Case, chunks: list[Any], step: Any, batches: list[Any]) -> float | None:
    """Forward and backward over all microbatches; the summed loss on the last stage."""
    for chunk in chunks:
        chunk.zero_grad_buffer()
    iterators = [iter(batches) for _ in chunks]
    results = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iterators if case.vpp else iterators[0],
        model=chunks if case.vpp else chunks[0],
        num_microbatches=len(batches),
        seq_length=MAX_LEN,
        micro_batch_size=1,
        forward_only=False,
    )
    if not results:
        return None
    return float(sum(float(r["loss"]) if "loss" in r else 0.0 for r in results))


def named_gradients(chunks: list[Any]) -> dict[str, Tensor]:
    return {
        f"chunk{i}.{name}": parameter.main_grad.detach().clone()
        for i, chunk in enumerate(chunks)
        for name, parameter in chunk.module.named_parameters()
        if parameter.requires_grad
    }


def make_dp_rows(case: Case, num_rows: int, seed: int = 0) -> list[Rows]:
    """Rows of this data-parallel rank of the case; microbatches differ in length."""
    copies = case.cp // parallel_state.get_context_parallel_world_size()
    rank = parallel_state.get_data_parallel_rank() // copies
    pad = case.row_multiple
    return [make_rows(seed + 100 * rank + i, pad, shared_length=6 * i) for i in range(num_rows)]


def assert_within(errors: dict[str, float], bound: float) -> None:
    # NaN is not within anything.
    beyond = {name: error for name, error in errors.items() if not error <= bound}
    assert not beyond, f"more than {bound:.1e}: {beyond}"
