"""Broken input gives one clear error that names the file, and no output."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_pg.checkpoint import (
    HfFolder,
    MegatronFolder,
    hf_to_megatron,
    hf_writer,
    inspect_checkpoint,
    megatron_to_hf,
    read_hf_config,
    reshard_checkpoint,
    torch_dist,
)
from megatron_pg.checkpoint import files as checkpoint_files

pytestmark = pytest.mark.megatron


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config |= changes
        (folder / "config.json").write_text(json.dumps(config))

    return edit


def edit_weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")

    return edit


def shorten(name: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = next(folder.rglob(name))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return edit


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: next(folder.rglob(name)).unlink()


def write(name: str, content: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / name).write_text(content)

    return edit


HEAD, NORM = "lm_head.weight", "model.norm.weight"
HF_CASES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "no config": ("llama", remove("config.json"), "no config.json"),
    "config no JSON": ("llama", write("config.json", "{"), "config.json: not readable as JSON"),
    "missing shard": ("qwen3", remove("model-00002*"), "model-00002.* missing"),
    "index names nothing": ("qwen3", write("model.safetensors.index.json", "{}"), "no weight_map"),
    "no weights": ("llama", remove("model.safetensors"), "neither model.safetensors"),
    "truncated": ("llama", shorten("model.safetensors"), "model.safetensors: not readable"),
    "truncated shard": ("qwen3", shorten("model-00003*"), "model-00003.* not readable"),
    "integer weights": (
        "llama",
        edit_weights(lambda w: w.update({NORM: w[NORM].to(torch.int8)})),
        "model.norm.weight has dtype I8",
    ),
    "missing tensor": (
        "llama",
        edit_weights(lambda w: w.pop(NORM)),
        "model.norm.weight is missing",
    ),
    "unexpected tensor": (
        "llama",
        edit_weights(lambda w: w.update({"model.extra": w[NORM].clone()})),
        "does not describe: model.extra",
    ),
    "wrong width": ("llama", edit_config(intermediate_size=64), "must be .64, 32."),
    "fewer layers": (
        "llama",
        edit_config(num_hidden_layers=7),
        "does not describe: model.layers.7",
    ),
    "more layers": ("llama", edit_config(num_hidden_layers=9), "model.layers.8.* is missing"),
    "tied with a head": ("llama", edit_config(tie_word_embeddings=True), "lm_head.weight differs"),
    "untied without": (
        "qwen2_tied",
        edit_config(tie_word_embeddings=False),
        "lm_head.weight is mi",
    ),
    "architecture": (
        "llama",
        edit_config(architectures=["GPT2LMHeadModel"]),
        "supported are Llama",
    ),
    "gemma": ("llama", edit_config(architectures=["Gemma3ForCausalLM"]), "'Gemma3ForCausalLM'"),
    "yarn": (
        "llama",
        edit_config(rope_parameters=dict(rope_type="yarn", factor=4.0, rope_theta=1e4)),
        "rope type 'yarn'",
    ),
    "other llama3 rope": (
        "llama3_rope",
        edit_config(
            rope_parameters=dict(
                rope_type="llama3",
                factor=8.0,
                low_freq_factor=2.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=8192,
                rope_theta=1e4,
            )
        ),
        "low_freq_factor",
    ),
    "two rope bases": ("llama", edit_config(rope_theta=5e5), "rope_theta is given as"),
    "sliding window": ("mistral", edit_config(sliding_window=64), "sliding_window=64"),
    "activation": ("llama", edit_config(hidden_act="gelu"), "hidden_act='gelu'"),
    "half of the biases": (
        "llama",
        edit_config(attention_bias=True),
        "attention_bias and mlp_bias",
    ),
    "unknown setting": ("llama", edit_config(logit_scale=2.0), "unknown key logit_scale=2.0"),
    "quantised": ("llama", edit_config(quantization_config=dict(bits=4)), "quantization_config"),
}


@pytest.mark.parametrize("case", HF_CASES)
def test_hugging_face(case: str, models: Path, tmp_path: Path) -> None:
    name, damage, message = HF_CASES[case]
    shutil.copytree(models / name, tmp_path / "hf")
    damage(tmp_path / "hf")
    with pytest.raises((ValueError, NotImplementedError), match=message) as caught:
        hf_to_megatron(tmp_path / "hf", tmp_path / "out")
    assert str(tmp_path / "hf") in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


TRACKER = "latest_checkpointed_iteration.txt"
MEGATRON_CASES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no tracker": (remove(TRACKER), "latest_checkpointed_iteration.txt: missing"),
    "odd tracker": (write(TRACKER, "latest"), "must be 'release' or a number"),
    "tracker to nowhere": (write(TRACKER, "12"), "iter_0000012: missing"),
    "no metadata.json": (remove("metadata.json"), "metadata.json: missing"),
    "other format": (write("release/metadata.json", '{"sharded_backend": "zarr"}'), "'zarr'"),
    "no description": (remove(".metadata"), ".metadata: not readable"),
    "damaged description": (shorten(".metadata"), ".metadata: not readable"),
    "missing part": (remove("*.distcp"), "__0_0.distcp: missing"),
    "cut part": (shorten("*.distcp"), "cut off"),
    "no common.pt": (remove("common.pt"), "common.pt: missing"),
    "damaged common.pt": (shorten("common.pt"), "common.pt: not readable"),
    "other configuration": (
        lambda folder: edit_config(intermediate_size=64)(folder / "huggingface"),
        "by the configuration it must be",
    ),
    "fewer layers": (
        lambda folder: edit_config(num_hidden_layers=4)(folder / "huggingface"),
        "has 8 layers, the configuration says 4",
    ),
}


@pytest.mark.parametrize("case", MEGATRON_CASES)
def test_megatron(case: str, models: Path, tmp_path: Path) -> None:
    damage, message = MEGATRON_CASES[case]
    shutil.copytree(models / "llama-megatron", tmp_path / "in")
    damage(tmp_path / "in")
    with pytest.raises(ValueError, match=message) as caught:
        megatron_to_hf(tmp_path / "in", tmp_path / "out")
    assert str(tmp_path / "in") in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_corrupt_bytes(models: Path, tmp_path: Path) -> None:
    """Bytes inside a part are wrong: found while writing, and nothing is left."""
    shutil.copytree(models / "llama-megatron", tmp_path / "in")
    path = tmp_path / "in/release/__0_0.distcp"
    path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(ValueError, match="__0_0.distcp: tensor .* not readable"):
        megatron_to_hf(tmp_path / "in", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_description_runs_no_code(models: Path, tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "touched",))

    shutil.copytree(models / "llama-megatron", tmp_path / "in")
    (tmp_path / "in/release/.metadata").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(ValueError, match="which no checkpoint needs"):
        MegatronFolder(tmp_path / "in")
    torch.save({"args": Attack()}, tmp_path / "in/release/common.pt")
    shutil.copy(models / "llama-megatron/release/.metadata", tmp_path / "in/release")
    with pytest.raises(ValueError, match="--trust-pickle"):
        MegatronFolder(tmp_path / "in")
    assert "--trust-pickle" in inspect_checkpoint(tmp_path / "in").notes[0]
    assert not (tmp_path / "touched").exists()


def test_disk_full(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch_dist.torch, "save", full)
    with pytest.raises(ValueError, match="No space left on device"):
        hf_to_megatron(models / "llama", tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr(hf_writer, "save_file", full)
    with pytest.raises(ValueError, match="No space left on device"):
        megatron_to_hf(models / "llama-megatron", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_output(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An output that holds something is left alone; one that cannot be written is named."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(ValueError, match="full: exists and is not empty"):
        hf_to_megatron(models / "llama", tmp_path / "full")
    with pytest.raises(ValueError, match="no permission|file"):
        hf_to_megatron(models / "llama", tmp_path / "full/file/out")
    monkeypatch.setattr(checkpoint_files.os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match="no permission to write"):
        megatron_to_hf(models / "llama-megatron", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full"]


def test_interrupted(models: Path, tmp_path: Path) -> None:
    """What is left by a killed conversion does not look finished, and the next one succeeds."""
    partial = checkpoint_files.start_folder(tmp_path / "out")
    (partial / "release").mkdir()
    assert not (tmp_path / "out").exists()
    hf_to_megatron(models / "llama", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_layouts_that_do_not_fit(models: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_attention_heads=4 is no multiple of tp=3"):
        hf_to_megatron(models / "llama", tmp_path / "out", tp_size=3)
    with pytest.raises(ValueError, match="num_layers=8 is no multiple of pp . vpp=3"):
        reshard_checkpoint(models / "llama-megatron", tmp_path / "out", tp_size=1, pp_size=3)
    assert list(tmp_path.iterdir()) == []


def test_same_head_stored_twice(models: Path, tmp_path: Path) -> None:
    """A tied head may be stored again as long as it is the embedding."""
    shutil.copytree(models / "qwen2_tied", tmp_path / "hf")
    edit_weights(lambda w: w.update({HEAD: w["model.embed_tokens.weight"].clone()}))(
        tmp_path / "hf"
    )
    assert HEAD not in HfFolder(tmp_path / "hf").shapes


def test_both_rope_spellings(models: Path, tmp_path: Path) -> None:
    """transformers 4 wrote rope_theta and rope_scaling, transformers 5 writes rope_parameters."""
    config = json.loads((models / "llama3_rope/config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_hf_config(tmp_path) == read_hf_config(models / "llama3_rope")
