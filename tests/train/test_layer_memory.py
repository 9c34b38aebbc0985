"""What the dry run says that a layer keeps, and recompute frees, against what real layers save."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from packaging.version import parse as parse_version

core = pytest.importorskip("megatron.core")

from megatron_pg.data import LayerKind, MemoryModel, ModuleKinds  # noqa: E402
from megatron_pg.mcore.versions import HAS_HYBRID_MODEL  # noqa: E402
from megatron_pg.train.config import ParallelConfig  # noqa: E402
from megatron_pg.train.dry_run.layers import (  # noqa: E402
    layer_memory,
    layer_sizes,
    rank_share,
)
from megatron_pg.train.model import plan_model  # noqa: E402
from tests.ranks import Pool  # noqa: E402
from tests.train.rank_counts import OF_EXPERTS, hybrid_of  # noqa: E402
from tests.train.saved_activations import (  # noqa: E402
    VOCAB,
    hybrid_per_token,
    linear_per_token,
    make_plan,
    saved_per_token,
)

DENSE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 64,
    "ffn_hidden_size": 176,
    "num_attention_heads": 8,
    "num_query_groups": 2,
    "kv_channels": 12,
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "activation_func": "silu",
    "add_bias_linear": False,
}
LATENT = {name: value for name, value in DENSE.items() if name not in ("kv_channels",)} | {
    "num_query_groups": 8,
    "multi_latent_attention": True,
    "q_lora_rank": 40,
    "kv_lora_rank": 48,
    "qk_head_dim": 20,
    "qk_pos_emb_head_dim": 10,
    "v_head_dim": 14,
}
EXPERTS = DENSE | {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 88}
SHARED = {"moe_shared_expert_intermediate_size": 72}
FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


def selective(*modules: str) -> dict[str, Any]:
    return {"recompute_granularity": "selective", "recompute_modules": list(modules)}


MODELS: dict[str, dict[str, Any]] = {
    "dense": DENSE,
    "biases": DENSE
    | {
        "normalization": "LayerNorm",
        "gated_linear_unit": False,
        "activation_func": "gelu",
        "add_bias_linear": True,
    },
    "qk_norms": DENSE | {"qk_layernorm": True},
    "all_heads": DENSE | {"num_query_groups": 8},
    "all_heads+core_attn": DENSE | {"num_query_groups": 8} | selective("core_attn"),
    "qk_norms+core_attn": DENSE | {"qk_layernorm": True} | selective("core_attn"),
    "gated+core_attn": DENSE | {"attention_output_gate": True} | selective("core_attn"),
    "gated": DENSE | {"attention_output_gate": True},
    "latent": LATENT,
    "latent_norms": LATENT | {"qk_layernorm": True},
    "latent_one_query": LATENT | {"q_lora_rank": None},
    "experts": EXPERTS,
    "experts_shared": EXPERTS | SHARED,
    "dense+core_attn": DENSE | selective("core_attn"),
    "dense+mlp": DENSE | selective("mlp"),
    "dense+full": DENSE | FULL,
    "latent+core_attn": LATENT | selective("core_attn"),
    "latent+mla_up_proj": LATENT | selective("mla_up_proj"),
    "latent+full": LATENT | FULL,
    "experts_shared+moe": EXPERTS | SHARED | selective("moe"),
    "experts+core_attn": EXPERTS | selective("core_attn"),
    "experts+full": EXPERTS | FULL,
}
LAYOUTS: dict[str, ParallelConfig] = {
    "one": ParallelConfig(),
    "tp2": ParallelConfig(tensor_model_parallel_size=2),
    "tp2_sp": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
    "cp2": ParallelConfig(context_parallel_size=2),
    "ep2": ParallelConfig(expert_model_parallel_size=2),
    "tp2_sp_ep2": ParallelConfig(
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        expert_model_parallel_size=2,
        expert_tensor_parallel_size=1,
    ),
}
# Attention keeps otherwise what ranks divide, and what is recomputed of that.
HEADS = [
    *("qk_norms", "qk_norms+core_attn", "gated", "gated+core_attn", "all_heads+core_attn"),
    *("dense+core_attn", "dense+full", "latent", "latent+core_attn", "latent+mla_up_proj"),
]
CASES: dict[str, list[str]] = {
    "one": list(MODELS),
    "tp2": ["dense", "qk_norms", "gated", "latent_norms"],
    "tp2_sp": ["biases", "all_heads", *HEADS],
    "cp2": ["dense", "experts_shared", "latent_norms", "experts+core_attn", *HEADS],
    "ep2": ["experts_shared"],
    "tp2_sp_ep2": ["experts", "experts_shared+moe"],
}
# Latents that are gathered to be projected again are kept whole on every rank.
LOOSE = {("tp2_sp", "latent+mla_up_proj"): 0.08}


@pytest.fixture(scope="module")
def measured(ranks: Pool) -> Callable[[str], dict[str, float]]:
    """Bytes of a token by model, of a layout: the mean of its ranks, since experts' loads differ.

    A layout's models are measured together when the first of them is asked for.
    """

    @cache
    def of_layout(layout: str) -> dict[str, float]:
        parallel, models = LAYOUTS[layout], {name: MODELS[name] for name in CASES[layout]}
        found = ranks.run(1 if layout == "one" else 2, saved_per_token, models, parallel)
        return {name: mean(rank[name] for rank in found) for name in models}

    return of_layout


def said(layout: str, model: str) -> MemoryModel:
    made = make_plan(MODELS[model], LAYOUTS[layout])
    return layer_memory(made, LayerKind(mlp="experts" if "experts" in model else "dense"))


@pytest.mark.parametrize(
    ("layout", "model"), [(layout, model) for layout, models in CASES.items() for model in models]
)
def test_a_layer_keeps_what_is_said(measured, layout: str, model: str) -> None:
    got, memory = measured(layout)[model], said(layout, model)
    # Left out is a number or two of every norm.
    assert memory.activations == pytest.approx(got, rel=LOOSE.get((layout, model), 0.01))
    if "+" in model:
        plain, choice = model.split("+")
        freed = said(layout, plain).activations - memory.activations
        assert freed == memory.recomputed == memory.freed[choice] != 0
        # What gates stand on is a view less under context parallelism, and stays otherwise.
        assert freed > 0 or (layout, model) == ("cp2", "gated+core_attn")


LINEAR = DENSE | {
    "experimental_attention_variant": "gated_delta_net",
    "linear_attention_freq": 2,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
}


@pytest.mark.parametrize(
    ("layout", "key_heads"), [("one", 4), ("one", 8), ("tp2_sp", 4), ("cp2", 4)]
)
def test_a_layer_with_linear_attention_keeps_what_is_said(
    ranks: Pool, layout: str, key_heads: int
) -> None:
    parallel, settings = LAYOUTS[layout], LINEAR | {"linear_num_key_heads": key_heads}
    if layout == "cp2" and parse_version(core.__version__) < parse_version("0.18"):
        pytest.skip("this Megatron-Core has no linear attention under context parallelism")
    (got, *_) = ranks.run(1 if layout == "one" else 2, linear_per_token, settings, parallel)
    memory = layer_memory(make_plan(settings, parallel), LayerKind("gated_delta"))
    assert memory.activations == pytest.approx(got, rel=0.03)


HYBRID: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=176,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=12,
    mamba_num_heads=8,
    mamba_head_dim=16,
    n_groups=2,
    ssm_state_size=12,
    **OF_EXPERTS,
)


@pytest.mark.skipif(not HAS_HYBRID_MODEL, reason="HybridModel came with megatron-core 0.18")
@pytest.mark.parametrize(
    ("layout", "symbol", "kind", "has_kernels"),
    [
        ("one", "M", LayerKind("state_space", mlp=None), True),
        ("one", "M", LayerKind("state_space", mlp=None), False),
        ("one", "-", LayerKind(mixer=None), False),
        ("one", "*", LayerKind(mlp=None), False),
        ("one", "E", LayerKind(mixer=None, mlp="experts"), False),
        ("tp2_sp", "M", LayerKind("state_space", mlp=None), True),
        # Each of four ranks has a copy of one of two groups.
        ("cp4", "M", LayerKind("state_space", mlp=None), True),
    ],
)
def test_a_layer_of_a_hybrid_keeps_what_is_said(
    ranks: Pool, tmp_path: Path, layout: str, symbol: str, kind: LayerKind, has_kernels: bool
) -> None:
    parallel = LAYOUTS.get(layout, ParallelConfig(context_parallel_size=4))
    number = {"one": 1, "tp2_sp": 2, "cp4": 4}[layout]
    models = {
        name: hybrid_of(tmp_path / name, symbol * count + "*", **HYBRID)
        for name, count in (("few", 1), ("more", 3))
    }
    (got, *_) = ranks.run(number, hybrid_per_token, models, parallel, has_kernels)
    plan = plan_model(models["few"], parallel)
    assert kind in plan.layer_kinds
    modules = ModuleKinds(has_fused_norms=False, has_fused_recurrence=has_kernels)
    layer = replace(layer_sizes(plan, kind), modules=modules)
    said = MemoryModel.of_layer(layer, rank_share(plan.config)).activations
    # Routers keep a little more of sigmoid scores.
    assert said == pytest.approx(got, rel=0.02 if kind.has_experts else 0.01)
