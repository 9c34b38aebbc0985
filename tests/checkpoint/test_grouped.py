"""Experts of a grouped GEMM: one module with a weight for each expert, as Transformer Engine's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")

from megatron_pg.checkpoint import HfFolder, export_hf, load_hf, load_weights  # noqa: E402
from megatron_pg.checkpoint.one_rank import build_gpt, one_rank  # noqa: E402
from tests.checkpoint import tiny  # noqa: E402
from tests.checkpoint.folders import (  # noqa: E402
    assert_same_bits,
    make_config,
    make_weights,
    read_weights,
    write_folder,
)
from tests.ranks import Pool  # noqa: E402

pytestmark = pytest.mark.megatron


class GroupedLinear(torch.nn.Module):
    """The parameters of ``TEGroupedLinear``."""

    def __init__(self, weights: list[torch.Tensor]) -> None:
        super().__init__()
        for number, weight in enumerate(weights):
            self.register_parameter(f"weight{number}", torch.nn.Parameter(torch.zeros_like(weight)))


def group(model: Any) -> None:
    """Put modules of grouped experts in the place of single ones."""
    for layer in model.decoder.layers:
        singles = layer.mlp.experts.local_experts
        grouped = torch.nn.Module()
        for name in ("linear_fc1", "linear_fc2"):
            weights = [getattr(expert, name).weight for expert in singles]
            grouped.add_module(name, GroupedLinear(weights))
        layer.mlp.experts = grouped


def test_names_and_weights_are_those_of_single_experts(tmp_path: Path) -> None:
    config = make_config("Qwen3MoeForCausalLM")
    write_folder(tmp_path / "hf", config, make_weights(config))
    source = HfFolder(tmp_path / "hf")
    with one_rank() as device:
        single = build_gpt(source.model, torch.float32, device)
        grouped = build_gpt(source.model, torch.float32, device)
        load_weights([single], source)
        group(grouped)
        load_weights([grouped], source)
        compared = 0
        for one, other in zip(single.decoder.layers, grouped.decoder.layers):
            for number, expert in enumerate(one.mlp.experts.local_experts):
                for name in ("linear_fc1", "linear_fc2"):
                    got = getattr(getattr(other.mlp.experts, name), f"weight{number}")
                    assert got.any() and torch.equal(got, getattr(expert, name).weight)
                    compared += 1
        assert compared == 2 * source.model.num_experts * source.model.num_layers
        export_hf([grouped], tmp_path / "out", source.path)
    assert_same_bits(read_weights(tmp_path / "out"), read_weights(tmp_path / "hf"))


def exchange(source: Path, out: Path) -> int:
    """On experts of one rank in two: experts that are not NaN any more."""
    layout = tiny.Layout(ep=2)
    with tiny.on_layout(layout):
        (chunk,) = tiny.build(HfFolder(source).model, layout)
        group(chunk)
        grouped = [m for m in chunk.modules() if isinstance(m, GroupedLinear)]
        weights = [weight for module in grouped for weight in module.parameters()]
        for weight in weights:
            weight.data.fill_(float("nan"))
        load_hf([chunk], source)
        export_hf([chunk], out, source)
        return sum(not weight.isnan().any() for weight in weights)


def test_ranks_have_experts_of_their_own(ranks: Pool, tmp_path: Path) -> None:
    config = make_config("Qwen3MoeForCausalLM")
    write_folder(tmp_path / "hf", config, make_weights(config))
    model = HfFolder(tmp_path / "hf").model
    counts = ranks.run(2, exchange, tmp_path / "hf", tmp_path / "out")
    assert counts == [model.num_experts * model.num_layers] * 2  # two halves, two modules
    assert_same_bits(read_weights(tmp_path / "out"), read_weights(tmp_path / "hf"))
