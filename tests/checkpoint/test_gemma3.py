"""What of Gemma 3 has a place of its own in config.json, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch.nn.functional import gelu

from megatron_pg.checkpoint import HfFolder, load_hf, parse_hf_config
from megatron_pg.checkpoint.one_rank import build_gpt, one_rank
from megatron_pg.mcore import fit_decoder
from tests.checkpoint import tiny
from tests.checkpoint.folders import make_config
from tests.hostile import refused

pytestmark = pytest.mark.megatron

FULL, SLIDING = "full_attention", "sliding_attention"


def config(**changes: Any) -> dict[str, Any]:
    content = make_config("Gemma3ForCausalLM", num_hidden_layers=4)
    del content["rope_theta"]
    return content | changes


ROPES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "version 4": dict(
        rope_theta=2e6,
        rope_local_base_freq=3e4,
        rope_scaling=dict(rope_type="linear", factor=8.0),
        sliding_window_pattern=2,
    ),
    "version 5": dict(
        rope_parameters={
            FULL: dict(rope_type="linear", factor=8.0, rope_theta=2e6),
            SLIDING: dict(rope_type="default", rope_theta=3e4),
        },
        layer_types=[FULL, SLIDING, SLIDING, FULL],
    ),
    "half of version 5": dict(rope_parameters={SLIDING: dict(rope_theta=3e4)}),
    "no window": dict(layer_types=[FULL] * 4),
}


@pytest.mark.parametrize("name", ROPES)
def test_positions_and_windows(name: str) -> None:
    """As transformers reads them, from its file and from the one that is written for it."""
    model = parse_hf_config(config(**ROPES[name]))
    for content in (config(**ROPES[name]), model.config_json()):
        assert parse_hf_config(content) == model
        content = {k: v for k, v in content.items() if k != "model_type"}
        theirs = transformers.Gemma3TextConfig(**content)
        full, windows = (theirs.rope_parameters[kind] for kind in (FULL, SLIDING))
        assert (model.rope_type, model.rotary_base) == (full["rope_type"], full["rope_theta"])
        assert model.rope_factor == full.get("factor", 1.0)
        assert model.transformer_config()["window_rotary_base"] == windows["rope_theta"]
        layers = [int(kind == SLIDING) for kind in theirs.layer_types]
        assert (model.window is None) == (name == "no window")
        assert model.window is None or list(model.window.layers) == layers


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(final_logit_softcapping=30.0), "final_logit_softcapping=30.0 (must be None)"),
        (dict(attn_logit_softcapping=50.0), "attn_logit_softcapping=50.0 (must be None)"),
        (dict(use_bidirectional_attention=True), "use_bidirectional_attention=True"),
        (dict(hidden_activation="gelu"), "hidden_activation='gelu'"),
        (dict(rope_parameters=dict(rope_theta=1e4)), "rope_parameters of ['rope_theta'] (must be"),
        (
            dict(rope_parameters={SLIDING: dict(rope_type="linear", factor=2.0)}),
            "rope type 'linear' in layers with a window",
        ),
        (dict(rope_parameters={FULL: "linear"}), "full_attention='linear' must be an object"),
        (dict(query_pre_attn_scalar=0), "query_pre_attn_scalar=0 must be"),
        (dict(sliding_window=None), "sliding_window is missing"),
        (dict(vision_config={"hidden_size": 8}), "unknown key vision_config"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], named: str) -> None:
    with refused(named):
        parse_hf_config(config(**changes))


def test_its_activation() -> None:
    x = torch.linspace(-8, 8, 1001, dtype=torch.float64)
    own = parse_hf_config(config()).transformer_config()["activation_func"]
    assert (own(x) - gelu(x, approximate="tanh")).abs().max() < 1e-9


def test_embeddings_are_scaled_as_parameters_are_rounded(tmp_path: Any) -> None:
    """In bf16 the root of the width is no number that parameters hold."""
    theirs = tiny.save_hf(tiny.FAMILIES["gemma3"], tmp_path, num_layers=2).bfloat16()
    tokens = torch.arange(9)[None]
    with one_rank() as device, torch.no_grad():
        ours = build_gpt(HfFolder(tmp_path).model, torch.bfloat16, device)
        load_hf([ours], tmp_path)
        want = theirs.model.embed_tokens(tokens)
        assert torch.equal(ours.embedding(tokens, None).transpose(0, 1), want)
        assert not torch.equal(want, (ours.embedding.word_embeddings(tokens) * 32**0.5).bfloat16())


def test_a_spec_without_its_layers(tmp_path: Any) -> None:
    tiny.save_hf(tiny.FAMILIES["gemma3"], tmp_path, num_layers=2)
    with one_rank() as device:
        model = build_gpt(HfFolder(tmp_path).model, torch.float32, device)
        model.decoder.layers[1].mlp.linear_fc2 = torch.nn.Linear(3, 3)
        with refused("layer 2 has not what its configuration names (has_post_layernorms=True"):
            fit_decoder(model)
