"""Models over ranks: round trips, logits, exchange with Megatron-Core, resharded training."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_pg.checkpoint import (
    HfFolder,
    MegatronFolder,
    TorchDistReader,
    compare_training_state,
    compare_weights,
    reshard_checkpoint,
)
from megatron_pg.checkpoint.sharded_state import _check_names
from megatron_pg.parallel import PipelineSplit
from tests.checkpoint import logits, megatron_exchange, round_trip, tiny, trajectory
from tests.checkpoint.tiny import FAMILIES, Layout
from tests.ranks import Pool
from tests.utils import assert_close

pytestmark = pytest.mark.megatron

NUM_RANKS = 4
# Experts with biases are not cut.
BIASED = ["gpt_oss"]
EXPERTS = [name for name, family in FAMILIES.items() if family.has_experts if name not in BIASED]
DENSE = [name for name in FAMILIES if name not in EXPERTS + BIASED]
# Of which ranks without sequence parallelism would train the norms by their own heads alone.
LINEAR = [name for name, family in FAMILIES.items() if family.has_linear_attention]
EXCHANGED = ["llama_tied", "llama_bias", "qwen3", "qwen3_moe", "qwen2_moe_mixed", "deepseek_v3"]

# layout -> models for: round trip, logits, exchange with Megatron-Core
LAYOUTS: dict[Layout, tuple[list[str], list[str], list[str]]] = {
    Layout(): (DENSE + EXPERTS + BIASED, [], []),
    Layout(tp=2, sp=True): (DENSE + EXPERTS, DENSE + EXPERTS, []),
    Layout(tp=4, sp=True): (DENSE, DENSE, EXCHANGED),
    Layout(pp=2): (DENSE, DENSE + EXPERTS + BIASED, []),
    Layout(pp=2, vpp=2): (DENSE + EXPERTS + BIASED, [], []),
    Layout(pp=4): (DENSE, [], ["llama_tied"]),
    Layout(pp=4, vpp=2): (DENSE, [], []),
    Layout(tp=2, pp=2, sp=True): (DENSE + EXPERTS, DENSE, [*LINEAR[:2], "nemotron_h"]),
    Layout(tp=2, pp=2, vpp=2): (
        [name for name in DENSE if name not in LINEAR],
        [],
        [*EXCHANGED, "minimax_m2"],
    ),
    Layout(pp=4, split=PipelineSplit(num_layers_in_first_pipeline_stage=2)): (
        *(["llama_tied"], ["llama_tied", "qwen3_moe"], []),
    ),
    # Stages of the embedding and of the loss alone.
    Layout(pp=2, vpp=2, split=PipelineSplit(pipeline_model_parallel_layout="E|t*3|t*5|L")): (
        ["llama_tied", "qwen3_moe", "qwen3_next"],
        [],
        ["llama_tied", "qwen3_moe"],
    ),
    Layout(ep=2): (EXPERTS + BIASED, [], []),
    Layout(ep=4): (["qwen3_moe", *BIASED], [], []),
    Layout(tp=2, ep=2, sp=True): (EXPERTS, [], []),
    Layout(pp=2, ep=2): (EXPERTS, [], []),
    Layout(tp=2, ep=2, etp=1, sp=True): ([], BIASED, []),
    Layout(tp=2, pp=2, ep=2, etp=1, sp=True): (EXPERTS + BIASED, [], []),
    Layout(tp=2, ep=4, etp=1, sp=True): (["qwen3_moe"], ["qwen3_moe"], ["qwen3_moe"]),
}
WHAT = {"round_trip": round_trip, "logits": logits, "megatron_exchange": megatron_exchange}
CASES = [
    pytest.param(what, layout, names, id=f"{what}-{layout}")
    for layout, columns in LAYOUTS.items()
    for what, names in zip(WHAT, columns)
    if names
]


def check(what: str, root: Path, layout: Layout, names: list[str]) -> dict[str, int]:
    """Tensors or samples of every model that were compared on this rank."""
    with tiny.on_layout(layout):
        return {name: WHAT[what].check(root, name, layout) for name in names}


@pytest.mark.parametrize(("what", "layout", "names"), CASES)
def test_every_layout(
    ranks: Pool, models: Path, what: str, layout: Layout, names: list[str]
) -> None:
    """Round trips bit-equal, logits as transformers', checkpoints as Megatron-Core's."""
    names = [name for name in names if FAMILIES[name].can_be_built]
    if what == "logits":
        # Once, and not on every rank of every layout.
        for name in names:
            logits.of_transformers(models, name)
    counts = ranks.run(NUM_RANKS, check, what, models, layout, names, timeout=300)
    comparing = NUM_RANKS // layout.pp if what == "logits" else 1
    for name in names:
        assert sum(count[name] > 0 for count in counts) == comparing, name


def test_training_goes_on_under_another_layout_and_spec(
    ranks: Pool, models: Path, tmp_path: Path
) -> None:
    """tp=2 -> pp=2 -> dp=2, specs alternating, is the trajectory of tp=2 throughout."""
    source = models / trajectory.NAME
    for leg in range(len(trajectory.LEGS)):
        ranks.run(2, trajectory.run_leg, source, tmp_path, leg)
    got, want, start = map(HfFolder, (tmp_path / "resharded", tmp_path / "unbroken", source))
    moved = 0.0
    for name in want.shapes:
        assert_close(name, got.read(name), want.read(name), 1e-5)
        moved = max(moved, (want.read(name) - start.read(name)).abs().max().item())
    assert moved > 1e-2, "nothing was trained"


def test_the_state_of_a_distributed_optimizer_goes_along(
    ranks: Pool, models: Path, tmp_path: Path
) -> None:
    """Fully reshardable (loading it needs Apex or Transformer Engine)."""
    ranks.run(2, trajectory.save_distributed, models / trajectory.NAME, tmp_path / "saved")
    reshard_checkpoint(tmp_path / "saved", tmp_path / "resharded", tp_size=1, pp_size=2)
    saved, resharded = MegatronFolder(tmp_path / "saved"), MegatronFolder(tmp_path / "resharded")
    moments = [k for k in TorchDistReader(resharded.path).tensors if "exp_avg_sq" in k]
    assert len(moments) > 5
    assert not list(compare_training_state(saved, resharded))
    assert not list(compare_weights(saved, resharded))


WEIGHTS = ["decoder.a.weight", "decoder.experts.b.weight"]
MOMENTS = [f"optimizer.state.exp_avg.{name}" for name in WEIGHTS]
PARTED = [f"chained_{i}.{name}" for i, name in enumerate(MOMENTS)]


@pytest.mark.parametrize(
    ("stored", "asked", "message"),
    [
        (PARTED, MOMENTS, "experts apart from that of other weights, this run has them together"),
        (MOMENTS, PARTED, "experts together with that of other weights, this run has them apart"),
        (MOMENTS[:1], PARTED, "of another model or optimizer"),
        (MOMENTS, [], "of another model or optimizer"),
    ],
)
def test_experts_are_optimized_apart_or_not_as_before(
    stored: list[str], asked: list[str], message: str
) -> None:
    folder = Path("saved/iter_0000001")
    reader = SimpleNamespace(tensors=dict.fromkeys(WEIGHTS + stored), objects={}, folder=folder)
    _check_names({*WEIGHTS, *stored}, reader)
    with pytest.raises(ValueError) as error:
        _check_names({*WEIGHTS, *asked}, reader)
    assert message in str(error.value) and str(folder) in str(error.value)
