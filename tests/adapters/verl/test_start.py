"""The engine as verl's worker starts it: a few updates, the reference model, half precision."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("verl", reason="verl is installed in its own lane")

from verl.workers.config.engine import EngineRouterReplayConfig  # noqa: E402

from tests.adapters.verl.harness import VerlCase, make_data, response_values  # noqa: E402
from tests.adapters.verl.workers import (  # noqa: E402
    make_worker,
    run_worker,
    with_settings,
    without_cuda_numbers,
    worker_config,
)
from tests.mcore.harness import on_cpu  # noqa: E402
from tests.ranks import Pool  # noqa: E402

pytestmark = pytest.mark.verl

METRICS = {"reuse_ratio", "unique_tokens", "logical_tokens", "rows", "packed_calls"}
METRICS |= {"resident_groups", "split_tokens"}


UPDATES = {
    "one": VerlCase(batch="turns", data=dict(uids=True)),
    "two": VerlCase(dp=2, batch="turns", data=dict(uids=True)),
    "divided": VerlCase(cp=2, batch="turns", data=dict(uids=True)),
    # One rank has rows that nothing is read of where the other one's prompts are resident.
    "fillers": VerlCase(
        dp=2,
        batch="uneven",
        data=dict(uids=True),
        prefix_group=dict(prefix_resident="always", max_resident_tokens=50),
    ),
}


@pytest.mark.parametrize("name", UPDATES)
def test_updates_of_verls_worker(ranks: Pool, name: str) -> None:
    case = UPDATES[name]
    dp = case.dp
    stock = ranks.run(dp, run_worker, case, False, 2)
    ours = ranks.run(case.world_size, run_worker, case, True, 2)
    for rank, b in enumerate(ours):
        a = stock[rank // case.cp]
        differences = [(a.weights[n] - w).norm() / w.norm() for n, w in b.weights.items()]
        assert max(map(float, differences)) < 1e-5 and len(differences) > 10
        if rank % case.cp:
            assert not b.metrics
            continue
        assert a.engine == "MegatronEngineWithLMHead"
        assert b.engine == "PrefixGroupedMegatronEngine"
        for x, y in zip(a.logprobs, b.logprobs, strict=True):
            assert float((x - y).abs().max()) < 1e-4
        assert len(a.metrics) == len(b.metrics) == 2
        for one, other in zip(a.metrics, b.metrics):
            assert len(one["loss"]) == 2, "two optimizer steps"
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-5, abs=1e-5)
            assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
            for sums in ("actor/pg_loss", "actor/entropy_loss", "kl_loss"):
                assert other[sums] == pytest.approx(one[sums], rel=1e-4, abs=1e-5), sums
            named = {n.split("/")[1] for n in other if n.startswith("prefix_grouped/")}
            assert named == METRICS
            assert all(len(other[f"prefix_grouped/{name}"]) == 2 * dp for name in METRICS)
            assert min(other["prefix_grouped/reuse_ratio"]) > 1.2
        assert a.metrics[0]["loss"] != a.metrics[1]["loss"], "weights have changed"


def test_the_engine_says_that_it_is_active(ranks: Pool) -> None:
    training, reference = ranks.run(1, said)[0]
    assert training == ["megatron_pg: prefix-grouped engine is active (training; attention: cpu)"]
    assert reference == [
        "megatron_pg: prefix-grouped engine is active (logprobs only; attention: cpu)"
    ]


def said() -> list[list[str]]:
    """Lines about the engine, of a training one and of a reference model's."""
    from contextlib import redirect_stdout
    from io import StringIO

    found = []
    for changes in ({}, dict(forward_only=True)):
        printed = StringIO()
        with redirect_stdout(printed), on_cpu(), without_cuda_numbers():
            make_worker(True, worker_config(True, **changes))
        found.append([line for line in printed.getvalue().splitlines() if "megatron_pg" in line])
    return found


def test_the_reference_models_logprobs_and_half_precision(ranks: Pool) -> None:
    (difference,) = ranks.run(1, half_precision_difference)
    assert 0 < difference < 0.3


def half_precision_difference() -> float:
    """Largest difference of a reference model's logprobs between bf16 and fp32."""
    case, values = VerlCase(), []
    for changes in ({}, dict(dtype="bfloat16")):
        with on_cpu(), without_cuda_numbers():
            config = worker_config(True, forward_only=True, **changes)
            worker = make_worker(True, config)
            data = make_data(case, max_token_len_per_gpu=None)
            output = worker.infer_batch(with_settings(data, compute_loss=False))
            rows = response_values(dict(model_output=output), data, "log_probs")
            values.append(torch.cat(rows).float())
    return float((values[0] - values[1]).abs().max())


def test_settings_of_the_model_are_refused_together(ranks: Pool) -> None:
    (message,) = ranks.run(1, refused)
    assert message.startswith("2 setting(s)")
    assert "attention_dropout=0.1" in message and "window_size=(4, 1)" in message


def refused() -> str:
    with on_cpu(), without_cuda_numbers(), pytest.raises(ValueError) as error:
        make_worker(True, attention_dropout=0.1, window_size=(4, 1))
    return str(error.value)


def test_megatron_s_own_replay_stays_off(ranks: Pool) -> None:
    """verl turns it on with its router replay; it goes by the order of calls."""
    assert ranks.run(1, replay_settings) == [[False, False]]


def replay_settings() -> list[bool]:
    with on_cpu(), without_cuda_numbers():
        changes = dict(router_replay=EngineRouterReplayConfig(mode="R3"))
        engine = make_worker(True, worker_config(True, **changes)).engine
        assert engine.enable_routing_replay, "verl was not told"
        configs = engine.tf_config, engine.module[0].config
        return [bool(config.moe_enable_routing_replay) for config in configs]
