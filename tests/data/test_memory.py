"""What a token keeps, against values counted by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_pg.data import (
    AttentionSizes,
    ExpertSizes,
    LayerSizes,
    LinearSizes,
    MemoryModel,
    ModuleKinds,
    RankShare,
)

ATTENTION = AttentionSizes(num_heads=4, num_kv_heads=2, head_dim=3, value_dim=3)
LAYER = LayerSizes(
    hidden_size=8,
    mixer=ATTENTION,
    ffn_hidden_size=16,
    gated_linear_unit=True,
    value_bytes=2,
)
# A log-sum-exp of every head, in fp32.
LSE = 4 * 4


def of_layer(layer: LayerSizes = LAYER, *recompute: str, **share: int | bool) -> MemoryModel:
    return MemoryModel.of_layer(layer, RankShare(**share), recompute)


def test_activations_of_a_small_decoder() -> None:
    model = of_layer()
    # Two norms and two projections read 8 values; q, rotated q and output 12; k, v, rotated k 6.
    assert model.activations == 2 * (4 * 8 + 3 * 12 + 3 * 6 + 3 * 16) + LSE
    assert model.freed == {
        "full": model.activations - 2 * 8,
        "mlp": 2 * 3 * 16,
        # What is turned, of which queries are copied before.
        "core_attn": LSE + 2 * 6,
    }
    # Gradients of q, k, v and out, or of what gate and activation read.
    assert model.gradients == 2 * (2 * 12 + 2 * 6)
    assert of_layer(replace(LAYER, ffn_hidden_size=64)).gradients == 2 * 2 * 64


def test_modules_of_several_operations_keep_what_they_scale() -> None:
    model = of_layer()
    apart = of_layer(replace(LAYER, modules=ModuleKinds(has_fused_activation=False)))
    assert apart.freed["mlp"] == 2 * 5 * 16 == apart.activations - model.activations + 2 * 48
    apart = of_layer(replace(LAYER, modules=ModuleKinds(has_fused_norms=False)))
    assert apart.activations - model.activations == 2 * 2 * 8
    plain = of_layer(replace(LAYER, gated_linear_unit=False))
    assert model.activations - plain.activations == 2 * 16


def test_norms_behind_a_part_and_none_before() -> None:
    behind = of_layer(replace(LAYER, has_norms_behind=True))
    assert behind.activations - of_layer().activations == 2 * 2 * 8
    alone = of_layer(replace(LAYER, has_norms_behind=True, has_norms_before=False))
    assert alone.activations == of_layer().activations


@pytest.mark.parametrize("choice", ["full", "mlp", "core_attn"])
def test_what_is_recomputed_is_held_by_one_layer_at_a_time(choice: str) -> None:
    model, again = of_layer(), of_layer(LAYER, choice)
    assert again.recomputed == model.freed[choice] > 0 == model.recomputed
    assert again.activations == model.activations - again.recomputed
    assert again.kept_without_recompute == model.activations
    assert again.recompute_layers == (choice == "full")


def test_tensor_parallel_ranks_share_heads_and_with_sequence_parallelism_the_rest() -> None:
    inside = 2 * (3 * 12 + 3 * 6 + 3 * 16) + LSE
    assert of_layer(tp_size=2).activations == 2 * 4 * 8 + inside // 2
    assert of_layer(tp_size=2, sequence_parallel=True).activations == (2 * 4 * 8 + inside) // 2
    # Two heads for keys and values on four ranks: one on each.
    assert of_layer(tp_size=4).kv == 2 * 2 * 3


def test_context_parallel_ranks_keep_what_they_exchanged() -> None:
    # Of a token of theirs q, k and v of the others' rows, and the output before and after.
    inside = 2 * (3 * 12 + 2 * 6 + 3 * 16) + LSE
    assert of_layer(cp_size=2).activations == 2 * 4 * 8 + inside
    # Four ranks share two key heads: each is sent twice.
    model = of_layer(cp_size=4, kv_head_copies=2)
    assert model.activations == 2 * 4 * 8 + inside + 2 * 2 * 6 and model.kv == model.kept == 2 * 24


def test_every_expert_of_a_token_gets_a_copy_of_it() -> None:
    experts = ExpertSizes(number=8, topk=3, ffn_hidden_size=10)
    layer = replace(LAYER, ffn_hidden_size=0, experts=experts)
    # The attention, and what the norm before the experts reads and returns.
    dense = of_layer(replace(LAYER, ffn_hidden_size=0)).activations + 2 * 2 * 8
    routed = 5 * 8 + 24 * 3
    copies = 2 * 3 * (8 + 3 * 10)
    assert of_layer(layer).activations == dense + copies + routed
    assert of_layer(layer).freed["moe"] == copies + routed
    # Weighting the result is a step of its own without a kernel.
    apart = replace(layer, modules=ModuleKinds(has_fused_activation=False))
    assert of_layer(apart).freed["moe"] == 2 * 3 * (8 + 6 * 10) + routed
    shared = replace(layer, ffn_hidden_size=5)
    assert of_layer(shared).freed["moe"] - of_layer(shared).freed["shared_experts"] == (
        copies + routed
    )
    # On two ranks, a half of the tokens; where they divide experts' widths, halves of all.
    halves = dict(tp_size=2, sequence_parallel=True)
    spread = of_layer(layer, expert_tp_size=1, **halves)
    assert spread.freed["moe"] == (copies + routed) // 2
    divided = of_layer(layer, **halves).freed["moe"]
    assert divided == 2 * 3 * (8 + 3 * 10 // 2) + routed // 2


@pytest.mark.parametrize(("value_bytes", "grad_bytes"), [(2, 4), (4, 4), (8, 8)])
def test_resident_tokens_keep_keys_values_and_gradients(value_bytes: int, grad_bytes: int) -> None:
    model = of_layer(replace(LAYER, value_bytes=value_bytes))
    # Keys and values of two heads of three channels.
    assert model.kv == model.kept == 12 * value_bytes and model.kept_grads == 12 * grad_bytes
    assert model.resident("recompute") == 12 * (value_bytes + grad_bytes)
    # The activations hold the keys and values already.
    assert model.resident("retain") == model.activations + 12 * grad_bytes
    # A window keeps copies of the part that it reaches, the row itself all of its own.
    assert model.resident("recompute", 0.25) == 3 * (value_bytes + grad_bytes)
    assert model.resident("retain", 0.25) == model.activations + 3 * (value_bytes + grad_bytes)
    # Where layers run again in the backward pass, they hold the layer's input alone.
    model = of_layer(replace(LAYER, value_bytes=value_bytes), "full")
    assert model.activations == 8 * value_bytes
    assert model.resident("retain") == 8 * value_bytes + 12 * (value_bytes + grad_bytes)


def test_resident_tokens_of_latent_attention_keep_what_keys_and_values_are_made_of() -> None:
    attention = AttentionSizes(
        num_heads=128,
        num_kv_heads=128,
        head_dim=192,
        value_dim=128,
        kv_lora_rank=512,
        rotary_dim=64,
    )
    layer = replace(LAYER, mixer=attention)
    for tp_size, sp, kept in ((1, False, 576), (8, False, 576), (8, True, 128)):
        assert attention.kept_dim(tp_size, sp) == kept
        model = of_layer(layer, tp_size=tp_size, sequence_parallel=sp)
        assert model.kv == 2 * 128 * 320 // tp_size
        assert model.resident("recompute") == kept * (2 + 4)
        assert model.resident("retain") == model.activations + kept * 4
    plain = AttentionSizes(num_heads=8, num_kv_heads=2, head_dim=16, value_dim=16)
    assert [plain.kept_dim(tp, True) for tp in (1, 2, 4)] == [64, 32, 32]


def test_latent_attention_keeps_latents_beside_heads() -> None:
    attention = AttentionSizes(
        num_heads=4,
        num_kv_heads=4,
        head_dim=5,
        value_dim=3,
        q_lora_rank=6,
        kv_lora_rank=8,
        rotary_dim=2,
    )
    layer = replace(LAYER, mixer=attention)
    others = 2 * (4 * 8 + 3 * 16) + LSE
    heads = 4 * (5 + 5 + 3 + 3)
    # The part of a key that heads share is a view of what was projected.
    assert of_layer(layer).activations == others + 2 * (heads + 6 + 8 + 2)
    assert of_layer(layer).freed["core_attn"] == LSE
    assert of_layer(layer).freed["mla_up_proj"] == 2 * 4 * (5 + 5 + 3)
    normed = replace(layer, has_qk_norms=True)
    assert of_layer(normed).activations - of_layer(layer).activations == 2 * (6 + 8)
    # Local modules gather the latents of queries of all rows, and turn the shared part in steps.
    halves = dict(tp_size=2, sequence_parallel=True)
    gathered = replace(layer, modules=ModuleKinds(gathers_latents=True))
    more = of_layer(gathered, **halves).activations - of_layer(layer, **halves).activations
    assert more == 2 * (6 - 6 // 2 + 4 * 2)


def test_a_layer_may_be_a_mixer_or_an_mlp_alone() -> None:
    whole = of_layer()
    mixer, mlp = of_layer(replace(LAYER, ffn_hidden_size=0)), of_layer(replace(LAYER, mixer=None))
    assert mixer.activations + mlp.activations == whole.activations
    assert mlp.activations == 2 * (2 * 8 + 3 * 16) and mlp.gradients == 2 * 2 * 16
    assert mlp.kv == mlp.kept == mlp.state == 0 and mixer.kv == whole.kv
    assert (set(mixer.freed), set(mlp.freed)) == ({"full", "core_attn"}, {"full", "mlp"})
    experts = ExpertSizes(number=8, topk=3, ffn_hidden_size=10)
    alone = of_layer(replace(LAYER, mixer=None, ffn_hidden_size=0, experts=experts))
    assert alone.activations == 2 * 2 * 8 + alone.freed["moe"]


def test_heads_that_no_position_turns_are_read_as_they_were_projected() -> None:
    plain = replace(LAYER, has_rotary=False)
    assert of_layer().activations - of_layer(plain).activations == 2 * 6
    # Where all heads are views nothing is copied; exchanged or normalised they are anyhow.
    views = replace(plain, mixer=replace(ATTENTION, num_kv_heads=4))
    turned = replace(views, has_rotary=True)
    assert of_layer(turned).activations - of_layer(views).activations == 2 * 2 * 12
    normed = replace(plain, has_qk_norms=True)
    assert of_layer(normed) == of_layer(replace(normed, has_rotary=True))
    assert of_layer(plain, cp_size=2) == of_layer(cp_size=2)


def test_mamba_keeps_what_its_kernels_read() -> None:
    sizes = LinearSizes(
        num_key_heads=2,
        num_value_heads=4,
        key_dim=3,
        value_dim=5,
        conv_kernel=4,
        rule="state_space",
    )
    layer = replace(LAYER, mixer=sizes)
    # Queries and keys of two groups, values of four heads; a gate, and a step of each head.
    convolved, projected = 2 * 2 * 3 + 20, 2 * 2 * 3 + 20 + 20 + 4
    between = projected + convolved + (convolved + 2 * 4) + 4 + 3 * 20
    assert of_layer(layer).activations == 2 * (4 * 8 + between + 3 * 16)
    # With more ranks than groups each has a copy of one.
    copies = of_layer(layer, cp_size=4).activations - of_layer(layer, cp_size=2).activations
    assert copies == 2 * 2 * 2 * 2 * 3
    # Gradients of what was read, and states of every 128 tokens with theirs.
    wide = replace(sizes, key_dim=64, value_dim=64)
    read = 2 * 2 * 64 + 4 * 64 + 2 * 4
    assert of_layer(replace(layer, mixer=wide)).gradients == 2 * (read + 2 * 4 * 64 * 64 // 128)
    # 4 x 3 x 5 in fp32, and 3 tokens of what is convolved.
    assert of_layer(layer).state == 4 * 60 + 2 * 3 * convolved


def test_linear_attention_keeps_no_keys_and_values() -> None:
    linear = LinearSizes(num_key_heads=2, num_value_heads=4, key_dim=3, value_dim=5, conv_kernel=4)
    layer = replace(LAYER, mixer=linear)
    model = of_layer(layer)
    # Queries and keys of 6, values and gates of 20, decay and strength of 4 heads, once projected.
    projected, convolved = 2 * 6 + 2 * 20 + 2 * 4, 2 * 6 + 20
    read = 4 * (2 * 3 + 5 + 2)
    between = projected + convolved + 2 * 6 + read + 4 * 64 + 2 * 20
    assert model.activations == 2 * (4 * 8 + between + 3 * 16)
    assert model.kv == model.kept == model.kept_grads == 0 and "core_attn" not in model.freed
    # Without kernels the activation of the convolution reads what that returned.
    apart = of_layer(replace(layer, modules=ModuleKinds(has_fused_recurrence=False)))
    assert apart.activations - model.activations == 2 * (convolved - 4 * 64)
    # Where a key head serves one value head, the recurrence reads what the norm returned.
    alone = of_layer(replace(layer, mixer=replace(linear, num_value_heads=2)))
    between = 2 * 6 + 2 * 10 + 2 * 2 + 2 * 6 + 10 + 2 * (2 * 3 + 5 + 2) + 2 * 64 + 2 * 10
    assert alone.activations == 2 * (4 * 8 + between + 3 * 16)
    # On two ranks half of it.
    half = of_layer(layer, tp_size=2, sequence_parallel=True)
    assert half.activations == model.activations // 2
    # A segment leaves a state of 3 x 5 in fp32 for each head, and inputs of 32 channels.
    inputs = 32 * (linear.conv_kernel - 1)
    assert (model.state, model.state_grads) == (4 * 60 + 2 * inputs, 4 * 60 + 4 * inputs)
    assert half.state == model.state // 2 == of_layer(layer, cp_size=2).state
