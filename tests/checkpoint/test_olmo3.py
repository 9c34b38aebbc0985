"""How Olmo 3's config.json says positions and windows, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from megatron_pg.checkpoint import parse_hf_config
from tests.checkpoint.folders import make_config
from tests.hostile import refused

pytestmark = pytest.mark.megatron

FULL, SLIDING = "full_attention", "sliding_attention"
YARN = dict(
    rope_type="yarn",
    factor=8.0,
    attention_factor=1.2079441541679836,
    beta_fast=32.0,
    beta_slow=1.0,
    original_max_position_embeddings=8192,
)
FORMS: dict[str, dict[str, Any]] = {
    "version 4": dict(rope_theta=500000, rope_scaling=YARN),
    "other base": dict(rope_theta=250000, rope_scaling=YARN),
    "version 5": dict(rope_parameters={FULL: YARN | dict(rope_theta=5e5), SLIDING: None}),
    "plain": dict(layer_types=[FULL, SLIDING, SLIDING, FULL]),
}


def config(**changes: Any) -> dict[str, Any]:
    content = make_config("Olmo3ForCausalLM", num_hidden_layers=4)
    del content["rope_theta"]
    return content | changes


@pytest.mark.parametrize("name", FORMS)
def test_positions_and_windows(name: str) -> None:
    """As transformers reads them, from its file and from the one that is written for it."""
    model = parse_hf_config(config(**FORMS[name]))
    for content in (config(**FORMS[name]), model.config_json()):
        assert parse_hf_config(content) == model
        theirs = transformers.Olmo3Config(**{k: v for k, v in content.items() if k != "model_type"})
        full, windows = (theirs.rope_parameters[kind] for kind in (FULL, SLIDING))
        assert (model.rope_type, model.rotary_base) == (full["rope_type"], full["rope_theta"])
        assert (model.yarn is None) == (name == "plain")
        assert model.transformer_config()["window_rotary_base"] == windows["rope_theta"]
        layers = tuple(int(kind == SLIDING) for kind in theirs.layer_types)
        assert model.window is not None and model.window.layers == layers


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(rope_parameters={FULL: YARN | dict(truncate=False)}), "truncate=false by kind"),
        (dict(rope_parameters={SLIDING: YARN}), "rope type 'yarn' in layers with a window"),
        (dict(clip_qkv=8.0), "unknown key clip_qkv=8.0"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], named: str) -> None:
    with refused(named):
        parse_hf_config(config(**changes))
