"""Checks of short runs on one rank whose numbers are known; each gets an empty folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_pg.data import Group
from megatron_pg.rollout import (
    OpenAIServerSource,
    SampledRollouts,
    SamplingParams,
)
from megatron_pg.train import METRICS, load_config, parallel_run
from megatron_pg.train import run as run_parts
from megatron_pg.train.config import ParallelConfig
from megatron_pg.train.rollouts.shared_stream import SharedStream
from tests.data.forests import forest_groups
from tests.data.samples import make_large_groups
from tests.train import dense, late_imports, tiny  # noqa: F401

CHECKS: list[Callable[[Path], None]] = []


def check(function: Callable[[Path], None]) -> Callable[[Path], None]:
    CHECKS.append(function)
    return function


def run(
    folder: Path, groups: Sequence[Group] | None = None, **overrides: Any
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Metrics of every step, and the weights at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    sections = tiny.run_sections(folder, groups)
    sections["rollout"]["shuffle"] = False
    sections["run"]["num_steps"] = 1
    sections["prefix_group"]["max_tokens_per_microbatch"] = 200
    config = load_config(tiny.write_config(folder / "config.yaml", sections, **overrides))
    with tiny.opened(config) as trainer:
        trainer.run()
        state = trainer.model.chunks[0].module.state_dict()
        weights = {n: t.clone() for n, t in state.items() if isinstance(t, torch.Tensor)}
    lines = Path(config.run.out, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], weights


def refused(message: str, folder: Path, groups: Any = None, **overrides: Any) -> None:
    try:
        run(folder, groups, **overrides)
    except ValueError as error:
        assert message in str(error), error
        assert not (folder / "out" / "metrics.jsonl").exists()
    else:
        raise AssertionError(f"nothing was refused: {message}")


def with_rewards(groups: Sequence[Group], reward: Callable[[int, int], float]) -> list[Group]:
    return [
        Group(
            g.group_id,
            tuple(replace(s, reward=reward(n, i)) for i, s in enumerate(g.samples)),
        )
        for n, g in enumerate(groups)
    ]


def near(got: float, want: float, bound: float = 1e-5) -> bool:
    return abs(got - want) <= bound * max(abs(want), 1.0)


@check
def numbers_equal_those_computed_by_hand(folder: Path) -> None:
    groups = tiny.make_groups(5)
    (step,), _ = run(folder, groups)
    samples = [s for g in groups for s in g.samples]
    unique = sum(
        len(g.samples[0].prompt_ids) + sum(len(s.response_ids) for s in g.samples) for g in groups
    )
    logical = sum(len(s.prompt_ids) + len(s.response_ids) for s in samples)
    counts = [int(s.loss_mask.sum()) for s in samples]
    advantages = dense.advantages_of(groups).tolist()
    assert step["tokens/unique"] == unique and step["tokens/logical"] == logical > unique
    assert step["tokens/reuse_ratio"] == logical / unique and step["tokens/padded"] == 0
    assert step["packing/microbatches"] == 1 and step["packing/fillers"] == 0
    assert step["packing/efficiency"] == unique / 200 and step["pipeline/bubble"] == 0
    rewards = [s.reward for s in samples]
    assert near(step["reward/mean"], sum(rewards) / len(rewards))
    assert step["reward/max"] == max(rewards) and step["reward/min"] == min(rewards)
    # One truncated sample in each group of four.
    assert step["response_length/truncated"] == 4 / 17
    assert step["groups/without_spread"] == 2 and step["groups/skipped"] == 0
    assert step["actor/trained_tokens"] == sum(counts) and step["actor/updates"] == 1
    # On policy the ratio is 1, nothing is clipped, the loss is minus the mean advantage.
    assert step["actor/ratio"] == 1 and step["actor/ppo_kl"] == 0
    assert step["actor/clipfrac_low"] == step["actor/clipfrac_high"] == 0
    loss = -sum(a * n for a, n in zip(advantages, counts)) / sum(counts)
    assert near(step["actor/loss"], loss) and abs(loss) > 1e-3
    assert step["check/packed_vs_written_out"] < 1e-5
    assert step["actor/grad_norm"] > 0 and 0 < step["actor/entropy"] < 4
    assert near(step["perf/unique_tokens_per_second"] * step["time/step"], unique)


@check
def every_documented_name_is_written_and_no_other(folder: Path) -> None:
    (step,), _ = run(
        folder,
        tiny.make_groups(5, has_rollout_logprobs=True),
        algorithm__policy={
            "kl_loss_coef": 0.1,
            "entropy_coeff": 0.01,
            "importance_mode": "token_truncate",
        },
        algorithm__use_kl_in_reward=True,
        run__tensorboard=True,
        prefix_group__max_tokens_per_microbatch=24,
    )
    # Recorded rollouts are not asked for, nothing is held out, and there are no routers.
    of_others = ("eval/", "filter_groups/", "rollout/", "time/eval", "reward/<", "router/")
    documented = {name for name in METRICS if not name.startswith(of_others)}
    assert step.keys() == documented, step.keys() ^ documented
    # The reference is the policy itself, computed by the same code.
    assert step["reward/kl_penalty"] == 0 and step["actor/kl"] == 0
    assert step["actor/rollout_logprob_diff"] > 0.1
    assert list((folder / "out" / "tensorboard").glob("events*"))
    summary = json.loads((folder / "out" / "summary.json").read_text())
    assert summary["reward_before"] == step["reward/mean"] and summary["standard_error"] is None
    assert summary["unique_tokens"] < summary["logical_tokens"] and summary["seconds"] > 0
    assert (folder / "out" / "reward.png").stat().st_size > 1000


@check
def a_reference_of_its_own_is_compared_with(folder: Path) -> None:
    (folder / "other").mkdir(parents=True)
    tiny.save_model(folder / "other", seed=5)
    settings = {
        "algorithm__ref_hf": str(folder / "other"),
        "algorithm__use_kl_in_reward": True,
        "algorithm__kl_coef": 0.1,
        "algorithm__kl_penalty": "k2",
    }
    (step,), _ = run(folder, **settings)
    assert step["reward/kl_penalty"] > 0.1


@check
def a_step_of_skipped_groups_changes_nothing(folder: Path) -> None:
    flat = with_rewards(tiny.make_groups(5), lambda group, sample: 0.5)
    _, start = run(folder / "flat", flat)
    steps, weights = run(
        folder / "skipped",
        flat,
        algorithm__skip_groups_without_spread=True,
        run__num_steps=2,
        run__save_interval=1,
    )
    assert [s["step"] for s in steps] == [1, 2]
    for step in steps:
        assert step["groups/skipped"] == 5 and step["actor/updates"] == 0
        assert step["tokens/unique"] == 0 and "actor/loss" not in step
    (_,), alone = run(folder / "untouched", flat, optimizer__lr=0.0)
    assert all(torch.equal(weights[n], alone[n]) for n in weights)
    # A lone sample's advantage is its reward, so that without skipping there is an update.
    assert any(not torch.equal(start[n], alone[n]) for n in start)


def broken(groups: Sequence[Group]) -> list[Group]:
    """The groups with responses between theirs that must not count, and one group of those only."""
    whole = groups[0].samples[0]
    empty = replace(
        whole,
        response_ids=whole.response_ids[:0],
        loss_mask=whole.loss_mask[:0],
        rollout_logprobs=None,
        reward=77.0,
    )
    cut = replace(whole, status="aborted", reward=-50.0, rollout_logprobs=None)
    mixed = []
    for number, group in enumerate(groups):
        prompt = group.samples[0].prompt_ids
        odd = [replace(sample, prompt_ids=prompt) for sample in (empty, cut)]
        samples = [*group.samples]
        samples[number % 2 : number % 2] = odd
        mixed.append(Group(group.group_id, tuple(samples)))
    return [*mixed[:2], Group("none", (empty, cut)), *mixed[2:]]


@check
def aborted_and_empty_responses_count_nowhere(folder: Path) -> None:
    groups = tiny.make_groups(5, has_rollout_logprobs=True)
    importance = {"importance_mode": "token_truncate"}
    for name, settings in {
        "grpo": {"algorithm__policy": importance},
        "sequences": {"algorithm__loss_agg_mode": "seq-mean-token-mean"},
        "baseline": {"algorithm__adv_estimator": "reinforce_plus_plus_baseline"},
        "shaped": {"algorithm__overlong_buffer_len": 8, "algorithm__use_kl_in_reward": True},
        "divided": {"prefix_group__max_tokens_per_microbatch": 30},
    }.items():
        (want,), plain = run(folder / name / "without", groups, **settings)
        (got,), weights = run(
            folder / name / "with", broken(groups), run__groups_per_step=6, **settings
        )
        assert all(torch.equal(weights[n], plain[n]) for n in plain), name
        for metric in want.keys() - {n for n in want if n.split("/")[0] in ("time", "perf")}:
            told_apart = metric.split("/")[0] in ("response_length", "prompt_length")
            assert told_apart or got[metric] == want[metric], metric
        assert got["response_length/aborted"] == 12 / 29 and want["response_length/aborted"] == 0
    # Against the stock model on written-out samples: on policy every ratio is 1.
    (step,), _ = run(folder / "dense", broken(groups), run__groups_per_step=6)
    loss, norm = dense_step(folder / "dense" / "model", groups)
    assert near(step["actor/loss"], loss) and near(step["actor/grad_norm"], norm) and norm > 0.01


def dense_step(model: Path, groups: Sequence[Group]) -> tuple[float, float]:
    """Loss and gradient norm of the transformers model, every sample by itself."""
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager")

    def logits_of(tokens: torch.Tensor) -> torch.Tensor:
        return stock(tokens[None]).logits[0]

    with torch.no_grad():
        old = iter(dense.sample_logprobs(logits_of, groups, tiny.VOCAB))
    known = [
        Group(g.group_id, tuple(replace(s, old_logprobs=next(old).double()) for s in g.samples))
        for g in groups
    ]
    loss = dense.dense_loss(logits_of, known, dense.LossCase(), tiny.VOCAB)
    loss.backward()
    squares = [p.grad.double().square().sum() for p in stock.parameters() if p.grad is not None]
    return float(loss), float(torch.stack(squares).sum().sqrt())


@check
def a_step_of_aborted_responses_changes_nothing(folder: Path) -> None:
    groups = tiny.make_groups(5)
    none = [
        Group(f"none{n}", tuple(replace(s, status="aborted") for s in g.samples))
        for n, g in enumerate(groups[:2])
    ]
    settings = {"run__groups_per_step": 2, "algorithm__use_kl_in_reward": True}
    steps, _ = run(folder, [*none, *groups[:2]], run__num_steps=2, **settings)
    assert [s["actor/updates"] for s in steps] == [0, 1]
    assert steps[0]["response_length/aborted"] == 1 and steps[0]["tokens/unique"] == 0
    # There is no KL to take a mean of; the reference is the policy itself.
    assert [s.get("reward/kl_penalty") for s in steps] == [None, 0]
    refused("no row has a trained token", folder / "refused", none, run__groups_per_step=2)


@check
def how_files_are_read_is_said_in_the_config(folder: Path) -> None:
    folder.mkdir(parents=True)
    files = []
    for number in range(2):
        samples = [
            {
                "group_index": 0,
                "index": 2 * number + i,
                "tokens": [5, 6, 7 + number, i + 9],
                "response_length": 2,
                "reward": {"answer": float(i), "form": 0.5 * number},
                "status": "completed",
            }
            for i in range(2)
        ]
        files.append(str(folder / f"{number}.pt"))
        torch.save({"rollout_id": 0, "samples": samples}, files[-1])
    settings = {"rollout__files": files, "run__groups_per_step": 1}
    for name, key, group_across, mean in (
        ("text", "answer", False, 0.5),
        ("list", ["answer", "form"], True, 0.75),
    ):
        (step,), _ = run(
            folder / name,
            rollout__reward_key=key,
            rollout__group_across_files=group_across,
            **settings,
        )
        assert step["reward/mean"] == mean
    refused("name those to be summed in reward_key", folder / "refused", **settings)


@check
def a_rollout_counts_once(folder: Path) -> None:
    """The first two samples of every group are one rollout with the reward of the first."""
    parts, once = [], []
    for group in tiny.make_groups(5):
        first, *others = group.samples
        first = replace(first, rollout_id="a")
        second = [replace(s, rollout_id="a", reward=first.reward) for s in others[:1]]
        parts.append(Group(group.group_id, (first, *second, *others[1:])))
        once.append(Group(group.group_id, (first, *others[1:])))
    by_rollout = dense.advantages_of(once).tolist()
    # Group 3 has one sample.
    by_sample = [by_rollout[i] for n in (0, 3, 6, None, 10)
                 for i in ((9,) if n is None else (n, n, n + 1, n + 2))]  # fmt: skip
    given = tiny.one_sample_groups(parts, torch.tensor(by_sample))
    (got,), weights = run(folder / "parts", parts)
    (want,), plain = run(folder / "given", given, run__groups_per_step=len(given))
    assert near(got["actor/loss"], want["actor/loss"])
    assert all(torch.allclose(weights[n], plain[n], atol=1e-5) for n in plain)
    (step,), _ = run(folder / "mean", parts, algorithm__loss_agg_mode="seq-mean-token-mean")
    assert near(step["actor/loss"], -sum(by_rollout) / 13)
    assert not near(step["actor/loss"], -sum(by_sample) / 17, 1e-3)
    for shaping in ({"algorithm__use_kl_in_reward": True}, {"algorithm__overlong_buffer_len": 4}):
        refused("rollouts of several samples", folder / "refused", parts, **shaping)


@check
def rollouts_in_several_rows_train_from_a_file(folder: Path) -> None:
    """A group's rows begin with two tokens, and are shared at any depth without being told."""
    groups = forest_groups(5, 4, vocab_size=tiny.VOCAB)
    firsts, counts = [], []
    for group in groups:
        numbers = group.rollouts.tolist()
        firsts.append(Group("g", tuple(group.samples[numbers.index(n)] for n in set(numbers))))
        for n in range(max(numbers) + 1):
            own = [s for s, number in zip(group.samples, numbers) if number == n]
            counts.append(sum(s.num_loss_tokens for s in own))
    (step,), _ = run(folder, groups, run__groups_per_step=4)
    advantages = dense.advantages_of(firsts).tolist()
    loss = -sum(a * n for a, n in zip(advantages, counts, strict=True)) / sum(counts)
    assert near(step["actor/loss"], loss) and abs(loss) > 1e-3
    assert step["actor/trained_tokens"] == sum(counts)
    rewards = [s.reward for g in firsts for s in g.samples]
    assert near(step["reward/mean"], sum(rewards) / len(rewards))
    assert step["check/packed_vs_written_out"] < 1e-5 and step["tokens/reuse_ratio"] > 1.5
    assert all({int(s.prompt_ids[0]) for s in g.samples} == {0, 1} for g in groups[:1])


@check
def prompts_stay_resident_where_that_costs_less(folder: Path) -> None:
    groups = make_large_groups()
    settings = {
        "prefix_group__max_tokens_per_microbatch": 25,
        "prefix_group__max_resident_tokens": 25,
    }
    (repeated,), plain = run(
        folder / "never", groups, prefix_group__prefix_resident="never", **settings
    )
    (resident,), weights = run(folder / "auto", groups, **settings)
    assert repeated["packing/repeated_groups"] == 4 and repeated["tokens/resident"] == 0
    assert resident["packing/resident_groups"] == 4 and resident["packing/repeated_groups"] == 0
    # The prompts without their last token, two waves of them.
    assert resident["tokens/resident"] == 10 + 8 + 11 + 6 and resident["packing/waves"] == 2
    assert resident["tokens/unique"] < repeated["tokens/unique"]
    assert resident["tokens/logical"] == repeated["tokens/logical"]
    costs = [resident[f"packing/predicted_cost{x}"] for x in ("", "_repeated")]
    assert costs[0] < costs[1] == repeated["packing/predicted_cost"]
    assert abs(resident["actor/loss"] - repeated["actor/loss"]) < 1e-6
    assert all(torch.allclose(weights[n], plain[n], atol=1e-6) for n in plain)
    refused(
        "max_resident_tokens=9 are resident at once; raise max_resident_tokens",
        folder / "small",
        groups,
        prefix_group__max_tokens_per_microbatch=18,
        prefix_group__max_resident_tokens=9,
        prefix_group__prefix_resident="always",
    )


@check
def only_groups_without_spread_are_skipped(folder: Path) -> None:
    (step,), _ = run(folder, algorithm__skip_groups_without_spread=True)
    kept = [g for i, g in enumerate(tiny.make_groups(5)) if i not in (2, 3)]
    assert step["groups/skipped"] == 2 == step["groups/without_spread"]
    trained = sum(int(s.loss_mask.sum()) for g in kept for s in g.samples)
    assert step["actor/trained_tokens"] == trained


@check
def equal_rewards_have_no_gradient(folder: Path) -> None:
    flat = with_rewards([g for g in tiny.make_groups(5) if len(g.samples) > 1], lambda g, s: 0.25)
    (step,), _ = run(folder, flat, run__groups_per_step=4)
    assert step["groups/without_spread"] == 4 and step["groups/skipped"] == 0
    assert step["actor/updates"] == 1 and step["actor/grad_norm"] == 0 == step["actor/loss"]


@check
def groups_of_one_are_trained_on_their_reward(folder: Path) -> None:
    groups = [Group(g.group_id, g.samples[:1]) for g in tiny.make_groups(5)]
    (step,), _ = run(folder, groups)
    counts = [int(g.samples[0].loss_mask.sum()) for g in groups]
    weighted = sum(g.samples[0].reward * n for g, n in zip(groups, counts)) / sum(counts)
    assert near(step["actor/loss"], -weighted) and step["tokens/reuse_ratio"] == 1


@check
def one_token_and_equal_responses_are_ordinary(folder: Path) -> None:
    short = []
    for group in tiny.make_groups(5):
        one = group.samples[0].response_ids[:1]
        samples = tuple(
            replace(s, response_ids=one, loss_mask=torch.ones(1, dtype=torch.bool))
            for s in group.samples
        )
        short.append(Group(group.group_id, samples))
    (step,), _ = run(folder, short)
    assert step["response_length/max"] == 1 and step["actor/trained_tokens"] == 17
    assert step["tokens/unique"] == sum(
        len(g.samples[0].prompt_ids) + len(g.samples) for g in short
    )
    (detected,), _ = run(folder / "detected", short, prefix_group__min_shared=1)
    # Equal responses are encoded once, and trained as often as they were sampled.
    assert detected["tokens/unique"] == sum(len(g.samples[0].prompt_ids) + 1 for g in short)
    assert near(detected["actor/loss"], step["actor/loss"])
    assert near(detected["actor/grad_norm"], step["actor/grad_norm"])


@check
def a_minibatch_of_tool_tokens_is_left_out(folder: Path) -> None:
    groups = tiny.make_groups(4)
    masked = [
        Group(
            g.group_id,
            tuple(replace(s, loss_mask=torch.zeros_like(s.loss_mask)) for s in g.samples),
        )
        for g in groups[:2]
    ]
    settings = {"run__groups_per_step": 4, "algorithm__num_minibatches": 2}
    (step,), _ = run(folder / "half", [*masked, *groups[2:]], **settings)
    assert step["actor/updates"] == 1
    refused("no row has a trained token", folder / "none", masked, run__groups_per_step=2)


@check
def a_step_that_cannot_be_whitened_is_left_out(folder: Path) -> None:
    ordinary = [g for g in tiny.make_groups(8, seed=7) if len(g.samples) == 4][:2]
    settings = {"run__groups_per_step": 2, "run__save_interval": 1}
    for estimator in ("reinforce_plus_plus", "reinforce_plus_plus_baseline"):
        settings["algorithm__adv_estimator"] = estimator
        _, alone = run(folder / estimator / "alone", ordinary, **settings)
        for count in (0, 1):
            few = with_trained_tokens(ordinary, count)
            steps, weights = run(
                folder / estimator / str(count), [*few, *ordinary], run__num_steps=2, **settings
            )
            assert steps[0]["groups/skipped"] == 2 and steps[0]["actor/updates"] == 0
            assert "actor/loss" not in steps[0] and steps[0]["tokens/unique"] == 0
            assert steps[1]["groups/skipped"] == 0 and steps[1]["actor/updates"] == 1
            assert all(torch.equal(weights[n], alone[n]) for n in alone)
        # Two tokens can be whitened, equal rewards and a lone sample give no direction.
        two = with_trained_tokens(ordinary, 2)
        (step,), _ = run(folder / estimator / "two", two, **settings)
        assert step["actor/updates"] == 1 and step["actor/trained_tokens"] == 2
        lone = [Group("lone", ordinary[0].samples[2:3])]
        (step,), _ = run(
            folder / estimator / "lone",
            lone,
            run__groups_per_step=1,
            **{name: value for name, value in settings.items() if "groups" not in name},
        )
        assert step["actor/updates"] == 1 and step["actor/loss"] == 0 == step["actor/grad_norm"]
        flat = with_rewards(ordinary, lambda group, sample: 0.5)
        (step,), _ = run(folder / estimator / "flat", flat, **settings)
        assert step["actor/updates"] == 1 and step["actor/loss"] == 0 == step["actor/grad_norm"]


def with_trained_tokens(groups: Sequence[Group], count: int) -> list[Group]:
    """The same groups, of which only the first ``count`` tokens are trained."""
    changed = []
    for group in groups:
        samples = []
        for sample in group.samples:
            mask = torch.zeros_like(sample.loss_mask)
            mask[:count] = True
            count -= int(mask.sum())
            samples.append(replace(sample, loss_mask=mask))
        changed.append(Group(f"{group.group_id}-few", tuple(samples)))
    return changed


def nothing_is_built(*arguments: Any) -> Any:
    raise AssertionError("the model was built before everything was looked at")


@check
def what_cannot_be_run_is_refused_before_the_model_is_built(folder: Path) -> None:
    groups = tiny.make_groups(5)
    refused(
        "a row holds 9; raise max_tokens",
        folder / "a",
        groups,
        prefix_group__max_tokens_per_microbatch=9,
    )
    refused("reference", folder / "flash", prefix_group__attention_backend="flash_attn")
    refused("float64", folder / "b", model__transformer={"params_dtype": "float64"})
    built, run_parts.build_trained_model = run_parts.build_trained_model, nothing_is_built
    refused("/nowhere", folder / "f", model__pretrained_checkpoint="/nowhere")
    reference = {"algorithm__ref_hf": "/nowhere", "algorithm__use_kl_in_reward": True}
    refused("/nowhere", folder / "g", **reference)
    run_parts.build_trained_model = built
    own = tiny.with_advantages(tiny.make_groups(5))
    refused(
        "algorithm.skip_groups_without_spread=True concerns rewards",
        folder / "c",
        own,
        algorithm__skip_groups_without_spread=True,
    )
    (step,), _ = run(folder / "d", own)
    assert near(step["actor/loss"], -1)
    mixture = [*own[:2], *groups[2:]]
    refused("give them for all samples or for none", folder / "e", mixture)


@check
def a_fresh_run_does_not_mix_with_an_old_one(folder: Path) -> None:
    run(folder, run__save_interval=1)
    try:
        run(folder, run__load=False)
    except ValueError as error:
        assert "holds checkpoints" in str(error)
    else:
        raise AssertionError("checkpoints of another run were ignored")


@check
def a_resumed_run_follows_its_own_schedule(folder: Path) -> None:
    settings = {"run__save_interval": 1, "optimizer__lr_decay_style": "linear"}
    run(folder, **settings)
    steps, _ = run(folder, **settings, optimizer__lr=5e-4, run__num_steps=4)
    rates = [s["optimizer/lr"] for s in steps]
    # After updates 2 and 3 of 4, as the second configuration has it.
    assert near(rates[1], 5e-4 * 2 / 4, 1e-9) and near(rates[2], 5e-4 / 4, 1e-9)


@check
def updates_without_clipping_report_their_norm(folder: Path) -> None:
    (step,), _ = run(folder, optimizer__clip_grad=0.0)
    assert step["actor/grad_norm"] > 0


@check
def a_server_gets_every_version_once(folder: Path) -> None:
    folder.mkdir(parents=True)
    source = OpenAIServerSource("http://127.0.0.1:9", reload="sglang", export_dir=folder / "export")
    taken: list[tuple[str, int]] = []
    source.reload_weights = lambda path, version: taken.append((path.name, version))  # type: ignore
    params = SamplingParams(num_generations=1, max_response_tokens=1)
    stream = SampledRollouts(None, source, lambda prompt, response: 0.0, params)  # type: ignore
    left_behind = folder / "export" / "version-2"
    left_behind.mkdir(parents=True)
    (left_behind / "torn.safetensors").touch()

    def export(path: Path) -> None:
        path.mkdir(parents=True)
        (path / "model.safetensors").touch()

    with parallel_run(ParallelConfig(), 0):
        shared = SharedStream(stream, is_first=True)
        for version in (1, 2, 3):
            shared.update_weights(export, version)
            # What an interrupted run wrote is gone, and so is every earlier version.
            (only,) = (folder / "export").iterdir()
            assert [p.name for p in only.iterdir()] == ["model.safetensors"]
    assert taken == [("version-1", 1), ("version-2", 2), ("version-3", 3)]
