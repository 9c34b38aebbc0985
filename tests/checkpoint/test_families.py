"""A model family is one file: what is in the folder, and a new one written here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_pg import checkpoint
from megatron_pg.checkpoint import (
    FAMILIES,
    HfFolder,
    HfModel,
    MegatronFolder,
    compare_logits,
    compare_weights,
    hf_to_megatron,
    megatron_to_hf,
    parse_hf_config,
)
from megatron_pg.checkpoint.description import ConfigValues
from tests.checkpoint.folders import MODEL_TYPES, make_config
from tests.checkpoint.tiny import Family, save_hf
from tests.hostile import refused

pytestmark = pytest.mark.megatron
FOLDER = Path(checkpoint.__file__).parent / "families"


def test_every_file_registers_one_family() -> None:
    files = {path.stem for path in FOLDER.glob("*.py")} - {"__init__"}
    assert {family.__module__.rpartition(".")[2] for family in FAMILIES.values()} == files
    assert len(files) == len(FAMILIES)
    assert {name: family.model_type for name, family in FAMILIES.items()} == MODEL_TYPES


@pytest.mark.parametrize("architecture", FAMILIES)
def test_no_other_module_names_a_family(architecture: str) -> None:
    family = FAMILIES[architecture]
    own = FOLDER / f"{family.__module__.rpartition('.')[2]}.py"
    named = [path for path in FOLDER.parent.rglob("*.py") if architecture in path.read_text()]
    assert named == [own]


# A family as its file would have it: biases of queries, keys and values under keys of their own.
@dataclass(frozen=True, kw_only=True)
class SeedOss(HfModel):
    own_defaults = ("num_key_value_heads", "head_dim", "attention_bias", "attention_out_bias")

    @property
    def add_qkv_bias(self) -> bool:
        return True

    @classmethod
    def read_bias(cls, values: ConfigValues) -> bool:
        values.must("attention_bias", True)
        values.must("attention_out_bias", False)
        values.must("mlp_bias", False)
        values.get("residual_dropout")
        return False

    def config_json(self) -> dict[str, Any]:
        biases = dict(attention_bias=True, attention_out_bias=False, mlp_bias=False)
        return super().config_json() | biases


@pytest.fixture
def seed_oss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "SeedOssForCausalLM", SeedOss)
    SeedOss.architecture, SeedOss.model_type = "SeedOssForCausalLM", "seed_oss"


def test_new_family(seed_oss: None, tmp_path: Path) -> None:
    """There and back bit by bit, and its logits are those of transformers."""
    biases = dict(attention_bias=True, attention_out_bias=False, mlp_bias=False)
    save_hf(Family("SeedOss", dict(head_dim=12, **biases)), tmp_path / "hf", num_layers=2)
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron", tp_size=2)
    hf, megatron = HfFolder(tmp_path / "hf"), MegatronFolder(tmp_path / "megatron")
    assert type(hf.model) is type(megatron.model) is SeedOss and len(hf.shapes) == 27
    assert not list(compare_weights(hf, megatron))
    found = compare_logits(hf, megatron)
    assert found.equal, found
    # Without the configuration that was kept beside: from the arguments.
    (tmp_path / "megatron/huggingface/config.json").unlink()
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert compare_logits(hf, HfFolder(tmp_path / "back"), bound=0.0).equal


def test_setting_of_a_new_family(seed_oss: None) -> None:
    config = make_config("LlamaForCausalLM", attention_bias=True, attention_out_bias=True)
    config |= dict(architectures=["SeedOssForCausalLM"], model_type="seed_oss")
    with refused("attention_out_bias=True (must be False)"):
        parse_hf_config(config)


@pytest.mark.parametrize("key", ["num_experts", "num_experts_per_tok", "moe_intermediate_size"])
def test_experts_of_a_family_without(key: str) -> None:
    with refused(f"unknown key {key}=2"):
        parse_hf_config(make_config("LlamaForCausalLM", **{key: 2}))
