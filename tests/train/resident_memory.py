"""On one rank: what ``dry_run`` says about resident prompts, and what training them takes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from megatron_pg.data import Group, Sample, write_rollouts
from megatron_pg.grpo import GrpoStep, PrefixGroupConfig
from megatron_pg.mcore import PrefixKV
from megatron_pg.mcore.schedule import resident
from megatron_pg.train import TrainConfig, dry_run, parallel_run
from megatron_pg.train.config import (
    ModelConfig,
    RolloutConfig,
    RunConfig,
)
from megatron_pg.train.model import build_trained_model
from megatron_pg.train.model.plan import ModelPlan, plan_model
from tools.bench.timing import peak_bytes

VOCAB = 64
NUM_PROMPTS, PROMPT_LEN, NUM_RESPONSES, RESPONSE_LEN = 8, 256, 5, 63
# A prompt and one of its responses, or all of them beside it: every group is larger.
MAX_TOKENS = 320
MODEL = ModelConfig(
    vocab_size=VOCAB,
    max_position_embeddings=512,
    transformer={
        "num_layers": 2,
        "hidden_size": 64,
        "ffn_hidden_size": 176,
        "num_attention_heads": 8,
        "num_query_groups": 2,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": "silu",
        "add_bias_linear": False,
    },
)
Passes = partial[dict[str, float]]


@dataclass(frozen=True)
class Measured:
    """One mode with so many prompts at once; ``kept`` is K, V and gradients of one wave."""

    mode: str
    at_once: int
    waves: int
    resident_groups: int
    kept: int
    peak: int
    parameters: int
    estimate: int
    estimate_resident: int


def make_groups() -> list[Group]:
    def group(number: int) -> Group:
        prompt = torch.randint(0, VOCAB, (PROMPT_LEN,))
        samples = (
            Sample(
                prompt_ids=prompt,
                response_ids=torch.randint(0, VOCAB, (RESPONSE_LEN,)),
                reward=float(i),
                loss_mask=torch.ones(RESPONSE_LEN, dtype=torch.bool),
            )
            for i in range(NUM_RESPONSES)
        )
        return Group(str(number), tuple(samples))

    return [group(number) for number in range(NUM_PROMPTS)]


def kept_bytes(run: Passes, num_waves: int) -> int:
    """What the prefix rows of one wave have kept when it ends; all waves are alike."""
    made: list[PrefixKV] = []

    class Noted(PrefixKV):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    resident.PrefixKV = Noted
    try:
        run()
    finally:
        resident.PrefixKV = PrefixKV
    per_wave = len(made) // num_waves
    waves = [made[start : start + per_wave] for start in range(0, len(made), per_wave)]
    (kept,) = {sum(kv.num_bytes for kv in wave) for wave in waves}
    return kept


def measure(config: TrainConfig, plan: ModelPlan, groups: list[Group]) -> Measured:
    estimate = dry_run(config, 1)
    chunks = build_trained_model(config, plan, 1).chunks
    step = GrpoStep(chunks, vocab_size=VOCAB, settings=config.prefix_group)
    batch = step.prepare(groups)
    waves, tokens = batch.minibatches[0].waves, batch.tokens
    run: Passes = partial(step.backward, batch)
    kept = kept_bytes(run, len(waves))
    return Measured(
        mode=config.prefix_group.prefix_resident_mode,
        at_once=NUM_PROMPTS // len(waves),
        waves=len(waves),
        resident_groups=tokens.resident_groups,
        kept=kept,
        peak=peak_bytes(run),
        parameters=estimate.parameters_per_rank,
        estimate=estimate.bytes_per_rank,
        estimate_resident=estimate.resident_bytes_per_rank,
    )


def measure_all(folder: Path) -> dict[tuple[str, int], Measured]:
    """By mode and number of prompts that are resident at once."""
    torch.manual_seed(0)
    groups, file = make_groups(), folder / "rollouts.jsonl"
    write_rollouts(groups, file)
    run = RunConfig(groups_per_step=NUM_PROMPTS)
    base = TrainConfig(model=MODEL, rollout=RolloutConfig(files=[str(file)]), run=run)
    measured = {}
    with parallel_run(base.parallel, 0):
        plan = plan_model(base.model, base.parallel)
        for mode in ("retain", "recompute"):
            for at_once in (2, NUM_PROMPTS):
                settings = PrefixGroupConfig(
                    max_tokens_per_microbatch=MAX_TOKENS,
                    prefix_resident="always",
                    prefix_resident_mode=mode,
                    max_resident_tokens=at_once * PROMPT_LEN,
                    logprob_chunk_tokens=64,
                )
                changed = replace(base, prefix_group=settings)
                measured[mode, at_once] = measure(changed, plan, groups)
    return measured
