"""Linear layers' sizes against transformers' modules, counted products and a published model."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_pg.data import (
    AttentionSizes,
    CostModel,
    LayerKind,
    LinearSizes,
    layer_kinds,
    linear_pattern,
)
from megatron_pg.linear import state_space_scan
from megatron_pg.tree import PrefixTree

NEXT = LinearSizes(num_key_heads=16, num_value_heads=32, key_dim=128, value_dim=128, conv_kernel=4)
FIELDS: dict[str, Any] = dict(
    experimental_attention_variant="gated_delta_net",
    num_layers=4,
    linear_attention_freq=4,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=6,
    linear_conv_kernel_dim=3,
    hidden_size=16,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    attention_output_gate=True,
    gated_linear_unit=True,
    ffn_hidden_size=24,
    num_moe_experts=None,
)


def test_parameters_are_those_of_a_built_layer() -> None:
    modeling = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    config = modeling.Qwen3NextConfig()
    with torch.device("meta"):
        layer = modeling.Qwen3NextGatedDeltaNet(config, 0)
        attention = modeling.Qwen3NextAttention(config, 3)
    counted = sum(p.numel() for p in layer.parameters() if p.ndim > 1)
    assert NEXT.parameters(config.hidden_size) == counted
    gated = AttentionSizes(
        num_heads=16, num_kv_heads=2, head_dim=256, value_dim=256, has_output_gate=True
    )
    counted = sum(p.numel() for p in attention.parameters() if p.ndim > 1)
    assert gated.parameters(config.hidden_size) == counted


def test_flops_of_the_scan_are_its_products() -> None:
    modeling = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    from torch.utils.flop_counter import FlopCounterMode

    # Batch, tokens, heads, channels: two chunks of three heads.
    q, k = torch.randn(2, 1, 128, 3, 16)
    v, gates = torch.randn(1, 128, 3, 24), torch.rand(2, 1, 128, 3)
    with FlopCounterMode(display=False) as counter:
        modeling.torch_chunk_gated_delta_rule(q, k, v, -gates[0], gates[1])
    sizes = LinearSizes(num_key_heads=3, num_value_heads=3, key_dim=16, value_dim=24, conv_kernel=4)
    # The triangle is solved there, with keys and values as right-hand sides: no product.
    solved = 3 * (2 * 64**2 / 3 + 2 * 64 * (16 + 24))
    assert 128 * (sizes.scan_flops - solved) == pytest.approx(counter.get_total_flops())


def test_what_a_prefix_keeps_has_no_length() -> None:
    """As it was measured: 2 MiB and 48 KiB in each of 36 layers, and its gradients."""
    assert NEXT.state_bytes(2) == 2 * 2**20 + 48 * 1024
    assert 36 * NEXT.state_bytes(2) / 2**20 == pytest.approx(73.7, abs=0.05)
    assert 36 * NEXT.state_grad_bytes(2) / 2**20 == pytest.approx(75.4, abs=0.05)
    assert NEXT.state_bytes(2, tp_size=4) == NEXT.state_bytes(2) // 4


def test_patterns() -> None:
    config = SimpleNamespace(**FIELDS)
    assert layer_kinds(config) == [*[LayerKind("gated_delta")] * 3, LayerKind()]
    assert linear_pattern([1, 0, 1], 3) == [True, False, True]
    config.experimental_attention_variant = None
    assert layer_kinds(config) == [LayerKind()] * 4
    config.num_moe_experts, config.moe_layer_freq = 8, [0, 1, 1, 0]
    has_experts = [kind.has_experts for kind in layer_kinds(config)]
    assert has_experts == [False, True, True, False]


def test_linear_layers_cost_tokens_and_no_pairs() -> None:
    config = SimpleNamespace(**FIELDS)
    sizes = LinearSizes.from_config(config, "gated_delta")
    assert (sizes.conv_dim, sizes.in_dim, sizes.out_dim) == (56, 88, 24)
    cost = CostModel.from_config(config, 100, (None, None, None, 5))
    # Queries and gates, keys and values, and the way back, of the one layer that attends.
    attention = 16 * (2 * 32 + 2 * 16 + 32)
    linear = 16 * (88 + 24) + 3 * 56
    mlps = 4 * 3 * 16 * 24
    assert cost.per_token == 2 * (attention + 3 * linear + mlps) + 3 * sizes.scan_flops
    assert cost.per_attention_pair == 0
    assert cost.per_window_pair == ((5, 2 * 4 * 16),)
    tree = PrefixTree.from_group(40, [3, 4])
    assert cost.attention(tree) < CostModel.from_config(config, 100, (None,) * 4).attention(tree)


MAMBA: dict[str, Any] = dict(
    mamba_num_heads=6, mamba_head_dim=4, mamba_num_groups=2, mamba_state_dim=5, hidden_size=16
)


def test_mamba_layers_have_parameters_and_products_of_a_built_one() -> None:
    modeling = pytest.importorskip("transformers.models.nemotron_h.modeling_nemotron_h")
    from transformers import NemotronHConfig

    sizes = LinearSizes.from_config(SimpleNamespace(**MAMBA), "state_space")
    config = NemotronHConfig(
        **dict(hidden_size=16, mamba_num_heads=6, mamba_head_dim=4, n_groups=2, ssm_state_size=5),
        layers_block_type=["linear_attention"],
    )
    with torch.device("meta"):
        layer = modeling.NemotronHMamba2Mixer(config, layer_idx=0)
    assert sizes.parameters(16) == sum(p.numel() for p in layer.parameters() if p.ndim > 1)
    assert sizes.in_dim == layer.in_proj.out_features and sizes.conv_dim == layer.conv_dim
    # Megatron-Core's inner width where no number of heads is given.
    given = SimpleNamespace(**MAMBA | dict(mamba_num_heads=None))
    assert LinearSizes.from_config(given, "state_space").num_value_heads == 2 * 16 // 4


def test_flops_of_a_state_space_scan_are_its_products() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    x, dt, (b, c) = (
        torch.randn(1, 256, 3, 24),
        torch.rand(1, 256, 3),
        torch.randn(2, 1, 256, 3, 16),
    )
    sizes = LinearSizes.from_config(
        SimpleNamespace(
            mamba_num_heads=3, mamba_head_dim=24, mamba_num_groups=3, mamba_state_dim=16
        ),
        "state_space",
    )
    with FlopCounterMode(display=False) as counter:
        state_space_scan(x, dt, -torch.rand(3), b, c, chunk_tokens=sizes.chunk_tokens)
    assert 256 * sizes.scan_flops == counter.get_total_flops()
    # Heads of one group read and write by the same projections, which are multiplied once.
    one = replace(sizes, num_key_heads=1)
    assert sizes.scan_flops - one.scan_flops == 2 * 2 * sizes.chunk_tokens * 16


def test_layers_of_a_hybrid_cost_what_they_have() -> None:
    fields = FIELDS | MAMBA | dict(experimental_attention_variant=None, num_layers=5)
    experts = dict(
        num_moe_experts=8,
        moe_router_topk=2,
        moe_ffn_hidden_size=10,
        moe_shared_expert_intermediate_size=7,
    )
    config = SimpleNamespace(**fields | experts | dict(gated_linear_unit=False))
    mamba = LinearSizes.from_config(config, "state_space")
    delta = LinearSizes.from_config(config, "gated_delta")
    cost = CostModel.from_config(config, 100, (None,) * 5, "M*|-EM")
    attention, mlps = 16 * (2 * 32 + 2 * 16 + 32), 2 * 16 * (24 + 2 * 10 + 7)
    weights = 2 * mamba.parameters(16) + attention + mlps
    assert cost.per_token == 2 * weights + 2 * mamba.scan_flops
    assert cost.per_attention_pair == 2 * 4 * 16
    both = CostModel.from_config(config, 100, (None,) * 5, "G*-EM")
    more = 2 * delta.parameters(16) + delta.scan_flops
    assert both.per_token - cost.per_token == more - (2 * mamba.parameters(16) + mamba.scan_flops)
    alone = CostModel.from_config(config, 100, (None,) * 2, "M-")
    assert alone.per_attention_pair == 0 and alone.attention(PrefixTree.from_group(4, [3])) == 0
    with pytest.raises(
        NotImplementedError, match=r"hybrid_layer_pattern='M\+\*': layers \+ are not"
    ):
        CostModel.from_config(config, 100, (None,) * 3, "M+*")
