"""Which layers have windows: as transformers reads a config.json, or a refusal."""

from __future__ import annotations

import json
from typing import Any

import pytest
import transformers

from megatron_pg.checkpoint import hf_model_from_args, make_megatron_args, parse_hf_config
from tests.checkpoint.folders import make_config
from tests.hostile import refused

pytestmark = pytest.mark.megatron

FULL, SLIDING = "full_attention", "sliding_attention"
NUM_LAYERS = 4
MIXED = [FULL, SLIDING, SLIDING, FULL]
ON = dict(use_sliding_window=True, sliding_window=8)

CASES: list[tuple[str, dict[str, Any]]] = [
    ("Mistral", dict(sliding_window=None)),
    ("Mistral", dict(sliding_window=8)),
    ("Mistral", dict(sliding_window=1)),
    ("Mistral", dict(sliding_window=8, use_sliding_window=False)),
    ("Mistral", dict(sliding_window=4096)),
    ("Qwen2", dict(sliding_window=8)),
    ("Qwen2", dict(sliding_window=8, use_sliding_window=False, max_window_layers=2)),
    ("Qwen2", ON | dict(max_window_layers=3)),
    ("Qwen2", ON | dict(max_window_layers=0)),
    ("Qwen2", ON | dict(max_window_layers=28)),
    ("Qwen3", ON | dict(layer_types=MIXED, max_window_layers=2)),
    ("Qwen3", ON | dict(sliding_window=None, max_window_layers=2)),
    ("Qwen3", dict(layer_types=[FULL] * 4)),
    ("Qwen3Moe", ON),
    ("Qwen3Moe", dict(sliding_window=8, use_sliding_window=False)),
    ("SmolLM3", ON),
    ("SmolLM3", ON | dict(no_rope_layers=[1, 0, 0, 1], max_window_layers=28)),
    ("SmolLM3", ON | dict(no_rope_layers=[1, 0, 1, 1], layer_types=MIXED)),
    ("SmolLM3", dict(no_rope_layer_interval=2)),
    ("SmolLM3", dict(sliding_window=8, no_rope_layers=[1, 1, 1, 1, 0])),
]


def theirs(name: str, config: dict[str, Any]) -> tuple[int | None, list[int]]:
    """Size, and 1 for a layer whose attention is cut, of transformers' own reading."""
    read = getattr(transformers, f"{name}Config")(**json.loads(json.dumps(config)))
    size = getattr(read, "sliding_window", None)
    if name == "SmolLM3":
        size = size if read.use_sliding_window else None
    default = [SLIDING] * NUM_LAYERS if name in ("Mistral", "Qwen3Moe") else None
    kinds = default or read.layer_types
    layers = [int(size is not None and kind == SLIDING) for kind in kinds]
    return (size if any(layers) else None), layers


@pytest.mark.parametrize(("name", "changes"), CASES)
def test_windows_are_those_of_transformers(name: str, changes: dict[str, Any]) -> None:
    """And come back, from a config.json and from Megatron-LM's arguments."""
    config = make_config(f"{name}ForCausalLM", num_hidden_layers=NUM_LAYERS, **changes)
    model = parse_hf_config(config)
    size, layers = theirs(name, config)
    if size is None:
        assert model.window is None
    else:
        assert model.window is not None
        assert (model.window.size, list(model.window.layers)) == (size, layers)
        # Megatron counts the tokens before a token, transformers the token too.
        assert model.transformer_config()["window_size"] == (size - 1, 0)
    if name == "SmolLM3":
        rope = transformers.SmolLM3Config(**config).no_rope_layers[:NUM_LAYERS]
        assert model.no_rope_freq == tuple(1 - x for x in rope)  # type: ignore[attr-defined]
    back = model.config_json()
    assert parse_hf_config(back) == model
    assert theirs(name, back) == (size, layers)
    assert hf_model_from_args(make_megatron_args(model), "here") == model


def test_some_cases_have_windows() -> None:
    configs = [make_config(f"{n}ForCausalLM", num_hidden_layers=4, **c) for n, c in CASES]
    windows = [parse_hf_config(config).window for config in configs]
    assert sum(window is not None for window in windows) >= 9


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("Llama", dict(sliding_window=8), "sliding_window=8 (must be None)"),
    ("Llama", dict(layer_types=MIXED), "layer_types="),
    ("Mistral", dict(sliding_window=8, layer_types=MIXED), "layer_types="),
    ("Mistral", dict(sliding_window=0), "sliding_window=0 must be"),
    ("Qwen2", dict(layer_types=MIXED), "layer_types="),
    ("Qwen2", dict(use_sliding_window=True, max_window_layers=1), "'sliding_window' is missing"),
    ("Qwen2", ON, "max_window_layers=None must be"),
    ("Qwen2", ON | dict(max_window_layers=-1), "max_window_layers=-1 must be"),
    ("Qwen2", ON | dict(layer_types=MIXED[:3]), "must name all 4 layers"),
    ("Qwen2", ON | dict(layer_types=["chunked_attention"] * 4), "'chunked_attention'"),
    ("Qwen2", ON | dict(layer_types=[["x"]] * 4), "layer_types with ['x']"),
    ("Qwen3", dict(use_sliding_window="yes"), "use_sliding_window='yes' must be true or false"),
    ("Qwen3Moe", ON | dict(layer_types=MIXED), "layer_types="),
    ("Qwen3Moe", dict(use_sliding_window=True), "'sliding_window' is missing"),
    ("SmolLM3", dict(no_rope_layers=[1, 0]), "no_rope_layers=[1, 0] must hold 0 or 1 for all 4"),
    ("SmolLM3", dict(no_rope_layers=[1, 0, 3, 1]), "must hold 0 or 1"),
    ("SmolLM3", dict(no_rope_layer_interval=0), "no_rope_layer_interval=0 must be"),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED)
def test_what_is_refused(name: str, changes: dict[str, Any], message: str) -> None:
    config = make_config(f"{name}ForCausalLM", num_hidden_layers=NUM_LAYERS, **changes)
    with refused(message):
        parse_hf_config(config)
