"""Runs of a model with latent attention from scratch: layouts, resident prompts, resuming."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")

from megatron_pg.train import dry_run  # noqa: E402
from tests.ranks import Pool  # noqa: E402
from tests.train.layouts import with_layout  # noqa: E402
from tests.train.scratch import (  # noqa: E402
    NUM_STEPS,
    SIZES,
    assert_same_training,
    make_config,
    run,
    with_resident_prompts,
)

pytestmark = pytest.mark.megatron

LATENT = SIZES | dict(
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


@pytest.fixture(scope="module")
def straight(ranks: Pool, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("latent")
    config = make_config(folder, LATENT)
    return config, *run(ranks, config, folder / "straight")


def test_the_dry_run_counts_its_parameters(straight: Any) -> None:
    config, (weights,), _ = straight
    told = dry_run(config, 1)
    assert told.parameters_per_rank == sum(weight.numel() for weight in weights.values())


@pytest.mark.parametrize("layout", ["tp2", "tp2_sp"])
def test_ranks_train_as_one(ranks: Pool, straight: Any, layout: str, tmp_path: Path) -> None:
    config, _, want = straight
    _, got = run(ranks, config, tmp_path / "out", layout)
    assert_same_training(got, want)


@pytest.mark.parametrize("mode", ["retain", "recompute"])
def test_prompts_that_are_resident(ranks: Pool, straight: Any, mode: str, tmp_path: Path) -> None:
    config, _, want = straight
    _, got = run(ranks, with_resident_prompts(config, mode), tmp_path / "out")
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
    config = make_config(tmp_path, LATENT)
    model = replace(config.model, transformer=LATENT | changes)
    with pytest.raises(ValueError, match=message):
        dry_run(replace(config, model=model), 1)


def test_widths_that_ranks_cannot_divide(tmp_path: Path) -> None:
    config = with_layout(make_config(tmp_path, LATENT), "tp2")
    model = replace(config.model, transformer=LATENT | dict(kv_lora_rank=13))
    with pytest.raises(ValueError, match="qk_pos_emb_head_dim=17 is no multiple of tensor_model"):
        dry_run(replace(config, model=model), 2)
    assert dry_run(config, 2).parameters_per_rank > 0


def test_a_model_without_a_latent_of_queries(tmp_path: Path) -> None:
    config = make_config(tmp_path, LATENT)
    model = replace(config.model, transformer=LATENT | dict(q_lora_rank=None))
    # One projection of 32 to 4 heads of 12 in the place of two over 16, and no norm of 16.
    one, two = (dry_run(replace(config, model=m), 1) for m in (model, config.model))
    fewer = 2 * (16 * (32 + 48) + 16 - 32 * 48)
    assert two.parameters_per_rank - one.parameters_per_rank == fewer
