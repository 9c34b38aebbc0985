"""What of gpt-oss has a place of its own in config.json and in its files, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from megatron_pg.checkpoint import (
    HfFolder,
    MegatronFolder,
    compare_logits,
    hf_to_megatron,
    iter_hf_tensors,
    load_hf,
    load_weights,
    parse_hf_config,
)
from megatron_pg.checkpoint.one_rank import build_gpt, one_rank
from megatron_pg.checkpoint.table import make_shard
from tests.checkpoint import tiny
from tests.checkpoint.folders import make_config, read_weights, write_folder
from tests.hostile import refused

pytestmark = pytest.mark.megatron

# As its folder has it.
HUB = dict(
    attention_dropout=0.0,
    eos_token_id=200002,
    experts_per_token=2,
    initial_context_length=16,
    layer_types=["sliding_attention", "full_attention"],
    rope_parameters=None,
    rope_scaling=dict(
        beta_fast=32.0,
        beta_slow=1.0,
        factor=32.0,
        original_max_position_embeddings=16,
        rope_type="yarn",
        truncate=False,
    ),
    rope_theta=150000,
    router_aux_loss_coef=0.9,
    sliding_window=8,
    swiglu_limit=7.0,
)


def config(**changes: Any) -> dict[str, Any]:
    return make_config("GptOssForCausalLM", **HUB | changes)


def test_its_config() -> None:
    """As transformers reads it."""
    content = config()
    model = parse_hf_config(content)
    del content["model_type"], content["rope_parameters"]
    theirs = transformers.GptOssConfig(**json.loads(json.dumps(content)))
    assert model.window is not None and model.window.layers == (1, 0)
    assert model.window.size == theirs.sliding_window
    assert model.rotary_base == theirs.rope_parameters["rope_theta"]
    assert model.rope_factor == theirs.rope_parameters["factor"]
    assert model.yarn is not None and not model.yarn.truncate
    assert not theirs.rope_parameters["truncate"]
    settings = model.transformer_config()
    assert settings["activation_func_clamp_value"] == theirs.swiglu_limit
    x = torch.linspace(-5, 5, 99)
    assert torch.equal(settings["activation_func"](x), x * torch.sigmoid(theirs.swiglu_alpha * x))
    default = {k: v for k, v in config().items() if k != "layer_types"}
    assert parse_hf_config(default).window == model.window


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(quantization_config=dict(quant_method="mxfp4")), "Mxfp4Config(dequantize=True)"),
        (dict(quantization_config=dict(quant_method="fp8")), "quantization_config"),
        (dict(swiglu_alpha=1.5), "swiglu_alpha=1.5 (must be 1.702)"),
        (dict(swiglu_limit=0.0), "swiglu_limit=0.0 must be"),
        (dict(attention_bias=False), "attention_bias=False (must be True)"),
        (dict(experts_per_token=1), "num_experts_per_tok=2, experts_per_token=1"),
        (dict(rope_scaling=None), "rope_parameters is missing"),
        (dict(num_experts_per_tok=3), "num_experts_per_tok=3 must be"),
        (dict(hidden_act="gelu"), "hidden_act='gelu'"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], named: str) -> None:
    with refused(named):
        parse_hf_config(config(**changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gpt_oss")
    tiny.save_hf(tiny.FAMILIES["gpt_oss"], path, num_layers=2)
    return path


def experts_of(read: dict[str, Tensor], expert: int) -> dict[str, Tensor]:
    """Parameters of an expert, as Megatron-Core computes with them."""
    up, down = (read[f"model.layers.1.mlp.experts.{x}_proj"] for x in ("gate_up", "down"))
    up_bias, down_bias = (
        read[f"model.layers.1.mlp.experts.{x}_proj_bias"] for x in ("gate_up", "down")
    )
    return {
        "linear_fc1.weight": torch.cat((up[expert, :, ::2].T, up[expert, :, 1::2].T)),
        "linear_fc1.bias": torch.cat((up_bias[expert, ::2], up_bias[expert, 1::2])),
        "linear_fc2.weight": down[expert].T,
        "linear_fc2.bias": down_bias[expert],
    }


def test_experts_out_of_tensors_of_all(folder: Path) -> None:
    source = HfFolder(folder)
    table = source.model.weight_table()
    stored = read_weights(folder)
    for expert in (0, 3):
        for leaf, want in experts_of(stored, expert).items():
            name = f"decoder.layers.1.mlp.experts.local_experts.{expert}.{leaf}"
            assert torch.equal(
                make_shard(table.shard(name), source.read, torch.float32, name), want
            )


def test_every_tensor_comes_once(folder: Path) -> None:
    """Of a running model, as an engine takes them: all experts of a layer in one."""
    with one_rank() as device:
        model = build_gpt(HfFolder(folder).model, torch.float32, device)
        load_hf([model], folder)
        tensors = list(iter_hf_tensors([model], HfFolder(folder).model))
    stored = read_weights(folder)
    assert sorted(name for name, _ in tensors) == sorted(stored)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in tensors)


def test_a_checkpoint_is_read_expert_by_expert(folder: Path, tmp_path: Path) -> None:
    """And its tensors whole, and in slices of any dimension."""
    hf_to_megatron(folder, tmp_path / "megatron", tp_size=2)
    ours, stored = MegatronFolder(tmp_path / "megatron"), read_weights(folder)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    for dim, (start, stop) in enumerate([(1, 3), (2, 9), (5, None)]):
        index = (slice(None),) * dim + (slice(start, stop),)
        assert torch.equal(ours.read(name, dim, start, stop), stored[name][index])
    with one_rank() as device:
        model = build_gpt(ours.model, torch.float32, device)
        load_weights([model], ours)
        assert all(
            torch.equal(tensor, stored[name])
            for name, tensor in iter_hf_tensors([model], ours.model)
        )


@pytest.mark.parametrize("broken", ["gate and up", "sinks", "router's bias", "limit"])
def test_what_its_logits_depend_on(broken: str, folder: Path, tmp_path: Path) -> None:
    """None of it is idle in the model whose logits are compared."""
    weights, content = read_weights(folder), json.loads((folder / "config.json").read_text())
    layer = "model.layers.1."
    if broken == "gate and up":
        for name in ("gate_up_proj", "gate_up_proj_bias"):
            tensor = weights[f"{layer}mlp.experts.{name}"]
            tensor.copy_(tensor.unflatten(-1, (-1, 2)).flip(-1).flatten(-2))
    elif broken == "sinks":
        weights[f"{layer}self_attn.sinks"] += 1
    elif broken == "router's bias":
        weights[f"{layer}mlp.router.bias"] *= -1
    else:
        content["swiglu_limit"] = 7.0
    write_folder(tmp_path / "hf", content, weights)
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    assert compare_logits(HfFolder(tmp_path / "hf"), MegatronFolder(tmp_path / "megatron")).equal
    found = compare_logits(HfFolder(folder), MegatronFolder(tmp_path / "megatron"))
    assert found.largest_difference > 1e-3
