"""Runs that replay routes: taken up where they were, and refused before the model is built."""

from __future__ import annotations

import base64
import io
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("megatron.core")

from megatron_pg.data import Group, RouteShape, Sample, read_rollouts, write_rollouts  # noqa: E402
from megatron_pg.rollout import OpenAIServerSource  # noqa: E402
from megatron_pg.train import dry_run, load_config  # noqa: E402
from megatron_pg.train.rollouts import Sampling, make_stream  # noqa: E402
from tests.data.routed import with_routes  # noqa: E402
from tests.ranks import Pool  # noqa: E402
from tests.rollout.stand_in import completion, stand_in, vllm_like  # noqa: E402
from tests.train import family_runs, runs, tiny  # noqa: E402

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


# Losses that weigh as much as the policy's, and biases that go on by what is replayed.
LOSSES = dict(
    moe_router_load_balancing_type=["aux_loss", "seq_aux_loss"],
    moe_aux_loss_coeff=[0.3, 0.2],
    moe_z_loss_coeff=0.1,
    moe_router_bias_update_rate=0.01,
)


@pytest.fixture(scope="module")
def straight(ranks: Pool, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run on one rank with recorded routes, of GLM-4.5, and its end."""
    folder = tmp_path_factory.mktemp("glm")
    settings = dict(
        algorithm__router_replay="R3",
        model__transformer=LOSSES,
        prefix_group__min_shared=1,
        run__num_steps=3,
    )
    config = family_runs.prepare(folder, "glm4_moe", **settings)
    groups = read_rollouts(config.rollout.files, vocab_size=family_runs.VOCAB)
    routed = with_routes(groups, (4, 2), num_experts=8, divergence=0.3)
    write_rollouts(routed, Path(config.rollout.files[0]))
    return config, runs.load_weights(folder / "model"), runs.run(ranks, config, "one", folder / "o")


@pytest.mark.parametrize("layout", ["tp2_sp", "tp2_ep2_etp1_sp", "cp2_ep2"])
def test_ranks_train_routers_as_one(
    ranks: Pool, straight: Any, layout: str, tmp_path: Path
) -> None:
    """Coefficients of losses, counts of replayed experts and what is logged of them."""
    config, start, (want, steps) = straight
    got, others = runs.run(ranks, config, layout, tmp_path / "out")
    assert family_runs.largest_difference(got, want, start) <= 2e-4
    biases = [name for name in want if name.endswith("e_score_correction_bias")]
    assert len(biases) == 3
    for name in biases:
        assert torch.equal(got[name], want[name]) and not torch.equal(want[name], start[name])
    for ours, theirs in zip(others, steps, strict=True):
        assert theirs["tokens/split_by_routes"] > 5
        for name in (n for n in theirs if n.startswith(("router/", "actor/", "tokens/split"))):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
        assert len([name for name in theirs if name.startswith("router/")]) == 3


def engine(path: str, body: Any) -> Any:
    """A vLLM whose samples part in their routes within a prompt, the same for the same request."""
    if path in ("/collective_rpc", "/reset_prefix_cache"):
        return 200, {"success": True}
    status, answer = vllm_like(path, body)
    if path != "/v1/completions":
        return status, answer
    prompt, choices = body["prompt"], []
    for index in range(body["n"]):
        own = np.random.default_rng([*prompt, body.get("seed") or 0, index])
        tokens = own.integers(3, 20, min(body["max_tokens"], 2 + index)).tolist()
        rows = len(prompt) + len(tokens) - 1
        routes = np.random.default_rng(prompt).random((rows, 4, 8)).argsort(axis=-1)[..., :2]
        routes = routes.astype(np.uint8)
        routes[len(prompt) // 2 :] += np.uint8(index % 3)
        routes %= 8
        routes[:, 0] = 0
        stream = io.BytesIO()
        np.save(stream, routes)
        told = base64.b64encode(stream.getvalue()).decode()
        words = " ".join(["7"] * (index if sum(prompt) % 3 else 0) + ["a"])
        choices.append(completion(tokens, index=index, text=words, routed_experts=told))
    return 200, {"choices": choices}


def test_a_run_from_a_server_replays_its_routes_and_is_taken_up(
    ranks: Pool, tmp_path: Path
) -> None:
    """Of groups with spread alone, on two stages, in two minibatches of two epochs."""
    with stand_in(engine) as server:
        settings = dict(
            rollout__source="server",
            rollout__files=[],
            rollout__num_generations=4,
            rollout__max_response_tokens=6,
            rollout__reward="tests.train.rewards:share_of_digits",
            rollout__server=dict(base_url=server.url, reload="vllm"),
            algorithm__router_replay="R3",
            algorithm__ppo_epochs=2,
            algorithm__filter_groups=dict(enable=True),
            prefix_group__min_shared=1,
            run__num_steps=3,
            run__save_interval=1,
            run__eval_prompts=2,
            run__self_check_interval=1,
        )
        config = family_runs.prepare(tmp_path, "glm4_moe", **settings)
        tiny.save_tokenizer(tmp_path / "model")
        want, steps = runs.run(ranks, config, "pp2", tmp_path / "whole")
        runs.run(ranks, with_steps(config, 1), "pp2", tmp_path / "parts")
        got, rest = runs.run(ranks, config, "pp2", tmp_path / "parts")
    assert all(step["tokens/split_by_routes"] > 5 for step in steps)
    assert max(step["check/packed_vs_written_out"] for step in steps) < 1e-5
    assert sum(step["filter_groups/without_spread"] for step in steps) > 0
    runs.assert_same((got, rest), (want, steps))


def with_steps(config: Any, num_steps: int) -> Any:
    return replace(config, run=replace(config.run, num_steps=num_steps))


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


def test_routes_of_layers_without_experts_cost_nothing(tmp_path: Path) -> None:
    """What an engine says of a dense layer is not read, in a dry run as little as in a step."""

    def with_odd_layer(sample: Sample, number: int) -> Sample:
        assert sample.routed_experts is not None
        routes = sample.routed_experts.clone()
        routes[:, 0] = torch.tensor([number % 4, (number + 1) % 4], dtype=torch.int16)
        return replace(sample, routed_experts=routes)

    odd = [
        Group(g.group_id, tuple(with_odd_layer(s, i) for i, s in enumerate(g.samples)))
        for g in ROUTED
    ]
    for groups in (ROUTED, odd):
        config = config_of(tmp_path, groups)
        (told,) = (line for line in dry_run(config, 1).lines if line.startswith("first step"))
        with tiny.opened(replace(config, run=replace(config.run, load=False))) as trainer:
            got = trainer.train_step()
        assert f" {got['tokens/unique']:.0f} encoded" in told
        assert f" {got['tokens/split_by_routes']:.0f} tokens more for their routes" in told


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
