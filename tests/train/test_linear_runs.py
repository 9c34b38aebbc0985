"""Runs of a model with linear attention from scratch: layouts, resuming, and what cannot be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")

from megatron_pg.mcore import DIVIDES_LINEAR_ATTENTION  # noqa: E402
from megatron_pg.train import dry_run  # noqa: E402
from megatron_pg.train.model.linear_rules import kernel_problems  # noqa: E402
from tests.ranks import Pool  # noqa: E402
from tests.train import scratch  # noqa: E402

pytestmark = pytest.mark.megatron

LINEAR = scratch.SIZES | dict(
    normalization="RMSNorm",
    attention_output_gate=True,
    qk_layernorm=True,
    layernorm_zero_centered_gamma=True,
    experimental_attention_variant="gated_delta_net",
    linear_attention_freq=2,
    linear_conv_kernel_dim=3,
    linear_key_head_dim=6,
    linear_value_head_dim=5,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
)


@pytest.fixture(scope="module")
def straight(ranks: Pool, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("linear")
    config = scratch.make_config(folder, LINEAR)
    settings = replace(config.prefix_group, prefix_resident="never")
    config = replace(config, prefix_group=settings)
    return config, *scratch.run(ranks, config, folder / "straight")


def test_rows_equal_samples_written_out(straight: Any) -> None:
    _, (weights,), steps = straight
    assert [name for name in weights if name.endswith("A_log")] == [
        "module.decoder.layers.0.self_attention.A_log"
    ]
    assert steps[0]["check/packed_vs_written_out"] < 1e-5


def test_a_resumed_run_is_bit_identical(ranks: Pool, straight: Any, tmp_path: Path) -> None:
    config, (weights,), _ = straight
    out = tmp_path / "resumed"
    scratch.run(ranks, config, out, num_steps=2)
    (resumed,), steps = scratch.run(ranks, config, out)
    assert len(steps) == scratch.NUM_STEPS and resumed.keys() == weights.keys()
    assert all(torch.equal(resumed[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize("mode", ["retain", "recompute"])
def test_prompts_that_are_resident(ranks: Pool, straight: Any, mode: str, tmp_path: Path) -> None:
    """In small rows; what is kept of a prompt is a state."""
    config, _, want = straight
    _, got = scratch.run(ranks, scratch.with_resident_prompts(config, mode), tmp_path / "out")
    assert all(step["packing/resident_groups"] > 0 for step in got)
    scratch.assert_same_training(got, want)


@pytest.mark.parametrize("layout", ["tp2_sp", "pp2"])
def test_ranks_go_on_as_one(ranks: Pool, straight: Any, layout: str, tmp_path: Path) -> None:
    """From a checkpoint, whose parameters lie section by section."""
    config, _, want = straight
    out = tmp_path / "out"
    scratch.run(ranks, config, out, num_steps=2)
    _, got = scratch.run(ranks, config, out, layout)
    scratch.assert_same_training(got, want)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(experimental_attention_variant=None), "linear_conv_kernel_dim=3 would be ignored"),
        (dict(experimental_attention_variant="dsa"), "experimental_attention_variant='dsa'"),
        (dict(linear_attention_freq=1), "linear_attention_freq=1 must be a whole number from 2"),
        (dict(linear_attention_freq=[1, 0, 1]), "for each of num_layers=2"),
        (dict(linear_attention_freq=[0, 0]), "with a 1 among them"),
        (dict(linear_num_key_heads=3), "must be a multiple of"),
        (dict(linear_key_head_dim=0), "linear_key_head_dim=0 must be at least 1"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    config = scratch.make_config(tmp_path, LINEAR)
    model = replace(config.model, transformer=LINEAR | changes)
    with pytest.raises(ValueError, match=message):
        dry_run(replace(config, model=model), 1)
    assert dry_run(config, 1).parameters_per_rank > 0


@pytest.mark.skipif(DIVIDES_LINEAR_ATTENTION, reason="this Megatron-Core divides it")
def test_context_parallelism_of_older_versions_is_refused_with_what_has_it(tmp_path: Path) -> None:
    config = scratch.make_config(tmp_path, LINEAR)
    config = replace(config, parallel=replace(config.parallel, context_parallel_size=2))
    with pytest.raises(ValueError, match=r"context_parallel_size=2: .*install megatron-core 0.18"):
        dry_run(config, 2)


def test_kernels_that_are_not_there(straight: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without them Megatron-Core builds no such layer on CUDA."""
    from megatron_pg.train.model import plan_model

    config = straight[0]
    made = plan_model(config.model, config.parallel).config
    missing = {"fla", "mamba_ssm"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in missing else name)
    of_linear, of_mamba = kernel_problems(made, "M*")
    assert "pip install flash-linear-attention" in of_linear
    assert "pip install --no-build-isolation mamba-ssm" in of_mamba
    assert list(kernel_problems(made, "")) == [of_linear]
    missing.clear()
    assert not list(kernel_problems(made, "M*"))
