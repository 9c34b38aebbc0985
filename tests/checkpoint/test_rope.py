"""Rotary positions: Megatron-Core's tables from our settings are those of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
    YarnRotaryEmbedding,
    _yarn_get_concentration_factor_from_config,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_pg.checkpoint import HfModel, parse_hf_config
from megatron_pg.mcore import DecoderConfig, cpu, make_transformer_config
from megatron_pg.train.config import ModelConfig, ParallelConfig
from megatron_pg.train.model import plan_model
from tests.checkpoint.folders import make_config, make_weights, write_folder
from tests.hostile import refused

pytestmark = pytest.mark.megatron

LENGTH = 4096
# Of gpt-oss, Qwen2.5, DeepSeek-V3 and Olmo 3, and what is left to defaults.
YARNS: dict[str, dict[str, Any]] = {
    "untruncated": dict(
        factor=32.0, beta_fast=32.0, beta_slow=1.0, truncate=False, rope_theta=150000.0
    ),
    "plain": dict(factor=4.0, rope_theta=1e6),
    "mscale": dict(factor=40, beta_fast=32, beta_slow=1, mscale=0.707, mscale_all_dim=1.2),
    "equal mscale": dict(factor=40.0, mscale=1.0, mscale_all_dim=1.0),
    "attention factor": dict(factor=8.0, attention_factor=1.2079441541679836, rope_theta=5e5),
    "nothing lengthened": dict(factor=1.0),
    "null": dict(factor=4.0, beta_fast=None, mscale=None, truncate=None),
}


def yarn_config(**rope: Any) -> dict[str, Any]:
    head = dict(head_dim=64, hidden_size=128, max_position_embeddings=131072)
    rope = dict(rope_type="yarn", original_max_position_embeddings=4096, rope_theta=1e4) | rope
    rope = {k: v for k, v in rope.items() if v is not None}
    config = make_config("LlamaForCausalLM", **head)
    del config["rope_theta"]
    return config | dict(rope_parameters=rope)


@pytest.mark.parametrize("name", YARNS)
def test_yarn(name: str) -> None:
    config = yarn_config(**YARNS[name])
    inv_freq, factor = ROPE_INIT_FUNCTIONS["yarn"](
        transformers.LlamaConfig(**config), device=torch.device("cpu")
    )
    angles = torch.outer(torch.arange(LENGTH, dtype=torch.float32), inv_freq)
    table, settings = megatron_table(parse_hf_config(config))
    assert torch.equal(table, torch.cat((angles, angles), -1))
    got = _yarn_get_concentration_factor_from_config(settings)
    assert got == pytest.approx(factor, rel=1e-14)
    assert (factor == 1.0) == (name in ("equal mscale", "nothing lengthened"))


def megatron_table(model: HfModel) -> tuple[torch.Tensor, Any]:
    """As ``GPTModel`` makes it of its configuration and arguments."""
    settings = make_transformer_config(model.transformer_config())
    assert isinstance(settings, DecoderConfig)
    assert model.gpt_model()["position_embedding_type"] == "yarn"
    with cpu.emulate_cuda():
        rotary = YarnRotaryEmbedding(
            kv_channels=settings.kv_channels,
            rotary_base=model.gpt_model()["rotary_base"],
            use_cpu_initialization=True,
            scaling_factor=settings.yarn_rotary_scaling_factor,
            original_max_position_embeddings=settings.yarn_original_max_position_embeddings,
            beta_fast=settings.yarn_beta_fast,
            beta_slow=settings.yarn_beta_slow,
            mscale=settings.yarn_mscale,
            mscale_all_dim=settings.yarn_mscale_all_dim,
            correction_range_round_to_int=settings.yarn_correction_range_round_to_int,
        )
        return rotary.get_emb(LENGTH)[0][:, 0, 0], settings


@pytest.mark.parametrize(
    ("place", "meant"), [("inside", 512), ("outside", 512), ("both", 512), ("nowhere", 131072)]
)
def test_where_the_context_before_yarn_stands(place: str, meant: int) -> None:
    config = yarn_config(factor=4.0, original_max_position_embeddings=None)
    if place in ("inside", "both"):
        config["rope_parameters"]["original_max_position_embeddings"] = 512
    if place in ("outside", "both"):
        config["original_max_position_embeddings"] = 512
    yarn = parse_hf_config(config).yarn
    assert yarn is not None and yarn.original_max_position_embeddings == meant
    theirs = transformers.LlamaConfig(**config)
    theirs.standardize_rope_params()
    assert theirs.rope_parameters["original_max_position_embeddings"] == meant


@pytest.mark.parametrize(
    ("rope", "named"),
    [
        (dict(attention_factor=1.3), "attention_factor=1.3 (Megatron-Core computes 1.1386"),
        (dict(mscale_all_dim=1.0), "mscale and mscale_all_dim of [0.0, 1.0] (name both)"),
        (dict(mscale=0.5), "mscale and mscale_all_dim of [0.5, 0.0] (name both)"),
        (dict(finetuned=True), "rope type 'yarn' with {'finetuned': True}"),
        (dict(rope_type="longrope"), "rope type 'longrope' is not supported (it divides every"),
        (dict(beta_slow=-1.0), "beta_slow=-1.0 must be"),
        (dict(truncate="no"), "truncate='no' must be true or false"),
    ],
)
def test_what_of_yarn_is_refused(rope: dict[str, Any], named: str) -> None:
    with refused(named):
        parse_hf_config(yarn_config(factor=4.0, **rope))


def test_context_that_is_named_twice() -> None:
    with refused("original_max_position_embeddings is 4096 and 512"):
        parse_hf_config(yarn_config(factor=4.0) | dict(original_max_position_embeddings=512))


def test_dynamic_scaling(tmp_path: Any) -> None:
    """No scaling within the context, and another for every length beyond, which is refused."""
    config = make_config("LlamaForCausalLM", rope_scaling=dict(rope_type="dynamic", factor=4.0))
    theirs = transformers.LlamaConfig(**config)
    cpu_device = torch.device("cpu")
    plain = 1.0 / 1e4 ** (torch.arange(0, 4, 2, dtype=torch.float) / 4)
    for length, is_scaled in ((64, False), (65, True)):
        inv_freq, factor = ROPE_INIT_FUNCTIONS["dynamic"](theirs, cpu_device, seq_len=length)
        assert torch.equal(inv_freq, plain) != is_scaled and factor == 1.0
    model = parse_hf_config(config)
    assert parse_hf_config(model.config_json()) == model and model.rope_factor == 4.0
    assert model.gpt_model()["seq_len_interpolation_factor"] is None
    write_folder(tmp_path, config, make_weights(config))
    for length in (None, 64):
        plan_model(ModelConfig(hf=str(tmp_path), max_position_embeddings=length), ParallelConfig())
    with refused("max_position_embeddings=65 with rope type 'dynamic'", "at most 64"):
        plan_model(ModelConfig(hf=str(tmp_path), max_position_embeddings=65), ParallelConfig())
