"""Five steps of the recipe from a folder of every family end where a plain loop ends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("megatron.core")
pytest.importorskip("transformers")

from megatron_pg.mcore.versions import DIVIDES_LINEAR_ATTENTION  # noqa: E402
from megatron_pg.train import TrainConfig  # noqa: E402
from tests.checkpoint.tiny import FAMILIES  # noqa: E402
from tests.ranks import Pool  # noqa: E402
from tests.train import family_runs, runs  # noqa: E402
from tests.train.runs import Weights  # noqa: E402

pytestmark = pytest.mark.megatron

# One model of every family, in which all that is its own occurs.
TRAINED = [
    "llama_yarn",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "qwen2_moe_mixed",
    "mixtral",
    "mistral",
    "smollm3",
    "gemma3",
    "gpt_oss",
    "olmo3",
    "qwen3_next",
    "qwen3_5",
    "qwen3_5_moe",
    "glm4_moe",
    "glm4_moe_lite",
    "deepseek_v3",
    "moonlight",
    "minimax_m2",
    "nemotron_h",
    "nemotron_h_moe",
]
# Grouped keys, experts over all ranks, windows with sinks, latent attention.
IN_CONTEXT = {"qwen3": "cp2", "qwen3_moe": "cp2_ep2", "gpt_oss": "cp2", "deepseek_v3": "cp2_ep2"}
IN_CONTEXT |= {"nemotron_h_moe": "cp2_ep2"}
if DIVIDES_LINEAR_ATTENTION:
    IN_CONTEXT |= {"qwen3_next": "cp2", "nemotron_h": "cp2"}
CASES = [(name, layout) for name in TRAINED for layout in family_runs.LAYOUTS]
CASES += IN_CONTEXT.items()
Truth = tuple[TrainConfig, Weights, Weights]


@pytest.fixture(scope="module")
def truth(
    ranks: Pool, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Truth:
    """A run, the weights it starts from, and those with which the plain loop ends."""
    if not FAMILIES[request.param].can_be_built:
        pytest.skip("HybridModel came with megatron-core 0.18")
    folder = tmp_path_factory.mktemp(request.param)
    config = family_runs.prepare(folder, request.param)
    ranks.run(1, family_runs.plain_run, config, folder / "plain")
    return config, runs.load_weights(folder / "model"), runs.load_weights(folder / "plain")


@pytest.mark.parametrize(("truth", "layout"), CASES, indirect=["truth"], scope="module")
def test_five_steps_end_where_a_plain_loop_ends(
    ranks: Pool, truth: Truth, layout: str, tmp_path: Path
) -> None:
    config, start, plain = truth
    if layout == "tp2_sp" and "gpt_oss" in str(config.model.hf):
        layout = "tp2_ep2_etp1_sp"
    ours, steps = runs.run(ranks, config, layout, tmp_path / "out")
    assert min(step["tokens/reuse_ratio"] for step in steps) > 1.2
    assert sum(step["actor/clipfrac_low"] + step["actor/clipfrac_high"] for step in steps) > 0
    assert family_runs.largest_difference(ours, plain, start) <= 2e-4


@pytest.mark.parametrize(
    ("name", "norm"),
    [("moonlight", "model.norm.weight"), ("nemotron_h_moe", "backbone.norm_f.weight")],
)
def test_biases_of_experts_stay_fp32(ranks: Pool, name: str, norm: str, tmp_path: Path) -> None:
    """In a model of bf16, to the last bit; they are no parameters of the optimizer."""
    if not FAMILIES[name].can_be_built:
        pytest.skip("HybridModel came with megatron-core 0.18")
    settings = {"model__transformer": {"params_dtype": "bfloat16"}, "run__num_steps": 1}
    config = family_runs.prepare(tmp_path, name, **settings)
    ours, _ = runs.run(ranks, config, "pp2", tmp_path / "out")
    start = runs.load_weights(tmp_path / "model")
    biases = [key for key in start if key.endswith("e_score_correction_bias")]
    assert biases and all(torch.equal(ours[key], start[key]) for key in biases)
    assert not torch.equal(start[biases[0]], start[biases[0]].bfloat16().float())
    assert ours[norm].dtype == torch.bfloat16
