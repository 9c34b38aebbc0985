"""Qwen3-Next and Qwen3.5: sampled as transformers does, and norms that are kept less one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from megatron_pg.checkpoint import (
    HfFolder,
    MegatronFolder,
    TorchDistReader,
    compare_weights,
    hf_to_megatron,
    load_hf,
    megatron_to_hf,
    read_hf_config,
)
from megatron_pg.checkpoint.one_rank import build_gpt, one_rank
from megatron_pg.mcore import generate
from tests.checkpoint.folders import make_config, make_weights, read_weights, write_folder
from tests.checkpoint.tiny import FAMILIES, save_hf
from tests.hostile import refused

pytestmark = pytest.mark.megatron


def test_a_convolution_over_one_token_is_refused_where_it_is_read(tmp_path: Path) -> None:
    config = make_config("Qwen3NextForCausalLM", linear_conv_kernel_dim=1)
    write_folder(tmp_path, config, {})
    with refused("config.json", "linear_conv_kernel_dim=1 must be a whole number from 2"):
        read_hf_config(tmp_path)


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5"])
def test_greedy_samples_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """Prompts of fewer tokens than the convolution sees, too; samples end at different steps."""
    save_hf(FAMILIES[name], tmp_path, num_layers=4)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 83, (n,), generator=generator) for n in (9, 1, 2, 70)]
    with torch.no_grad():
        whole = [
            model.generate(prompt[None], do_sample=False, min_new_tokens=12, max_new_tokens=12)[0]
            for prompt in prompts
        ]
    want = [tokens[len(prompt) :].tolist() for tokens, prompt in zip(whole, prompts)]
    stop = next(token for token in want[0][3:] if token not in want[1])
    with one_rank() as device:
        chunk = build_gpt(HfFolder(tmp_path).model, torch.float32, device)
        load_hf([chunk], tmp_path)
        groups = generate(
            [chunk],
            prompts,
            num_generations=2,
            max_response_tokens=12,
            seed=0,
            temperature=0.0,
            stop_token_ids=[stop],
        )
    ended = [ids[: ids.index(stop) + 1] if stop in ids else ids for ids in want]
    assert len(set(map(len, ended))) > 1 and len({tuple(ids) for ids in want}) == 4
    assert [[r.response_ids.tolist() for r in group] for group in groups] == [
        [ids, ids] for ids in ended
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_factors_of_a_half_and_more_come_back(dtype: torch.dtype, tmp_path: Path) -> None:
    """Smaller ones are rounded as what is kept is: once, to the nearest."""
    config = make_config("Qwen3_5ForCausalLM", torch_dtype=str(dtype).removeprefix("torch."))
    name = "model.layers.0.linear_attn.norm.weight"
    weights = {key: x.to(dtype) for key, x in make_weights(config).items()}
    # The largest below a half, one in between that both hold, and one that has no such neighbour.
    small = torch.tensor(0.5, dtype=dtype)
    weights[name] = torch.stack([small, small * 1.25, small * 9]).contiguous()
    write_folder(tmp_path / "a", config, weights)
    hf_to_megatron(tmp_path / "a", tmp_path / "m")
    stored = TorchDistReader(tmp_path / "m/release")
    kept = stored.read("decoder.layers.0.self_attention.out_norm.weight")
    assert kept.tolist() == [-0.5, -0.375, 3.5]
    megatron_to_hf(tmp_path / "m", tmp_path / "b")
    assert torch.equal(read_weights(tmp_path / "b")[name], weights[name])
    tiny = torch.finfo(dtype).eps / 4
    weights[name] = torch.full((3,), tiny, dtype=dtype)
    write_folder(tmp_path / "c", config, weights)
    hf_to_megatron(tmp_path / "c", tmp_path / "n")
    megatron_to_hf(tmp_path / "n", tmp_path / "d")
    back = read_weights(tmp_path / "d")[name]
    assert not torch.equal(back, weights[name]) and (back - tiny).abs().max() <= tiny
    # The checkpoint is the folder's all the same, another folder is not.
    folders = [HfFolder(tmp_path / name) for name in "cd"]
    assert not list(compare_weights(folders[0], MegatronFolder(tmp_path / "n")))
    assert [found.split(":")[0] for found in compare_weights(*folders)] == [name]
    assert list(compare_weights(HfFolder(tmp_path / "a"), MegatronFolder(tmp_path / "n")))


def test_sections_of_one_parameter_have_one_dtype(tmp_path: Path) -> None:
    """Megatron-Core has them as one tensor, which is stored in six parts."""
    config = make_config("Qwen3_5ForCausalLM")
    weights = make_weights(config)
    name = "model.layers.0.linear_attn.in_proj_z.weight"
    weights[name] = weights[name].bfloat16()
    write_folder(tmp_path / "a", config, weights)
    with refused(name, "pass dtype=DTYPE"):
        hf_to_megatron(tmp_path / "a", tmp_path / "m")
    hf_to_megatron(tmp_path / "a", tmp_path / "m", dtype=torch.bfloat16)
    assert set(MegatronFolder(tmp_path / "m").dtypes.values()) == {torch.bfloat16}
