"""Hostile Megatron checkpoints: what is not read is refused by name, nothing is lost."""

from __future__ import annotations

import io
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_pg.checkpoint import (
    TorchDistReader,
    TorchDistWriter,
    compare_weights,
    hf_to_megatron,
    megatron_to_hf,
    open_weights,
    reshard_checkpoint,
)
from tests.checkpoint.folders import (
    MODEL_TYPES,
    assert_same_bits,
    make_config,
    make_weights,
    read_weights,
    write_folder,
)
from tests.hostile import refused, seeds

pytestmark = pytest.mark.megatron

NORM_OF_QKV = "decoder.layers.self_attention.linear_qkv.layer_norm_weight"
NORM = "decoder.layers.input_layernorm.weight"
HEAD, EMBEDDING = "output_layer.weight", "embedding.word_embeddings.weight"


class Content:
    """What a checkpoint is written from: whole tensors, objects, and common.pt."""

    def __init__(self, folder: Path) -> None:
        reader = TorchDistReader(folder)
        self.tensors = {key: reader.read(key) for key in reader.tensors}
        self.objects: dict[str, Any] = {
            key: torch.load(io.BytesIO(reader.read_bytes(key))) for key in reader.objects
        }
        self.common = torch.load(folder / "common.pt")
        # Where to cut a tensor along its first axis.
        self.cuts: dict[str, int] = {}
        # Of what lies behind the cut.
        self.dtypes: dict[str, torch.dtype] = {}

    def write(self, folder: Path) -> None:
        for path in folder.iterdir():
            path.unlink()
        writer = TorchDistWriter(folder)
        for key, tensor in self.tensors.items():
            cut, zeros = self.cuts.get(key, 0), (0,) * tensor.dim()
            rest = tensor.to(self.dtypes.get(key, tensor.dtype))
            if cut:
                writer.add(key, tensor[:cut], tuple(tensor.shape), zeros)
                rest = rest[cut:]
            writer.add(key, rest, tuple(tensor.shape), (cut, *zeros[1:])[: tensor.dim()])
        for key, value in self.objects.items():
            writer.add_object(key, value)
        writer.finish(self.common)


# A mutation changes the content and says what the refusal must name, or nothing if it must not
# matter.
Mutation = Callable[[Content, random.Random], tuple[str, ...]]


def some_key(content: Content, rng: random.Random, part: str = "") -> str:
    return rng.choice(sorted(key for key in content.tensors if part in key))


def extra_tensor(content: Content, rng: random.Random) -> tuple[str, ...]:
    names = (
        *("mlp.router.expert_bias", "mlp.router.bias", "self_attention.sinks"),
        *("mlp.shared_experts.linear_fc1.weight", "mlp.shared_experts.gate_weight"),
        *("self_attention.linear_proj.bias", "mlp.linear_fc1.bias", "cross_attention.x.weight"),
        *("self_attention.linear_q_down_proj.weight", "self_attention.linear_qkv.adapter.weight"),
        *("mlp.experts.experts.linear_fc3.weight", "post_self_attn_layernorm.weight"),
    )
    whole = ("mtp.layers.transformer_layer.mlp.linear_fc1.weight", "decoder.final_layernorm.bias")
    whole += ("optimizer_like", "rng_state_of_the_model", "embedding.position_embeddings.weight")
    whole += ("model.decoder.final_layernorm.weight", "chained_0.weight", "rerun_weights")
    key = rng.choice((*(f"decoder.layers.{name}" for name in names), *whole))
    content.tensors[key] = torch.zeros(rng.choice(((2, 8), (2, 4, 3), (1,), (2, 0))))
    return (key,)


def extra_of_another_family(content: Content, rng: random.Random) -> tuple[str, ...]:
    kinds = ("q_layernorm.weight", "k_layernorm.weight", "linear_qkv.bias")
    keys = [f"decoder.layers.self_attention.{kind}" for kind in kinds]
    key = rng.choice([key for key in keys if key not in content.tensors])
    content.tensors[key] = torch.ones(2, 16 if key.endswith("bias") else 4)
    return (key,)


def renamed(content: Content, rng: random.Random) -> tuple[str, ...]:
    key = some_key(content, rng)
    content.tensors[f"{key}_"] = content.tensors.pop(key)
    return (key,)


def dropped(content: Content, rng: random.Random) -> tuple[str, ...]:
    key = some_key(content, rng, "linear_")
    if "norm" in key:
        key = EMBEDDING
    del content.tensors[key]
    return (key,)


def another_shape(content: Content, rng: random.Random) -> tuple[str, ...]:
    key = rng.choice([key for key in content.tensors if "layers" in key and "norm" not in key])
    tensor = content.tensors[key]
    content.tensors[key] = rng.choice((tensor[..., :-1], tensor.repeat_interleave(2, -1)))
    return key.split(".")[-2], "by the configuration it must be"


def another_depth(content: Content, rng: random.Random) -> tuple[str, ...]:
    """A layer more or less in one tensor, or in all."""
    # Of a norm under two keys a layer may be missing under one.
    keys = [key for key in content.tensors if "layers" in key and "norm" not in key]
    fewer = rng.random() < 0.5
    for key in keys if rng.random() < 0.5 else [rng.choice(keys)]:
        tensor = content.tensors[key]
        content.tensors[key] = tensor[:1] if fewer else torch.cat([tensor, tensor[:1]])
    return ("decoder.layers.",)


def another_expert(content: Content, rng: random.Random) -> tuple[str, ...]:
    keys = [key for key in content.tensors if "experts.experts" in key]
    if not keys:
        return another_depth(content, rng)
    key = rng.choice(keys)
    content.tensors[key] = torch.cat([content.tensors[key], content.tensors[key][:, :1]], 1)
    return (key, "experts")


def copy_that_differs(content: Content, rng: random.Random) -> tuple[str, ...]:
    content.tensors[NORM] = content.tensors[NORM_OF_QKV].clone()
    content.tensors[NORM][rng.randrange(2), rng.randrange(8)] += 1
    return NORM, NORM_OF_QKV


def layer_apart_that_differs(content: Content, rng: random.Random) -> tuple[str, ...]:
    key = some_key(content, rng, "linear_proj.weight")
    apart = key.replace("layers.", "layers.1.")
    content.tensors[apart] = content.tensors[key][1] + 1
    return key, apart


def head_that_differs(content: Content, rng: random.Random) -> tuple[str, ...]:
    if HEAD in content.tensors:
        return extra_tensor(content, rng)
    head = content.tensors[EMBEDDING].clone()
    head[rng.randrange(11), 3] += 1
    content.tensors[HEAD] = rng.choice((head, head[:-1], head.double(), head.flatten(), head[0, 0]))
    return (HEAD,)


def not_finite(content: Content, rng: random.Random) -> tuple[str, ...]:
    key = some_key(content, rng)
    tensor = content.tensors[key]
    # Rows that pad the vocabulary are nobody's.
    where = rng.randrange(11 * 8 if key in (HEAD, EMBEDDING) else tensor.numel())
    tensor.view(-1)[where] = rng.choice((float("nan"), float("inf"), float("-inf")))
    return ("__0_0.distcp", "NaN or infinite")


def dtype_of_no_weight(content: Content, rng: random.Random) -> tuple[str, ...]:
    key = some_key(content, rng, "weight")
    dtype = rng.choice((torch.int32, torch.bool, torch.uint8, torch.float8_e4m3fn))
    content.tensors[key] = content.tensors[key].to(dtype)
    return ("dtype", str(dtype))


def part_of_another_dtype(content: Content, rng: random.Random) -> tuple[str, ...]:
    key = some_key(content, rng, "decoder.layers.")
    content.cuts[key], content.dtypes[key] = 1, torch.bfloat16
    return "__0_0.distcp", key, "torch.bfloat16"


def state_that_is_full(content: Content, rng: random.Random) -> tuple[str, ...]:
    key = rng.choice(sorted(content.objects))
    scales = torch.frombuffer(bytearray(pickle.dumps({"scale": 2.0})), dtype=torch.uint8)
    values = (torch.ones(3), torch.ones(1), io.BytesIO(b"scale"), [None, scales], scales, {"a": 1})
    content.objects[key] = [rng.choice(values)]
    return (key,)


def unknown_object(content: Content, rng: random.Random) -> tuple[str, ...]:
    key = rng.choice(("decoder.scales/shard_0_1", "ema", "rng_stat/shard_0_1", "optimizerx.y"))
    content.objects[key] = [torch.ones(2)]
    return (key,)


def damaged_common(content: Content, rng: random.Random) -> tuple[str, ...]:
    if rng.random() < 0.5:
        content.common["args"] = rng.choice((vars(content.common["args"]), 3, "args", [1]))
        return (" args ",)
    content.common = rng.choice(([], 3, "common", torch.ones(2)))
    return ("common.pt",)


def shapeless_embedding(content: Content, rng: random.Random) -> tuple[str, ...]:
    content.tensors[EMBEDDING] = torch.zeros(())
    return "embedding", "vocabulary"


def tensor_in_common(content: Content, rng: random.Random) -> tuple[str, ...]:
    name = "decoder.layers.0.mlp.router.expert_bias"
    key = rng.choice(("model", "model1", "ema", "router"))
    content.common[key] = rng.choice(({name: torch.ones(2)}, {name: [torch.ones(2)]}))
    return (f"{key}.{name}",)


def used_vocabulary(content: Content, rng: random.Random) -> tuple[str, ...]:
    content.common["args"].vocab_size = rng.choice((17, 64, 128))
    return ("vocabulary", "16 rows")


def cut_elsewhere(content: Content, rng: random.Random) -> tuple[str, ...]:
    for key, tensor in content.tensors.items():
        content.cuts[key] = rng.randrange(len(tensor))
    return ()


def layers_apart(content: Content, rng: random.Random) -> tuple[str, ...]:
    """As models with layers of several kinds are saved."""
    for key in [key for key in content.tensors if key.startswith("decoder.layers.")]:
        for layer, tensor in enumerate(content.tensors.pop(key)):
            content.tensors[key.replace("layers.", f"layers.{layer}.")] = tensor
    return ()


def equal_copies(content: Content, rng: random.Random) -> tuple[str, ...]:
    content.tensors[NORM] = content.tensors[NORM_OF_QKV].clone()
    key = some_key(content, rng, "linear_proj.weight")
    content.tensors[key.replace("layers.", "layers.1.")] = content.tensors[key][1].clone()
    if HEAD not in content.tensors:
        content.tensors[HEAD] = content.tensors[EMBEDDING].clone()
    return ()


def training_state(content: Content, rng: random.Random) -> tuple[str, ...]:
    for prefix in ("", "chained_0."):
        key = f"{prefix}optimizer.state.exp_avg.{some_key(content, rng)}"
        content.tensors[key] = torch.full((3,), float("nan"))
        content.objects[f"{prefix}optimizer.param_groups/shard_0_1"] = [{"lr": 1.0}]
    content.objects["rng_state/shard_0.0_1.2"] = [{"rng": torch.ones(4)}]
    content.objects["rerun_state_machine_state/shard_0_1"] = [{"mode": 1}]
    content.common |= {"optimizer": {"step": torch.ones(1)}, "opt_param_scheduler": {"lr": 1.0}}
    return ()


def empty_states(content: Content, rng: random.Random) -> tuple[str, ...]:
    """What versions of Transformer Engine save for a layer that is not quantised."""
    buffer = io.BytesIO()
    torch.save(None, buffer)
    pickled = torch.frombuffer(bytearray(pickle.dumps(None)), dtype=torch.uint8)
    for key in content.objects:
        empty = (None, torch.empty(0), torch.empty(0, dtype=torch.uint8), buffer, pickled)
        content.objects[key] = [rng.choice(empty)]
    content.common["model"] = {"decoder.layers.0.mlp.linear_fc1._extra_state": None}
    return ()


REFUSED: tuple[Mutation, ...] = (
    *(extra_tensor, extra_of_another_family, renamed, dropped, another_shape, another_depth),
    *(another_expert, copy_that_differs, layer_apart_that_differs, head_that_differs, not_finite),
    *(dtype_of_no_weight, state_that_is_full, unknown_object, tensor_in_common, used_vocabulary),
    *(part_of_another_dtype, damaged_common, shapeless_embedding),
)
HARMLESS: tuple[Mutation, ...] = (
    *(cut_elsewhere, layers_apart, equal_copies, training_state, empty_states),
)
# Layers of several kinds, saved apart; or without a norm beside queries, keys and values.
_APART = ("DeepseekV3", "Glm4Moe", "Glm4MoeLite", "NemotronH", "Olmo3")
_APART += ("Qwen3Next", "Qwen3_5", "Qwen3_5Moe")
_OF_LAYERS_TOGETHER: tuple[Mutation, ...] = (
    *(layers_apart, equal_copies, copy_that_differs, another_expert, dropped, head_that_differs),
    *(extra_tensor, extra_of_another_family, layer_apart_that_differs),
)


@pytest.mark.parametrize("seed", seeds())
def test_checkpoint(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    folder, middle, back = (tmp_path / name for name in ("hf", "megatron", "back"))
    # Every mutation occurs; a quarter of the inputs is harmless.
    mutations = HARMLESS if seed % 4 == 0 else REFUSED
    mutation = mutations[seed // 4 % len(mutations)]
    families = list(MODEL_TYPES)
    if mutation in _OF_LAYERS_TOGETHER:
        families = [name for name in families if name.removesuffix("ForCausalLM") not in _APART]
    config = make_config(rng.choice(families), tie_word_embeddings=rng.random() < 0.3)
    write_folder(folder, config, make_weights(config, seed))
    hf_to_megatron(folder, middle, tp_size=2, make_vocab_size_divisible_by=8)
    content = Content(middle / "release")
    named = mutation(content, rng)
    content.write(middle / "release")
    if rng.random() < 0.5:
        # Described by its arguments alone.
        (middle / "huggingface/config.json").unlink()
    if not named:
        assert not list(compare_weights(open_weights(folder), open_weights(middle)))
        megatron_to_hf(middle, back)
        assert_same_bits(read_weights(back), read_weights(folder))
        # Ranks that share experts have their optimizer's state apart, as this one lies.
        is_parted = mutation is training_state and open_weights(middle).model.num_experts
        layout = dict(tp_size=1, pp_size=2, ep_size=2 if is_parted else 1)
        reshard_checkpoint(middle, tmp_path / "other", **layout)
        assert not list(compare_weights(open_weights(folder), open_weights(tmp_path / "other")))
        return
    with refused(str(middle), *named):
        megatron_to_hf(middle, back)
    with refused(str(middle), *named):
        reshard_checkpoint(middle, back, tp_size=1, pp_size=2)
    with refused(str(middle), *named):
        list(compare_weights(open_weights(folder), open_weights(middle)))
    assert not back.exists()


# With experts in all layers, under other names and in another order of rows.
_ONE_MODEL = {"Qwen3NextForCausalLM", "Qwen3_5MoeForCausalLM"}


@pytest.mark.parametrize("saved", MODEL_TYPES)
@pytest.mark.parametrize("described", MODEL_TYPES)
def test_configuration_of_another_family(saved: str, described: str, tmp_path: Path) -> None:
    """Of the same sizes: a Qwen3 checkpoint described as a Llama would lose its norms."""
    weights = {}
    for name, architecture in (("hf", saved), ("other", described)):
        config = make_config(architecture)
        weights[architecture] = make_weights(config)
        write_folder(tmp_path / name, config, weights[architecture])
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    convert = dict(hf_config=tmp_path / "other")
    if {saved, described} == _ONE_MODEL:
        megatron_to_hf(tmp_path / "megatron", tmp_path / "back", **convert)
        hf_to_megatron(tmp_path / "back", tmp_path / "again")
        megatron_to_hf(tmp_path / "again", tmp_path / "first", hf_config=tmp_path / "hf")
        assert_same_bits(read_weights(tmp_path / "first"), weights[saved])
        return
    if weights[saved].keys() == weights[described].keys():
        megatron_to_hf(tmp_path / "megatron", tmp_path / "back", **convert)
        assert_same_bits(read_weights(tmp_path / "back"), weights[saved])
        return
    with refused(str(tmp_path / "megatron")):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "back", **convert)
    assert not (tmp_path / "back").exists()
