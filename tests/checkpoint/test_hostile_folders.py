"""Hostile Hugging Face folders: refused by name, or there and back bit for bit."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_pg.checkpoint import compare_weights, hf_to_megatron, megatron_to_hf, open_weights
from tests.checkpoint.folders import (
    INDEX,
    MODEL_TYPES,
    SINGLE,
    assert_same_bits,
    make_config,
    make_weights,
    read_weights,
    write_folder,
)
from tests.hostile import refused, seeds

pytestmark = pytest.mark.megatron

NAN, INF = float("nan"), float("inf")
SIZES = (
    *("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"),
    *("num_key_value_heads", "max_position_embeddings", "head_dim"),
)
# These have a default in some architectures.
OPTIONAL = ("num_key_value_heads", "head_dim")
NO_SIZE = (0, -1, True, "8", 8.0, NAN, INF, 10**30, [8], {})
NO_NUMBER = (0, -1e-6, True, "1e-6", NAN, INF, -INF, 1e300, [1e-6], {})

# A mutation changes the folder and says what the refusal must name, or nothing if it must not
# matter.
Mutation = Callable[[Path, random.Random], tuple[str, ...]]


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def one_file(folder: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(folder.glob("*.safetensors")))


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def edit_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def shard(folder: Path) -> None:
    """The folder's weights as three shards with an index, whatever they were."""
    weights = read_weights(folder)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    write_folder(folder, json.loads((folder / "config.json").read_text()), weights, 3)


def bad_size(folder: Path, rng: random.Random) -> tuple[str, ...]:
    key = rng.choice(SIZES)
    edit_config(folder, **{key: rng.choice(NO_SIZE)})
    return "config.json", key


def bad_number(folder: Path, rng: random.Random) -> tuple[str, ...]:
    key = rng.choice(("rms_norm_eps", "rope_theta"))
    edit_config(folder, **{key: rng.choice(NO_NUMBER)})
    return "config.json", key


def bad_rope_factor(folder: Path, rng: random.Random) -> tuple[str, ...]:
    rope = dict(rope_type="linear", factor=rng.choice((*NO_NUMBER, 0.5, None)))
    key = rng.choice(("rope_scaling", "rope_parameters"))
    edit_config(folder, **{"rope_parameters": None, key: rope})
    return "config.json", "factor"


def bad_rope(folder: Path, rng: random.Random) -> tuple[str, ...]:
    changes, name = rng.choice(
        (
            (dict(rope_scaling=dict(rope_type="longrope", factor=2.0)), "'longrope'"),
            (dict(rope_scaling=dict(rope_type="linear", type="dynamic", factor=2.0)), "'dynamic'"),
            (dict(rope_scaling=dict(rope_type="yarn", factor=2.0, mscale=0.7)), "mscale"),
            (dict(rope_scaling=dict(rope_type="yarn", factor=2.0, beta_fast="x")), "beta_fast"),
            (dict(rope_scaling=dict(rope_type=["linear"], factor=2.0)), "rope type"),
            (dict(rope_scaling="linear"), "rope_scaling"),
            (dict(rope_parameters=[1e4]), "rope_parameters"),
            (dict(rope_parameters=dict(rope_theta=5e5)), "rope_theta"),
            (dict(rope_parameters=dict(full_attention=dict(rope_theta=1e4))), "full_attention"),
        )
    )
    # Some have positions under the other key already.
    edit_config(folder, **{"rope_parameters": None} | changes)
    return "config.json", name


def bad_architecture(folder: Path, rng: random.Random) -> tuple[str, ...]:
    names = ("LlamaForCausalLM", ["GemmaForCausalLM"], [], None, 3, [None], [["LlamaForCausalLM"]])
    named = rng.choice((*names, ["LlamaForCausalLM", "Qwen2ForCausalLM"], {"0": "x"}))
    if named == "LlamaForCausalLM":
        named += "X"
    edit_config(folder, architectures=named)
    return "config.json", "architecture", "LlamaForCausalLM"


def contradicting_type(folder: Path, rng: random.Random) -> tuple[str, ...]:
    own = json.loads((folder / "config.json").read_text())["model_type"]
    kinds = [kind for kind in (*MODEL_TYPES.values(), "gpt2", "", 3) if kind != own]
    edit_config(folder, model_type=rng.choice(kinds))
    return "config.json", "model_type", own


def bad_dtype(folder: Path, rng: random.Random) -> tuple[str, ...]:
    dtype = rng.choice(("float8_e4m3fn", "auto", "torch.bfloat16", "int8", 3, ["float32"]))
    edit_config(folder, **{rng.choice(("dtype", "torch_dtype")): dtype})
    return "config.json", "dtype"


def two_dtypes(folder: Path, rng: random.Random) -> tuple[str, ...]:
    edit_config(folder, dtype="bfloat16", torch_dtype="float16")
    return "config.json", "bfloat16", "float16"


def bad_flag(folder: Path, rng: random.Random) -> tuple[str, ...]:
    key = rng.choice(("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"))
    edit_config(folder, **{key: rng.choice(("false", "", 0, 1, [], {}))})
    return "config.json", key


def missing_key(folder: Path, rng: random.Random) -> tuple[str, ...]:
    config = json.loads((folder / "config.json").read_text())
    key = rng.choice([key for key in (*SIZES, "rms_norm_eps") if key not in OPTIONAL])
    del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    return "config.json", key, "missing"


def another_model(folder: Path, rng: random.Random) -> tuple[str, ...]:
    key, value = rng.choice(
        (
            ("logit_scale", 2.0),
            ("hidden_act", "gelu"),
            ("partial_rotary_factor", 1.5),
            ("attention_bias", "x"),
            ("mlp_bias", True),
            ("sliding_window", "x"),
            ("layer_types", ["full_attention", "sliding_attention"]),
            ("quantization_config", dict(bits=4)),
        )
    )
    edit_config(folder, **{key: value})
    return "config.json", key


def bad_json(folder: Path, rng: random.Random) -> tuple[str, ...]:
    file = rng.choice(("config.json", INDEX))
    if file == INDEX:
        shard(folder)
    text = (folder / file).read_text()
    contents = (
        text[: rng.randrange(len(text))],
        f"[{text}]",
        "null",
        "\ufeff" + text,
        "[" * 100_000,
        f'{text[:-1]}, "deep": {"[" * 200 + "]" * 200}}}',
        text[:-1] + ', "vocab_size": 11, "weight_map": {}, "vocab_size": 11}',
    )
    (folder / file).write_text(rng.choice(contents), encoding="utf-8")
    return (file,)


def twice_in_json(folder: Path, rng: random.Random) -> tuple[str, ...]:
    file = rng.choice(("config.json", INDEX))
    if file == INDEX:
        shard(folder)
    text = (folder / file).read_text()
    key, value = rng.choice(list(json.loads(text).items()))
    (folder / file).write_text(text[:-1] + f", {json.dumps(key)}: {json.dumps(value)}}}")
    return file, key, "twice"


def leaving_index(folder: Path, rng: random.Random) -> tuple[str, ...]:
    shard(folder)
    own = one_file(folder, rng)
    shutil.copy(own, folder.parent / "outside.safetensors")
    (folder / "sub").mkdir()
    named = rng.choice(
        ("../outside.safetensors", str(folder.parent / "outside.safetensors"), "", ".", "..")
        + (f"sub/../{own.name}", f"./{own.name}", f"sub\\{own.name}", f"{own.name}\0", 3, None)
        + ([own.name], "/dev/zero", "sub//x")
    )
    edit_index(folder, lambda index: index["weight_map"].update({"model.norm.weight": named}))
    return (INDEX, "model.norm.weight")


def linked_subfolder(folder: Path, rng: random.Random) -> tuple[str, ...]:
    shard(folder)
    own = one_file(folder, rng)
    (folder.parent / "elsewhere").mkdir()
    shutil.move(own, folder.parent / "elsewhere" / own.name)
    (folder / "sub").symlink_to(folder.parent / "elsewhere")
    edit_index(folder, lambda index: _move(index["weight_map"], own.name, f"sub/{own.name}"))
    return "sub", INDEX


def _move(weight_map: dict[str, str], old: str, new: str) -> None:
    weight_map |= {name: new for name, file in weight_map.items() if file == old}


def odd_index(folder: Path, rng: random.Random) -> tuple[str, ...]:
    shard(folder)
    files = sorted(folder.glob("*.safetensors"))
    index = json.loads((folder / INDEX).read_text())
    name, file = rng.choice(list(index["weight_map"].items()))
    other = rng.choice([path.name for path in files if path.name != file])
    kind = rng.randrange(6)
    if kind == 0:
        edit_index(folder, lambda index: index["weight_map"].update({name: other}))
    elif kind == 1:
        edit_index(folder, lambda index: index["weight_map"].pop(name))
    elif kind == 2:
        name = "model.layers.7.mlp.up_proj.weight"
        edit_index(folder, lambda index: index["weight_map"].update({name: other}))
    elif kind == 3:
        edit_index(folder, lambda index: index.update(weight_map=rng.choice(([], {}, None, 3))))
        return INDEX, "weight_map"
    elif kind == 4:
        files[0].unlink()
        return files[0].name, "missing"
    else:
        edit_weights(folder / other, lambda weights: weights.update({name: torch.zeros(3)}))
    return str(folder), name


def two_sets(folder: Path, rng: random.Random) -> tuple[str, ...]:
    weights = read_weights(folder)
    shard(folder)
    if rng.random() < 0.5:
        save_file(weights, folder / SINGLE)
    else:
        # transformers would read nothing but this part.
        own = one_file(folder, rng)
        shutil.move(own, folder / SINGLE)
        edit_index(folder, lambda index: _move(index["weight_map"], own.name, SINGLE))
    return SINGLE, INDEX, "out of date"


def file_beside(folder: Path, rng: random.Random) -> tuple[str, ...]:
    if rng.random() < 0.5:
        shard(folder)
    names = ("model-00004-of-00004", "adapter_model", "model.fp16", "mtp", "model-00000-of-00002")
    name = f"{rng.choice(names)}.safetensors"
    save_file({"model.norm.weight": torch.zeros(8)}, folder / name)
    return name, "remove it"


def adapter(folder: Path, rng: random.Random) -> tuple[str, ...]:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    return "adapter_config.json", "merge"


def missing_tensor(folder: Path, rng: random.Random) -> tuple[str, ...]:
    name = rng.choice(list(read_weights(folder)))
    for path in folder.glob("*.safetensors"):
        edit_weights(path, lambda weights: weights.pop(name, None))
    return str(folder), name


def renamed_tensor(folder: Path, rng: random.Random) -> tuple[str, ...]:
    path = one_file(folder, rng)
    name = rng.choice(list(load_file(path)))
    edit_weights(path, lambda weights: weights.update({f"{name}_": weights.pop(name)}))
    return str(folder), name


def extra_tensor(folder: Path, rng: random.Random) -> tuple[str, ...]:
    names = (
        *("model.layers.2.input_layernorm.weight", "model.layers.0.self_attn.sinks", "x"),
        *("model.layers.0.mlp.shared_expert.up_proj.weight", "model.layers.0.mlp.gate.e_score"),
        *("model.extra.rotary_emb.inv_freq", "model.layers.9.self_attn.rotary_emb.inv_freq"),
        *("base_model.model.layers.0.self_attn.q_proj.lora_A.weight", "mtp.norm.weight"),
    )
    name = rng.choice(names)
    tensor = torch.zeros(rng.choice(((), (0,), (8,), (2, 0, 3))))
    edit_weights(one_file(folder, rng), lambda weights: weights.update({name: tensor}))
    return str(folder), name


def reshaped_tensor(folder: Path, rng: random.Random) -> tuple[str, ...]:
    path = one_file(folder, rng)
    name = rng.choice(list(load_file(path)))
    changes: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda tensor: tensor.flatten()[: tensor.numel() - 1],
        lambda tensor: tensor[None],
        lambda tensor: tensor[:0],
        lambda tensor: tensor.flatten().repeat(2),
    ]
    change = rng.choice(changes)
    edit_weights(path, lambda weights: weights.update({name: change(weights[name]).contiguous()}))
    return path.name, name


def dtype_of_no_weight(folder: Path, rng: random.Random) -> tuple[str, ...]:
    path = one_file(folder, rng)
    name = rng.choice(list(load_file(path)))
    dtype = rng.choice((torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.uint8))
    edit_weights(path, lambda weights: weights.update({name: weights[name].to(dtype)}))
    return path.name, name, "dtype"


def not_finite(folder: Path, rng: random.Random) -> tuple[str, ...]:
    path = one_file(folder, rng)
    name = rng.choice(list(load_file(path)))
    value = rng.choice((NAN, INF, -INF))

    def change(weights: dict[str, torch.Tensor]) -> None:
        weights[name].flatten()[rng.randrange(weights[name].numel())] = value

    edit_weights(path, change)
    return path.name, name, "NaN or infinite"


def dtypes_of_one_parameter(folder: Path, rng: random.Random) -> tuple[str, ...]:
    weights = read_weights(folder)
    name = rng.choice([name for name in weights if ".layers." in name])
    for path in folder.glob("*.safetensors"):
        if name in load_file(path):
            edit_weights(path, lambda weights: weights.update({name: weights[name].double()}))
    return str(folder), "float64", "dtype="


def damaged_file(folder: Path, rng: random.Random) -> tuple[str, ...]:
    path = one_file(folder, rng)
    data = path.read_bytes()
    contents = (data[: rng.randrange(len(data))], b"", data + b"\0", b"\xff" * 64, data[8:])
    path.write_bytes(rng.choice(contents))
    return (path.name,)


def own_dtypes(folder: Path, rng: random.Random) -> tuple[str, ...]:
    """A dtype of its own for every kind of tensor: Megatron keeps layers and q, k, v together."""
    kinds = ("norm", "gate.", "router.", "_proj", "experts.", "sinks", "embed", "lm_head", "")
    dtypes = {kind: rng.choice((torch.bfloat16, torch.float16, torch.float32)) for kind in kinds}
    dtypes["lm_head"] = dtypes["embed"]

    def change(weights: dict[str, torch.Tensor]) -> None:
        for name, tensor in weights.items():
            weights[name] = tensor.to(dtypes[next(kind for kind in kinds if kind in name)])

    for path in folder.glob("*.safetensors"):
        edit_weights(path, change)
    edit_config(folder, torch_dtype=rng.choice(("bfloat16", "float32")))
    return ()


def other_formats_beside(folder: Path, rng: random.Random) -> tuple[str, ...]:
    for name in ("consolidated.safetensors", "pytorch_model.bin", "original.pth"):
        (folder / name).write_bytes(b"never read")
    return ()


def derived_beside(folder: Path, rng: random.Random) -> tuple[str, ...]:
    """Where layers attend, by positions: a hybrid's have none."""
    prefix = "model.layers.1.self_attn."
    if any(name.startswith(prefix) for name in read_weights(folder)):
        derived = {f"{prefix}rotary_emb.inv_freq": torch.ones(2)}
        edit_weights(one_file(folder, rng), lambda weights: weights.update(derived))
    return ()


def linked_files(folder: Path, rng: random.Random) -> tuple[str, ...]:
    """A hub's cache: every file is a link to a blob outside the folder."""
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        shutil.move(path, blobs / str(number))
        path.symlink_to(f"../blobs/{number}")
    return ()


def subfolder(folder: Path, rng: random.Random) -> tuple[str, ...]:
    shard(folder)
    own = one_file(folder, rng)
    (folder / "sub").mkdir()
    shutil.move(own, folder / "sub" / own.name)
    edit_index(folder, lambda index: _move(index["weight_map"], own.name, f"sub/{own.name}"))
    return ()


def other_total_size(folder: Path, rng: random.Random) -> tuple[str, ...]:
    shard(folder)
    edit_index(folder, lambda index: index.update(metadata=rng.choice(({}, {"total_size": 1}, 3))))
    return ()


def index_of_the_single_file(folder: Path, rng: random.Random) -> tuple[str, ...]:
    weights = read_weights(folder)
    shard(folder)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    save_file(weights, folder / SINGLE)
    edit_index(folder, lambda index: index.update(weight_map=dict.fromkeys(weights, SINGLE)))
    return ()


REFUSED: tuple[Mutation, ...] = (
    *(bad_size, bad_number, bad_rope_factor, bad_rope, bad_architecture, contradicting_type),
    *(bad_dtype, two_dtypes, bad_flag, missing_key, another_model, bad_json, twice_in_json),
    *(leaving_index, linked_subfolder, odd_index, two_sets, file_beside, adapter),
    *(missing_tensor, renamed_tensor, extra_tensor, reshaped_tensor, dtype_of_no_weight),
    *(not_finite, dtypes_of_one_parameter, damaged_file),
)
HARMLESS: tuple[Mutation, ...] = (
    *(own_dtypes, other_formats_beside, derived_beside, linked_files, subfolder),
    *(other_total_size, index_of_the_single_file),
)


def make_input(seed: int, folder: Path) -> tuple[str, ...]:
    """A folder of the seed, and what its refusal must name."""
    rng = random.Random(seed)
    config = make_config(rng.choice(list(MODEL_TYPES)), tie_word_embeddings=rng.random() < 0.3)
    write_folder(folder, config, make_weights(config, seed), rng.choice((1, 1, 2, 3)))
    # Every mutation occurs; a quarter of the inputs is harmless.
    mutations = HARMLESS if seed % 4 == 0 else REFUSED
    return mutations[seed // 4 % len(mutations)](folder, rng)


@pytest.mark.parametrize("seed", seeds())
def test_folder(seed: int, tmp_path: Path) -> None:
    folder, middle, back = (tmp_path / name for name in ("hf", "megatron", "back"))
    named = make_input(seed, folder)
    before = sorted(tmp_path.iterdir())
    if named:
        with refused(*named):
            hf_to_megatron(folder, middle)
        assert sorted(tmp_path.iterdir()) == before
        return
    hf_to_megatron(folder, middle)
    assert not list(compare_weights(open_weights(folder), open_weights(middle)))
    megatron_to_hf(middle, back)
    want = {k: v for k, v in read_weights(folder).items() if not k.endswith("inv_freq")}
    # Megatron-Core keeps biases of experts in fp32.
    biases = {name for name in want if name.endswith("e_score_correction_bias")}
    assert_same_bits(read_weights(back), want | {name: want[name].float() for name in biases})
    configs = (json.loads((path / "config.json").read_text()) for path in (folder, back))
    assert next(configs) == next(configs)
