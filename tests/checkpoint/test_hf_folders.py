"""What a Hugging Face folder means: defaults as transformers', dtypes and files kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megatron_pg.checkpoint import (
    HfFolder,
    compare_weights,
    export_hf,
    has_tokenizer,
    hf_to_megatron,
    inspect_checkpoint,
    load_hf,
    megatron_to_hf,
    open_weights,
    parse_hf_config,
    reshard_checkpoint,
)
from megatron_pg.checkpoint.folders.huggingface.writing import make_weight_files
from megatron_pg.checkpoint.one_rank import build_gpt, one_rank
from tests.checkpoint.folders import (
    INDEX,
    MODEL_TYPES,
    assert_same_bits,
    make_config,
    make_weights,
    read_weights,
    write_folder,
)
from tests.hostile import refused

pytestmark = pytest.mark.megatron


def mixed_moe(folder: Path, num_shards: int = 1) -> dict[str, torch.Tensor]:
    """A bf16 model with its routers in fp32."""
    config = make_config("Qwen3MoeForCausalLM", torch_dtype="bfloat16")
    weights = make_weights(config)
    weights = {k: v if ".mlp.gate." in k else v.bfloat16() for k, v in weights.items()}
    write_folder(folder, config, weights, num_shards)
    return weights


@pytest.mark.parametrize("num_shards", [1, 3])
def test_every_tensor_keeps_its_dtype(num_shards: int, tmp_path: Path) -> None:
    """There, to another layout and back; the configuration names the source's."""
    weights = mixed_moe(tmp_path / "hf", num_shards)
    hf_to_megatron(tmp_path / "hf", tmp_path / "a", tp_size=2)
    reshard_checkpoint(tmp_path / "a", tmp_path / "b", tp_size=1, pp_size=2)
    assert not list(compare_weights(HfFolder(tmp_path / "hf"), HfFolder(tmp_path / "hf")))
    for middle in "ab":
        megatron_to_hf(tmp_path / middle, tmp_path / f"{middle}-hf", max_shard_bytes=1000)
        assert_same_bits(read_weights(tmp_path / f"{middle}-hf"), weights)
        assert HfFolder(tmp_path / f"{middle}-hf").model.dtype == torch.bfloat16
        index = json.loads((tmp_path / f"{middle}-hf" / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(x.nbytes for x in weights.values())


def test_running_model_keeps_every_dtype(tmp_path: Path) -> None:
    weights = mixed_moe(tmp_path / "hf")
    with one_rank() as device:
        gpt_model = build_gpt(HfFolder(tmp_path / "hf").model, torch.bfloat16, device)
        for name, parameter in gpt_model.named_parameters():
            if "router" in name:
                parameter.data = parameter.data.float()
        load_hf([gpt_model], tmp_path / "hf")
        export_hf([gpt_model], tmp_path / "out", tmp_path / "hf")
        export_hf([gpt_model], tmp_path / "half", tmp_path / "hf", dtype=torch.float16)
    assert_same_bits(read_weights(tmp_path / "out"), weights)
    assert {x.dtype for x in read_weights(tmp_path / "half").values()} == {torch.float16}


def test_two_kinds_in_one_folder(tmp_path: Path) -> None:
    """Which of the two is meant is not guessed."""
    mixed_moe(tmp_path / "hf")
    hf_to_megatron(tmp_path / "hf", tmp_path / "a")
    tracker = "latest_checkpointed_iteration.txt"
    shutil.copy(tmp_path / "a" / tracker, tmp_path / "hf")
    with refused(str(tmp_path / "hf"), "config.json", tracker):
        open_weights(tmp_path / "hf")
    with refused(str(tmp_path / "hf"), "config.json", tracker):
        inspect_checkpoint(tmp_path / "hf")


def test_head_of_another_dtype(tmp_path: Path) -> None:
    """A tied head that is stored again is the embedding in every bit."""
    config = make_config("LlamaForCausalLM", tie_word_embeddings=True)
    weights = make_weights(config)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].double()
    write_folder(tmp_path / "hf", config, weights)
    with refused("model.safetensors", "lm_head.weight differs"):
        HfFolder(tmp_path / "hf")


def test_files_are_filled_by_each_tensors_size() -> None:
    shapes = {"a": (10,), "b": (10,), "c": (10,)}
    dtypes = {"a": torch.float32, "b": torch.bfloat16, "c": torch.bfloat16}
    files = make_weight_files(shapes, dtypes, max_shard_bytes=40)
    assert list(files.names.values()) == [("a",), ("b", "c")] and files.total_bytes == 80


def test_dtype_that_is_asked_for(tmp_path: Path) -> None:
    """All tensors get it, and every configuration on the way says so."""
    weights = mixed_moe(tmp_path / "hf")
    hf_to_megatron(tmp_path / "hf", tmp_path / "a", dtype=torch.float16)
    megatron_to_hf(tmp_path / "a", tmp_path / "back")
    assert_same_bits(
        read_weights(tmp_path / "back"), {k: v.to(torch.float16) for k, v in weights.items()}
    )
    for folder in ("back", "a/huggingface"):
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert config["torch_dtype"] == "float16"


FIELDS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "vocab_size": "vocab_size",
    "layernorm_epsilon": "rms_norm_eps",
    "max_sequence_length": "max_position_embeddings",
    "tied": "tie_word_embeddings",
}


@pytest.mark.parametrize(
    ("architecture", "key"), [(name, key) for name in MODEL_TYPES for key in make_config(name)]
)
def test_what_an_absent_key_means(architecture: str, key: str) -> None:
    """What transformers takes for it, or a refusal."""
    content = make_config(architecture)
    del content[key]
    try:
        ours = parse_hf_config(dict(content))
    except (ValueError, NotImplementedError) as error:
        assert key.removesuffix("s") in str(error)
        return
    content.pop("model_type", None)
    theirs = transformers.AutoConfig.for_model(MODEL_TYPES[architecture], **content)
    fields = FIELDS | {"ffn_hidden_size": ours.ffn_key}
    if not hasattr(theirs, "rms_norm_eps"):
        fields["layernorm_epsilon"] = "layer_norm_epsilon"
    for field, theirs_key in fields.items():
        assert getattr(ours, field) == getattr(theirs, theirs_key), field
    width = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert (ours.qk_pos_emb_head_dim if ours.is_latent else ours.kv_channels) == width
    if ours.has_positions:
        rope = theirs.rope_parameters
        assert ours.rotary_percent == rope.get("partial_rotary_factor", 1.0)
        assert ours.rotary_base == rope.get("full_attention", rope)["rope_theta"]
    if ours.num_experts is not None:
        # Mixtral always normalises.
        assert ours.norm_topk_prob == getattr(theirs, "norm_topk_prob", True)
    # Zero where the switch is off.
    if not getattr(theirs, "sliding_window", None):
        assert ours.window is None
    else:
        assert ours.window is not None and ours.window.size == theirs.sliding_window


BIASES = {
    "Gemma3ForCausalLM": "attention_bias=True (must be false for Gemma3ForCausalLM)",
    "LlamaForCausalLM": "both be true or both false",
    "MistralForCausalLM": "attention_bias=True (must be false for MistralForCausalLM)",
    "Olmo3ForCausalLM": "attention_bias=True (must be false for Olmo3ForCausalLM)",
    "Qwen2ForCausalLM": "attention_bias=True (must be false for Qwen2ForCausalLM)",
    "Qwen3ForCausalLM": "attention_bias=True (must be false for Qwen3ForCausalLM)",
    "Qwen3MoeForCausalLM": "attention_bias=True (must be false for Qwen3MoeForCausalLM)",
    "SmolLM3ForCausalLM": "attention_bias=True (must be false for SmolLM3ForCausalLM)",
}


@pytest.mark.parametrize("architecture", BIASES)
def test_biases(architecture: str) -> None:
    """The advice is possible: following it, the configuration is read."""
    config = make_config(architecture, attention_bias=True)
    with refused(BIASES[architecture]):
        parse_hf_config(config)
    is_llama = architecture == "LlamaForCausalLM"
    advice = dict(mlp_bias=True) if is_llama else dict(attention_bias=False)
    assert parse_hf_config(config | advice).add_bias_linear == is_llama


def test_tokenizer_files(tmp_path: Path) -> None:
    """Named chat templates too, and nothing else from their folder."""
    config = make_config("LlamaForCausalLM")
    write_folder(tmp_path / "hf", config, make_weights(config))
    (tmp_path / "hf/additional_chat_templates").mkdir()
    files = {
        "tokenizer.json": "{}",
        "tokenizer_config.json": '{"a": 1}',
        "chat_template.jinja": "default",
        "additional_chat_templates/tool_use.jinja": "tools",
        "additional_chat_templates/rag.jinja": "rag",
    }
    for name, content in files.items():
        (tmp_path / "hf" / name).write_text(content)
    (tmp_path / "hf/additional_chat_templates/notes.txt").write_text("not a template")
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    assert megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    for folder in (tmp_path / "megatron/huggingface", tmp_path / "back"):
        for name, content in files.items():
            assert (folder / name).read_text() == content, name
        assert has_tokenizer(folder)
        assert not (folder / "additional_chat_templates/notes.txt").exists()


def test_templates_that_transformers_saves(tmp_path: Path) -> None:
    """Whatever its tokenizer writes comes back, and the same templates are read from it."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    config = make_config("LlamaForCausalLM")
    write_folder(tmp_path / "hf", config, make_weights(config))
    tokenizer: Any = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    )
    tokenizer.chat_template = {"default": "{{ 1 }}", "tool_use": "{{ 2 }}"}
    tokenizer.save_pretrained(tmp_path / "hf")
    saved = {p.relative_to(tmp_path / "hf") for p in (tmp_path / "hf").rglob("*") if p.is_file()}
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    back = {p.relative_to(tmp_path / "back") for p in (tmp_path / "back").rglob("*") if p.is_file()}
    assert back == saved and len(saved) >= 5
    read = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert read.chat_template == tokenizer.chat_template


@pytest.mark.parametrize("name", ["tokenizer.json", "additional_chat_templates/tool.jinja"])
@pytest.mark.parametrize("place", ["secret", "cache/blobs", "hf"])
def test_links_of_side_files(name: str, place: str, tmp_path: Path) -> None:
    """Into a hub's blobs or within the folder they are followed, out of it they are refused."""
    folder = tmp_path / ("hf" if place != "cache/blobs" else "cache/snapshots/main")
    folder.mkdir(parents=True)
    config = make_config("LlamaForCausalLM")
    write_folder(folder, config, make_weights(config))
    held = tmp_path / place / "held"
    held.parent.mkdir(exist_ok=True)
    held.write_text("content")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).symlink_to(held)
    if place == "secret":
        with pytest.raises(ValueError, match=f"{folder / name}: a link to {held}, outside"):
            hf_to_megatron(folder, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    hf_to_megatron(folder, tmp_path / "out")
    copied = tmp_path / "out/huggingface" / name
    assert copied.read_text() == "content" and not copied.is_symlink()
