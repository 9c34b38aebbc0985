"""Every field of the installed Megatron-Core's configurations has a verdict that holds."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from megatron.core.transformer.heterogeneous.heterogeneous_config import (
    HeterogeneousTransformerConfig,
)
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from megatron_pg.mcore import cpu, field_verdict, validate_config
from megatron_pg.mcore.config_fields import (
    PROVEN_FORMS,
    PROVEN_MODEL,
    PROVEN_RUN,
    PROVEN_VALUES,
)
from megatron_pg.mcore.refused_fields import REFUSED
from tests.mcore import cases, harness

pytestmark = pytest.mark.megatron

CONFIGS = (TransformerConfig, MLATransformerConfig, HeterogeneousTransformerConfig)
INSTALLED = sorted({field.name for cls in CONFIGS for field in dataclasses.fields(cls)})
PROVEN = [
    *(*cases.EQUIVALENCE.values(), *cases.SCHEDULE.values(), *cases.ROUTERS.values()),
    *cases.HYBRID.values(),
]
# As a stock ``pretrain_gpt.py`` sets them; what packed rows need (no dropout, lengths) aside.
MEGATRON_LM = dict(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    attention_dropout=0.0,
    hidden_dropout=0.0,
    variable_seq_lengths=True,
    gradient_accumulation_fusion=True,
    masked_softmax_fusion=True,
    bias_dropout_fusion=True,
    bias_activation_fusion=True,
    persist_layer_norm=True,
    deallocate_pipeline_outputs=True,
    cross_entropy_loss_fusion=True,
    attention_softmax_in_fp32=False,
    cp_comm_type="p2p",
    bf16=True,
    params_dtype=torch.bfloat16,
    pipeline_dtype=torch.bfloat16,
    inference_sampling_seed=1234,
    moe_token_dispatcher_type="alltoall",
)


def stock(**changes: Any) -> TransformerConfig:
    config = TransformerConfig(**MEGATRON_LM)
    for name, value in changes.items():
        setattr(config, name, value)
    return config


@pytest.mark.parametrize("name", INSTALLED)
def test_every_field_has_a_verdict(name: str) -> None:
    assert field_verdict(name) is not None, f"say in config_fields what {name} does to packed rows"


@pytest.mark.parametrize(
    "name", sorted({*PROVEN_MODEL, *PROVEN_RUN, *PROVEN_VALUES, *PROVEN_FORMS})
)
def test_a_proven_field_is_set_by_a_case_that_is_compared(name: str) -> None:
    for cls in (TransformerConfig, MLATransformerConfig):
        default = cls(num_layers=1, hidden_size=8, num_attention_heads=2)
        if hasattr(default, name):
            break
    configs = [c for c in map(harness.make_config, PROVEN) if hasattr(c, name)]
    assert any(getattr(config, name) != getattr(default, name) for config in configs)


@pytest.mark.parametrize(
    "name",
    [
        *("normalization", "moe_router_score_function", "recompute_granularity", "rope_type"),
        *("softmax_type", "experimental_attention_variant"),
    ],
)
def test_every_proven_value_is_that_of_a_case(name: str) -> None:
    configs = [c for c in map(harness.make_config, PROVEN) if hasattr(c, name)]
    assert {getattr(config, name) for config in configs} == set(PROVEN_VALUES[name][0])


@pytest.mark.parametrize(
    "changes",
    [
        # Not built without Transformer Engine, which has the kernel.
        dict(apply_rope_fusion=True),
        dict(num_moe_experts=4, moe_router_load_balancing_type="seq_aux_loss"),
        dict(num_moe_experts=4, moe_grouped_gemm=True, moe_router_dtype="fp32"),
        dict(num_moe_experts=4, moe_router_load_balancing_type=["aux_loss", "seq_aux_loss"]),
        dict(recompute_granularity="selective", recompute_modules=["core_attn", "moe_act"]),
        dict(window_size=[128, 0], window_attn_skip_freq=[True, 0], softmax_type="off-by-one"),
        dict(window_attn_skip_freq=2),
        dict(attention_backend="flash", timers=print, no_sync_func=[print], init_method_std=1.0),
    ],
)
def test_what_megatron_lm_sets_for_ordinary_training_passes(changes: dict[str, Any]) -> None:
    validate_config(stock(**changes))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("moe_router_load_balancing_type", "quantile_balancing"),
        ("moe_router_load_balancing_type", "sinkhorn"),
        ("moe_router_load_balancing_type", ["aux_loss", "quantile_balancing"]),
        ("moe_router_score_function", "sqrtsoftplus"),
        ("moe_token_dispatcher_type", "broadcast"),
        ("moe_flex_dispatcher_backend", "hybridep"),
        ("normalization", "L2Norm"),
        ("recompute_modules", ["core_attn", "attn_norm"]),
        ("experimental_attention_variant", "dsa"),
        ("recompute_granularity", "partial"),
        ("transformer_impl", "inference_optimized"),
        ("activation_func", "silu"),
        ("softmax_type", None),
        ("softmax_type", "learned"),
        ("window_size", 128),
        ("window_size", (128,)),
        ("window_size", (128, -1)),
        ("window_size", (128, 1)),
        ("window_size", (-1, 0)),
        ("window_size", (-1, -1)),
        ("window_size", (128.0, 0)),
        ("window_size", (128, False)),
        ("window_attn_skip_freq", 0),
        ("window_attn_skip_freq", True),
        ("window_attn_skip_freq", (1, 0)),
        ("window_attn_skip_freq", [1, 2]),
        ("window_attn_skip_freq", [1, 0, 1]),
        ("window_attn_skip_freq", []),
    ],
)
def test_values_that_nothing_proves_are_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError) as error:
        validate_config(stock(**{name: value}))
    assert f"{name}={value!r}" in str(error.value)
    assert str(error.value).startswith("1 setting(s)")


@dataclasses.dataclass
class NewerConfig(TransformerConfig):
    """As a version that is not supported yet, or a framework, would extend it."""

    rope_of_tomorrow: bool = False
    experts_of_tomorrow: list[str] = dataclasses.field(default_factory=lambda: ["none"])
    logits_of_tomorrow: float | None = None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rope_of_tomorrow", True),
        ("rope_of_tomorrow", 0),
        ("experts_of_tomorrow", ["none", "some"]),
        ("logits_of_tomorrow", 0.0),
    ],
)
def test_fields_of_which_nothing_is_known_keep_their_default(name: str, value: object) -> None:
    validate_config(NewerConfig(**MEGATRON_LM))
    with pytest.raises(ValueError) as error:
        validate_config(NewerConfig(**MEGATRON_LM, **{name: value}))
    message = str(error.value)
    assert f"{name}={value!r}: nothing is known of this field of NewerConfig" in message
    assert "leave it at its default" in message and message.startswith("1 setting(s)")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("apply_rope_fusion", True),
        ("num_query_groups", 2),
        ("cache_mla_latents", True),
        ("rope_type", "longrope"),
        ("experimental_attention_variant", "dsa"),
    ],
)
def test_what_latent_attention_cannot_have(name: str, value: Any) -> None:
    sizes = dict(num_layers=2, hidden_size=32, num_attention_heads=4)
    config = MLATransformerConfig(attention_dropout=0.0, hidden_dropout=0.0, **sizes)
    validate_config(config)
    setattr(config, name, value)
    with pytest.raises(ValueError, match=rf"^1 setting\(s\) [^\n]*\n  - {name}={value!r}"):
        validate_config(config)


def test_every_setting_that_is_refused_is_named() -> None:
    sizes = dict(num_layers=2, hidden_size=32, num_attention_heads=4)
    assert {"attention_dropout", "hidden_dropout"} <= REFUSED.keys()
    with pytest.raises(ValueError, match=r"^2 setting\(s\)"):
        validate_config(TransformerConfig(**sizes, **cpu.transformer_config_defaults()))


def test_a_verdict_is_one_of_three_and_says_what_to_do() -> None:
    for name in INSTALLED:
        verdict = field_verdict(name)
        assert verdict is not None and verdict.kind in ("proven", "harmless", "refused")
        assert verdict.kind != "refused" or f"set {name}=" in verdict.problem
