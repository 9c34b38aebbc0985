"""On ranks: parameters of real modules, and the passes of a real schedule that are in flight."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_pg.grpo import GrpoStep, PrefixGroupConfig
from megatron_pg.mcore import build_gpt_chunks
from megatron_pg.train import TrainConfig, parallel_run
from megatron_pg.train.config import ModelConfig, ParallelConfig
from megatron_pg.train.model import build_trained_model, plan_model
from tests.checkpoint.folders import make_config
from tests.train import tiny

SIZES: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "num_query_groups": 2,
}
# Of layers of a hybrid, where its pattern has some.
OF_EXPERTS: dict[str, Any] = dict(
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=20,
    n_shared_experts=1,
    moe_shared_expert_intermediate_size=28,
    n_group=1,
    topk_group=1,
    routed_scaling_factor=2.5,
    norm_topk_prob=True,
)
# Fields of ``ModelConfig``.
OF_MODEL = ("untie_embeddings_and_output_weights", "position_embedding_type")


def hybrid_of(folder: Path, pattern: str, **sizes: Any) -> ModelConfig:
    """Of a folder that describes a NemotronH with layers by this pattern, and holds no weights."""
    layers = dict(hybrid_override_pattern=pattern, num_hidden_layers=len(pattern))
    made = make_config("NemotronHForCausalLM", **{"vocab_size": tiny.VOCAB} | layers | sizes)
    del made["layers_block_type"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(made))
    return ModelConfig(hf=str(folder))


def model_of(transformer: Mapping[str, Any]) -> ModelConfig:
    """Of settings among which are fields of ``ModelConfig``, and 50 tokens."""
    fields = {name: transformer[name] for name in OF_MODEL if name in transformer}
    others = {name: value for name, value in transformer.items() if name not in OF_MODEL}
    return ModelConfig(vocab_size=tiny.VOCAB, transformer=others, **fields)


def counted(
    models: Mapping[str, Mapping[str, Any] | ModelConfig], parallel: ParallelConfig
) -> dict[str, tuple[int, int, int]]:
    """By model: the stage of this rank, its parameters outside of experts, and in them."""
    with parallel_run(parallel, 0):
        stage = parallel_state.get_pipeline_model_parallel_rank()
        found = {}
        for name, model in models.items():
            model = model if isinstance(model, ModelConfig) else model_of(model)
            plan = plan_model(model, parallel)
            sizes = [
                (".experts." in key, parameter.numel())
                for chunk in build_gpt_chunks(plan.config, gpt=plan.gpt)
                for key, parameter in chunk.named_parameters()
            ]
            of = [sum(size for is_in, size in sizes if is_in == kind) for kind in (False, True)]
            found[name] = stage, *of
        return found


def live_passes(parallel: ParallelConfig, num_groups: int) -> tuple[list[int], int]:
    """Forward passes before their backward passes, by chunk, when most were; and rows of a rank."""
    with parallel_run(parallel, 0):
        # A layer for every chunk at the least.
        layers = {"num_layers": max(SIZES["num_layers"], parallel.sizes.num_chunks)}
        config = TrainConfig(model=model_of(SIZES | layers), parallel=parallel)
        model = build_trained_model(config, plan_model(config.model, parallel), 1)
        live, peak = [0] * len(model.chunks), [0] * len(model.chunks)

        def begin(number: int, out: Any) -> None:
            nonlocal peak
            live[number] += 1
            if sum(live) > sum(peak):
                peak = list(live)
            first = out if torch.is_tensor(out) else out[0]
            first.register_hook(lambda grad: end(number))

        def end(number: int) -> None:
            live[number] -= 1

        for number, chunk in enumerate(model.chunks):
            chunk.register_forward_hook(lambda m, a, out, number=number: begin(number, out))
        settings = PrefixGroupConfig(max_tokens_per_microbatch=40, prefix_resident="never")
        step = GrpoStep(model.chunks, vocab_size=tiny.VOCAB, settings=settings)
        batch = step.prepare(tiny.make_groups(num_groups))
        step.backward(batch)
        assert live == [0] * len(live)
        return peak, len(batch.minibatches[0].waves[0].microbatches)


def first_step(config: TrainConfig) -> dict[str, float]:
    """Metrics of a run's first step, complete on the first rank."""
    with tiny.opened(config) as trainer:
        return dict(trainer.train_step())
