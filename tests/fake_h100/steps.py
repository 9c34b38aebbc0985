"""A rank of a training run on the fake device: builds its model and makes gradients of a step."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from megatron_pg.data import Group, Sample
from megatron_pg.grpo import GrpoStep, PrefixGroupConfig
from megatron_pg.mcore import attention_backends
from megatron_pg.train import TrainConfig, parallel_run
from megatron_pg.train.config import ModelConfig, ParallelConfig
from megatron_pg.train.model import (
    ModelPlan,
    build_trained_model,
    check_attention,
    plan_model,
)
from tests.fake_h100.alone import NoReplicas, alone
from tests.fake_h100.device import FakeH100, Reads
from tests.fake_h100.packages import install
from tests.fake_h100.record import Record

HIDDEN, VOCAB, ROW_TOKENS = 256, 512, 224
PROMPT_TOKENS, RESPONSE_TOKENS = 96, 32
DENSE: dict[str, Any] = dict(
    num_layers=2,
    hidden_size=HIDDEN,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=512,
    gated_linear_unit=True,
    activation_func="silu",
    normalization="RMSNorm",
    add_bias_linear=False,
)
# Mamba-2 layers, attention and an MLP.
NEMOTRON: dict[str, Any] = dict(
    architectures=["NemotronHForCausalLM"],
    model_type="nemotron_h",
    layers_block_type=["mamba", "attention", "mamba", "mlp"],
    hidden_size=HIDDEN,
    intermediate_size=512,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    vocab_size=VOCAB,
    max_position_embeddings=512,
    layer_norm_epsilon=1e-5,
    tie_word_embeddings=False,
    torch_dtype="bfloat16",
    mamba_num_heads=8,
    mamba_head_dim=32,
    n_groups=2,
    ssm_state_size=32,
    conv_kernel=4,
    use_conv_bias=True,
    mlp_hidden_act="relu2",
    mamba_hidden_act="silu",
)
NUM_EXPERTS, TOPK = 4, 2
EXPERTS = dict(num_moe_experts=NUM_EXPERTS, moe_router_topk=TOPK, moe_ffn_hidden_size=128)

# Values are smaller than queries and keys, as in DeepSeek's models.
LATENT = dict(
    multi_latent_attention=True,
    q_lora_rank=64,
    kv_lora_rank=64,
    qk_head_dim=32,
    qk_pos_emb_head_dim=32,
    v_head_dim=32,
    num_query_groups=4,
)
LINEAR = dict(
    experimental_attention_variant="gated_delta_net",
    linear_attention_freq=2,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=32,
    linear_value_head_dim=32,
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One rank of a layout, and a step.

    Attributes:
        rank: which one.
        parallel: fields of ``ParallelConfig``.
        model: fields of ``TransformerConfig`` that differ from ``DENSE``.
        settings: fields of ``PrefixGroupConfig``.
        package: of kernels, that is there.
        hf: a ``config.json`` that the model is of instead, with random weights.
        group_sizes: responses of every prompt; four of them fill a row.
    """

    rank: int = 0
    parallel: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    package: str | None = None
    hf: Mapping[str, Any] | None = None
    group_sizes: Sequence[int] = (4, 4)

    @property
    def num_ranks(self) -> int:
        """Of one replica."""
        sizes = ParallelConfig(**self.parallel).sizes
        return sizes.model_size * sizes.ep


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a case did.

    Attributes:
        backends: of attention, that ran.
        devices, dtypes: of the parameters.
        gradient_dtypes: of what their gradients are added up in.
        without_gradient: parameters that no gradient reached.
        row_tokens: of the rows that train.
        num_prefix_rows: rows that stayed resident.
        first: the first training pass over the rows.
        again: the same once more, as in a second epoch.
    """

    backends: tuple[str, ...]
    devices: set[str]
    dtypes: set[torch.dtype]
    gradient_dtypes: set[torch.dtype]
    without_gradient: list[str]
    row_tokens: list[int]
    num_prefix_rows: int
    first: Record
    again: Record


@dataclass(frozen=True)
class Built:
    """A rank's model on its device, within both."""

    device: FakeH100
    chunks: list[Any]
    vocab_size: int
    settings: PrefixGroupConfig


@contextmanager
def built(case: Case, reads: Reads | None = None) -> Iterator[Built]:
    """The model of a case, for what is run within; ``reads`` as ``FakeH100`` takes them."""
    if case.package is not None:
        install(case.package)
    parallel = ParallelConfig(**case.parallel)
    model = ModelConfig(vocab_size=VOCAB, transformer={**DENSE, **case.model})
    settings = PrefixGroupConfig(max_tokens_per_microbatch=ROW_TOKENS, **case.settings)
    config = TrainConfig(model=model, parallel=parallel, prefix_group=settings)
    with (
        alone(case.rank, case.num_ranks),
        FakeH100(reads or _spread(case)) as device,
        parallel_run(parallel, 1) as ranks,
    ):
        plan = _plan(case, model, parallel)
        check_attention(plan, settings.attention_backend, ranks.device)
        chunks = build_trained_model(config, plan, num_updates=10).chunks
        yield Built(device, chunks, plan.vocab_size, settings)


def train(case: Case) -> Seen:
    """Run a case."""
    with built(case) as model:
        device, chunks = model.device, model.chunks
        step = GrpoStep(chunks, vocab_size=model.vocab_size, settings=model.settings)
        step.replicas = NoReplicas()
        batch = step.prepare([_group(number, size) for number, size in enumerate(case.group_sizes)])
        (minibatch,) = batch.minibatches
        parameters = dict(_parameters(chunks))
        reached: set[str] = set()
        for name, parameter in parameters.items():
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: reached.add(name))
        records = [device.record(lambda: step.backward(batch)) for _ in range(2)]
        return Seen(
            backends=attention_backends(torch.nn.ModuleList(chunk.module for chunk in chunks)),
            devices={str(p.device) for p in parameters.values()},
            dtypes={p.dtype for p in parameters.values()},
            gradient_dtypes={p.main_grad.dtype for p in parameters.values()},
            without_gradient=sorted(parameters.keys() - reached),
            row_tokens=[row.layout.total_tokens for row in minibatch.rows],
            num_prefix_rows=sum(len(wave.prefix_rows) for wave in minibatch.waves),
            first=records[0],
            again=records[1],
        )


def _plan(case: Case, model: ModelConfig, parallel: ParallelConfig) -> ModelPlan:
    if case.hf is None:
        return plan_model(model, parallel)
    with TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(case.hf))
        return plan_model(ModelConfig(hf=folder), parallel)


def _spread(case: Case) -> Reads:
    def reads(tensor: Tensor) -> Tensor | None:
        """Tokens spread evenly over the experts, and over the ranks that hold them."""
        if tensor.dtype == torch.int64 and tensor.numel() in (NUM_EXPERTS, case.num_ranks):
            return torch.full(tensor.shape, ROW_TOKENS * TOPK // tensor.numel())
        return None

    return reads


def _group(number: int, size: int) -> Group:
    prompt_ids = torch.randint(0, VOCAB, (PROMPT_TOKENS,))
    samples = [
        Sample(
            prompt_ids=prompt_ids,
            response_ids=torch.randint(0, VOCAB, (RESPONSE_TOKENS,)),
            reward=float(place),
            loss_mask=torch.ones(RESPONSE_TOKENS, dtype=torch.bool),
            old_logprobs=-torch.ones(RESPONSE_TOKENS, dtype=torch.float64),
            ref_logprobs=None,
            rollout_logprobs=None,
        )
        for place in range(size)
    ]
    return Group(str(number), tuple(samples))


def _parameters(chunks: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    for number, chunk in enumerate(chunks):
        for name, parameter in chunk.module.named_parameters():
            yield f"chunk{number}.{name}", parameter
