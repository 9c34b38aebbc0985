"""Latent attention beyond a step against the stock spec: our own models, fused ones, other rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor

from megatron_pg.data import AttentionSizes
from megatron_pg.mcore import (
    PrefixGroupedGPTModel,
    PrefixGroupedSeqParams,
    PrefixKV,
    build_gpt_chunks,
    gpt_builder,
    with_prefix_grouped_attention,
    with_sequence_parallel_norms,
)
from megatron_pg.mcore import chunks as chunks_module
from megatron_pg.mcore.layers import latent_core_attention
from megatron_pg.mcore.resident import ProjectedKV, ResidentLatent
from megatron_pg.mcore.schedule import resident
from tests.mcore import cases, harness, resident_steps
from tests.ranks import Pool
from tests.utils import assert_close

pytestmark = pytest.mark.megatron

GPT = dict(
    vocab_size=harness.VOCAB, max_sequence_length=harness.MAX_LEN, position_embedding_type="rope"
)


def make_model(spec: Any, config: Any, cls: type = GPTModel) -> Any:
    return cls(config, spec, **GPT).to(config.params_dtype)


def packed_loss(model: Any, row: harness.Rows) -> Tensor:
    params = PrefixGroupedSeqParams.from_layout(row.layout)
    tokens = row.layout.pack_tokens(row.sequences)
    logits = model(tokens[None], params.position_ids[None], None, packed_seq_params=params)[0]
    total = logits.new_zeros(())
    for sample, weights in enumerate(row.weights):
        targets = row.layout.sample_indices(sample)[1:]
        logprobs = logits[row.layout.predictor_of[targets]].log_softmax(-1)
        total = total - (logprobs.gather(1, tokens[targets][:, None])[:, 0] * weights).sum()
    return total


def written_out_loss(model: Any, row: harness.Rows) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for sequence, weights in zip(row.sequences, row.weights):
        logprobs = ordinary(model, sequence)[:-1].log_softmax(-1)
        total = total - (logprobs.gather(1, sequence[1:, None])[:, 0] * weights).sum()
    return total


def ordinary(model: Any, sequence: Tensor) -> Tensor:
    n = len(sequence)
    mask = torch.ones(1, 1, n, n, dtype=torch.bool).triu(1)
    return model(sequence[None], torch.arange(n)[None], mask)[0]


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_packed_equals_written_out(model: Any) -> dict[str, Tensor]:
    row = harness.make_rows(3, 1)
    got = gradients(model, packed_loss(model, row))
    want = gradients(model, written_out_loss(model, row))
    for name, gradient in want.items():
        assert gradient.abs().max() > 0
        assert_close(name, got[name], gradient, 1e-11)
    return want


# Models of our own.


def shared_key_gradients(mends: bool, case: harness.Case) -> list[dict[str, Tensor]]:
    """Gradients of projections onto the latent, gathered over ranks: packed, and written out."""
    with harness.on_cpu():
        harness.initialize(case)
        if not mends:
            chunks_module.with_mended_latent_attention = lambda block: block
        config = harness.make_config(case)
        (model,) = build_gpt_chunks(config, gpt=GPT)
        row = harness.make_rows(3, case.tp)
        found = []
        losses: list[Callable[..., Tensor]] = [packed_loss]
        if not case.sp:  # rows of any length
            losses.append(written_out_loss)
        for loss in losses:
            grads = gradients(model, gathered(loss, model, row))
            found.append({n: whole(g) for n, g in grads.items() if "kv_down_proj" in n})
        return found


def gathered(loss: Callable[..., Tensor], model: Any, row: harness.Rows) -> Tensor:
    """The loss of logits of the whole vocabulary."""

    def logits(*args: Any, **kwargs: Any) -> Tensor:
        part = model(*args, **kwargs)
        return harness.gather_from_tensor_model_parallel_region(part)

    return loss(logits, row)


def whole(shard: Tensor) -> Tensor:
    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(shard) for _ in range(group.size())]
    torch.distributed.all_gather(parts, shard, group=group)
    return torch.cat(parts)


@pytest.mark.parametrize("sp", [False, True])
def test_gradients_of_our_model_are_those_of_one_rank(ranks: Pool, sp: bool) -> None:
    case = harness.Case(**cases.LATENT)
    (want, _), *_ = ranks.run(1, shared_key_gradients, True, case)
    on_two = replace(case, tp=2, sp=sp)
    of_ours = ranks.run(2, shared_key_gradients, True, on_two)
    of_stock = ranks.run(2, shared_key_gradients, False, on_two)
    assert len(want) == 2
    for name, gradient in want.items():
        for ours in (found for of_rank in of_ours for found in of_rank):
            assert_close(name, ours[name], gradient, 1e-12)
        error = (of_stock[0][0][name] - gradient).abs().max() / gradient.abs().max()
        assert error > 1e-3, "the stock layer is right: mend it no longer"


def test_keys_are_normed_without_a_latent_of_queries(one_rank: None) -> None:
    settings = cases.LATENT_YARN | dict(q_lora_rank=None)
    config = harness.make_config(harness.Case(**cases.latent(**settings)))
    (model,) = build_gpt_chunks(config, gpt=GPT)
    names = [n for n in model.state_dict() if ".0.self_attention" in n and "extra" not in n]
    assert [n.split("self_attention.")[1] for n in names] == [
        "linear_proj.weight",
        "linear_q_proj.weight",
        "linear_kv_down_proj.weight",
        "linear_kv_up_proj.weight",
        "kv_layernorm.weight",
    ]
    assert_packed_equals_written_out(model)


# Specs of a user's own.


def test_ordinary_batches_are_the_stock_models(one_rank: None) -> None:
    config = harness.make_config(harness.Case(**cases.LATENT))
    layer = get_gpt_layer_local_spec(**cases.LATENT["spec"], normalization="RMSNorm")
    block = with_sequence_parallel_norms(layer, config)
    stock = make_model(harness.with_value_sizes(block), config)
    wrapped = with_prefix_grouped_attention(block)
    ours = make_model(wrapped, config, PrefixGroupedGPTModel)
    ours.load_state_dict(stock.state_dict())
    sequence = torch.arange(40) % harness.VOCAB
    assert torch.equal(ordinary(ours, sequence), ordinary(stock, sequence))
    packed_loss(ours, harness.make_rows(3, 1))
    assert torch.equal(ordinary(ours, sequence), ordinary(stock, sequence))


@pytest.mark.skipif(
    not hasattr(multi_latent_attention, "FusedMLASelfAttention"),
    reason="this Megatron-Core does not fuse projections onto latents",
)
def test_fused_projections_onto_latents(one_rank: None) -> None:
    config = harness.make_config(harness.Case(**cases.LATENT))
    layer = get_gpt_layer_local_spec(**cases.LATENT["spec"], normalization="RMSNorm")
    attention = layer.submodules.self_attention
    attention = replace(
        attention,
        module=multi_latent_attention.FusedMLASelfAttention,
        submodules=replace(attention.submodules, linear_qkv_down_proj=ColumnParallelLinear),
    )
    layer = replace(layer, submodules=replace(layer.submodules, self_attention=attention))
    block = with_sequence_parallel_norms(layer, config)
    model = make_model(with_prefix_grouped_attention(block), config)
    grads = assert_packed_equals_written_out(model)
    assert sum("linear_qkv_down_proj" in name for name in grads) == 2


# Resident prompts.


@pytest.mark.parametrize("mode", ["retain", "recompute"])
def test_resident_prompts_keep_latents(one_rank: None, monkeypatch, mode: str) -> None:
    case = harness.Case(**cases.LATENT_PLAIN)
    config = harness.make_config(case)
    chunks = harness.wrap_ddp(case, config, harness.build(case, config, packed=True))
    kept: list[PrefixKV] = []

    def make_prefix_kv() -> PrefixKV:
        kept.append(PrefixKV())
        return kept[-1]

    monkeypatch.setattr(resident, "PrefixKV", make_prefix_kv)
    waves = resident_steps.make_waves(case, mode)
    resident.prefix_resident_forward_backward(
        forward_step_func=resident_steps.resident_step(resident_steps.groups_of(0)),
        waves=waves,
        model=chunks,
        seq_length=harness.MAX_LEN,
        mode=mode,
    )
    rows = [row for wave in waves for row in wave.prefix_rows]
    assert len(rows) == len(kept) > 1
    # Latents of 12 and a shared key of 4 in two layers, 8 bytes each, with their gradients; keys
    # and values would be four heads of 20.
    sizes = AttentionSizes.from_config(config)
    assert sizes.kept_dim(1, False) == 12 + 4
    for row, prefix_kv in zip(rows, kept):
        assert prefix_kv.num_bytes == row.layout.total_tokens * 2 * (12 + 4) * 8 * 2
        assert len(prefix_kv.latents) == 2


def test_a_row_that_comes_too_early_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="not been encoded"):
        PrefixKV().latent_of(torch.nn.Identity())


def test_keys_and_values_of_latents_are_there_while_they_are_read() -> None:
    weight = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    calls = []

    def project(latent: Tensor, shared_key: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(len(latent))
        both = (latent @ weight.t()).view(-1, 2, 3)
        return torch.cat([both[..., :2], shared_key[:, None].expand(-1, 2, -1)], -1), both[..., 2:]

    latent = torch.randn(4, 3, dtype=torch.float64)
    kept = ResidentLatent(latent, torch.randn(4, 1, dtype=torch.float64))
    made = ProjectedKV(kept, project)
    assert made.k.shape == (4, 2, 3) and made.v.shape == (4, 2, 1) and calls == [4]
    assert not made.k.requires_grad and not made.v.requires_grad
    made.drop()
    dk, dv = made.grads()
    dk += 2.0
    dv += 3.0
    key = torch.zeros(1, requires_grad=True)
    made.follow(key).sum().backward()
    assert calls == [4, 4] and made.dk is None
    of_latent, of_key = kept.gradients
    share = torch.tensor([2.0, 2.0, 3.0, 2.0, 2.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(of_latent, (share @ weight.detach()).expand(4, 3))
    torch.testing.assert_close(weight.grad, share[:, None] * latent.sum(0))
    assert torch.equal(of_key, torch.full((4, 1), 4.0, dtype=torch.float64))
    assert kept.num_bytes == 2 * 4 * (3 + 1) * 8


# Ways to a model.


class SizedCore(torch.nn.Module):
    """As Transformer Engine's, which takes the sizes of heads."""

    def __init__(self, config: Any, k_channels: int | None = None, v_channels: int | None = None):
        super().__init__()


def test_cores_that_take_sizes_stay() -> None:
    assert latent_core_attention(SizedCore) is SizedCore
    sized = latent_core_attention(DotProductAttention)
    assert issubclass(sized, DotProductAttention) and sized is not DotProductAttention
    assert latent_core_attention(sized) is sized


class HandsOn(DotProductAttention):
    """A user's own, which takes whatever the class above it does."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)


class HandsOnSized(SizedCore):
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)


def test_a_core_that_hands_on_what_it_is_given(one_rank: None) -> None:
    assert latent_core_attention(HandsOnSized) is HandsOnSized
    config = harness.make_config(harness.Case(**cases.LATENT_PLAIN))
    layer = get_gpt_layer_local_spec(**cases.LATENT_PLAIN["spec"], normalization="RMSNorm")
    attention = layer.submodules.self_attention
    parts = replace(attention.submodules, core_attention=HandsOn)
    attention = replace(attention, submodules=parts)
    layer = replace(layer, submodules=replace(layer.submodules, self_attention=attention))
    block = with_prefix_grouped_attention(with_sequence_parallel_norms(layer, config))
    assert_packed_equals_written_out(make_model(block, config))


def test_megatron_lm_builds_it(one_rank: None) -> None:
    arguments = SimpleNamespace(
        padded_vocab_size=harness.VOCAB,
        max_position_embeddings=harness.MAX_LEN,
        untie_embeddings_and_output_weights=True,
        position_embedding_type="rope",
        rotary_percent=1.0,
        rotary_base=10000,
        transformer_impl="local",
    )
    config = harness.make_config(harness.Case(**cases.LATENT))
    model = gpt_builder(arguments, True, True, config=config).double()
    attention = model.decoder.layers[0].self_attention
    assert isinstance(attention, multi_latent_attention.MLASelfAttention)
    assert torch.isfinite(ordinary(model, torch.arange(9))).all()
    config.apply_rope_fusion = True
    with pytest.raises(ValueError, match="apply_rope_fusion=True with multi_latent_attention"):
        gpt_builder(arguments, True, True, config=config)
