"""Layers that predict further tokens are not built, and their tensors go along bit by bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_pg.checkpoint import (
    HfFolder,
    MegatronFolder,
    compare_weights,
    export_hf,
    hf_to_megatron,
    load_hf,
    megatron_to_hf,
    reshard_checkpoint,
)
from megatron_pg.checkpoint.one_rank import build_gpt, one_rank
from tests.checkpoint.folders import (
    assert_same_bits,
    make_config,
    make_weights,
    read_weights,
    write_folder,
)
from tests.hostile import refused

pytestmark = pytest.mark.megatron

NAMES = ("eh_proj.weight", "shared_head.norm.weight", "mlp.gate.e_score_correction_bias")


def make_folder(folder: Path, architecture: str, num_shards: int = 1, **changes: Any) -> Any:
    """Two layers, and one further of three tensors, one of them in fp32."""
    config = make_config(architecture, num_nextn_predict_layers=1, torch_dtype="bfloat16")
    weights = {
        name: tensor if name.endswith("correction_bias") else tensor.bfloat16()
        for name, tensor in make_weights(config).items()
    }
    dtypes = (torch.bfloat16, torch.bfloat16, torch.float32)
    weights |= {
        f"model.layers.2.{name}": torch.randn(5, 3).to(dtype) for name, dtype in zip(NAMES, dtypes)
    }
    write_folder(folder, config | changes, weights, num_shards)
    return weights


def by_checkpoint(hf: Path, out: Path, num_carried: int = 3) -> None:
    hf_to_megatron(hf, out.with_name("a"), tp_size=2)
    kept = HfFolder(hf), MegatronFolder(out.with_name("a"))
    assert not list(compare_weights(*kept)) and len(kept[1].carried.shapes) == num_carried
    reshard_checkpoint(out.with_name("a"), out.with_name("b"), tp_size=1, pp_size=2)
    megatron_to_hf(out.with_name("b"), out, max_shard_bytes=2000)


def by_configuration(hf: Path, out: Path) -> None:
    """The folder is given anew, and what lay beside the checkpoint is gone."""
    hf_to_megatron(hf, out.with_name("a"))
    shutil.rmtree(out.with_name("a") / "huggingface")
    assert not MegatronFolder(out.with_name("a")).carried.shapes
    megatron_to_hf(out.with_name("a"), out, hf_config=hf)


def by_model(hf: Path, out: Path) -> None:
    with one_rank() as device:
        gpt_model = build_gpt(HfFolder(hf).model, torch.bfloat16, device)
        load_hf([gpt_model], hf)
        export_hf([gpt_model], out, hf, max_shard_bytes=2000)


@pytest.mark.parametrize("way", [by_checkpoint, by_configuration, by_model])
@pytest.mark.parametrize(
    ("architecture", "num_shards"), [("DeepseekV3ForCausalLM", 3), ("Glm4MoeForCausalLM", 1)]
)
def test_they_come_back(
    way: Callable[[Path, Path], None], architecture: str, num_shards: int, tmp_path: Path
) -> None:
    """With the biases of the layers that are built, which stay fp32 in a model of bf16."""
    weights = make_folder(tmp_path / "hf", architecture, num_shards)
    way(tmp_path / "hf", tmp_path / "out")
    assert_same_bits(read_weights(tmp_path / "out"), weights)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["num_nextn_predict_layers"] == 1


@pytest.mark.parametrize(
    ("architecture", "said"),
    [("Qwen3NextForCausalLM", {}), ("Qwen3_5ForCausalLM", dict(mtp_num_hidden_layers=1))],
)
def test_they_come_back_by_names_of_their_own(
    architecture: str, said: dict[str, int], tmp_path: Path
) -> None:
    """No file of Qwen3-Next says that there are any."""
    config = make_config(architecture, **said)
    weights = make_weights(config) | {
        "mtp.fc.weight": torch.randn(5, 3),
        "mtp.layers.0.mlp.gate.weight": torch.randn(2, 3, dtype=torch.bfloat16),
    }
    write_folder(tmp_path / "hf", config, weights)
    by_checkpoint(tmp_path / "hf", tmp_path / "out", num_carried=2)
    assert_same_bits(read_weights(tmp_path / "out"), weights)
    content = json.loads((tmp_path / "out/config.json").read_text())
    assert content.get("mtp_num_hidden_layers") == said.get("mtp_num_hidden_layers")


def test_they_are_of_the_number_that_the_configuration_has(tmp_path: Path) -> None:
    make_folder(tmp_path / "hf", "DeepseekV3ForCausalLM", num_nextn_predict_layers=0)
    with refused("model.layers.2.eh_proj.weight"):
        HfFolder(tmp_path / "hf")


def test_a_checkpoint_without_them_is_another(tmp_path: Path) -> None:
    make_folder(tmp_path / "hf", "DeepseekV3ForCausalLM")
    hf_to_megatron(tmp_path / "hf", tmp_path / "a")
    shutil.rmtree(tmp_path / "a/huggingface/mtp")
    found = list(compare_weights(HfFolder(tmp_path / "hf"), MegatronFolder(tmp_path / "a")))
    assert found == [f"model.layers.2.{name}: only in {tmp_path / 'hf'}" for name in sorted(NAMES)]


def test_what_lies_among_them_is_theirs(tmp_path: Path) -> None:
    """Neither a tensor of another layer nor a link."""
    make_folder(tmp_path / "hf", "DeepseekV3ForCausalLM")
    hf_to_megatron(tmp_path / "hf", tmp_path / "a")
    kept = tmp_path / "a/huggingface/mtp"
    shutil.move(kept, tmp_path / "elsewhere")
    kept.symlink_to(tmp_path / "elsewhere")
    with refused(str(kept), "link"):
        MegatronFolder(tmp_path / "a")
    kept.unlink()
    kept.mkdir()
    shutil.copy(tmp_path / "hf/model.safetensors", kept)
    with refused(str(kept), "is of no layer beyond the model's 2"):
        MegatronFolder(tmp_path / "a")
