"""Whole runs side by side: ``python -m tests.train.runs_worker CASE FOLDER``."""

from __future__ import annotations

import json
import random
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

warnings.filterwarnings("ignore")

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from megatron_pg.checkpoint import export_hf, load_hf, read_hf_config  # noqa: E402
from megatron_pg.data import Group, read_rollouts  # noqa: E402
from megatron_pg.train import TrainConfig, load_config, parallel_run  # noqa: E402
from megatron_pg.train.sources import open_sampling  # noqa: E402
from tests.checkpoint import tiny as stock  # noqa: E402
from tests.train import dense, forked, gathering  # noqa: E402
from tests.train.layouts import LAYOUTS  # noqa: E402
from tests.train.tiny import VOCAB  # noqa: E402

NUM_KILLS = 10
# More than a run gets through between its kills.
NUM_STEPS = 40
TIMEOUT_MINUTES = 3.0
Weights = dict[str, torch.Tensor]


def run(
    config: TrainConfig,
    layout: str,
    out: Path,
    train: Callable[[TrainConfig], None] = forked.train,
    **changes: object,
) -> tuple[Weights, list]:
    """Weights and metrics of a run on a layout, written to ``out``."""
    config = on_layout(config, layout, out, **changes)
    forked.finish(lambda: train(config), world_size(layout), out.with_suffix(".log"))
    return result(config)


def on_layout(config: TrainConfig, layout: str, out: Path, **changes: object) -> TrainConfig:
    # Long enough for a machine that is busy with other things.
    parallel = replace(LAYOUTS[layout], distributed_timeout_minutes=TIMEOUT_MINUTES)
    values = {"out": str(out), "export_hf": True, **changes}
    return replace(config, parallel=parallel, run=replace(config.run, **values))


def world_size(layout: str) -> int:
    return 1 if layout == "one" else 2


def result(config: TrainConfig) -> tuple[Weights, list]:
    out = Path(config.run.out)
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    # Each step once, in order.
    assert [m["step"] for m in steps] == list(range(1, config.run.num_steps + 1))
    return load_weights(out / f"hf_step_{config.run.num_steps}"), steps


def load_weights(folder: Path) -> Weights:
    """All tensors of a Hugging Face folder; stages write files of their own."""
    files = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    assert files
    return {name: tensor for file in files for name, tensor in file.items()}


def assert_near(name: str, ours: Weights, theirs: Weights, start: Weights, bound: float) -> None:
    """Every tensor differs by at most ``bound`` of its movement."""
    worst = 0.0
    assert ours.keys() == theirs.keys() == start.keys()
    for key, want in theirs.items():
        moved = (want - start[key]).norm()
        assert moved > 1e-3 * start[key].norm(), f"{key} did not train"
        worst = max(worst, float((ours[key] - want).norm() / moved))
    assert worst <= bound, f"{name}: {worst:.1e} of the movement"
    print(f"near {name}: {worst:.1e} of the movement", flush=True)


def assert_same(ours: tuple[Weights, list], theirs: tuple[Weights, list]) -> None:
    """Bit-identical weights and metrics; only times and memory may differ."""
    assert ours[0].keys() == theirs[0].keys()
    assert all(torch.equal(ours[0][name], theirs[0][name]) for name in ours[0])
    ours_steps, theirs_steps = (
        [{k: v for k, v in m.items() if k.split("/")[0] not in ("time", "perf")} for m in steps]
        for steps in (ours[1], theirs[1])
    )
    assert ours_steps == theirs_steps and "actor/loss" in ours_steps[0]


def written_out_run(config: TrainConfig, out: Path) -> None:
    """The run of ``config`` by the stock model, dense arrays and torch's own Adam."""
    groups = read_rollouts(config.rollout.files, vocab_size=VOCAB)
    case = dense.LossCase(kl=config.algorithm.policy.kl_loss_coef, dual=3.0)
    hf = Path(str(config.model.hf))
    with parallel_run(config.parallel, 0):
        models = []
        for _ in range(2):
            (model,) = stock.build(read_hf_config(hf), stock.Layout(), torch.float32, packed=False)
            load_hf([model], hf)
            models.append(model)

        def logits_of(model: torch.nn.Module) -> dense.LogitsOf:
            def call(tokens: torch.Tensor) -> torch.Tensor:
                n = len(tokens)
                mask = torch.triu(torch.ones(n, n, dtype=torch.bool), 1)[None, None]
                return model(tokens[None], torch.arange(n)[None], mask)[0]

            return call

        def with_logprobs(batch: list[Group]) -> list[Group]:
            with torch.no_grad():
                old, ref = (dense.sample_logprobs(logits_of(m), batch, VOCAB) for m in models)
            numbers = iter(range(len(old)))
            return [
                replace(
                    g,
                    samples=tuple(
                        replace(s, old_logprobs=old[i].double(), ref_logprobs=ref[i].double())
                        for s, i in zip(g.samples, numbers)
                    ),
                )
                for g in batch
            ]

        policy = models[0]
        adam = torch.optim.AdamW(
            policy.parameters(),
            lr=config.optimizer.lr,
            eps=config.optimizer.adam_eps,
            weight_decay=0.0,
        )
        per_step, count = config.run.groups_per_step, config.algorithm.num_minibatches
        for step in range(config.run.num_steps):
            places = [(step * per_step + i) % len(groups) for i in range(per_step)]
            chosen = with_logprobs([groups[i] for i in places])
            size = per_step // count
            for _ in range(config.algorithm.ppo_epochs):
                for first in range(0, per_step, size):
                    adam.zero_grad()
                    part = chosen[first : first + size]
                    dense.dense_loss(logits_of(policy), part, case, VOCAB).backward()
                    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
                    adam.step()
        export_hf([policy], out, hf)


def whole_run(config: TrainConfig, folder: Path) -> None:
    """Ten steps of two epochs over two minibatches with a KL term."""
    written = folder / "written_out"
    forked.finish(lambda: written_out_run(config, written), 1, folder / "written_out.log")
    reference, start = load_weights(written), load_weights(Path(str(config.model.hf)))
    for layout in ("one", "tp2_sp", "pp2", "dp2_distributed"):
        weights, steps = run(config, layout, folder / layout)
        clipped = sum(m["actor/clipfrac_low"] + m["actor/clipfrac_high"] for m in steps)
        assert clipped > 0 and all(m["actor/updates"] == 4 for m in steps)
        assert min(m["tokens/reuse_ratio"] for m in steps) > 1.2
        assert all(m["actor/grad_norm"] > 0 for m in steps)
        assert_near(layout, weights, reference, start, 2e-3)


def resume(config: TrainConfig, folder: Path) -> None:
    """Stopped and continued equals never stopped, on one rank and on two."""
    for layout in ("one", "dp2_distributed"):
        straight = run(config, layout, folder / f"straight_{layout}", num_steps=6)
        out = folder / f"resumed_{layout}"
        run(config, layout, out, gathering.train_and_weigh, num_steps=2, save_interval=2)
        num_parameters = sum(weight.numel() for weight in straight[0].values())
        gathering.assert_gathered_once(
            out.with_suffix(".log"), num_parameters, world_size(layout), "distributed" in layout
        )
        run(config, layout, out, num_steps=3, save_interval=2)
        # As if the last steps had been made after the newest checkpoint and were lost.
        shutil.rmtree(out / "checkpoints" / "iter_0000003")
        (out / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("2")
        assert_same(run(config, layout, out, num_steps=6, save_interval=2), straight)
        # A finished run that is started again changes nothing, and says with what else it was.
        other = replace(config, optimizer=replace(config.optimizer, lr=0.5))
        assert_same(run(other, layout, out, num_steps=6, save_interval=2), straight)
        words = f"with other settings: optimizer.lr {config.optimizer.lr} -> 0.5\n"
        assert out.with_suffix(".log").read_text().count(words) == 1
        summary = json.loads((out / "summary.json").read_text())
        changed = {"optimizer.lr": [config.optimizer.lr, 0.5]}
        assert summary["changed_settings"] == [{"step": 6, "changed": changed}]
        names = sorted(p.name for p in (out / "checkpoints").iterdir())
        tracker = "latest_checkpointed_iteration.txt"
        assert names == ["huggingface", "iter_0000004", "iter_0000006", tracker], names
        print(f"same {layout}", flush=True)


def layouts(config: TrainConfig, folder: Path) -> None:
    """A run that goes on under other layouts ends where it would have ended."""
    straight, _ = run(config, "tp2_sp", folder / "straight", num_steps=6)
    start = load_weights(Path(str(config.model.hf)))
    chains = {
        "plain": ("tp2_sp", "pp2", "dp2"),
        "distributed": ("tp2_sp_distributed", "dp2_distributed"),
    }
    for name, chain in chains.items():
        for number, layout in enumerate(chain, 1):
            steps = 6 * number // len(chain)
            moved, _ = run(config, layout, folder / name, num_steps=steps, save_interval=1)
        assert_near(f"moved {name}", moved, straight, start, 2e-3)
    other = on_layout(config, "dp2_distributed", folder / "plain", num_steps=7, save_interval=1)
    log = folder / "refused.log"
    codes = forked.start(lambda: forked.train(other), 2, log).wait(120)
    assert set(codes.values()) == {1}
    assert "was saved with parallel.use_distributed_optimizer=false" in log.read_text()
    summary = json.loads((folder / "plain" / "summary.json").read_text())
    assert summary["changed_settings"] == [], "a layout changes nothing"
    damaged_on_one_rank(folder / "plain", other)


def damaged_on_one_rank(out: Path, config: TrainConfig) -> None:
    """A file that one of two ranks compares: the other ends with it, with the same words."""
    folder = max((out / "checkpoints").glob("iter_*"))
    names = sorted(path.name for path in folder.iterdir() if path.name != "manifest.json")
    path = next(folder / name for name in names[1::2] if name.endswith(".distcp"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    config = on_layout(config, "dp2", out, num_steps=7, save_interval=1)
    log = out.with_name("damaged.log")
    codes = forked.start(lambda: forked.train(config), 2, log).wait(120)
    assert set(codes.values()) == {1}
    words = f"ValueError: {path}: its bytes are not those that manifest.json lists"
    assert log.read_text().count(words) == 2


def kill(config: TrainConfig, folder: Path) -> None:
    """Killed at ten random moments, three of them while a checkpoint is written."""
    layout, chance = "pp2", random.Random(5)
    straight = run(config, layout, folder / "straight", num_steps=NUM_STEPS, save_interval=1)
    assert all(m["packing/resident_groups"] > 0 for m in straight[1])
    pace = sum(m["time/step"] for m in straight[1][2:]) / (NUM_STEPS - 2)
    out = folder / "killed"
    config = on_layout(config, layout, out, num_steps=NUM_STEPS, save_interval=1)
    checkpoints, log = out / "checkpoints", folder / "killed.log"
    num_writes, alone, together = 0, 0, 0
    for number in range(NUM_KILLS):
        ranks = forked.start(lambda: forked.train(config), 2, log)
        during_write = number % 3 == 1
        deadline = time.monotonic() + 120
        before = set(checkpoints.glob(".partial-*"))
        lines = count_lines(out / "metrics.jsonl")
        while True:
            if during_write and set(checkpoints.glob(".partial-*")) - before:
                time.sleep(chance.uniform(0, 0.02))
                # A write that has ended meanwhile is not the one; the next will be.
                if set(checkpoints.glob(".partial-*")) - before:
                    break
            # Also before the first step, while the checkpoint is loaded.
            has_started = count_lines(out / "metrics.jsonl") > lines or number % 3 == 2
            if not during_write and has_started:
                time.sleep(chance.uniform(0, 2 * pace + (number % 3 == 2)))
                break
            assert not ranks.poll() and time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.002)
        num_writes += bool(set(checkpoints.glob(".partial-*")) - before)
        assert not ranks.poll(), "the run ended before it was killed"
        victims = [0, 1] if number % 2 else [chance.randrange(2)]
        ranks.kill(victims)
        codes = ranks.wait(timeout=60 * TIMEOUT_MINUTES + 30)
        assert all(codes[rank] == -9 for rank in victims) and 0 not in codes.values()
        alone, together = alone + (len(victims) == 1), together + (len(victims) == 2)
    assert num_writes >= 3 and alone == together == NUM_KILLS // 2
    forked.finish(lambda: forked.train(config), 2, log)
    assert_same(result(config), straight)
    assert not list(checkpoints.glob(".partial-*"))
    print(f"killed {NUM_KILLS} times, {num_writes} while writing", flush=True)


def sampled(config: TrainConfig, folder: Path) -> None:
    """Rollouts from the model itself, evaluation before and after."""
    lines = {}
    for layout in ("pp2", "dp2"):
        _, steps = run(config, layout, folder / layout)
        lines[layout] = steps
        assert all(m["actor/rollout_logprob_diff"] < 1e-4 for m in steps), steps
        assert all(m["tokens/reuse_ratio"] > 1.5 for m in steps)
        assert all(1 < m["response_length/mean"] <= 6 for m in steps)
        assert max(m["reward/std"] for m in steps) > 0
        summary = json.loads((folder / layout / "summary.json").read_text())
        # The learning rate is 0: the same prompts and seeds are answered and judged alike.
        assert summary["reward_before"] == summary["reward_after"] > 0
        assert summary["standard_error"] > 0
    # A sample's randomness is its own, whichever ranks draw it.
    for name in ("reward/mean", "response_length/mean", "tokens/logical"):
        assert [m[name] for m in lines["pp2"]] == [m[name] for m in lines["dp2"]]
    straight = result(on_layout(config, "pp2", folder / "pp2"))
    out = folder / "resumed"
    run(config, "pp2", out, num_steps=1, save_interval=1)
    assert_same(run(config, "pp2", out, num_steps=2, save_interval=1), straight)
    task = open_sampling(config, None).task
    trained = {p.metadata["question"] for p in task.prompts(0, 200)}
    judged = {p.metadata["question"] for p in task.held_out().prompts(0, config.run.eval_prompts)}
    assert not trained & judged and len(judged) > 1
    print("sampled", flush=True)


def count_lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.is_file() else 0


def background_save(config: TrainConfig, folder: Path) -> None:
    """Checkpoints written beside the steps hold what was saved, not what came later."""
    straight = run(config, "dp2_distributed", folder / "straight", num_steps=5)
    out = folder / "background"
    run(config, "dp2_distributed", out, num_steps=3, save_interval=1, async_save=True)
    again = run(config, "dp2_distributed", out, num_steps=5, save_interval=1, async_save=True)
    assert_same(again, straight)
    print("same in the background", flush=True)


def main() -> None:
    case, folder = sys.argv[1], Path(sys.argv[2])
    globals()[case](load_config(folder / "config.yaml"), folder)


if __name__ == "__main__":
    main()
