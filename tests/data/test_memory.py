"""What a token keeps, against values counted by hand."""

from __future__ import annotations

import pytest

from megatron_pg.data import AttentionSizes, MemoryModel

DIMS = dict(
    hidden_size=8,
    ffn_hidden_size=16,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=3,
    gated_linear_unit=True,
)


def test_activations_of_a_small_decoder() -> None:
    model = MemoryModel.from_model_dims(**DIMS, value_bytes=2)
    # Two norms and two projections read 8 values; q, rotated q and output 12; k, v, rotated k 6.
    assert model.activations == 2 * (4 * 8 + 3 * 12 + 3 * 6 + 3 * 16)
    plain = MemoryModel.from_model_dims(**{**DIMS, "gated_linear_unit": False}, value_bytes=2)
    assert model.activations - plain.activations == 2 * 16


def test_tensor_parallel_ranks_share_heads_and_with_sequence_parallelism_the_rest() -> None:
    model = MemoryModel.from_model_dims(**DIMS, value_bytes=2, tp_size=2)
    assert model.activations == 2 * (4 * 8 + (3 * 12 + 3 * 6 + 3 * 16) // 2)
    model = MemoryModel.from_model_dims(**DIMS, value_bytes=2, tp_size=2, sequence_parallel=True)
    assert model.activations == 2 * (4 * 8 + 3 * 12 + 3 * 6 + 3 * 16) // 2
    # Two heads for keys and values on four ranks: one on each.
    model = MemoryModel.from_model_dims(**DIMS, value_bytes=2, tp_size=4)
    assert model.kv == 2 * 2 * 3


@pytest.mark.parametrize(("value_bytes", "grad_bytes"), [(2, 4), (4, 4), (8, 8)])
def test_resident_tokens_keep_keys_values_and_gradients(value_bytes: int, grad_bytes: int) -> None:
    model = MemoryModel.from_model_dims(**DIMS, value_bytes=value_bytes)
    # Keys and values of two heads of three channels.
    assert model.kv == model.kept == 12 * value_bytes and model.kept_grads == 12 * grad_bytes
    assert model.resident("recompute") == 12 * (value_bytes + grad_bytes)
    # The activations hold the keys and values already.
    assert model.resident("retain") == model.activations + 12 * grad_bytes
    # A window keeps copies of the part that it reaches, the row itself all of its own.
    assert model.resident("recompute", 0.25) == 3 * (value_bytes + grad_bytes)
    assert model.resident("retain", 0.25) == model.activations + 3 * (value_bytes + grad_bytes)
    # Where layers run again in the backward pass, they hold the layer's input alone.
    model = MemoryModel.from_model_dims(**DIMS, value_bytes=value_bytes, recompute_layers=True)
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
    dims = DIMS | dict(num_attention_heads=128, num_query_groups=128, kv_channels=192)
    for tp_size, sp, kept in ((1, False, 576), (8, False, 576), (8, True, 128)):
        assert attention.kept_dim(tp_size, sp) == kept
        model = MemoryModel.from_model_dims(
            **dims, value_channels=128, value_bytes=2, tp_size=tp_size, kept_channels=kept
        )
        assert model.kv == 2 * 128 * 320 // tp_size
        assert model.resident("recompute") == kept * (2 + 4)
        assert model.resident("retain") == model.activations + kept * 4
    plain = AttentionSizes(num_heads=8, num_kv_heads=2, head_dim=16, value_dim=16)
    assert [plain.kept_dim(tp, True) for tp in (1, 2, 4)] == [64, 32, 32]
