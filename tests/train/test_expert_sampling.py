"""Sampling by replicas that share experts: the tokens of a replica that has all of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

pytest.importorskip("megatron.core")

from megatron_pg.mcore.versions import HAS_HYBRID_MODEL  # noqa: E402
from tests.checkpoint.tiny import FAMILIES, save_hf  # noqa: E402
from tests.ranks import Pool  # noqa: E402
from tests.train import family_runs, hybrid_runs, runs  # noqa: E402
from tests.train.layouts import with_layout  # noqa: E402
from tests.train.prompt_runs import MODULE, config_of  # noqa: E402

pytestmark = pytest.mark.megatron

MODELS = ["qwen3_moe", "nemotron_h_moe"] if HAS_HYBRID_MODEL else ["qwen3_moe"]


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_transformers(ranks: Pool, tmp_path: Path, name: str) -> None:
    """Of three prompts one replica has two."""
    save_hf(FAMILIES[name], tmp_path / "model", num_layers=4)
    settings = {"rollout__top_k": 1, "run__groups_per_step": 3}
    config = with_layout(config_of(tmp_path, f"{MODULE}:ours", **settings), "ep2")
    parts = ranks.run(2, hybrid_runs.first_samples, config, timeout=300)
    assert [len(samples) for samples in parts] == [8, 4]
    samples = [one for part in parts for one in part]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        config.model.hf, attn_implementation="eager", dtype=torch.float32
    )
    for prompt, response, _ in samples:
        tokens = prompt
        for _ in range(len(response)):
            logits = model(tokens[None], use_cache=False).logits[0, -1]
            tokens = torch.cat([tokens, logits.argmax()[None]])
        assert response.tolist() == tokens[len(prompt) :].tolist()
    want = torch.cat(hybrid_runs.plain_logprobs(config, samples))
    got = torch.cat([logprobs for *_, logprobs in samples])
    assert float((got - want).abs().max()) < 5e-5 and float(want.std()) > 0.1


def test_steps_are_those_of_whole_replicas(ranks: Pool, tmp_path: Path) -> None:
    """Routes recorded and replayed, balancing losses counted, evaluations of one prompt."""
    save_hf(FAMILIES["qwen3_moe"], tmp_path / "model", num_layers=4)
    balanced = dict(
        moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.01, moe_z_loss_coeff=0.001
    )
    settings = {
        "algorithm__num_minibatches": 2,
        "algorithm__router_replay": "R2",
        "model__transformer": balanced,
        "run__groups_per_step": 6,
        "run__num_steps": 5,
    }
    config = config_of(tmp_path, f"{MODULE}:ours", **settings)
    whole, shared = (runs.run(ranks, config, name, tmp_path / name) for name in ("dp2", "ep2"))
    start = runs.load_weights(tmp_path / "model")
    assert family_runs.largest_difference(shared[0], whole[0], start) <= 1e-3
    for ours, theirs in zip(shared[1], whole[1], strict=True):
        names = [n for n in theirs if n.split("/")[0] not in ("time", "perf")]
        assert {n: ours[n] for n in names} == pytest.approx(
            {n: theirs[n] for n in names}, rel=1e-4, abs=1e-6
        )
    assert len({step["reward/mean"] for step in whole[1]}) == 5
    rewards = [
        [summary["reward_before"], summary["reward_after"]]
        for name in ("dp2", "ep2")
        for summary in [json.loads((tmp_path / name / "summary.json").read_text())]
    ]
    assert rewards[0] == rewards[1] and rewards[0][0] != rewards[0][1]
    assert whole[1][0]["router/load_balancing_loss"] > 0
