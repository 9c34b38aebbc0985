"""Whole runs: packed against written out, stopped against never stopped."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("megatron.core")

from megatron_pg.checkpoint import MegatronFolder, reshard_checkpoint  # noqa: E402
from megatron_pg.train import TrainConfig, load_config  # noqa: E402
from megatron_pg.train.rollouts import open_sampling  # noqa: E402
from tests.ranks import Job, Pool  # noqa: E402
from tests.train import family_runs, tiny  # noqa: E402
from tests.train.layouts import NUM_RANKS  # noqa: E402
from tests.train.runs import (  # noqa: E402
    TIMEOUT_MINUTES,
    Ended,
    Weights,
    assert_near,
    assert_same,
    load_weights,
    on_layout,
    result,
    run,
    train,
    train_and_weigh,
    written_out_run,
)

NUM_KILLS = 10
# More than a run gets through between its kills.
NUM_STEPS = 40
TRACKER = "latest_checkpointed_iteration.txt"


def prepare(folder: Path, **overrides: object) -> TrainConfig:
    """Groups of four samples, so that minibatches are equal however samples are grouped."""
    groups = [g for g in tiny.make_groups(9, seed=3) if len(g.samples) == 4]
    assert len(groups) == 8
    sections = tiny.run_sections(folder, groups)
    sections["rollout"]["shuffle"] = False
    sections["algorithm"] = {
        "ppo_epochs": 2,
        "num_minibatches": 2,
        "policy": {"kl_loss_coef": 0.1, "clip_ratio_c": 3.0},
    }
    sections["run"] |= {"groups_per_step": 4, "num_steps": 10}
    sections["prefix_group"]["max_tokens_per_microbatch"] = 70
    sections["run"]["self_check_interval"] = None
    return load_config(tiny.write_config(folder / "config.yaml", sections, **overrides))


def start_weights(config: TrainConfig) -> Weights:
    return load_weights(Path(str(config.model.hf)))


@pytest.fixture(scope="module")
def written_out(
    ranks: Pool, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainConfig, Weights]:
    """A run and the weights with which the same run ends when every sample is written out."""
    folder = tmp_path_factory.mktemp("written_out")
    config = prepare(folder)
    ranks.run(1, written_out_run, config, folder / "written_out", timeout=300)
    return config, load_weights(folder / "written_out")


@pytest.mark.megatron
@pytest.mark.parametrize(
    "layout", ["one", "tp2_sp", "pp2", "cp2_overlap", "cp2_pp2", "cp2_tp2_sp", "dp2_distributed"]
)
def test_ten_steps_end_at_the_weights_of_a_written_out_run(
    ranks: Pool, written_out: tuple[TrainConfig, Weights], layout: str, tmp_path: Path
) -> None:
    """Two epochs over two minibatches a step, with a KL term."""
    config, reference = written_out
    weights, steps = run(ranks, config, layout, tmp_path / "out")
    clipped = sum(m["actor/clipfrac_low"] + m["actor/clipfrac_high"] for m in steps)
    assert clipped > 0 and len(steps) == 10 and all(m["actor/updates"] == 4 for m in steps)
    assert min(m["tokens/reuse_ratio"] for m in steps) > 1.2
    assert all(m["actor/grad_norm"] > 0 for m in steps)
    assert_near(weights, reference, start_weights(config), 2e-3)


@pytest.mark.megatron
@pytest.mark.parametrize("layout", ["one", "dp2_distributed", "cp2_distributed"])
def test_a_resumed_run_is_bit_identical(ranks: Pool, layout: str, tmp_path: Path) -> None:
    config = prepare(tmp_path, optimizer__lr_warmup_iters=3, rollout__shuffle=True)
    straight = run(ranks, config, layout, tmp_path / "straight", num_steps=6)
    out = tmp_path / "resumed"
    first = on_layout(config, layout, out, num_steps=2, save_interval=2)
    sizes = ranks.run(NUM_RANKS[layout], train_and_weigh, first, timeout=300)
    # Two moments, and of a distributed optimizer the parameters once more, of four bytes each.
    num_parameters = sum(weight.numel() for weight in straight[0].values())
    whole = (3 if "distributed" in layout else 2) * 4 * num_parameters
    handed = [size for (size,) in sizes]
    # Each rank hands over what it holds, and no more: nothing has been gathered.
    assert sum(handed) == whole and max(handed) <= 1.01 * whole / len(handed)
    run(ranks, config, layout, out, num_steps=3, save_interval=2)
    # As if the last steps had been made after the newest checkpoint and were lost.
    shutil.rmtree(out / "checkpoints" / "iter_0000003")
    (out / "checkpoints" / TRACKER).write_text("2")
    assert_same(run(ranks, config, layout, out, num_steps=6, save_interval=2), straight)
    # A finished run that is started again changes nothing, and says with what else it was.
    other = replace(config, optimizer=replace(config.optimizer, lr=0.5))
    assert_same(run(ranks, other, layout, out, num_steps=6, save_interval=2), straight)
    words = f"with other settings: optimizer.lr {config.optimizer.lr} -> 0.5\n"
    assert out.with_suffix(".log").read_text().count(words) == 1
    assert "all 6 steps are done; raise run.num_steps" in out.with_suffix(".log").read_text()
    summary = json.loads((out / "summary.json").read_text())
    changed = {"optimizer.lr": [config.optimizer.lr, 0.5]}
    assert summary["changed_settings"] == [{"step": 6, "changed": changed}]
    names = sorted(p.name for p in (out / "checkpoints").iterdir())
    assert names == ["huggingface", "iter_0000004", "iter_0000006", TRACKER], names


@pytest.fixture(scope="module")
def straight(ranks: Pool, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, Weights]:
    """A run of six steps on one layout, and the weights with which it ends."""
    folder = tmp_path_factory.mktemp("straight")
    config = prepare(folder, algorithm__ppo_epochs=1)
    return config, run(ranks, config, "tp2_sp", folder / "straight", num_steps=6)[0]


@pytest.mark.megatron
@pytest.mark.parametrize(
    "chain",
    [
        ("tp2_sp", "pp2", "cp2"),
        ("cp2_pp2", "tp2"),
        ("tp2_sp_distributed", "dp2_distributed"),
        ("pp2_vpp2_ends", "pp2_first"),
    ],
    ids="-".join,
)
def test_a_run_goes_on_under_another_layout(
    ranks: Pool, straight: tuple[TrainConfig, Weights], chain: tuple[str, ...], tmp_path: Path
) -> None:
    config, want = straight
    out = tmp_path / "moved"
    for number, layout in enumerate(chain, 1):
        steps = 6 * number // len(chain)
        moved, _ = run(ranks, config, layout, out, num_steps=steps, save_interval=1)
    assert_near(moved, want, start_weights(config), 2e-3)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["changed_settings"] == [], "a layout changes nothing"


@pytest.mark.megatron
def test_a_resharded_run_goes_on_with_its_experts_laid_out_otherwise(
    ranks: Pool, tmp_path: Path
) -> None:
    """From whole experts beside divided layers to context parallelism, optimizer included."""
    config = family_runs.prepare(tmp_path, "qwen3_moe")
    want, _ = run(ranks, config, "tp2_ep2_etp1_sp", tmp_path / "straight", num_steps=4)
    run(ranks, config, "tp2_ep2_etp1_sp", tmp_path / "first", num_steps=2, save_interval=2)
    source, out = tmp_path / "first/checkpoints", tmp_path / "second/checkpoints"
    with pytest.raises(ValueError, match="experts lies apart .*=1 Megatron-Core has them together"):
        reshard_checkpoint(source, out, tp_size=1, pp_size=1)
    reshard_checkpoint(source, out, tp_size=1, pp_size=1, ep_size=2)
    assert MegatronFolder(source).args.expert_tensor_parallel_size == 1
    ranks.run(2, train, on_layout(config, "cp2_ep2", tmp_path / "second", num_steps=4), timeout=300)
    assert count_lines(tmp_path / "second/metrics.jsonl") == 2, "steps 3 and 4"
    moved = load_weights(tmp_path / "second/hf_step_4")
    assert family_runs.largest_difference(moved, want, start_weights(config)) <= 2e-4


def refused(ranks: Pool, config: TrainConfig, log: Path) -> str:
    """What two ranks say that go on with a checkpoint of two ranks; both must end."""
    codes = ranks.start(2, train, config, log=log).wait(120)
    assert set(codes.values()) == {1}
    return log.read_text()


def test_another_kind_of_optimizer_cannot_go_on(ranks: Pool, tmp_path: Path) -> None:
    config, out = prepare(tmp_path, algorithm__ppo_epochs=1), tmp_path / "out"
    run(ranks, config, "dp2", out, num_steps=1, save_interval=1)
    other = on_layout(config, "dp2_distributed", out, num_steps=2, save_interval=1)
    told = refused(ranks, other, tmp_path / "refused.log")
    assert "was saved with parallel.use_distributed_optimizer=false" in told


def test_a_file_that_one_of_two_ranks_compares_ends_both(ranks: Pool, tmp_path: Path) -> None:
    """With the same words."""
    config, out = prepare(tmp_path, algorithm__ppo_epochs=1), tmp_path / "out"
    run(ranks, config, "dp2", out, num_steps=1, save_interval=1)
    folder = max((out / "checkpoints").glob("iter_*"))
    names = sorted(path.name for path in folder.iterdir() if path.name != "manifest.json")
    path = next(folder / name for name in names[1::2] if name.endswith(".distcp"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    config = on_layout(config, "dp2", out, num_steps=2, save_interval=1)
    told = refused(ranks, config, tmp_path / "damaged.log")
    words = f"ValueError: {path}: its bytes are not those that manifest.json lists"
    assert told.count(words) == 2


def kill(job: Job, victims: Sequence[int]) -> None:
    job.kill(victims)
    codes = job.wait(timeout=60 * TIMEOUT_MINUTES + 30)
    assert all(codes[rank] == -9 for rank in victims) and 0 not in codes.values()


def test_kills_at_random_moments_change_nothing(ranks: Pool, tmp_path: Path) -> None:
    """Ten times, three of them while a checkpoint is written."""
    config = prepare(
        tmp_path,
        algorithm__ppo_epochs=1,
        algorithm__num_minibatches=1,
        algorithm__policy={},
        run__groups_per_step=2,
        # Divided groups, so that kills also fall between the phases of resident prompts.
        prefix_group__max_tokens_per_microbatch=24,
        prefix_group__prefix_resident="always",
    )
    chance, settings = random.Random(5), dict(num_steps=NUM_STEPS, save_interval=1)
    straight = run(ranks, config, "pp2", tmp_path / "straight", **settings)
    assert all(m["packing/resident_groups"] > 0 for m in straight[1])
    pace = sum(m["time/step"] for m in straight[1][2:]) / (NUM_STEPS - 2)
    out, log = tmp_path / "killed", tmp_path / "killed.log"
    config = on_layout(config, "pp2", out, **settings)
    checkpoints, metrics = out / "checkpoints", out / "metrics.jsonl"
    num_writes, alone, together = 0, 0, 0
    for number in range(NUM_KILLS):
        job = ranks.start(2, train, config, log=log)
        during_write = number % 3 == 1
        deadline = time.monotonic() + 120
        before = set(checkpoints.glob(".partial-*"))
        lines = count_lines(metrics)
        while True:
            if during_write and set(checkpoints.glob(".partial-*")) - before:
                time.sleep(chance.uniform(0, 0.02))
                # A write that has ended meanwhile is not the one; the next will be.
                if set(checkpoints.glob(".partial-*")) - before:
                    break
            # Also before the first step, while the checkpoint is loaded.
            has_started = count_lines(metrics) > lines or number % 3 == 2
            if not during_write and has_started:
                time.sleep(chance.uniform(0, 2 * pace + (number % 3 == 2)))
                break
            assert not job.poll() and time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.002)
        num_writes += bool(set(checkpoints.glob(".partial-*")) - before)
        assert not job.poll(), "the run ended before it was killed"
        victims = [0, 1] if number % 2 else [chance.randrange(2)]
        kill(job, victims)
        alone, together = alone + (len(victims) == 1), together + (len(victims) == 2)
    assert num_writes >= 3 and alone == together == NUM_KILLS // 2
    ranks.run(2, train, config, log=log, timeout=300)
    assert_same(result(config), straight)
    assert not list(checkpoints.glob(".partial-*"))


def count_lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.is_file() else 0


@pytest.fixture(scope="module")
def sampled(
    ranks: Pool, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainConfig, Callable[[str], tuple[Path, Ended]]]:
    """Runs on rollouts of the model itself, with evaluation before and after, by layout."""
    pytest.importorskip("reasoning_gym")
    folder = tmp_path_factory.mktemp("sampled")
    sections = tiny.run_sections(folder)
    tiny.save_tokenizer(folder / "model")
    del sections["rollout"]["files"]
    sections["optimizer"]["lr"] = 0.0
    sections["rollout"] |= {
        "source": "model",
        "reward": "tests.train.rewards:share_of_digits",
        "num_generations": 4,
        "max_response_tokens": 6,
    }
    sections["run"] |= {
        "groups_per_step": 4,
        "num_steps": 2,
        "eval_prompts": 4,
        "eval_generations": 2,
    }
    sections["prefix_group"]["max_tokens_per_microbatch"] = 90
    config = load_config(tiny.write_config(folder / "config.yaml", sections))

    @cache
    def on(layout: str) -> tuple[Path, Ended]:
        return folder / layout, run(ranks, config, layout, folder / layout)

    return config, on


@pytest.mark.parametrize("layout", ["pp2", "dp2", "cp2"])
def test_rollouts_of_the_model_itself(sampled, layout: str) -> None:
    out, (_, steps) = sampled[1](layout)
    assert all(m["actor/rollout_logprob_diff"] < 1e-4 for m in steps), steps
    assert all(m["tokens/reuse_ratio"] > 1.5 for m in steps)
    assert all(1 < m["response_length/mean"] <= 6 for m in steps)
    assert max(m["reward/std"] for m in steps) > 0
    summary = json.loads((out / "summary.json").read_text())
    # The learning rate is 0: the same prompts and seeds are answered and judged alike.
    assert summary["reward_before"] == summary["reward_after"] > 0
    assert summary["standard_error"] > 0


def test_the_randomness_of_a_sample_is_its_own_whichever_ranks_draw_it(sampled) -> None:
    steps = [sampled[1](layout)[1][1] for layout in ("pp2", "dp2", "cp2")]
    for name in ("reward/mean", "response_length/mean", "tokens/logical"):
        pp2, dp2, cp2 = ([m[name] for m in of_run] for of_run in steps)
        assert pp2 == dp2 == cp2, name


def test_a_resumed_run_samples_as_one_that_was_never_stopped(
    ranks: Pool, sampled, tmp_path: Path
) -> None:
    config, on = sampled
    run(ranks, config, "pp2", tmp_path / "out", num_steps=1, save_interval=1)
    resumed = run(ranks, config, "pp2", tmp_path / "out", num_steps=2, save_interval=1)
    assert_same(resumed, on("pp2")[1])


def test_what_judges_a_run_is_not_trained_on(sampled) -> None:
    config, _ = sampled
    task = open_sampling(config, None).task
    trained = {p.metadata["question"] for p in task.prompts(0, 200)}
    judged = {p.metadata["question"] for p in task.held_out().prompts(0, config.run.eval_prompts)}
    assert not trained & judged and len(judged) > 1
