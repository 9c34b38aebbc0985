"""Runs of a model with latent attention from scratch: layouts, resident prompts, resuming."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")

from megatron_pg.train import TrainConfig, dry_run, load_config  # noqa: E402
from tests.data.samples import make_large_groups  # noqa: E402
from tests.ranks import Pool  # noqa: E402
from tests.train import late_imports, tiny  # noqa: E402, F401
from tests.train.layouts import NUM_RANKS, with_layout  # noqa: E402

pytestmark = pytest.mark.megatron

NUM_STEPS = 4
LATENT = dict(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    gated_linear_unit=True,
    activation_func="silu",
    add_bias_linear=False,
    init_method_std=0.2,
    multi_latent_attention=True,
    q_lora_rank=16,
    kv_lora_rank=12,
    qk_head_dim=8,
    qk_pos_emb_head_dim=4,
    v_head_dim=8,
    qk_layernorm=True,
    rope_type="yarn",
    rotary_scaling_factor=4.0,
    original_max_position_embeddings=16,
    mscale_all_dim=1.0,
)


def make_config(folder: Path) -> TrainConfig:
    sections = tiny.run_sections(folder, make_large_groups(seed=1, vocab_size=tiny.VOCAB))
    sections["model"] = dict(
        vocab_size=tiny.VOCAB, max_position_embeddings=64, transformer=dict(LATENT)
    )
    steps = dict(run__num_steps=NUM_STEPS, run__save_interval=2)
    return load_config(tiny.write_config(folder / "run.yaml", sections, **steps))


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


@pytest.fixture(scope="module")
def straight(ranks: Pool, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("latent")
    config = make_config(folder)
    return config, *run(ranks, config, folder / "straight")


def test_the_dry_run_counts_its_parameters(straight: Any) -> None:
    config, (weights,), _ = straight
    told = dry_run(config, 1)
    # The norm before the output layer is left out.
    assert told.parameters_per_rank + 32 == sum(weight.numel() for weight in weights.values())


def assert_same_training(got: list[dict[str, float]], want: list[dict[str, float]]) -> None:
    assert len(got) == len(want) == NUM_STEPS
    for ours, theirs in zip(got, want):
        for name in ("actor/loss", "actor/grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
    assert len({step["actor/grad_norm"] for step in want}) == NUM_STEPS


@pytest.mark.parametrize("layout", ["tp2", "tp2_sp"])
def test_ranks_train_as_one(ranks: Pool, straight: Any, layout: str, tmp_path: Path) -> None:
    config, _, want = straight
    _, got = run(ranks, config, tmp_path / "out", layout)
    assert_same_training(got, want)


@pytest.mark.parametrize("mode", ["retain", "recompute"])
def test_prompts_that_are_resident(ranks: Pool, straight: Any, mode: str, tmp_path: Path) -> None:
    config, _, want = straight
    settings = replace(
        config.prefix_group,
        max_tokens_per_microbatch=18,
        prefix_resident="always",
        prefix_resident_mode=mode,
    )
    _, got = run(ranks, replace(config, prefix_group=settings), tmp_path / "out")
    assert all(step["packing/resident_groups"] > 0 for step in got)
    assert_same_training(got, want)


def test_a_resumed_run_is_bit_identical(ranks: Pool, straight: Any, tmp_path: Path) -> None:
    config, (weights,), _ = straight
    out = tmp_path / "resumed"
    run(ranks, config, out, num_steps=2)
    (resumed,), steps = run(ranks, config, out)
    assert len(steps) == NUM_STEPS and resumed.keys() == weights.keys()
    assert all(torch.equal(resumed[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(multi_latent_attention=False), "q_lora_rank is of latent attention"),
        (dict(rotary_base=500.0), "is set by model.rotary_base"),
        (dict(q_lora_rank=0), "q_lora_rank=0 must be at least 1"),
        (dict(softmax_scale=0.5), "softmax_scale would be ignored by latent attention"),
        (dict(rope_type="rope"), "original_max_position_embeddings would be ignored"),
        (dict(qk_pos_emb_head_dim=5), "qk_pos_emb_head_dim=5 must be even"),
        (dict(apply_rope_fusion=True), "apply_rope_fusion=True with multi_latent_attention"),
        (dict(cache_mla_latents=True), "cache_mla_latents=True: it is an inference path"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    config = make_config(tmp_path)
    model = replace(config.model, transformer=LATENT | changes)
    with pytest.raises(ValueError, match=message):
        dry_run(replace(config, model=model), 1)


def test_widths_that_ranks_cannot_divide(tmp_path: Path) -> None:
    config = with_layout(make_config(tmp_path), "tp2")
    model = replace(config.model, transformer=LATENT | dict(kv_lora_rank=13))
    with pytest.raises(ValueError, match="qk_pos_emb_head_dim=17 is no multiple of tensor_model"):
        dry_run(replace(config, model=model), 2)
    assert dry_run(config, 2).parameters_per_rank > 0


def test_a_model_without_a_latent_of_queries(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    model = replace(config.model, transformer=LATENT | dict(q_lora_rank=None))
    # One projection of 32 to 4 heads of 12 in the place of two over 16, and no norm of 16.
    one, two = (dry_run(replace(config, model=m), 1) for m in (model, config.model))
    fewer = 2 * (16 * (32 + 48) + 16 - 32 * 48)
    assert two.parameters_per_rank - one.parameters_per_rank == fewer
