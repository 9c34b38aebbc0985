"""The table of shards: at sizes that no test machine has, and in running models."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_pg.checkpoint import HfFolder, load_hf
from megatron_pg.checkpoint.table import make_shard, merge_shards
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
    seen = {}
    for key in table.megatron_names():
        specs = [table.shard(key, rank, tp_size) for rank in range(tp_size)]
        shards = [make_shard(spec, folder.read, torch.float32, key) for spec in specs]
        seen |= merge_shards(specs, shards, folder.shapes)
    assert seen.keys() == folder.shapes.keys()
    assert all(torch.equal(seen[key], folder.read(key)) for key in seen)


def layouts(
    tp_sizes: tuple[int, ...], pp_sizes: tuple[int, ...], vpp_sizes: tuple[int | None, ...]
) -> Any:
    """Every combination that Megatron allows: several chunks take several stages."""
    return pytest.mark.parametrize(
        "layout",
        [
            Layout(tp, pp, vpp, sp=tp > 1)
            for tp, pp, vpp in product(tp_sizes, pp_sizes, vpp_sizes)
            if vpp is None or pp > 1
        ],
        ids=lambda layout: f"tp{layout.tp}-pp{layout.pp}-vpp{layout.vpp or 1}",
    )


@pytest.mark.parametrize("name", FAMILIES)
@layouts((1, 2, 4), (1, 2, 4), (None, 2))
def test_every_rank(name: str, layout: Layout, models: Path) -> None:
    """Up to sixteen ranks one after the other: together they hold the folder, bit by bit."""
    round_trip_over_ranks(models / name, layout)


@layouts((1, 3), (1, 2, 3), (None,))
def test_every_rank_of_nine_heads(layout: Layout, nine_heads: Path) -> None:
    round_trip_over_ranks(nine_heads, layout)


@pytest.fixture(scope="module")
def nine_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nine_heads")
    tiny.save_hf(tiny.SMOLLM2, folder)
    return folder


def round_trip_over_ranks(path: Path, layout: Layout) -> None:
    """Hugging Face -> the models of all ranks, in one process -> Hugging Face."""
    tp_size, num_ranks = layout.tp, layout.tp * layout.pp
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
                    layers = [layer.layer_number - 1 for layer in chunk.decoder.layers]
                    for key, parameter in chunk.named_parameters():
                        parts = key.split(".")
                        if parts[1] == "layers":
                            parts[2] = str(layers[int(parts[2])])
                        ranks = parameters.setdefault(".".join(parts), {})
                        ranks[parallel_state.get_tensor_model_parallel_rank()] = parameter.detach()
            finally:
                parallel_state.destroy_model_parallel()
                dist.destroy_process_group()
    table = folder.model.weight_table(folder.model.padded_vocab_size(tp_size, tiny.DIVISIBLE_BY))
    seen = {}
    for key, shards in parameters.items():
        specs = [table.shard(key, rank, tp_size) for rank in range(tp_size)]
        seen |= merge_shards(specs, [shards[rank] for rank in range(tp_size)], folder.shapes)
    assert seen.keys() == folder.shapes.keys()
    assert all(torch.equal(seen[key], folder.read(key)) for key in seen)


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
