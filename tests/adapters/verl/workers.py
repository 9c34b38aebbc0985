"""verl's own worker around its engine and ours, with a stand-in for Megatron Bridge.

Megatron Bridge needs Transformer Engine. What verl asks of it is here: a provider that is its
model's configuration and makes chunks from ``transformer_layer_spec``; weights are those of a seed.
"""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import LlamaConfig
from verl.trainer.config import CheckpointConfig
from verl.workers.config import McoreEngineConfig, McoreOptimizerConfig, TrainingWorkerConfig
from verl.workers.engine_workers import TrainingWorker

from megatron_pg.mcore import cpu, with_sequence_parallel_norms
from tests.adapters.verl.batches import VOCAB
from tests.adapters.verl.harness import Causal, loss_function, make_data, response_values
from tests.mcore.harness import on_cpu


def layer_spec(config: Any, vp_stage: int | None = None) -> Any:
    spec = get_gpt_layer_local_spec(normalization=config.normalization)
    return with_sequence_parallel_norms(spec, config, vp_stage=vp_stage)


@dataclass
class Provider(TransformerConfig):
    """As ``GPTModelProvider`` 0.5: fields that layers do not read, and a late ``__post_init__``."""

    vocab_size: int | None = None
    seq_length: int = 1024
    position_embedding_type: str = "learned_absolute"
    rotary_base: int = 10000
    rope_scaling: bool = False
    rope_scaling_factor: float = 1.0
    share_embeddings_and_output_weights: bool = True
    transformer_layer_spec: Any = layer_spec
    hf_model_id: str | None = None
    yarn_beta_fast: float | None = None
    _pg_collection: Any = None

    model_class: ClassVar[Any] = GPTModel

    def __post_init__(self) -> None:
        pass

    def apply_overrides_and_finalize(self, dtype: Any, overrides: dict[str, Any]) -> None:
        settings = dict(params_dtype=dtype, pipeline_dtype=dtype, bf16=dtype == torch.bfloat16)
        for name, value in (settings | overrides).items():
            setattr(self, name, value)
        # As Megatron Bridge does.
        self.calculate_per_token_loss = self.context_parallel_size > 1
        super().__post_init__()

    def provide_distributed_model(self, *, wrap_with_ddp: bool, **_: Any) -> list[Any]:
        model_parallel_cuda_manual_seed(1234, inference_rng_tracker=True, force_reset_rng=True)
        torch.manual_seed(1234)
        self._pg_collection = object()
        spec = self.transformer_layer_spec(self, vp_stage=None)
        chunk = self.model_class(
            self,
            spec,
            vocab_size=self.vocab_size,
            max_sequence_length=self.seq_length,
            position_embedding_type=self.position_embedding_type,
            share_embeddings_and_output_weights=self.share_embeddings_and_output_weights,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
        ).to(self.params_dtype)
        if self.bf16:
            chunk = Float16Module(self, chunk)
        if wrap_with_ddp:
            chunk = DistributedDataParallel(self, DistributedDataParallelConfig(), chunk)
        return [chunk]


class StockProvider(Provider):
    """The same of a model that pads."""

    model_class = Causal


@dataclass(frozen=True)
class AutoBridge:
    """What verl asks of Megatron Bridge's."""

    provider: Any

    def to_megatron_provider(self, load_weights: bool) -> Any:
        return self.provider

    def load_hf_weights(self, module: Any, *args: Any, **kwargs: Any) -> None:
        pass


@contextmanager
def bridge(provider: Any) -> Iterator[None]:
    """Within, verl's engines are built from ``provider``."""
    names = ("verl.models.mcore.bridge", "megatron.bridge", "megatron.bridge.training")
    names += ("megatron.bridge.training.utils", "megatron.bridge.training.utils.config_utils")
    modules: dict[str, Any] = {name: types.ModuleType(name) for name in names}
    modules[names[0]].AutoBridge = SimpleNamespace(
        from_hf_pretrained=lambda *args, **kwargs: AutoBridge(provider)
    )
    modules[names[0]].make_value_model = modules[names[0]].freeze_moe_router = lambda *args: None
    modules[names[-1]].create_ddp_config = lambda **kwargs: None
    with mock.patch.dict(sys.modules, modules):
        yield


@contextmanager
def without_cuda_numbers() -> Iterator[None]:
    """Within, what verl reports of a device does not ask one that is not there."""
    with (
        mock.patch.object(torch.cuda, "mem_get_info", lambda *args: (0, 0)),
        mock.patch.object(torch.cuda, "get_device_name", lambda *args: "none"),
    ):
        yield


class ModelConfig(SimpleNamespace):
    """What engines read of verl's ``HFModelConfig``, which would look for files."""

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name, default)


def worker_config(packed: bool, **changes: Any) -> TrainingWorkerConfig:
    """A tiny model, trained by verl's worker in fp32.

    Args:
        packed: whether rows are packed; the stock model pads.
        changes: of the engine's configuration.
    """
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    hf_config = LlamaConfig(**sizes, architectures=["LlamaForCausalLM"])
    settings: dict[str, Any] = dict(
        sequence_parallel=False,
        use_distributed_optimizer=False,
        override_transformer_config=dict(cpu.transformer_config_defaults()),
        max_token_len_per_gpu=80,
        infer_max_token_len_per_gpu=80,
        micro_batch_size_per_gpu=1,
        infer_micro_batch_size_per_gpu=1,
        use_dynamic_bsz=packed,
    )
    engine = McoreEngineConfig(**settings | changes)
    if "dtype" not in changes:
        object.__setattr__(engine, "dtype", "fp32")
    model = ModelConfig(
        hf_config=hf_config,
        local_path="nowhere",
        trust_remote_code=False,
        share_embeddings_and_output_weights=False,
        architectures=["LlamaForCausalLM"],
        mtp=SimpleNamespace(enable=False, enable_train=False),
        lora={},
        tokenizer=SimpleNamespace(pad_token_id=0),
        get_processor=lambda: None,
        use_remove_padding=packed,
        use_fused_kernels=False,
    )
    return TrainingWorkerConfig(
        model_type="language_model",
        model_config=model,
        engine_config=engine,
        # Adam would divide what rounding leaves of a gradient by itself.
        optimizer_config=McoreOptimizerConfig(optimizer="sgd", lr=0.1, total_training_steps=8),
        checkpoint_config=CheckpointConfig(save_contents=[], load_contents=[]),
    )


def provider(packed: bool, **changes: Any) -> Provider:
    settings: dict[str, Any] = dict(
        num_layers=2,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        num_query_groups=2,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        init_method_std=0.3,
        vocab_size=VOCAB,
        seq_length=128,
        position_embedding_type="rope",
        rope_scaling=True,
        rope_scaling_factor=8.0,
        yarn_beta_fast=32.0,
        share_embeddings_and_output_weights=False,
        hf_model_id="nowhere",
    )
    return (Provider if packed else StockProvider)(**settings | changes)


def make_worker(packed: bool, config: TrainingWorkerConfig | None = None, **changes: Any) -> Any:
    """verl's worker, its engine chosen by verl's registry and started."""
    variables = dict(VERL_ENGINE_DEVICE="cuda", VERL_ENGINE_VENDOR="prefix_grouped" * packed)
    # A launcher's, which a lone rank has not.
    variables |= {n: os.environ.get(n, "0") for n in ("MASTER_ADDR", "MASTER_PORT")}
    with mock.patch.dict("os.environ", variables), bridge(provider(packed, **changes)):
        worker = TrainingWorker(config or worker_config(packed))
        worker.reset()
    worker.set_loss_fn(loss_function())
    return worker


@dataclass
class Run:
    """What a few updates came to.

    Attributes:
        logprobs: before the updates, of every response.
        metrics: of every update.
        weights: afterwards.
    """

    engine: str = ""
    logprobs: list[torch.Tensor] = field(default_factory=list)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)


def run_worker(case: Any, packed: bool, num_updates: int) -> Run:
    """Logprobs, then updates of two mini-batches each, through verl's worker; runs on a rank."""
    with on_cpu(), without_cuda_numbers():
        changes: dict[str, Any] = {}
        if packed:
            overrides = {"prefix_group": case.prefix_group}
            changes = dict(override_mcore_model_config=overrides, context_parallel_size=case.cp)
        config = worker_config(packed, **changes)
        worker = make_worker(packed, config)
        found = Run(type(worker.engine).__name__)
        drop = dict(use_dynamic_bsz=None, max_token_len_per_gpu=None)
        # Of context-parallel ranks verl reads the first.
        is_read = worker.engine.is_mp_src_rank_with_outputs()
        for update in range(num_updates):
            data = make_data(case, **drop)
            if update == 0:
                output = worker.infer_batch(with_settings(data, compute_loss=False))
                answer = dict(model_output=output)
                found.logprobs = response_values(answer, data, "log_probs") if is_read else []
            settings = dict(mini_batch_size=4 * case.dp, epochs=1, seed=1)
            output = worker.train_mini_batch(
                with_settings(data, global_batch_size=4 * case.dp, **settings)
            )
            found.metrics += [dict(output["metrics"])] if is_read else []
        for name, parameter in worker.engine.module[0].module.named_parameters():
            found.weights[name] = parameter.detach().clone()
        return found


def with_settings(data: Any, **settings: Any) -> Any:
    from verl.utils import tensordict_utils as tu

    return tu.assign_non_tensor(data.copy(), **settings)
