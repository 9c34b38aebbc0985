"""Runs of a hybrid of Mamba-2, attention and MLPs on what it samples itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("megatron.core")
pytest.importorskip("transformers")

from megatron_pg.train import TrainConfig  # noqa: E402
from tests.checkpoint.tiny import FAMILIES, save_hf  # noqa: E402
from tests.ranks import Pool  # noqa: E402
from tests.train import hybrid_runs, runs  # noqa: E402
from tests.train.cut_off import train_and_die  # noqa: E402
from tests.train.layouts import with_layout  # noqa: E402
from tests.train.prompt_runs import MODULE, config_of  # noqa: E402

FAMILY = FAMILIES["nemotron_h"]
pytestmark = [
    pytest.mark.megatron,
    pytest.mark.skipif(not FAMILY.can_be_built, reason="HybridModel came with megatron-core 0.18"),
]
Straight = tuple[TrainConfig, runs.Ended]


@pytest.fixture(scope="module")
def straight(ranks: Pool, tmp_path_factory: pytest.TempPathFactory) -> Straight:
    """Three steps on two stages."""
    folder = tmp_path_factory.mktemp("hybrid")
    save_hf(FAMILY, folder / "model", num_layers=4)
    config = config_of(folder, f"{MODULE}:ours")
    return config, runs.run(ranks, config, "pp2", folder / "straight")


def test_it_trains_on_what_it_samples(straight: Straight) -> None:
    config, (weights, steps) = straight
    start = runs.load_weights(Path(str(config.model.hf)))
    assert any(name.endswith("A_log") for name in weights)
    assert not [name for name in weights if torch.equal(weights[name], start[name])]
    assert all(m["actor/rollout_logprob_diff"] < 1e-5 for m in steps), steps
    assert all(m["tokens/reuse_ratio"] > 1.5 and m["reward/std"] > 0 for m in steps)


@pytest.mark.parametrize("layout", ["tp2_sp", "cp2"])
def test_what_it_samples_first_is_transformers(
    ranks: Pool, straight: Straight, layout: str
) -> None:
    """The same tokens on every layout, with the logprobs of a plain forward."""
    config, (_, steps) = straight
    parts = ranks.run(2, hybrid_runs.first_samples, with_layout(config, layout), timeout=300)
    (samples,) = filter(None, parts)
    assert len(samples) == 16 and len({len(response) for _, response, _ in samples}) > 1
    lens = [len(response) for _, response, _ in samples]
    assert sum(lens) / 16 == steps[0]["response_length/mean"]
    want = torch.cat(hybrid_runs.plain_logprobs(config, samples))
    got = torch.cat([logprobs for *_, logprobs in samples])
    assert float((got - want).abs().max()) < 5e-5 and float(want.std()) > 0.1


def test_a_run_killed_in_a_write_goes_on_bit_for_bit(
    ranks: Pool, straight: Straight, tmp_path: Path
) -> None:
    config, want = straight
    config = runs.on_layout(config, "pp2", tmp_path / "cut", save_interval=1)
    codes = ranks.start(2, train_and_die, config, 2).wait(300)
    assert -9 in codes.values() and 0 not in codes.values()
    names = {path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()}
    assert "iter_0000001" in names and "iter_0000002" not in names
    ranks.run(2, runs.train, config, timeout=300)
    runs.assert_same(runs.result(config), want)
