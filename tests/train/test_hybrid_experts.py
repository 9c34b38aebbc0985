"""Runs of a hybrid with experts: taken up again, on other ranks too, and with routes to replay."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")
pytest.importorskip("transformers")

from megatron_pg.data import Group, read_rollouts, write_rollouts  # noqa: E402
from megatron_pg.mcore.versions import HAS_HYBRID_MODEL  # noqa: E402
from megatron_pg.train import TrainConfig  # noqa: E402
from tests.checkpoint.tiny import FAMILIES, save_hf  # noqa: E402
from tests.data.routed import with_routes  # noqa: E402
from tests.ranks import Pool  # noqa: E402
from tests.train import family_runs, hybrid_runs, runs  # noqa: E402
from tests.train.layouts import with_layout  # noqa: E402
from tests.train.prompt_runs import MODULE, config_of  # noqa: E402

pytestmark = [
    pytest.mark.megatron,
    pytest.mark.skipif(not HAS_HYBRID_MODEL, reason="HybridModel came with megatron-core 0.18"),
]

MODEL, NUM_STEPS = "nemotron_h_moe", 4
STATISTICS = dict(
    moe_router_bias_update_rate=0.01,
    moe_router_load_balancing_type="aux_loss",
    moe_aux_loss_coeff=0.01,
    moe_z_loss_coeff=0.001,
)


@pytest.fixture(scope="module")
def straight(ranks: Pool, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("hybrid")
    settings = dict(model__transformer=STATISTICS, run__num_steps=NUM_STEPS, run__save_interval=2)
    config = family_runs.prepare(folder, MODEL, **settings)
    weights, steps = runs.run(ranks, config, "pp2", folder / "straight")
    return config, runs.load_weights(folder / "model"), weights, steps


def test_routers_keep_statistics(straight: Any) -> None:
    _, start, weights, steps = straight
    biases = [name for name in start if name.endswith("e_score_correction_bias")]
    # Each step adds or takes away 0.01 of an expert's bias.
    moves = torch.stack([weights[name] - start[name] for name in biases]) / 0.01
    assert len(biases) == 2 and moves.any(1).all()
    assert (moves - moves.round()).abs().max() < 1e-3 and moves.abs().max() < 2 * NUM_STEPS + 0.5
    names = "router/load_balancing_loss", "router/z_loss"
    assert all(step[name] > 0 for step in steps for name in names)


@pytest.fixture(scope="module")
def begun(ranks: Pool, straight: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was left after two steps."""
    out = tmp_path_factory.mktemp("begun") / "out"
    runs.run(ranks, straight[0], "pp2", out, num_steps=2)
    return out


@pytest.mark.parametrize("layout", ["pp2", "tp2_sp"])
def test_a_run_goes_on(
    ranks: Pool, straight: Any, begun: Path, layout: str, tmp_path: Path
) -> None:
    """To the last bit on as many stages."""
    config, start, weights, _ = straight
    shutil.copytree(begun, tmp_path / "out")
    got, _ = runs.run(ranks, config, layout, tmp_path / "out")
    if layout == "pp2":
        assert got.keys() == weights.keys()
        assert all(torch.equal(got[name], weight) for name, weight in weights.items())
    else:
        assert family_runs.largest_difference(got, weights, start) <= 2e-4


def replaying(config: TrainConfig, folder: Path, groups: list[Group]) -> TrainConfig:
    write_rollouts(groups, folder / "routed.jsonl")
    algorithm = replace(config.algorithm, router_replay="R3")
    rollout = replace(config.rollout, files=(str(folder / "routed.jsonl"),))
    run = replace(config.run, num_steps=2, self_check_interval=1)
    return replace(config, algorithm=algorithm, rollout=rollout, run=run)


def of_experts_alone(groups: list[Group]) -> list[Group]:
    """As engines report them that leave out layers without experts."""
    return [
        replace(
            group,
            samples=tuple(
                replace(sample, routed_experts=sample.routed_experts[:, [1, 3]])
                for sample in group.samples
                if sample.routed_experts is not None
            ),
        )
        for group in groups
    ]


def test_routes_are_replayed(ranks: Pool, straight: Any, tmp_path: Path) -> None:
    """Of all layers, or of those alone that have experts."""
    config, *_ = straight
    groups = read_rollouts(config.rollout.files, vocab_size=family_runs.VOCAB)
    routed = with_routes(groups, (4, 2), num_experts=8, divergence=0.3)
    found = []
    for number, given in enumerate((routed, of_experts_alone(routed))):
        folder = tmp_path / str(number)
        folder.mkdir()
        own = replaying(config, folder, given)
        replayed, steps = runs.run(ranks, own, "pp2", folder / "out")
        assert all(step["tokens/split_by_routes"] > 5 for step in steps)
        assert max(step["check/packed_vs_written_out"] for step in steps) < 1e-5
        found.append(replayed)
    whole, alone = found
    assert all(torch.equal(whole[name], alone[name]) for name in whole)


def test_what_it_samples_is_transformers(ranks: Pool, tmp_path: Path) -> None:
    """Its own responses have the logprobs of a plain forward; nothing routes a token otherwise."""
    save_hf(FAMILIES[MODEL], tmp_path / "model", num_layers=4)
    config = with_layout(config_of(tmp_path, f"{MODULE}:ours"), "tp2_sp")
    parts = ranks.run(2, hybrid_runs.first_samples, config, timeout=300)
    (samples,) = filter(None, parts)
    want = torch.cat(hybrid_runs.plain_logprobs(config, samples))
    got = torch.cat([logprobs for *_, logprobs in samples])
    assert float((got - want).abs().max()) < 5e-5 and float(want.std()) > 0.1
