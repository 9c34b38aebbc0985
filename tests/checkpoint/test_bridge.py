"""Families that are not held: by Megatron Bridge, or refused with what to do."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from megatron_pg.checkpoint import hf_to_megatron_by_bridge, megatron_to_hf_by_bridge
from tests.checkpoint.folders import make_config

pytestmark = pytest.mark.megatron


class StandIn:
    """Has the three methods of AutoBridge (0.1 to 0.3) that are called."""

    @classmethod
    def import_ckpt(cls, hf_model_id: str, megatron_path: str, **kwargs: Any) -> None:
        (Path(megatron_path) / "imported").write_text(hf_model_id)

    @classmethod
    def from_hf_pretrained(cls, path: str, **kwargs: Any) -> StandIn:
        if "broken" in path:
            raise RuntimeError("of no\nknown kind")
        return cls()

    def export_ckpt(self, megatron_path: str, hf_path: str, show_progress: bool = True) -> None:
        (Path(hf_path) / "exported").write_text(megatron_path)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    bridge = types.ModuleType("megatron.bridge")
    bridge.AutoBridge = StandIn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "megatron.bridge", bridge)


def folder(path: Path, **config: Any) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_both_ways(stand_in: None, tmp_path: Path) -> None:
    hf, out = folder(tmp_path / "hf", architectures=["Phi3ForCausalLM"]), tmp_path / "out"
    assert hf_to_megatron_by_bridge(hf, out) == out
    assert (out / "imported").read_text() == str(hf)
    megatron_to_hf_by_bridge(out, tmp_path / "back", hf_config=hf, trust_pickle=True)
    assert (tmp_path / "back/exported").read_text() == str(out)


def test_what_it_raises(stand_in: None, tmp_path: Path) -> None:
    hf = folder(tmp_path / "broken", architectures=["Phi3ForCausalLM"])
    with pytest.raises(ValueError, match=r"broken: Megatron Bridge .*RuntimeError: of no known"):
        megatron_to_hf_by_bridge(tmp_path, tmp_path / "out", hf_config=hf, trust_pickle=True)
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_it_unpickles(stand_in: None, tmp_path: Path) -> None:
    hf = folder(tmp_path / "hf", architectures=["Phi3ForCausalLM"])
    with pytest.raises(ValueError, match="unpickles what it reads.*trust_pickle=True"):
        megatron_to_hf_by_bridge(tmp_path, tmp_path / "out", hf_config=hf, trust_pickle=False)


def test_family_that_is_held(stand_in: None, tmp_path: Path) -> None:
    hf = folder(tmp_path / "hf", **make_config("LlamaForCausalLM"))
    with pytest.raises(ValueError, match="LlamaForCausalLM is held here"):
        hf_to_megatron_by_bridge(hf, tmp_path / "out")


def test_without_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "megatron.bridge", None)
    hf = folder(tmp_path / "hf", architectures=["Phi3ForCausalLM"])
    with pytest.raises(ValueError, match=r"does not import .*pip install megatron-bridge"):
        hf_to_megatron_by_bridge(hf, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
