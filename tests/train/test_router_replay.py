"""Runs that replay routes: taken up where they were, and refused before the model is built."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")

from megatron_pg.data import Group, RouteShape, write_rollouts  # noqa: E402
from megatron_pg.rollout import OpenAIServerSource  # noqa: E402
from megatron_pg.train import dry_run, load_config  # noqa: E402
from megatron_pg.train.rollouts import Sampling, make_stream  # noqa: E402
from tests.data.routed import with_routes  # noqa: E402
from tests.train import tiny  # noqa: E402

SHAPE = (3, 2)
TRANSFORMER = dict(
    num_layers=3,
    hidden_size=32,
    num_attention_heads=4,
    ffn_hidden_size=48,
    num_moe_experts=4,
    moe_router_topk=2,
    moe_ffn_hidden_size=16,
    moe_layer_freq=[0, 1, 1],
    moe_router_load_balancing_type="none",
    add_bias_linear=False,
)
DENSE = {name: value for name, value in TRANSFORMER.items() if "moe" not in name}
ROUTED = with_routes(tiny.make_groups(), SHAPE, divergence=0.3)
MODEL = dict(vocab_size=tiny.VOCAB, transformer=TRANSFORMER)


def config_of(folder: Path, groups: Sequence[Group] = ROUTED, **overrides: Any) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    sections = tiny.run_sections(folder)
    write_rollouts(groups, folder / "rollouts.jsonl")
    sections["model"] = MODEL
    sections["algorithm"] = dict(router_replay="R3", num_minibatches=2)
    sections["run"] |= dict(num_steps=2, save_interval=1)
    sections["prefix_group"] |= dict(min_shared=1)
    return load_config(tiny.write_config(folder / "run.yaml", sections, **overrides))


def run(config: Any) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """Weights after the last step, and the metrics of the steps that were made."""
    metrics = []
    with tiny.opened(config) as trainer:
        while trainer.step < config.run.num_steps:
            metrics.append(trainer.train_step())
            trainer._save()
        trainer.checkpoints.wait()
        chunk = trainer.model.chunks[0].module
        return {n: p.detach().clone() for n, p in chunk.named_parameters()}, metrics


def test_a_run_is_taken_up_with_its_routes_to_the_last_bit(tmp_path: Path) -> None:
    whole, metrics = run(config_of(tmp_path / "whole"))
    assert all(step["tokens/split_by_routes"] > 5 for step in metrics)
    assert max(step["check/packed_vs_written_out"] for step in metrics[:1]) < 1e-5
    first = config_of(tmp_path / "parts", run__num_steps=1)
    run(first)
    resumed, rest = run(config_of(tmp_path / "parts"))
    assert len(rest) == 1
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    shutil.rmtree(tmp_path / "parts" / "out")
    alone, others = run(config_of(tmp_path / "parts", algorithm__router_replay="disabled"))
    assert others[0]["tokens/split_by_routes"] == 0
    assert others[0]["tokens/unique"] < metrics[0]["tokens/unique"]
    assert not all(torch.equal(alone[name], whole[name]) for name in whole)


def test_routes_that_the_old_policy_takes_are_replayed(tmp_path: Path) -> None:
    """A second update with the routes of the first policy is another one."""
    found = {}
    for mode in ("R2", "disabled"):
        config = config_of(
            tmp_path / mode,
            tiny.make_groups(),
            algorithm__router_replay=mode,
            algorithm__ppo_epochs=3,
            optimizer__lr=0.05,
            run__num_steps=1,
        )
        found[mode], _ = run(config)
    assert any(not torch.equal(found["R2"][n], w) for n, w in found["disabled"].items())


def test_a_dry_run_tells_what_routes_cost(tmp_path: Path) -> None:
    told = "\n".join(dry_run(config_of(tmp_path), 1).lines)
    assert "tokens more for their routes" in told
    without = dry_run(config_of(tmp_path, algorithm__router_replay="disabled"), 1)
    assert "routes" not in "\n".join(without.lines)


def other_routes(change: Any) -> list[Group]:
    first, *rest = ROUTED[0].samples
    assert first.routed_experts is not None
    samples = (replace(first, routed_experts=change(first.routed_experts.clone())), *rest)
    return [Group(ROUTED[0].group_id, samples), *ROUTED[1:]]


def beyond(routes: torch.Tensor) -> torch.Tensor:
    routes[1, 1, 0] = 4
    return routes


OLD = [
    Group(g.group_id, tuple(replace(s, old_logprobs=-torch.ones(len(s.response_ids)).double())
                            for s in g.samples))
    for g in tiny.make_groups()
]  # fmt: skip


@pytest.mark.parametrize(
    ("groups", "overrides", "message"),
    [
        (tiny.make_groups(), {}, "algorithm.router_replay='R3' replays the routes of the rollout"),
        (other_routes(beyond), {}, "sample 0 of group 'g0': routed_experts of token 1 in layer"),
        (
            with_routes(tiny.make_groups(), (3, 1)),
            {},
            "sample 0 of group 'g0': routed_experts has shape",
        ),
        (OLD, dict(algorithm__router_replay="R2"), "algorithm.router_replay='R2' records routes"),
        (
            ROUTED,
            dict(model__transformer=DENSE),
            "router_replay='R3' replays routes to experts, but the model has none",
        ),
    ],
    ids=["none", "beyond", "width", "old_logprobs", "dense"],
)  # fmt: skip
def test_recorded_rollouts_that_cannot_be_replayed_are_refused(
    tmp_path: Path, groups: list[Group], overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as error:
        dry_run(config_of(tmp_path, groups, **overrides), 1)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("rollout", "message"),
    [
        (dict(source="model"), "rollout.source='model': the model that samples is the one"),
        (
            dict(source="server", server=dict(allow_retokenize=True)),
            "allow_retokenize=true: routes belong to the exact tokens",
        ),
    ],
    ids=["model", "retokenized"],
)
def test_sources_that_report_no_routes_are_refused(
    tmp_path: Path, rollout: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as error:
        config_of(tmp_path, rollout__files=[], **{f"rollout__{k}": v for k, v in rollout.items()})
    assert message in str(error.value)


def test_a_server_is_asked_for_the_model_s_routes(tmp_path: Path) -> None:
    server = dict(rollout__source="server", rollout__server=dict(reload="vllm"))
    config = config_of(tmp_path, rollout__files=[], **server)
    inputs = Sampling(tokenizer=None, task=None, reward=None, params=None)  # type: ignore[arg-type]
    shape = RouteShape(4, 2, (False, True, True))
    for routes in (shape, None):
        stream = make_stream(config, inputs, [], tiny.VOCAB, Ranks0(), routes)
        source = stream.stream.source  # type: ignore[union-attr]
        assert isinstance(source, OpenAIServerSource) and source.routes == routes


class Ranks0:
    """The only rank."""

    rank = 0
