"""The table of shards: at sizes that no test machine has, and in running models."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_pg.checkpoint import HfFolder, TorchDistReader, load_hf
from megatron_pg.checkpoint.load import global_name, named_weights, shard_position
from megatron_pg.checkpoint.table import Merger, make_shard
from megatron_pg.mcore import cpu
from tests.checkpoint import tiny
from tests.checkpoint.tiny import FAMILIES, Layout

pytestmark = pytest.mark.megatron


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_shards_partition_the_folder(name: str, tp_size: int, models: Path) -> None:
    """Every element is in the shards of some rank, and merging them gives it back."""
    folder = HfFolder(models / name)
    table = folder.model.weight_table(folder.model.padded_vocab_size(tp_size, 16))
    seen, merger = {}, Merger(folder.shapes)
    for key in table.megatron_names():
        specs = [table.shard(key, rank, tp_size) for rank in range(tp_size)]
        shards = [make_shard(spec, folder.read, torch.float32, key) for spec in specs]
        seen |= merger.add(specs, shards)
    assert seen.keys() == folder.shapes.keys()
    assert all(torch.equal(seen[key], folder.read(key)) for key in seen)


def layouts(
    tp_sizes: tuple[int, ...], pp_sizes: tuple[int, ...], vpp_sizes: tuple[int | None, ...]
) -> list[Layout]:
    """Every combination that Megatron allows: several chunks take several stages."""
    return [
        Layout(tp, pp, vpp, sp=tp > 1)
        for tp, pp, vpp in product(tp_sizes, pp_sizes, vpp_sizes)
        if vpp is None or pp > 1
    ]


def cases() -> Iterator[Any]:
    dense = layouts((1, 2, 4), (1, 2, 4), (None, 2))
    experts = [
        *layouts((1, 2), (1, 2), (None,)),
        *(Layout(tp, pp, ep=2, sp=tp > 1) for tp, pp in product((1, 2), (1, 2))),
    ]
    # Experts with biases are not cut.
    whole = [Layout(tp, pp, ep=2, etp=1, sp=tp > 1) for tp, pp in product((1, 2), (1, 2))]
    for name, family in FAMILIES.items():
        for layout in whole if name == "gpt_oss" else experts if family.has_experts else dense:
            yield pytest.param(name, layout, id=f"{name}-{layout}")


@pytest.mark.parametrize(("name", "layout"), cases())
def test_every_rank(name: str, layout: Layout, models: Path) -> None:
    """Up to sixteen ranks one after the other: together they hold the folder, bit by bit."""
    if not FAMILIES[name].can_be_built:
        pytest.skip("HybridModel came with megatron-core 0.18")
    round_trip_over_ranks(models / name, layout)


@pytest.mark.parametrize("layout", layouts((1, 3), (1, 2, 3), (None,)), ids=str)
def test_every_rank_of_nine_heads(layout: Layout, nine_heads: Path) -> None:
    round_trip_over_ranks(nine_heads, layout)


@pytest.fixture(scope="module")
def nine_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nine_heads")
    tiny.save_hf(tiny.SMOLLM2, folder)
    return folder


def round_trip_over_ranks(path: Path, layout: Layout) -> None:
    """Hugging Face -> the models of all ranks, in one process -> Hugging Face."""
    tp_size, num_ranks = layout.tp, layout.tp * layout.pp * layout.ep
    folder = HfFolder(path)
    parameters: dict[str, dict[int, torch.Tensor]] = {}
    with cpu.emulate_cuda():
        for rank in range(num_ranks):
            dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=num_ranks)
            try:
                tiny.initialize(layout)
                chunks = tiny.build(folder.model, layout)
                load_hf(chunks, folder.path)
                for chunk in chunks:
                    for key, weight in named_weights(chunk):
                        ranks = parameters.setdefault(global_name(chunk, key), {})
                        tp_rank, _ = shard_position(chunk, key, weight)
                        ranks[tp_rank] = weight.detach()
            finally:
                parallel_state.destroy_model_parallel()
                dist.destroy_process_group()
    table = folder.model.weight_table(folder.model.padded_vocab_size(tp_size, tiny.DIVISIBLE_BY))
    seen, merger = {}, Merger(folder.shapes)
    for key, shards in parameters.items():
        size = layout.etp if layout.etp and "local_experts" in key else tp_size
        specs = [table.shard(key, rank, size) for rank in range(size)]
        seen |= merger.add(specs, [shards[rank] for rank in range(size)])
    assert seen.keys() == folder.shapes.keys()
    assert all(torch.equal(seen[key], folder.read(key)) for key in seen)


def test_every_layer_of_a_pattern_has_its_own_tensors(models: Path) -> None:
    """Norms under the names of either spec: fused into a linear layer, or a module of their own."""
    reader = TorchDistReader(models / "deepseek_v3-megatron/release")
    keys = {key for key in reader.tensors if key.startswith("decoder.layers.")}
    assert not [key for key in keys if not key.split(".")[2].isdigit()]
    norms = {key.removeprefix("decoder.layers.") for key in keys if "norm" in key}
    latents = ("q_layernorm.weight", "linear_q_up_proj.layer_norm_weight", "kv_layernorm.weight")
    attention = {*latents, "linear_kv_up_proj.layer_norm_weight"}
    every = {"input_layernorm.weight", *(f"self_attention.{name}" for name in attention)}
    own, fused = "pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"
    assert norms == {f"{layer}.{name}" for layer in range(8) for name in {*every, own}} | {
        f"0.{fused}"
    }
    assert reader.tensors["decoder.layers.1.mlp.router.expert_bias"].dtype == torch.float32
    experts = reader.tensors["decoder.layers.1.mlp.experts.experts.linear_fc1.weight"]
    assert experts.shape == (8, 32, 32)


def test_model_of_another_configuration(models: Path) -> None:
    """Shapes that fit are not enough; the model is left as it was."""
    folder = HfFolder(models / "llama")
    with cpu.emulate_cuda():
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
        try:
            tiny.initialize(Layout())
            chunks = tiny.build(HfFolder(models / "llama3_rope").model, Layout())
            before = [parameter.detach().clone() for parameter in chunks[0].parameters()]
            with pytest.raises(ValueError, match="rotary_base=500000.0 must be 10000.0"):
                load_hf(chunks, folder.path)
            plain = tiny.build(folder.model, Layout())
            with pytest.raises(ValueError, match="seq_len_interpolation_factor=None must be 4.0"):
                load_hf(plain, models / "llama_linear")
            assert all(torch.equal(a, b) for a, b in zip(before, chunks[0].parameters()))
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()
