"""Short runs of a model from scratch on ranks of their own, and what they leave."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_pg.train import TrainConfig, load_config
from tests.data.samples import make_large_groups
from tests.ranks import Pool
from tests.train import late_imports, tiny  # noqa: F401
from tests.train.layouts import NUM_RANKS, with_layout

NUM_STEPS = 4
SIZES = dict(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    gated_linear_unit=True,
    activation_func="silu",
    add_bias_linear=False,
    init_method_std=0.2,
)


def make_config(folder: Path, transformer: dict[str, Any]) -> TrainConfig:
    """Of groups some of which are larger than a small row."""
    sections = tiny.run_sections(folder, make_large_groups(seed=1, vocab_size=tiny.VOCAB))
    sections["model"] = dict(
        vocab_size=tiny.VOCAB, max_position_embeddings=64, transformer=transformer
    )
    steps = dict(run__num_steps=NUM_STEPS, run__save_interval=2)
    return load_config(tiny.write_config(folder / "run.yaml", sections, **steps))


def with_resident_prompts(config: TrainConfig, mode: str) -> TrainConfig:
    settings = replace(
        config.prefix_group,
        max_tokens_per_microbatch=18,
        prefix_resident="always",
        prefix_resident_mode=mode,
    )
    return replace(config, prefix_group=settings)


def train(config: TrainConfig) -> dict[str, torch.Tensor]:
    """A whole run; weights of this rank."""
    with tiny.opened(config) as trainer:
        trainer.run()
        return {
            name: parameter.detach().clone()
            for chunk in trainer.model.chunks
            for name, parameter in chunk.named_parameters()
        }


def run(ranks: Pool, config: TrainConfig, out: Path, layout: str = "one", **changes: Any) -> Any:
    """Weights of every rank, and the metrics of every step."""
    settings = replace(config.run, out=str(out), **changes)
    config = with_layout(replace(config, run=settings), layout)
    weights = ranks.run(NUM_RANKS[layout], train, config, timeout=300)
    return weights, [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_same_training(got: list[dict[str, float]], want: list[dict[str, float]]) -> None:
    assert len(got) == len(want) == NUM_STEPS
    for ours, theirs in zip(got, want):
        for name in ("actor/loss", "actor/grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
    assert len({step["actor/grad_norm"] for step in want}) == NUM_STEPS
