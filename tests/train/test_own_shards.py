"""A distributed optimizer's state that nobody gathers is the one that Megatron gathers."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")

from megatron_pg.train import dry_run, load_config  # noqa: E402
from megatron_pg.train.checkpoints.own_shards import boxes_of_run  # noqa: E402
from tests.ranks import Pool  # noqa: E402
from tests.train import tiny  # noqa: E402
from tests.train.layouts import LAYOUTS  # noqa: E402
from tests.train.own_shards import save_both  # noqa: E402


@pytest.mark.parametrize("shape", [(), (7,), (4, 3), (2, 3, 4), (3, 1, 2, 2), (1, 1)])
def test_boxes_hold_a_run_in_order(shape: tuple[int, ...]) -> None:
    numbers = torch.arange(prod(shape)).reshape(shape)
    for start, stop in product(range(prod(shape) + 1), repeat=2):
        boxes = list(boxes_of_run(shape, start, stop))
        held = [
            numbers[tuple(slice(o, o + size) for o, size in zip(*box))].flatten().tolist()
            for box in boxes
        ]
        assert sum(held, []) == list(range(start, stop))
        assert len(boxes) <= max(2 * len(shape) - 1, 1)


def assert_same_both_ways(told: list[dict[str, Any]]) -> None:
    for case in told:
        assert case["same_names"] and case["tensors"] > 20 and not case["differ"]
        # Megatron loads what we wrote, and we what Megatron wrote.
        assert case["loaded"] == {"ours": True, "theirs": True}


@pytest.mark.megatron
def test_parts_equal_the_gathered_state_both_ways(ranks: Pool, tmp_path: Path) -> None:
    """bf16, a gated MLP whose halves are apart in the file, and ranges that end inside rows."""
    sections = tiny.run_sections(tmp_path)
    sections["model"]["transformer"] = {"params_dtype": "bfloat16"}
    sections["run"]["self_check_interval"] = None
    config = load_config(tiny.write_config(tmp_path / "run.yaml", sections))
    config = replace(config, parallel=LAYOUTS["dp2_distributed"])
    told = ranks.run(2, save_both, config, tmp_path)
    assert_same_both_ways(told)
    # Megatron hands over everything on the first rank, we what each rank holds.
    assert [case["sizes"]["theirs"] for case in told] == [told[0]["whole"], 0]
    ours = [case["sizes"]["ours"] for case in told]
    assert sum(ours) == told[0]["whole"] and max(ours) < 0.51 * sum(ours)
    assert told[0]["parts"] > 4, "no layer's tensor is cut inside"
    # Weights, which both hold, are divided, too.
    said = dry_run(config, 2).checkpoint_bytes_per_rank
    assert [case["written"] for case in told] == pytest.approx([said] * 2, rel=0.02)


@pytest.mark.megatron
def test_experts_of_other_ranks_are_saved_by_them(ranks: Pool, tmp_path: Path) -> None:
    """Two optimizers, one of experts that are divided and one of what replicas share."""
    sections = tiny.run_sections(tmp_path)
    sections["model"] = {
        "vocab_size": tiny.VOCAB,
        "transformer": {
            "num_layers": 2,
            "hidden_size": 32,
            "ffn_hidden_size": 48,
            "num_attention_heads": 4,
            "num_moe_experts": 4,
            "moe_router_load_balancing_type": "none",
            "normalization": "RMSNorm",
            "gated_linear_unit": True,
            "activation_func": "silu",
            "add_bias_linear": False,
            "params_dtype": "bfloat16",
        },
    }
    sections["parallel"] = {"expert_model_parallel_size": 2, "use_distributed_optimizer": True}
    sections["run"]["self_check_interval"] = None
    told = ranks.run(
        2, save_both, load_config(tiny.write_config(tmp_path / "run.yaml", sections)), tmp_path
    )
    assert_same_both_ways(told)
    ours = [case["sizes"]["ours"] for case in told]
    assert max(ours) < 0.51 * sum(ours)
