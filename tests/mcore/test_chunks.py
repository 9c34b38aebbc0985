"""``build_gpt_chunks``: which layers are there, the configuration alone says."""

from __future__ import annotations

from typing import Any

import pytest
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate

from megatron_pg.mcore import build_gpt_chunks
from tests.mcore import harness
from tests.ranks import Pool

pytestmark = pytest.mark.megatron

GPT = dict(vocab_size=harness.VOCAB, max_sequence_length=harness.MAX_LEN)
CASE = harness.Case(
    num_layers=4,
    config=dict(
        num_moe_experts=4,
        moe_ffn_hidden_size=16,
        moe_layer_freq=[0, 1, 0, 1],
        moe_shared_expert_intermediate_size=8,
        moe_router_load_balancing_type="none",
        qk_layernorm=True,
    ),
)


def layers_of(case: harness.Case) -> list[list[str]]:
    """What is numbered over the whole model, by chunk."""
    with harness.on_cpu():
        harness.initialize(case)
        chunks = build_gpt_chunks(harness.make_config(case), gpt=GPT)
        return [
            [
                f"{layer.layer_number}: {type(layer.mlp).__name__}"
                for layer in chunk.decoder.layers
                if layer.self_attention.q_layernorm.weight.dtype == case.dtype
            ]
            for chunk in chunks
        ]


def test_dense_and_expert_layers_are_those_of_the_stock_model(one_rank: None) -> None:
    config = harness.make_config(CASE)
    (chunk,) = build_gpt_chunks(config, gpt=GPT)
    block = get_gpt_decoder_block_spec(config, False, normalization="RMSNorm")
    stock: Any = GPTModel(config, block, **GPT)
    assert list(chunk.state_dict()) == list(stock.state_dict())
    names = "\n".join(chunk.state_dict())
    assert "layers.1.mlp.shared_experts" in names and "layers.0.mlp.linear_fc1" in names
    assert "k_layernorm" in names


def test_l2_norms_of_queries_and_keys_are_built(one_rank: None) -> None:
    (chunk,) = build_gpt_chunks(
        harness.make_config(harness.Case(config=dict(qk_l2_norm=True))), gpt=GPT
    )
    assert type(chunk.decoder.layers[0].self_attention.q_layernorm).__name__ == "L2Norm"


def test_every_virtual_stage_has_its_own_layers(ranks: Pool) -> None:
    settings = dict(pp=2, vpp=2, num_layers=4, config=CASE.config)
    first, second = ranks.run(2, layers_of, harness.Case(**settings))
    assert first == [["1: MLP"], ["3: MLP"]] and second == [["2: MoELayer"], ["4: MoELayer"]]


def offsets_in_the_norm(case: harness.Case) -> tuple[int, int]:
    """Offsets of heads that this rank brings to the norm of gradients; ours and the stock model's.

    Copied over tensor-parallel ranks or divided over them, a number counts once.
    """
    with harness.on_cpu():
        harness.initialize(case)
        config = harness.make_config(case)
        ours = build_gpt_chunks(config, gpt=GPT)
        stock = harness.build(case, config, packed=False)
        counts = []
        for (model,) in (ours, stock):
            named = dict(model.named_parameters())
            offsets = [x for name, x in named.items() if name.endswith("softmax_offset")]
            assert len(offsets) == case.num_layers
            counts.append(sum(len(x) for x in offsets if param_is_not_tensor_parallel_duplicate(x)))
        return counts[0], counts[1]


def test_clipping_counts_the_offsets_of_all_ranks(ranks: Pool) -> None:
    case = harness.Case(tp=2, config=dict(softmax_type="learnable"))
    found = ranks.run(2, offsets_in_the_norm, case)
    # Two layers of four heads, on each of two ranks two.
    assert [ours for ours, _ in found] == [4, 4]
    assert [stock for _, stock in found] == [4, 0], "the stock model counts them: drop the mark"
