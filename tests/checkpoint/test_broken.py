"""Broken input gives one clear error that names the file, and no output."""

from __future__ import annotations

import json
import pickle
import resource
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
    export_hf,
    hf_to_megatron,
    inspect_checkpoint,
    load_weights,
    megatron_to_hf,
    new_folder,
    open_weights,
    read_hf_config,
    reshard_checkpoint,
)
from megatron_pg.checkpoint.one_rank import build_gpt, one_rank

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
        "supported are .*Llama",
    ),
    "gemma": ("llama", edit_config(architectures=["Gemma3ForCausalLM"]), "'Gemma3ForCausalLM'"),
    "longrope": (
        "llama",
        edit_config(rope_parameters=dict(rope_type="longrope", factor=4.0, rope_theta=1e4)),
        "rope type 'longrope' is not supported",
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
    "sliding window": ("llama", edit_config(sliding_window=64), "sliding_window=64"),
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
    "tracker that leads out": (write(TRACKER, "../../x/iter_2"), "must be 'release' or a number"),
    "tracker in other digits": (write(TRACKER, "\u00b2"), "must be 'release' or a number"),
    "tracker to nowhere": (write(TRACKER, "12"), "iter_0000012: missing"),
    "no metadata.json": (remove("metadata.json"), "metadata.json: missing"),
    "other format": (write("release/metadata.json", '{"sharded_backend": "zarr"}'), "'zarr'"),
    "later format": (
        write(
            "release/metadata.json",
            '{"sharded_backend": "torch_dist", "sharded_backend_version": 2}',
        ),
        "metadata.json: sharded_backend_version=2, only 1 is known",
    ),
    "no description": (remove(".metadata"), ".metadata: missing"),
    "damaged description": (shorten(".metadata"), ".metadata: not readable"),
    "missing part": (remove("*.distcp"), "__0_0.distcp: missing"),
    "cut part": (shorten("*.distcp"), "cut off"),
    "no common.pt": (remove("common.pt"), "common.pt: missing"),
    "damaged common.pt": (shorten("common.pt"), "common.pt: not readable"),
    "other configuration": (
        lambda folder: edit_config(intermediate_size=64)(folder / "huggingface"),
        "ffn_hidden_size=48 .must be 64.",
    ),
    "fewer layers": (
        lambda folder: edit_config(num_hidden_layers=4)(folder / "huggingface"),
        "num_layers=8 .must be 4.",
    ),
}


def copy_without_manifest(models: Path, folder: Path) -> None:
    """A checkpoint as Megatron-LM leaves it."""
    shutil.copytree(models / "llama-megatron", folder)
    (folder / "release/manifest.json").unlink()


@pytest.mark.parametrize("case", MEGATRON_CASES)
def test_megatron(case: str, models: Path, tmp_path: Path) -> None:
    damage, message = MEGATRON_CASES[case]
    copy_without_manifest(models, tmp_path / "in")
    damage(tmp_path / "in")
    with pytest.raises(ValueError, match=message) as caught:
        megatron_to_hf(tmp_path / "in", tmp_path / "out")
    assert str(tmp_path / "in") in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_corrupt_bytes(models: Path, tmp_path: Path) -> None:
    """Bytes inside a part are wrong: found while writing, and nothing is left."""
    copy_without_manifest(models, tmp_path / "in")
    path = tmp_path / "in/release/__0_0.distcp"
    path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(ValueError, match="__0_0.distcp: .* not readable"):
        megatron_to_hf(tmp_path / "in", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_description_runs_no_code(models: Path, tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "touched",))

    copy_without_manifest(models, tmp_path / "in")
    (tmp_path / "in/release/.metadata").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(ValueError, match="which no checkpoint needs"):
        MegatronFolder(tmp_path / "in")
    torch.save({"args": Attack()}, tmp_path / "in/release/common.pt")
    shutil.copy(models / "llama-megatron/release/.metadata", tmp_path / "in/release")
    with pytest.raises(ValueError, match="trust_pickle=True"):
        MegatronFolder(tmp_path / "in")
    assert "trust_pickle=True" in inspect_checkpoint(tmp_path / "in").notes[0]
    assert not (tmp_path / "touched").exists()


WRITERS: dict[str, Callable[[Path, Path], Any]] = {
    "hf_to_megatron": lambda models, out: hf_to_megatron(models / "llama", out),
    "megatron_to_hf": lambda models, out: megatron_to_hf(models / "llama-megatron", out),
    "reshard_checkpoint": lambda models, out: reshard_checkpoint(
        models / "llama-megatron", out, tp_size=1, pp_size=2
    ),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("max_bytes", [100, 3_000, 40_000, 200_000])
def test_disk_full(writer: str, max_bytes: int, models: Path, tmp_path: Path) -> None:
    """No file may grow further, wherever that happens: in tensors, description or arguments."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, before[1]))
    try:
        with pytest.raises(ValueError, match="too large") as caught:
            WRITERS[writer](models, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert f"{tmp_path / 'out'}: writing failed" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_output(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An output that holds something is left alone; one that cannot be written is named."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(ValueError, match="full: exists and is not empty"):
        hf_to_megatron(models / "llama", tmp_path / "full")
    with pytest.raises(ValueError, match="no permission|file"):
        hf_to_megatron(models / "llama", tmp_path / "full/file/out")
    monkeypatch.setattr(new_folder.os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match="no permission to write"):
        megatron_to_hf(models / "llama-megatron", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full"]


@pytest.mark.parametrize("writer", WRITERS)
def test_place_that_cannot_be_written(writer: str, models: Path) -> None:
    """Not even by root."""
    with pytest.raises(ValueError, match="/proc.*(writing failed|no permission)"):
        WRITERS[writer](models, Path("/proc/out"))


WRONG_FOLDERS: dict[str, tuple[Callable[[Path, Path], Any], str, str]] = {
    "no folder": (hf_to_megatron, "nothing", "nothing: no such folder; pass a Hugging Face"),
    "a file": (hf_to_megatron, "llama/config.json", "config.json: no such folder"),
    "a checkpoint to convert": (hf_to_megatron, "llama-megatron", "llama-megatron: no config.json"),
    "only metadata": (hf_to_megatron, "llama-megatron/huggingface", "neither model.safetensors"),
    "no checkpoint": (megatron_to_hf, "nothing", "nothing: no such folder; pass a Megatron"),
    "a model to export": (megatron_to_hf, "llama", "llama: a Hugging Face folder; pass a Meg"),
    "parent": (megatron_to_hf, ".", "latest_checkpointed_iteration.txt: missing; pass the folder"),
    "a model to reshard": (
        lambda path, out: reshard_checkpoint(path, out, tp_size=1, pp_size=1),
        "llama",
        "llama: a Hugging Face folder",
    ),
    "nothing to look at": (
        lambda path, out: inspect_checkpoint(path),
        "nothing",
        "no such folder; pass a Hugging Face folder, or a Megatron checkpoint",
    ),
    "nothing to compare": (lambda path, out: open_weights(path), "nothing", "pass a Hugging Face"),
    "neither kind": (
        lambda path, out: open_weights(path),
        ".",
        "neither config.json nor latest_checkpointed_iteration.txt is in it; pass a Hugging Face",
    ),
    "other configuration": (
        lambda path, out: megatron_to_hf(path, out, hf_config=path / "nothing"),
        "llama-megatron",
        "nothing/config.json: not readable",
    ),
}


@pytest.mark.parametrize("case", WRONG_FOLDERS)
def test_wrong_folder(case: str, models: Path, tmp_path: Path) -> None:
    convert, folder, message = WRONG_FOLDERS[case]
    with pytest.raises(ValueError, match=message):
        convert(models / folder, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_interrupted(models: Path, tmp_path: Path) -> None:
    """What is left by a killed conversion does not look finished, and the next one succeeds."""
    (tmp_path / ".out.partial" / "release").mkdir(parents=True)
    (tmp_path / ".out.lock").write_text("process 1 on host elsewhere")
    assert not (tmp_path / "out").exists()
    hf_to_megatron(models / "llama", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_layouts_that_do_not_fit(models: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_attention_heads=4 is no multiple of tensor_model"):
        hf_to_megatron(models / "llama", tmp_path / "out", tp_size=3)
    with pytest.raises(
        ValueError, match="virtual_pipeline_model_parallel_size=0 must be at least 2"
    ):
        hf_to_megatron(models / "llama", tmp_path / "out", vpp_size=0)
    with pytest.raises(ValueError, match="make_vocab_size_divisible_by=0 must be at least 1"):
        hf_to_megatron(models / "llama", tmp_path / "out", make_vocab_size_divisible_by=0)
    with pytest.raises(ValueError, match="num_layers=8 is no multiple of pipeline_model"):
        reshard_checkpoint(models / "llama-megatron", tmp_path / "out", tp_size=1, pp_size=3)
    assert list(tmp_path.iterdir()) == []


def test_experts_without_a_counterpart(models: Path, tmp_path: Path) -> None:
    """Refused before the first write: the model stays what it was, no folder begins."""
    source = HfFolder(models / "qwen3_moe")
    with one_rank() as device:
        model = build_gpt(source.model, torch.float32, device)
        # What experts in the layout of the legacy grouped GEMM are called.
        experts = model.decoder.layers[-1].mlp.experts
        experts.register_parameter("weight1", torch.nn.Parameter(torch.zeros(1)))
        before = [parameter.clone() for parameter in model.parameters()]
        with pytest.raises(NotImplementedError, match="legacy grouped GEMM"):
            load_weights([model], source)
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        with pytest.raises(NotImplementedError, match="legacy grouped GEMM"):
            export_hf([model], tmp_path / "out", source.path)
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
