"""A HybridModel on packed rows equals the stock one on written-out samples."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_pg.mcore import (
    PrefixGroupedHybridModel,
    PrefixGroupedSeqParams,
    hybrid_stack_local_spec,
    with_prefix_grouped_attention,
)
from megatron_pg.mcore.versions import HAS_HYBRID_MODEL
from tests.mcore import cases, harness
from tests.mcore.test_equivalence import Step, check_steps, step_of
from tests.ranks import Pool

pytestmark = pytest.mark.megatron
with_hybrids = pytest.mark.skipif(not HAS_HYBRID_MODEL, reason="HybridModel came with 0.18")


def one_step(name: str) -> Step:
    return step_of(cases.HYBRID[name])


@with_hybrids
@pytest.mark.parametrize("name", cases.HYBRID)
def test_gradients_equal_the_stock_models_on_written_out_samples(ranks: Pool, name: str) -> None:
    case = cases.HYBRID[name]
    check_steps(case, ranks.run(case.world_size, one_step, name))


def build(
    pattern: str | None,
    cls: type = PrefixGroupedHybridModel,
    wraps: bool = True,
    **given: Any,
) -> Any:
    sizes = dict(num_layers=len((pattern or "").split("/")[0].replace("|", "")) or 2)
    settings = given.pop("case", {})
    settings = settings | dict(config=cases.MAMBA | settings.get("config", {}))
    case = harness.Case(**sizes | settings)
    config = harness.make_config(case)
    stack = given.pop("stack", None) or hybrid_stack_local_spec(config)
    return cls(
        config,
        with_prefix_grouped_attention(stack) if wraps else stack,
        vocab_size=harness.VOCAB,
        max_sequence_length=harness.MAX_LEN,
        hybrid_layer_pattern=pattern,
        position_embedding_type="rope",
        **given,
    ).double()


@with_hybrids
def test_keys_are_the_stock_models_and_those_of_transformer_engine(one_rank: None) -> None:
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    case = dict(case=dict(config=dict(qk_layernorm=True)))
    ours, stock = build("*-GM", **case), build("*-GM", HybridModel, wraps=False, **case)
    assert list(ours.state_dict()) == list(stock.state_dict()) and len(ours.state_dict()) > 20
    sharded = ours.sharded_state_dict()
    assert sharded.keys() == stock.sharded_state_dict().keys()
    keys = {tensor.key for tensor in sharded.values()}
    assert {
        "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.1.mlp.linear_fc1.layer_norm_weight",
        "decoder.layers.2.self_attention.in_proj.layer_norm_weight",
        "decoder.layers.3.mixer.in_proj.layer_norm_weight",
        "decoder.layers.3.mixer.norm.weight",
        "decoder.final_norm.weight",
    } <= keys


@with_hybrids
def test_the_given_stack_stays_and_wrapping_twice_is_wrapping_once(one_rank: None) -> None:
    stack = hybrid_stack_local_spec(harness.make_config(harness.Case(config=cases.MOE["config"])))
    before = repr(stack)
    once = with_prefix_grouped_attention(stack)
    assert repr(stack) == before and isinstance(once, ModuleSpec)
    assert "PrefixGroupedSelfAttention" in repr(once) and "PrefixGroupedRouter" in repr(once)
    assert repr(with_prefix_grouped_attention(once)) == repr(once)
    parts = with_prefix_grouped_attention(stack.submodules)
    assert type(parts) is type(stack.submodules) and repr(parts) == repr(once.submodules)


@with_hybrids
def test_layers_that_cannot_be_wrapped_stay_and_their_pattern_is_refused(one_rank: None) -> None:
    stack = hybrid_stack_local_spec(harness.make_config(harness.Case()))
    layer = stack.submodules.mamba_layer
    mixer = ModuleSpec(torch.nn.Linear)
    layer = replace(layer, submodules=replace(layer.submodules, mixer=mixer))
    stack = replace(stack, submodules=replace(stack.submodules, mamba_layer=layer))
    assert with_prefix_grouped_attention(stack).submodules.mamba_layer is layer
    with pytest.raises(NotImplementedError, match="'M': mixer is Linear; .* supports MambaMixer"):
        build("*M", stack=stack)
    assert build("*-", stack=stack)


REFUSED = {
    "latent": (dict(pattern="+-"), NotImplementedError, "'+': build the model from a spec"),
    "sparse": (dict(pattern="D-"), NotImplementedError, "'D': build the model from a spec"),
    "not_wrapped": (dict(pattern="*-", wraps=False), NotImplementedError, "'*': build the model"),
    "mtp": (dict(pattern="*-/*"), NotImplementedError, "after '/', rolls labels"),
    "no_pattern": (dict(pattern=None), ValueError, "hybrid_layer_pattern=None: name every layer"),
    "length": (
        dict(pattern="*-", case=dict(num_layers=4)),
        ValueError,
        "has 2 layers, the configuration num_layers=4",
    ),
    "stages_of_one_rank": (
        dict(pattern="*|-"),
        ValueError,
        "has 2 stages between '|', the configuration 1: pipeline_model_parallel_size=1",
    ),
    "stages_without_vpp": (
        dict(pattern="*|-|*|-", case=dict(pp=2)),
        ValueError,
        "has 4 stages between '|', the configuration 2",
    ),
    "linear_heads": (
        dict(pattern="G*", case=dict(config=dict(linear_num_key_heads=3))),
        ValueError,
        "linear_num_value_heads=32 is no multiple of linear_num_key_heads=3",
    ),
    "ratio": (
        dict(pattern="*-", hybrid_attention_ratio=0.5),
        ValueError,
        "hybrid_attention_ratio=0.5 is deprecated",
    ),
    "mamba_heads": (
        dict(pattern="*M", case=dict(config=dict(mamba_num_heads=6, mamba_num_groups=4))),
        ValueError,
        "mamba_num_heads=6 is no multiple of mamba_num_groups=4",
    ),
    "mamba_groups": (
        dict(
            pattern="*M",
            case=dict(
                tp=2, sp=True, config=dict(mamba_num_heads=6, mamba_num_groups=3, mamba_head_dim=8)
            ),
        ),
        ValueError,
        "mamba_num_groups=3 is no multiple of tensor_model_parallel_size=2",
    ),
    "experts_elsewhere": (
        dict(pattern="*E-E", case=dict(config=cases.MOE["config"])),
        ValueError,
        "hybrid_layer_pattern='*E-E'; set moe_layer_freq=[0, 1, 0, 1]",
    ),
    "settings": (
        dict(pattern="*-", case=dict(config=dict(attention_dropout=0.1))),
        ValueError,
        "attention_dropout=0.1",
    ),
}


@with_hybrids
@pytest.mark.parametrize("name", REFUSED)
def test_refusals(one_rank: None, name: str) -> None:
    settings, kind, message = REFUSED[name]
    with pytest.raises(kind, match=re.escape(message)):
        build(**settings)


@with_hybrids
def test_a_stock_hybrid_of_a_stock_stack_refuses_packed_rows(one_rank: None) -> None:
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    model = build("*-", HybridModel, wraps=False)
    row = harness.make_rows(0, 1)
    params = PrefixGroupedSeqParams.from_layout(row.layout)
    tokens = row.layout.pack_tokens(row.sequences)
    with pytest.raises(NotImplementedError, match="a layer read cu_seqlens"):
        model(tokens[None], params.position_ids[None], None, packed_seq_params=params)


def test_gpt_model_points_to_it(one_rank: None) -> None:
    config = harness.make_config(harness.Case(config=dict(is_hybrid_model=True)))
    with pytest.raises(NotImplementedError, match="build PrefixGroupedHybridModel"):
        harness.build(harness.Case(), config, packed=True)


@pytest.mark.skipif(HAS_HYBRID_MODEL, reason="it has one")
def test_older_versions_have_none() -> None:
    with pytest.raises(NotImplementedError, match="came with megatron-core 0.18"):
        PrefixGroupedHybridModel()
