"""The command-line tools and what they share, on one process."""

from __future__ import annotations

import argparse
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_pg.checkpoint import (
    HfFolder,
    MegatronFolder,
    TorchDistReader,
    TorchDistWriter,
    compare_logits,
    hf_model_from_args,
    hf_to_megatron,
    inspect_checkpoint,
    megatron_to_hf,
    parse_hf_config,
    read_hf_config,
    reshard_checkpoint,
)
from megatron_pg.checkpoint.table import make_shard
from tests.checkpoint.round_trip import same_weights
from tests.checkpoint.tiny import FAMILIES, Family, save_hf
from tests.utils import ROOT, assert_close

pytestmark = pytest.mark.megatron


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch):
    """Run a tool in this process; its exit status."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))

    def run(name: str, *args: object) -> int:
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        try:
            runpy.run_path(str(ROOT / "tools" / f"{name}.py"), run_name="__main__")
        except SystemExit as exit_:
            return int(exit_.code or 0)
        return 0

    return run


@pytest.mark.parametrize("name", FAMILIES)
def test_round_trip(name: str, models: Path, tmp_path: Path) -> None:
    """HF -> torch_dist -> HF bit-equal, also without the configuration kept beside."""
    source = models / name
    converted = MegatronFolder(models / f"{name}-megatron")
    same_weights(converted, source)
    assert hf_model_from_args(converted.args, "args") == converted.model == read_hf_config(source)
    assert parse_hf_config(converted.model.config_json()) == converted.model
    shutil.copytree(models / f"{name}-megatron/release", tmp_path / "release")
    megatron_to_hf(tmp_path / "release", tmp_path / "hf", max_shard_bytes=50_000)
    same_weights(HfFolder(tmp_path / "hf"), source)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    original = transformers.AutoModelForCausalLM.from_pretrained(source)
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        got, want = loaded(tokens).logits, original(tokens).logits
    # Where in memory a file's tensors lie decides the order of a convolution's sums.
    assert_close("logits", got, want, 1e-5 if FAMILIES[name].has_linear_attention else 0.0)


def test_commands(models: Path, tmp_path: Path, tool, capsys: pytest.CaptureFixture) -> None:
    """The documented commands, in the order in which a user runs them."""
    hf = tmp_path / "hf"
    shutil.copytree(models / "qwen2", hf)
    for extra in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (hf / extra).write_text("{}")
    a, b, back = tmp_path / "a", tmp_path / "b", tmp_path / "back"
    assert tool("hf_to_megatron", "--hf", hf, "--out", a, "--dry-run") == 0 and not a.exists()
    assert tool("hf_to_megatron", "--hf", hf, "--out", a, "--tp", 2, "--pp", 2) == 0
    assert (a / "latest_checkpointed_iteration.txt").read_text() == "release"
    assert tool("hf_to_megatron", "--hf", hf, "--out", a) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert tool("verify_checkpoint", a, hf) == 0
    assert tool("reshard_checkpoint", "--megatron", a, "--out", b, "--tp", 4, "--pp", 1) == 0
    assert MegatronFolder(b).args.tensor_model_parallel_size == 4
    assert MegatronFolder(b).args.padded_vocab_size == 512
    assert tool("verify_checkpoint", a, b) == 0
    assert tool("inspect_checkpoint", b, "--tensors") == 0
    assert "decoder.layers.mlp.linear_fc1.weight [8, 96, 32]" in capsys.readouterr().out
    assert tool("megatron_to_hf", "--megatron", b, "--out", back) == 0
    assert (back / "chat_template.jinja").is_file() and (back / "tokenizer.json").is_file()
    assert json.loads((back / "config.json").read_text()) == json.loads(
        (hf / "config.json").read_text()
    )
    assert tool("verify_checkpoint", back, hf, "--logits") == 0
    assert "greedy continuation equal" in capsys.readouterr().out
    assert tool("megatron_to_hf", "--megatron", b, "--out", tmp_path / "bf", "--dtype", "bf16") == 0
    assert HfFolder(tmp_path / "bf").model.dtype == torch.bfloat16
    assert tool("verify_checkpoint", tmp_path / "bf", hf, "--limit", 3) == 1
    assert "more than 3 differences" in capsys.readouterr().out
    assert tool("verify_checkpoint", tmp_path / "nothing", hf) == 2


def test_advice_in_flags(models: Path, tmp_path: Path, tool, capsys) -> None:
    """The library speaks of its parameters, a tool of its flags; a path is left as it is."""
    (tmp_path / "out_dir").mkdir()
    (tmp_path / "out_dir/file").touch()
    with pytest.raises(ValueError, match="pass another out_dir=DIR"):
        hf_to_megatron(models / "llama", tmp_path / "out_dir")
    assert tool("hf_to_megatron", "--hf", models / "llama", "--out", tmp_path / "out_dir") == 2
    told = capsys.readouterr().err
    assert str(tmp_path / "out_dir") in told and "another --out DIR" in told
    legacy = tmp_path / "iter_0000001/mp_rank_00"
    legacy.mkdir(parents=True)
    torch.save({"model": {}, "rng_state": [Family("x")]}, legacy / "model_optim_rng.pt")
    with pytest.raises(ValueError, match="read it with trust_pickle=True"):
        megatron_to_hf(legacy.parent, tmp_path / "out")
    assert tool("megatron_to_hf", "--megatron", legacy.parent, "--out", tmp_path / "out") == 2
    assert "read it with --trust-pickle" in capsys.readouterr().err
    shutil.copytree(models / "llama-megatron/release", tmp_path / "release")
    common = torch.load(tmp_path / "release/common.pt")
    del common["args"]
    torch.save(common, tmp_path / "release/common.pt")
    (tmp_path / "release/manifest.json").unlink()
    assert tool("verify_checkpoint", tmp_path / "release", models / "llama") == 2
    assert "--hf-config DIR" in capsys.readouterr().err
    arguments = ("--hf", models / "llama", "--out", tmp_path / "out", "--bridge")
    assert tool("hf_to_megatron", *arguments) == 2
    assert "LlamaForCausalLM is held here" in capsys.readouterr().err


def test_weights_that_are_not_finite(models: Path, tmp_path: Path, tool, capsys) -> None:
    """Two equal folders with NaN are not called equal."""
    shutil.copytree(models / "llama", tmp_path / "hf")
    weights = load_file(tmp_path / "hf/model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, tmp_path / "hf/model.safetensors")
    for options in ((), ("--logits",), ("--weights-only",)):
        assert tool("verify_checkpoint", tmp_path / "hf", tmp_path / "hf", *options) == 2
        told = capsys.readouterr().err
        assert "model.safetensors: tensor model.norm.weight: 1 of 32 values are NaN" in told


def test_no_tokenizer(models: Path, tmp_path: Path, tool, capsys) -> None:
    """Said also where there is a huggingface/ folder, which has none."""
    checkpoint = models / "llama-megatron"
    assert (checkpoint / "huggingface/config.json").is_file()
    assert not megatron_to_hf(checkpoint, tmp_path / "hf", dry_run=True)
    assert tool("megatron_to_hf", "--megatron", checkpoint, "--out", tmp_path / "hf") == 0
    assert "no tokenizer: none in the checkpoint's huggingface/" in capsys.readouterr().out


def test_other_vocabulary(models: Path, tmp_path: Path, tool, capsys) -> None:
    """The differences are shown although logits cannot be compared."""
    save_hf(Family("Llama", dict(vocab_size=96, num_key_value_heads=4)), tmp_path / "hf")
    assert tool("verify_checkpoint", models / "llama", tmp_path / "hf", "--logits") == 1
    out = capsys.readouterr().out
    assert "configuration: vocab_size is 83 and 96" in out
    assert "logits not compared: the vocabularies differ" in out and "greedy" not in out
    assert "optimizer state" not in out


def test_optimizer_state_that_is_not_compared(models: Path, tmp_path: Path, tool, capsys) -> None:
    """Weights are equal; that nothing else was compared is said, unless it was asked for."""
    a = models / "llama-megatron"
    legacy = tmp_path / "iter_0000001"
    (legacy / "mp_rank_00").mkdir(parents=True)
    source = MegatronFolder(a)
    table = source.table
    state = {
        name: make_shard(table.shard(name), source.read, torch.float32, name)
        for name in table.megatron_names()
    }
    file = legacy / "mp_rank_00/model_optim_rng.pt"
    torch.save({"model": state, "args": source.args, "optimizer": {}}, file)
    notice = "optimizer state not compared"
    for b, is_said in ((legacy, True), (models / "llama", True), (a, False)):
        assert tool("verify_checkpoint", a, b) == 0
        assert (notice in capsys.readouterr().out) == is_said
        assert tool("verify_checkpoint", a, b, "--weights-only") == 0
        assert notice not in capsys.readouterr().out


def test_as_a_program(models: Path, tmp_path: Path) -> None:
    """A tool runs from any folder, without the package being installed."""
    command = [sys.executable, ROOT / "tools/inspect_checkpoint.py", models / "llama"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "huggingface" in done.stdout, done.stderr


def test_one_value_differs(models: Path, tmp_path: Path, tool, capsys) -> None:
    """A single changed element is found and named, with the first layer that it changes."""
    model = transformers.AutoModelForCausalLM.from_pretrained(models / "qwen3_moe")
    with torch.no_grad():
        model.model.layers[5].self_attn.v_proj.weight[3, 4] += 1.0
    model.save_pretrained(tmp_path / "hf")
    assert tool("verify_checkpoint", models / "qwen3_moe-megatron", tmp_path / "hf") == 1
    out = capsys.readouterr().out
    assert "model.layers.5.self_attn.v_proj.weight: 1 of 512 values differ" in out
    result = compare_logits(
        MegatronFolder(models / "qwen3_moe-megatron"), HfFolder(tmp_path / "hf")
    )
    assert result.first_layer == 5 and not result.equal and result.kl > 0
    result = compare_logits(
        MegatronFolder(models / "qwen3_moe-megatron"), HfFolder(models / "qwen3_moe")
    )
    assert result.equal and result.first_layer is None and result.largest_difference < 1e-5
    assert 0 <= result.kl < 1e-10


def test_optimizer_state_bound_to_a_layout(models: Path, tmp_path: Path) -> None:
    """Refused with the remedy; the weights alone can go."""
    shutil.copytree(models / "llama-megatron", tmp_path / "in")
    reader = TorchDistReader(models / "llama-megatron/release")
    folder = tmp_path / "in/release"
    shutil.rmtree(folder)
    folder.mkdir()
    writer = TorchDistWriter(folder)
    for key, tensor in reader.tensors.items():
        whole = reader.read(key)
        writer.add(key, whole, tensor.shape, (0,) * whole.dim())
    moments = torch.ones(8)
    writer.add("optimizer.distributed.dp_group_idx_0.gbuf_idx_0.exp_avg", moments, (8,), (0,))
    writer.finish(torch.load(models / "llama-megatron/release/common.pt"))
    assert inspect_checkpoint(tmp_path / "in").facts["optimizer state"]
    layout = dict(tp_size=1, pp_size=2)
    with pytest.raises(ValueError, match="fully_reshardable.*weights_only=True"):
        reshard_checkpoint(tmp_path / "in", tmp_path / "out", **layout)
    assert not (tmp_path / "out").exists()
    reshard_checkpoint(tmp_path / "in", tmp_path / "out", **layout, weights_only=True)
    assert not inspect_checkpoint(tmp_path / "out").facts["optimizer state"]
    same_weights(MegatronFolder(tmp_path / "out"), models / "llama")


def test_every_size_of_a_layout_is_recorded(models: Path, tmp_path: Path, tool, capsys) -> None:
    """And nothing is left of the layout before."""
    names = iter("abcdef")
    start = models / "qwen3_moe-megatron"

    def reshard(source: Path, *options: object) -> Path:
        out = tmp_path / next(names)
        assert tool("reshard_checkpoint", "--megatron", source, "--out", out, *options) == 0
        assert tool("verify_checkpoint", start, out) == 0
        return out

    first = ("--decoder-first-pipeline-num-layers", 3)
    a = reshard(start, *("--tp", 2, "--pp", 2, "--ep", 2, "--etp", 1), *first)
    args = MegatronFolder(a).args
    assert args.expert_model_parallel_size == 2 and args.expert_tensor_parallel_size == 1
    assert args.decoder_first_pipeline_num_layers == 3
    assert args.pipeline_model_parallel_layout is None
    counted = [f"--account-for-{what}-in-pipeline-split" for what in ("embedding", "loss")]
    args = MegatronFolder(reshard(a, "--tp", 1, "--pp", 5, *counted)).args
    assert (args.expert_model_parallel_size, args.expert_tensor_parallel_size) == (1, 1)
    assert args.decoder_first_pipeline_num_layers is None
    assert args.account_for_embedding_in_pipeline_split
    layout = ("--pipeline-model-parallel-layout", "Et|tt|ttt|ttL")
    b = reshard(a, "--tp", 1, "--pp", 2, "--vpp", 2, *layout)
    args = MegatronFolder(b).args
    assert args.pipeline_model_parallel_layout == "Et|tt|ttt|ttL"
    assert args.virtual_pipeline_model_parallel_size == 2
    assert args.num_layers_per_virtual_pipeline_stage is None
    assert inspect_checkpoint(b).facts["pipeline_model_parallel_layout"] == "Et|tt|ttt|ttL"
    capsys.readouterr()
    for options, message in (
        (("--tp", 1, "--pp", 3, *first), "first"),
        (("--tp", 1, "--pp", 2, *layout), "has 2 chunks a rank: set vpp=2, got None"),
        (("--tp", 1, "--pp", 2, "--ep", 3), "num_moe_experts=4 is no multiple of ep=3"),
        (("--tp", 2, "--pp", 1, "--etp", 1), "etp=1 with ep=1"),
    ):
        out = tmp_path / "refused"
        assert tool("reshard_checkpoint", "--megatron", a, "--out", out, *options) == 2
        assert message in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize(
    ("moment", "bad", "good"),
    [("optimizer.state.exp_avg.x", 2, 1), ("chained_1.optimizer.state.exp_avg.x", 1, 2)],
    ids=["together", "apart"],
)
def test_an_optimizer_that_another_size_would_part(
    models: Path, tmp_path: Path, moment: str, bad: int, good: int
) -> None:
    start, folder = models / "qwen3_moe-megatron", tmp_path / "in/release"
    shutil.copytree(start, tmp_path / "in")
    shutil.rmtree(folder)
    folder.mkdir()
    reader, writer = TorchDistReader(start / "release"), TorchDistWriter(folder)
    for key, tensor in reader.tensors.items():
        whole = reader.read(key)
        writer.add(key, whole, tensor.shape, (0,) * whole.dim())
    writer.add(moment, torch.ones(8), (8,), (0,))
    writer.finish(torch.load(start / "release/common.pt"))
    layout = dict(tp_size=1, pp_size=1)
    with pytest.raises(ValueError, match=f"={bad} Megatron-Core .*weights_only=True"):
        reshard_checkpoint(tmp_path / "in", tmp_path / "out", **layout, ep_size=bad)
    reshard_checkpoint(tmp_path / "in", tmp_path / "out", **layout, ep_size=good)
    assert inspect_checkpoint(tmp_path / "out").facts["optimizer state"]
    reshard_checkpoint(tmp_path / "in", tmp_path / "bare", **layout, ep_size=bad, weights_only=True)


def test_dtype_and_padding(models: Path, tmp_path: Path) -> None:
    hf_to_megatron(
        models / "llama",
        tmp_path / "out",
        dtype=torch.bfloat16,
        tp_size=4,
        make_vocab_size_divisible_by=128,
    )
    reader = TorchDistReader(tmp_path / "out/release")
    embedding = reader.read("embedding.word_embeddings.weight")
    assert embedding.shape == (512, 32) and embedding.dtype == torch.bfloat16
    assert embedding[83:].count_nonzero() == 0
    want = HfFolder(models / "llama").read("model.embed_tokens.weight").to(torch.bfloat16)
    assert torch.equal(embedding[:83], want)


def test_names_in_a_checkpoint_steer_no_terminal(
    tool, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A tensor's name may hold lines of its own, an argument what no terminal takes."""
    folder = tmp_path / "release"
    folder.mkdir()
    writer = TorchDistWriter(folder)
    writer.add("x\nA and B are equal\x1b[2J", torch.ones(1), (1,), (0,))
    writer.finish({"args": argparse.Namespace(num_layers="\ud800")})
    assert tool("inspect_checkpoint", folder, "--tensors") == 0
    assert tool("verify_checkpoint", folder, folder) == 2
    out, err = capsys.readouterr()
    assert "  x\\nA and B are equal\\x1b[2J [1] float32\n" in out
    assert "\\ud800" in out and "\x1b" not in out + err and len(err.splitlines()) == 1
