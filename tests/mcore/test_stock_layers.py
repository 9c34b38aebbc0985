"""No layer that does not know packed groups runs one: it is wrapped, or refused by name."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.ssm import gated_delta_net
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import (
    CrossAttention,
    CrossAttentionSubmodules,
    SelfAttention,
)
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_token_prediction import roll_tensor
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import MLATransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)

from megatron_pg.mcore import (
    PrefixGroupedGPTModel,
    PrefixGroupedSeqParams,
    count_attention_calls,
    cpu,
    with_prefix_grouped_attention,
    with_sequence_parallel_norms,
)
from megatron_pg.mcore.generation import DecodeSeqParams, GenerationCache
from megatron_pg.mcore.positioned import WrappedRow
from tests.mcore import harness

pytestmark = pytest.mark.megatron

ROW = harness.make_rows(0, 1)
MODELS = [GPTModel, PrefixGroupedGPTModel]


def carrier() -> PrefixGroupedSeqParams:
    return PrefixGroupedSeqParams.from_layout(ROW.layout)


def stock_block(config: Any, **spec: Any) -> TransformerBlockSubmodules:
    layer = get_gpt_layer_local_spec(normalization=config.normalization, **spec)
    return with_sequence_parallel_norms(layer, config)


def build(model_cls: type, block: Any, config: Any = None, **model: Any) -> torch.nn.Module:
    config = config or harness.make_config(harness.Case())
    options = dict(vocab_size=64, max_sequence_length=64, position_embedding_type="rope")
    return model_cls(config, block, **(options | model)).to(config.params_dtype)


def run(model: torch.nn.Module) -> Any:
    tokens, params = ROW.layout.pack_tokens(ROW.sequences), carrier()
    return model(tokens[None], params.position_ids[None], None, packed_seq_params=params)


# The carrier itself.

READABLE = {"qkv_format", "max_seqlen_q", "max_seqlen_kv", "cp_group", "tokens_per_sample"}
REFUSED = [f.name for f in fields(PackedSeqParams) if f.name not in READABLE]


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_row_of_shared_tokens_has_not_cannot_be_read(name: str) -> None:
    for read in (
        lambda: getattr(carrier(), name),
        lambda: getattr(carrier(), name, None),
        lambda: hasattr(carrier(), name),
        lambda: getattr(copy.copy(carrier()), name),
    ):
        with pytest.raises(NotImplementedError, match=f"read {name} of a packed row.* wrapped"):
            read()
    with pytest.raises(ValueError, match=f"{name}=3: a packed row has its layout instead"):
        replace_field(name, 3)
    assert "cu_seqlens_q" in REFUSED and "cu_seqlens_kv_padded" in REFUSED


def replace_field(name: str, value: object) -> None:
    setattr(carrier(), name, value)


def test_every_row_of_ours_is_such_a_row() -> None:
    cache = GenerationCache([3, 2], 2, 4, torch.device("cpu"))
    for row in (carrier(), DecodeSeqParams.of_rows(cache)):
        # Rotary embeddings, which read the group, cut no table for it.
        assert row.qkv_format == "thd" and (row.cp_group.size(), row.cp_group.rank()) == (1, 0)
        assert f"{len(row.position_ids)} tokens" in repr(row)
        with pytest.raises(NotImplementedError, match="read cu_seqlens_q of a packed row"):
            _ = row.cu_seqlens_q


# Stock layers of Megatron-Core that are handed one.


@pytest.mark.parametrize("model_cls", MODELS)
def test_self_attention(one_rank, model_cls) -> None:
    model = build(model_cls, stock_block(harness.make_config(harness.Case())))
    with pytest.raises(NotImplementedError, match="with_prefix_grouped_attention wrapped every"):
        run(model)


def test_self_attention_without_positions(one_rank) -> None:
    block = stock_block(harness.make_config(harness.Case()))
    model = build(GPTModel, block, position_embedding_type="none")
    with pytest.raises(AssertionError, match="Packed sequence is not supported"):
        run(model)
    model = build(PrefixGroupedGPTModel, block, position_embedding_type="none")
    with pytest.raises(NotImplementedError, match="layer 1 runs SelfAttention"):
        run(model)


def test_latent_attention(one_rank) -> None:
    config = MLATransformerConfig(
        num_layers=1,
        hidden_size=32,
        num_attention_heads=4,
        normalization="RMSNorm",
        add_bias_linear=False,
        params_dtype=torch.float64,
        q_lora_rank=None,
        kv_lora_rank=8,
        qk_head_dim=8,
        qk_pos_emb_head_dim=8,
        v_head_dim=8,
        **cpu.transformer_config_defaults(),
    )
    block = stock_block(config, multi_latent_attention=True)
    # The local one takes no heads of two sizes.
    block.layer_specs[0].submodules.self_attention.submodules.core_attention = OwnCore
    model = build(GPTModel, block, config, position_embedding_type="none")
    with pytest.raises(NotImplementedError, match="of a packed row, whose samples share tokens"):
        run(model)


def test_gated_delta_net() -> None:
    class Bare:
        sp_size = cp_size = 1
        config = harness.make_config(harness.Case())
        _resolve_cu_seqlens = staticmethod(lambda *args, **kwargs: args[0])

    hidden = torch.zeros(ROW.layout.total_tokens, 1, 32)
    # 0.16 refuses every packed row itself.
    with pytest.raises(NotImplementedError, match="packed (row, whose samples|sequence for now)"):
        gated_delta_net.GatedDeltaNet.forward(Bare(), hidden, None, packed_seq_params=carrier())


def test_mamba() -> None:
    pytest.importorskip("triton")
    from megatron.core.ssm.mamba_mixer import MambaMixer

    # Its scan asks for kernels that CPUs do not have before it asks for what a row has not.
    if hasattr(MambaMixer, "_create_packed_seq_idx"):
        with pytest.raises(NotImplementedError, match="read cu_seqlens_q_padded of a packed row"):
            MambaMixer._create_packed_seq_idx(None, carrier(), ROW.layout.total_tokens)
    else:
        assert "packed_seq_params.seq_idx" in inspect.getsource(MambaMixer._ssm_training)
        assert "seq_idx" in REFUSED


def test_rolled_labels_of_multi_token_prediction() -> None:
    with pytest.raises(NotImplementedError, match="read cu_seqlens_q of a packed row"):
        roll_tensor(torch.zeros(1, ROW.layout.total_tokens), packed_seq_params=carrier())


# Models of which only a part is wrapped.


def partly_wrapped(config: Any) -> TransformerBlockSubmodules:
    block = stock_block(config)
    wrapped = with_prefix_grouped_attention(block)
    return replace(block, layer_specs=[wrapped.layer_specs[0], *block.layer_specs[1:]])


@pytest.mark.parametrize("model_cls", MODELS)
def test_a_block_with_one_layer_not_wrapped(one_rank, model_cls) -> None:
    model = build(model_cls, partly_wrapped(harness.make_config(harness.Case())))
    with pytest.raises(NotImplementedError, match="wrapped every layer") as error:
        run(model)
    if model_cls is PrefixGroupedGPTModel:
        assert "layer 2 runs SelfAttention" in str(error.value)


@pytest.mark.parametrize("model_cls", MODELS)
def test_a_list_of_layers_changed_after_wrapping(one_rank, model_cls) -> None:
    config = harness.make_config(harness.Case())
    block = with_prefix_grouped_attention(stock_block(config))
    block.layer_specs[1] = stock_block(config).layer_specs[1]
    with pytest.raises(NotImplementedError, match="wrapped every layer"):
        run(build(model_cls, block))


def wrapped_model(model_cls: type = PrefixGroupedGPTModel, block: Any = None) -> Any:
    config = harness.make_config(harness.Case())
    return build(model_cls, with_prefix_grouped_attention(block or stock_block(config)), config)


@pytest.mark.parametrize("model_cls", MODELS)
def test_attention_replaced_after_the_build(one_rank, model_cls) -> None:
    stock = build(GPTModel, stock_block(harness.make_config(harness.Case())))
    model = wrapped_model(model_cls)
    assert run(model).shape[:2] == (1, ROW.layout.total_tokens)
    model.decoder.layers[1].self_attention = stock.decoder.layers[1].self_attention
    with pytest.raises(NotImplementedError, match="wrapped every layer"):
        run(model)
    model = wrapped_model(model_cls)
    core = stock.decoder.layers[1].self_attention.core_attention
    model.decoder.layers[1].self_attention.core_attention = core
    with pytest.raises(NotImplementedError, match="core_attention of .* is DotProductAttention"):
        run(model)


def test_core_attention_replaced_in_a_wrapped_spec(one_rank) -> None:
    block = with_prefix_grouped_attention(stock_block(harness.make_config(harness.Case())))
    attention = block.layer_specs[0].submodules.self_attention
    attention.submodules.core_attention = DotProductAttention
    with pytest.raises(NotImplementedError, match="core_attention of .* wrap the spec last"):
        build(PrefixGroupedGPTModel, block)


def test_a_wrapped_core_under_stock_attention(one_rank) -> None:
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    wrapped = with_prefix_grouped_attention(layer)
    layer.submodules.self_attention.submodules.core_attention = (
        wrapped.submodules.self_attention.submodules.core_attention
    )
    block = with_sequence_parallel_norms(layer, harness.make_config(harness.Case()))
    model = build(GPTModel, block, position_embedding_type="none")
    with pytest.raises(NotImplementedError, match="from a self-attention that is not wrapped"):
        run(model)


class ForgetfulAttention(SelfAttention):
    """Keeps the row to itself, so that its core attention sees an ordinary batch."""

    def forward(self, *args: Any, packed_seq_params: Any = None, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class ForgetfulLayer(TransformerLayer):
    """Keeps the row from its attention."""

    def forward(self, *args: Any, packed_seq_params: Any = None, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def full_mask(model: torch.nn.Module) -> Any:
    """As ``run``, with a mask, so that nothing but the row can be missed."""
    tokens, params = ROW.layout.pack_tokens(ROW.sequences), carrier()
    mask = torch.ones(1, 1, len(tokens), len(tokens), dtype=torch.bool).triu(1)
    return model(tokens[None], params.position_ids[None], mask, packed_seq_params=params)


@pytest.mark.parametrize("model_cls", MODELS)
def test_attention_that_does_not_hand_the_row_on(one_rank, model_cls) -> None:
    block = stock_block(harness.make_config(harness.Case()))
    block.layer_specs[0].submodules.self_attention.module = ForgetfulAttention
    model = build(model_cls, with_prefix_grouped_attention(block), position_embedding_type="none")
    with pytest.raises(NotImplementedError, match="ForgetfulAttention did not hand"):
        full_mask(model)


def test_a_layer_that_does_not_hand_the_row_on(one_rank) -> None:
    block = stock_block(harness.make_config(harness.Case()))
    block.layer_specs[0].module = ForgetfulLayer
    model = build(
        PrefixGroupedGPTModel,
        with_prefix_grouped_attention(block),
        position_embedding_type="none",
    )
    with pytest.raises(NotImplementedError, match="a layer did not hand packed_seq_params on"):
        full_mask(model)
    assert count_attention_calls(model).ordinary > 0, "the layer ran ordinary attention"


# Specs that are refused when they are wrapped, or when the model is built.


def layer_with(**submodules: Any) -> ModuleSpec:
    layer = get_gpt_layer_local_spec()
    return replace(layer, submodules=replace(layer.submodules, **submodules))


class TokenMixer(torch.nn.Module):
    """Of no class that is known, but with a row in its call."""

    def forward(self, hidden_states: Any, packed_seq_params: Any = None) -> Any:
        return hidden_states, None


class OwnCore(torch.nn.Module):
    """Of no class that is known."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()


@dataclass
class NestedSubmodules:
    mixer: Any = None


@dataclass
class WiderSubmodules(TransformerLayerSubmodules):
    memory: Any = IdentityOp


def with_core(core: Any) -> ModuleSpec:
    layer = get_gpt_layer_local_spec()
    layer.submodules.self_attention.submodules.core_attention = core
    return layer


CROSS = ModuleSpec(
    module=CrossAttention,
    params={"attn_mask_type": AttnMaskType.padding},
    submodules=CrossAttentionSubmodules(
        linear_q=ColumnParallelLinear,
        linear_kv=ColumnParallelLinear,
        core_attention=DotProductAttention,
        linear_proj=RowParallelLinear,
    ),
)
WRAPPING = {
    "cross attention": (lambda: layer_with(cross_attention=CROSS), "cross_attention of .* Cross"),
    "mlp that mixes tokens": (lambda: layer_with(mlp=TokenMixer), "mlp of .* TokenMixer"),
    "nested": (
        lambda: layer_with(
            mlp=ModuleSpec(torch.nn.Identity, submodules=NestedSubmodules([TokenMixer]))
        ),
        "mlp of .* TokenMixer",
    ),
    "a field of its own": (
        lambda: ModuleSpec(TransformerLayer, submodules=WiderSubmodules(memory=TokenMixer)),
        "memory of TransformerLayer is TokenMixer",
    ),
    "a function": (lambda: layer_with(self_attention=lambda x: x), "self_attention is <function"),
    "own core": (lambda: with_core(OwnCore), "core_attention is OwnCore; .* plain softmax"),
    "core function": (lambda: with_core(lambda x: x), "core_attention is <function"),
    "heterogeneous linear": (
        lambda: layer_with(self_attention=ModuleSpec(module=torch.nn.Linear)),
        "self_attention is Linear",
    ),
}


@pytest.mark.parametrize("name", WRAPPING)
def test_layers_that_are_not_wrapped(name: str) -> None:
    make, message = WRAPPING[name]
    with pytest.raises(NotImplementedError, match=message):
        with_prefix_grouped_attention(make())
    both = TransformerBlockSubmodules(layer_specs=[get_gpt_layer_local_spec(), make()])
    with pytest.raises(NotImplementedError, match=message):
        with_prefix_grouped_attention(both)


def test_a_layer_without_attention_stays_as_it_is(one_rank) -> None:
    config = harness.make_config(harness.Case())
    block = stock_block(config)
    layer = block.layer_specs[0]
    block.layer_specs[0] = replace(
        layer, submodules=replace(layer.submodules, self_attention=IdentityOp)
    )
    assert with_prefix_grouped_attention(block).layer_specs[0] == block.layer_specs[0]


def test_blocks_of_multi_token_prediction(one_rank) -> None:
    config = harness.make_config(harness.Case())
    config.mtp_num_layers = 1
    block = stock_block(config)
    mtp = get_gpt_mtp_block_spec(config, block.layer_specs[-1], use_transformer_engine=False)
    with pytest.raises(ValueError, match="got MultiTokenPredictionBlockSubmodules"):
        with_prefix_grouped_attention(mtp)
    with pytest.raises(ValueError, match="mtp_num_layers=1"):
        build(GPTModel, with_prefix_grouped_attention(block), config, mtp_block_spec=mtp)


@pytest.mark.parametrize("mask", [AttnMaskType.padding, AttnMaskType.arbitrary, None])
def test_attention_that_is_not_causal(one_rank, mask) -> None:
    block = stock_block(harness.make_config(harness.Case()))
    params = block.layer_specs[0].submodules.self_attention.params
    params.pop("attn_mask_type")
    if mask is not None:
        params["attn_mask_type"] = mask
    with pytest.raises(ValueError, match="attention of packed groups is causal"):
        build(PrefixGroupedGPTModel, with_prefix_grouped_attention(block))


def test_what_megatron_core_reads_between_the_two_wrapped_modules() -> None:
    row = WrappedRow(carrier())
    assert row.qkv_format == "sbhd" and not isinstance(row, PackedSeqParams)
    with pytest.raises(AttributeError):
        _ = row.cu_seqlens_q
