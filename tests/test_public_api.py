"""The names that other programs import."""

from __future__ import annotations

import megatron_pg


def test_megatron_free_names() -> None:
    assert megatron_pg.__all__ == [
        "PackedLayout",
        "PrefixTree",
        "available_backends",
        "balance_groups",
        "pack_groups",
        "pack_trees",
        "prefix_grouped_attention",
    ]
    assert all(hasattr(megatron_pg, name) for name in megatron_pg.__all__)


def test_megatron_names() -> None:
    from megatron_pg import mcore

    contract = {
        "PrefixGroupedSeqParams",
        "SequenceParallelLayerNorm",
        "SequenceParallelRMSNorm",
        "cpu",
        "validate_config",
        "with_prefix_grouped_attention",
    }
    assert contract <= set(mcore.__all__)
    assert all(hasattr(mcore, name) for name in mcore.__all__)


def test_sizes() -> None:
    from megatron_pg import parallel

    assert parallel.__all__ == ["MEGATRON_NAMES", "ModelSizes", "ParallelSizes"]
    assert all(hasattr(parallel, name) for name in parallel.__all__)
