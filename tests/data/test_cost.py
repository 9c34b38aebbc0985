"""Costs against counts done by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_pg.data import AttentionSizes, CostModel
from megatron_pg.tree import PrefixTree

DIMS = {
    "hidden_size": 8,
    "num_layers": 3,
    "ffn_hidden_size": 16,
    "vocab_size": 100,
    "num_attention_heads": 4,
    "num_query_groups": 2,
}


def test_flops_of_a_small_decoder():
    model = CostModel.from_model_dims(**DIMS)
    # Per layer: q and o 8x8 each, k and v 8x4 each, three MLP matrices 8x16.
    assert model.per_token == 3 * 2 * (2 * 64 + 2 * 32 + 3 * 128)
    assert model.per_attention_pair == 3 * 2 * 2 * 8
    assert model.per_loss_token == 2 * 8 * 100
    plain = CostModel.from_model_dims(**DIMS, gated_linear_unit=False)
    assert model.per_token - plain.per_token == 3 * 2 * 128
    wide = CostModel.from_model_dims(**DIMS, kv_channels=5)
    assert wide.per_attention_pair == 3 * 2 * 2 * 20


def test_estimate_adds_the_three_terms():
    model = CostModel(per_token=100, per_attention_pair=1, per_loss_token=10_000)
    tree = PrefixTree.from_group(2, [1, 3])
    # Pairs: prompt 1+2, first response 3, second 3+4+5.
    assert model.estimate(tree, loss_tokens=4) == 600 + 18 + 40_000


def test_layers_with_a_window_cost_by_what_they_see():
    model = CostModel(per_token=0, per_attention_pair=6, per_loss_token=0)
    tree = PrefixTree.from_group(2, [1, 3])
    # Of 1 + 2, 3 and 3 + 4 + 5 visible keys a window of 1 leaves 2 to each token but the first.
    windowed = model.within_windows([None, 1, 1])
    assert windowed.estimate(tree) == 2 * 18 + 4 * (1 + 2 + 2 + 3 * 2)
    assert model.within_windows([0, 0, 0]).estimate(tree) == 6 * 6
    assert model.within_windows([1000, None, 5]).estimate(tree) == model.estimate(tree)
    assert model.within_windows([None, None]) == model
    with pytest.raises(ValueError, match=r"per_window_pair\[4\]=-1 must be finite"):
        CostModel(per_window_pair=((4, -1),))


def test_default_has_the_ratios_of_its_decoder():
    dims = CostModel.from_model_dims(
        hidden_size=1536,
        num_layers=28,
        ffn_hidden_size=8960,
        vocab_size=151936,
        num_attention_heads=12,
        num_query_groups=2,
    )
    default = CostModel()
    for name in ("per_attention_pair", "per_loss_token"):
        assert getattr(dims, name) / dims.per_token == pytest.approx(
            getattr(default, name), rel=0.02
        )


def test_refuses_sizes_below_one_and_negative_costs():
    with pytest.raises(ValueError, match="num_layers=0 must be at least 1"):
        CostModel.from_model_dims(**DIMS | {"num_layers": 0})
    with pytest.raises(ValueError, match="per_token=-1 must be finite and not negative"):
        CostModel(per_token=-1)


def test_latent_attention_costs_its_projections_and_both_widths_of_heads() -> None:
    config = SimpleNamespace(
        hidden_size=8,
        num_layers=2,
        num_attention_heads=4,
        num_query_groups=None,
        kv_channels=2,
        ffn_hidden_size=16,
        num_moe_experts=None,
        gated_linear_unit=False,
        multi_latent_attention=True,
        q_lora_rank=None,
        kv_lora_rank=5,
        qk_head_dim=6,
        qk_pos_emb_head_dim=2,
        v_head_dim=3,
    )
    # Queries; the latent and the key part that heads share; keys and values of it; output; MLP.
    one = 8 * 4 * 8 + 8 * (5 + 2) + 5 * 4 * (6 + 3) + 4 * 3 * 8
    cost = CostModel.from_config(config, 10, [None, None])
    assert cost.per_token == 2 * 2 * (one + 2 * 8 * 16)
    assert cost.per_attention_pair == 2 * 2 * 4 * (8 + 3)
    config.q_lora_rank = 7
    two = one - 8 * 4 * 8 + 7 * (8 + 4 * 8)
    cost = CostModel.from_config(config, 10, [None, None])
    assert cost.per_token == 2 * 2 * (two + 2 * 8 * 16)
    sizes = AttentionSizes.from_config(config)
    assert sizes.parameters(8) == two and sizes.down_parameters(8) == 8 * (7 + 5 + 2)
    assert (sizes.latent_dim, sizes.kv_latent_dim, sizes.head_dim) == (14, 7, 8)
