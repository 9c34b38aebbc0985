"""Other libraries' mappings give what ours gives, or are refused by name."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from megatron_pg.checkpoint import (
    HfFolder,
    MegatronFolder,
    compare_weights,
    hf_to_megatron_by,
    megatron_to_hf,
    megatron_to_hf_by,
)
from tests.checkpoint import tiny

pytestmark = pytest.mark.megatron


@pytest.mark.parametrize("name", ["llama3_rope", "qwen2_tied", "qwen3", "qwen3_moe"])
def test_modelopt_equals_direct(name: str, models: Path, tmp_path: Path) -> None:
    """Both ways, for a layout beyond tp=1: equal weights and equal files."""
    pytest.importorskip("modelopt.torch.export")
    converted, direct = tmp_path / "converted", models / f"{name}-megatron"
    layout = dict(tp_size=2, pp_size=2, make_vocab_size_divisible_by=tiny.DIVISIBLE_BY)
    hf_to_megatron_by("modelopt", models / name, converted, **layout)
    ours, theirs = MegatronFolder(direct), MegatronFolder(converted)
    assert ours.mapping.padded_vocab_size == theirs.mapping.padded_vocab_size == 96
    assert not list(compare_weights(ours, theirs)) and len(ours.shapes) > 50
    assert vars(theirs.args) == vars(ours.args) | {"world_size": 0}
    # These models have no tokenizer.
    assert not megatron_to_hf(direct, tmp_path / "a")
    assert not megatron_to_hf_by("modelopt", direct, tmp_path / "b")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
    assert not list(compare_weights(HfFolder(tmp_path / "b"), HfFolder(models / name)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "converted"]


@pytest.mark.parametrize("name", ["mistral", "llama_bias"])
def test_models_that_modelopt_does_not_carry(name: str, models: Path, tmp_path: Path) -> None:
    pytest.importorskip("modelopt.torch.export")
    with pytest.raises(
        ValueError, match="modelopt does not convert this .*use the direct conversion"
    ):
        hf_to_megatron_by("modelopt", models / name, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is not None, reason="Megatron Bridge may import"
)
def test_library_that_does_not_import(models: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"does not import .*pip install megatron-bridge"):
        hf_to_megatron_by("megatron-bridge", models / "llama", tmp_path / "out")
    with pytest.raises(ValueError, match=r"No module named .*; pip .*the direct conversion"):
        megatron_to_hf_by("megatron-bridge", models / "llama-megatron", tmp_path / "out")
    with pytest.raises(
        ValueError, match="backend='mbridge': use one of modelopt, .*the direct conversion"
    ):
        hf_to_megatron_by("mbridge", models / "llama", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
