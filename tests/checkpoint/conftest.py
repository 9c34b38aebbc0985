"""Tiny models on disk, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("megatron.core")
pytest.importorskip("transformers")

from megatron_pg.checkpoint import hf_to_megatron  # noqa: E402
from tests.checkpoint import tiny  # noqa: E402


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``NAME/`` of every family, and ``NAME-megatron/`` converted from it."""
    root = tmp_path_factory.mktemp("models")
    for name, family in tiny.FAMILIES.items():
        tiny.save_hf(family, root / name)
        hf_to_megatron(
            root / name,
            root / f"{name}-megatron",
            tp_size=2,
            pp_size=2,
            make_vocab_size_divisible_by=tiny.DIVISIBLE_BY,
        )
    return root
