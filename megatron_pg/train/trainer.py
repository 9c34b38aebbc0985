"""The loop: rollouts, advantages, logprobs, updates, metrics, checkpoints."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..checkpoint import export_hf
from ..data import CostModel, Group
from ..loss import kl_in_reward, metric_means
from ..mcore import count_attention_calls
from .batch import (
    Minibatch,
    PackingConfig,
    compute_advantages,
    make_minibatch,
    shaped_rewards,
    split_evenly,
    written_out,
)
from .config import TrainConfig, config_dict
from .evaluate import Evaluation, evaluate
from .metrics import MetricsWriter, PhaseTimer, plot_reward
from .model import build_reference, build_trained_model
from .passes import HeadConfig, compute_logprobs, train_pass, with_rollout_values
from .ranks import Ranks
from .sources import make_stream
from .state import find_checkpoint, load_checkpoint, save_checkpoint


class Trainer:
    """One run; constructed and driven on every rank alike."""

    def __init__(self, config: TrainConfig, ranks: Ranks) -> None:
        self.config = config
        self.ranks = ranks
        algorithm, run = config.algorithm, config.run
        updates = run.num_steps * algorithm.ppo_epochs * algorithm.num_minibatches
        self.model = build_trained_model(config, updates)
        self.reference = build_reference(config) if algorithm.needs_reference else None
        self.head = HeadConfig(
            temperature=config.rollout.temperature,
            vocab_size=self.model.plan.vocab_size,
            chunk_tokens=run.logprob_chunk_tokens,
        )
        self.packing = packing_config(config, self.model.plan)
        self.stream = make_stream(config, self.model.chunks, self.head.vocab_size, ranks)
        self.folder = Path(run.out)
        self.step = 0
        self.evaluations: dict[str, Evaluation] = {}
        self.totals = {"unique_tokens": 0, "logical_tokens": 0, "seconds": 0.0}
        self._resume()

    def run(self) -> None:
        """Train to the last step; the first rank writes metrics, plot and summary."""
        run = self.config.run
        writer = None
        if self.ranks.rank == 0:
            writer = MetricsWriter(run, config_dict(self.config), self.step)
        if run.eval_prompts and "before" not in self.evaluations:
            self.evaluations["before"] = self._evaluate(writer, "before training")
        while self.step < run.num_steps:
            started = time.perf_counter()
            metrics = self.train_step()
            if metrics is None:
                break
            if run.save_interval and self.step % run.save_interval == 0:
                self._save()
            self.totals["seconds"] += time.perf_counter() - started
            if writer is not None:
                writer.write(metrics)
        if run.eval_prompts:
            self.evaluations["after"] = self._evaluate(writer, "after training")
        if run.save_interval and self.step % run.save_interval:
            self._save()
        if run.export_hf and self.config.model.hf is not None:
            export_hf(
                self._bare_chunks(), self.folder / f"hf_step_{self.step}", self.config.model.hf
            )
        if writer is not None:
            self._finish(writer)
        dist.barrier()

    def train_step(self) -> dict[str, float] | None:
        """One rollout and its updates; None when the stream has ended.

        Returns:
            The step's metrics, complete on the first rank.
        """
        timer, started = PhaseTimer(), time.perf_counter()
        algorithm = self.config.algorithm
        with timer.phase("rollout"):
            groups = self.stream.next_groups(self.config.run.groups_per_step)
        if not groups:
            return None
        rewards = shaped_rewards(groups, algorithm, self.config.rollout)
        metrics = {"step": float(self.step + 1)} | _rollout_metrics(groups, rewards)
        check = self.config.run.self_check_interval
        if check is not None and (self.step == 0 or (check and self.step % check == 0)):
            with timer.phase("self_check"):
                metrics["check/packed_vs_written_out"] = self.self_check(groups)
        minibatches = self._prepare(groups, rewards, timer, metrics)
        sums: dict[str, float] = {}
        for _ in range(algorithm.ppo_epochs):
            for minibatch in minibatches:
                with timer.phase("train"):
                    update = train_pass(
                        self.model.chunks,
                        minibatch.microbatches,
                        algorithm.policy,
                        self.head,
                        self.ranks,
                    )
                with timer.phase("optimizer"):
                    grad_norm = self._optimizer_step()
                sums["updates"] = sums.get("updates", 0.0) + 1
                sums["grad_norm"] = sums.get("grad_norm", 0.0) + grad_norm
                for name, value in self._over_ranks(update).items():
                    sums[name] = sums.get(name, 0.0) + value
        self.step += 1
        with timer.phase("sync"):
            self.stream.update_weights(self._export_policy, self.step)
        metrics |= _update_metrics(sums) | self._token_metrics(minibatches)
        seconds = time.perf_counter() - started
        metrics |= timer.metrics() | {"time/step": seconds}
        for kind in ("unique", "logical"):
            self.totals[f"{kind}_tokens"] += int(metrics[f"tokens/{kind}"])
            metrics[f"perf/{kind}_tokens_per_second"] = metrics[f"tokens/{kind}"] / seconds
        metrics["perf/peak_memory_bytes"] = self._peak_memory_bytes()
        metrics["optimizer/lr"] = float(self.model.optimizer.param_groups[0]["lr"])
        return metrics

    def self_check(self, groups: Sequence[Group]) -> float:
        """Largest |logprob(packed) - logprob(written out)| over a few of the groups."""
        few = list(groups)[: self.config.run.self_check_groups]
        packed = self._logprobs_by_sample(few)
        alone = self._logprobs_by_sample(written_out(few))
        worst = 0.0
        for sample, logprobs in packed.items():
            if len(logprobs):
                worst = max(worst, float((logprobs - alone[sample]).abs().max()))
        return worst

    def _prepare(
        self, groups: list[Group], rewards: Tensor, timer: PhaseTimer, metrics: dict[str, float]
    ) -> list[Minibatch]:
        """Minibatches of this step with everything that the loss needs."""
        algorithm = self.config.algorithm
        if algorithm.use_kl_in_reward:
            with timer.phase("logprobs"):
                rewards = self._rewards_minus_kl(groups, rewards)
        advantages, has_spread = compute_advantages(groups, rewards, algorithm)
        own = all(s.advantages is not None for group in groups for s in group.samples)
        metrics["groups/without_spread"] = float((~has_spread).sum())
        kept = list(range(len(groups)))
        if algorithm.skip_groups_without_spread and not own and bool(has_spread.any()):
            kept = torch.nonzero(has_spread).flatten().tolist()
        metrics["groups/skipped"] = float(len(groups) - len(kept))
        parts = dict(enumerate(torch.split(advantages, [len(g.samples) for g in groups])))
        minibatches = []
        for members in split_evenly(kept, algorithm.num_minibatches):
            chosen = [groups[i] for i in members]
            values = None if own else torch.cat([parts[i] for i in members])
            minibatches.append(make_minibatch(chosen, values, algorithm, self.packing, self.ranks))
        with timer.phase("logprobs"):
            return [self._with_logprobs(minibatch) for minibatch in minibatches]

    def _with_logprobs(self, minibatch: Minibatch) -> Minibatch:
        """Old and reference logprobs, recomputed through the same packing where needed."""
        algorithm = self.config.algorithm
        keep = algorithm.policy.importance_mode is not None
        batches = [with_rollout_values(batch, True) for batch in minibatch.microbatches]
        recorded = all(b.old_logprobs is not None for b in batches)
        old: list[Tensor] = []
        if not recorded and (not algorithm.is_on_policy or keep):
            old = compute_logprobs(self.model.chunks, batches, self.head, self.ranks)
        ref: list[Tensor] = []
        if self.reference is not None and not all(b.ref_logprobs is not None for b in batches):
            ref = compute_logprobs(self.reference, batches, self.head, self.ranks)
        filled = tuple(
            batch.with_logprobs(
                old_logprobs=old[i] if old else None, ref_logprobs=ref[i] if ref else None
            )
            for i, batch in enumerate(batches)
        )
        return Minibatch(**{**minibatch.__dict__, "microbatches": filled})

    def _rewards_minus_kl(self, groups: list[Group], rewards: Tensor) -> Tensor:
        """Rewards less the KL of every sample to the reference, the same on every rank."""
        algorithm = self.config.algorithm
        assert self.reference is not None
        zeros = torch.zeros(len(rewards), dtype=torch.float64)
        batch = make_minibatch(groups, zeros, algorithm, self.packing, self.ranks)
        old = compute_logprobs(self.model.chunks, batch.microbatches, self.head, self.ranks)
        ref = compute_logprobs(self.reference, batch.microbatches, self.head, self.ranks)
        penalty = torch.zeros_like(rewards)
        if self.ranks.speaks_for_replica:
            for row, old_logprobs, ref_logprobs in zip(batch.microbatches, old, ref):
                if row.is_filler:
                    continue
                penalty[row.sample_numbers] = -kl_in_reward(
                    torch.zeros(len(row.sample_numbers), dtype=torch.float64),
                    old_logprobs,
                    ref_logprobs,
                    row.sample_ids,
                    kl_coef=algorithm.kl_coef,
                    kind=algorithm.kl_penalty,
                )
        dist.all_reduce(penalty)
        return rewards - penalty

    def _logprobs_by_sample(self, groups: Sequence[Group]) -> dict[int, Tensor]:
        """Logprobs of every sample on the ranks that speak for their replica, gathered to all."""
        count = sum(len(group.samples) for group in groups)
        zeros = torch.zeros(count, dtype=torch.float64)
        batch = make_minibatch(groups, zeros, self.config.algorithm, self.packing, self.ranks)
        logprobs = compute_logprobs(self.model.chunks, batch.microbatches, self.head, self.ranks)
        found: dict[int, Tensor] = {}
        if self.ranks.speaks_for_replica:
            for row, values in zip(batch.microbatches, logprobs):
                if not row.is_filler:
                    found |= dict(zip(row.sample_numbers.tolist(), row.split_by_sample(values)))
        parts: list[Any] = [None] * self.ranks.world_size
        dist.all_gather_object(parts, found)
        return {sample: values for part in parts for sample, values in part.items()}

    def _optimizer_step(self) -> float:
        success, grad_norm, _ = self.model.optimizer.step()
        self.model.scheduler.step(increment=1)
        self.model.optimizer.zero_grad()
        if not success or grad_norm is None or not math.isfinite(grad_norm):
            raise RuntimeError(
                f"step {self.step + 1}: gradient norm {grad_norm}, update refused; lower "
                "optimizer.lr or look at the rewards and logprobs of this step"
            )
        return float(grad_norm)

    def _over_ranks(self, sums: dict[str, float]) -> dict[str, float]:
        """Sums over the replicas, complete on the first rank and empty elsewhere."""
        mine = sums if self.ranks.speaks_for_replica else {}
        parts: list[Any] | None = [None] * self.ranks.world_size if self.ranks.rank == 0 else None
        dist.gather_object(mine, parts)
        total: dict[str, float] = {}
        for part in parts or []:
            for name, value in part.items():
                total[name] = total.get(name, 0.0) + value
        return total

    def _token_metrics(self, minibatches: Sequence[Minibatch]) -> dict[str, float]:
        unique = sum(m.unique_tokens for m in minibatches)
        logical = sum(m.logical_tokens for m in minibatches)
        padded = sum(m.padded_tokens for m in minibatches)
        rows = sum(len(m.microbatches) for m in minibatches) * self.ranks.dp_size
        stages = self.config.parallel.pipeline_model_parallel_size
        chunks = self.config.parallel.virtual_pipeline_model_parallel_size or 1
        per_pass = rows / self.ranks.dp_size / len(minibatches)
        return {
            "tokens/unique": float(unique),
            "tokens/logical": float(logical),
            "tokens/padded": float(padded),
            "tokens/reuse_ratio": logical / unique,
            "packing/microbatches": float(rows),
            "packing/fillers": float(sum(m.plan.num_fillers for m in minibatches)),
            "packing/efficiency": (unique + padded) / (rows * self.packing.max_tokens),
            # 1F1B: stages - 1 slots idle of every per_pass * chunks + stages - 1.
            "pipeline/bubble": (stages - 1) / (per_pass * chunks + stages - 1),
        }

    def _peak_memory_bytes(self) -> float:
        if self.ranks.device.type == "cuda":
            return float(torch.cuda.max_memory_allocated())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return float(peak if sys.platform == "darwin" else peak * 1024)

    def _evaluate(self, writer: MetricsWriter | None, when: str) -> Evaluation:
        result = evaluate(self.config, self.stream)
        if writer is not None:
            writer.print(
                f"held-out reward {when}: {result.mean:.3f} ± {result.standard_error:.3f} "
                f"({result.num_prompts} prompts)"
            )
        return result

    def _bare_chunks(self) -> list[Any]:
        return [chunk.module for chunk in self.model.chunks]

    def _export_policy(self, folder: Path) -> None:
        assert self.config.model.hf is not None
        export_hf(self._bare_chunks(), folder, self.config.model.hf)

    def _save(self) -> None:
        progress = {
            "stream": self.stream.state_dict(),
            "totals": self.totals,
            "evaluations": {name: e.__dict__ for name, e in self.evaluations.items()},
        }
        keep = self.config.run.keep_checkpoints
        save_checkpoint(self.folder / "checkpoints", self.model, self.step, progress, keep)

    def _resume(self) -> None:
        if not self.config.run.load:
            return
        path = find_checkpoint(self.folder / "checkpoints")
        if path is None:
            return
        progress = load_checkpoint(path, self.model)
        self.step = progress["step"]
        self.stream.load_state_dict(progress["stream"])
        self.totals = progress["totals"]
        self.evaluations = {n: Evaluation(**e) for n, e in progress["evaluations"].items()}

    def _finish(self, writer: MetricsWriter) -> None:
        """Plot, summary and the closing table."""
        from rich.table import Table

        if writer.history:
            plot_reward(writer.history, self.folder / "reward.png")
        before, after = self.evaluations.get("before"), self.evaluations.get("after")
        rewards = [m["reward/mean"] for m in writer.history]
        summary = {
            "reward_before": before.mean if before else (rewards or [math.nan])[0],
            "reward_after": after.mean if after else (rewards or [math.nan])[-1],
            "standard_error": (
                math.hypot(before.standard_error, after.standard_error)
                if before and after
                else math.nan
            ),
            **self.totals,
        }
        (self.folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        table = Table(title="What sharing saved, and where the time went")
        table.add_column("")
        table.add_column("value", justify="right")
        unique, logical = self.totals["unique_tokens"], self.totals["logical_tokens"]
        table.add_row("tokens an ordinary run encodes", f"{logical:,}")
        table.add_row("tokens this run encoded", f"{unique:,}")
        if unique:
            table.add_row("reuse ratio", f"{logical / unique:.2f}x")
        for name in sorted({k for m in writer.history for k in m if k.startswith("time/")}):
            total = sum(m.get(name, 0.0) for m in writer.history)
            table.add_row(f"seconds: {name.removeprefix('time/')}", f"{total:.1f}")
        calls = count_attention_calls(torch.nn.ModuleList(self._bare_chunks()))
        table.add_row("attention calls, prefix-grouped", f"{calls.prefix_grouped:,}")
        table.add_row("attention calls, ordinary", f"{calls.ordinary:,}")
        writer.print(table)
        writer.close()


def packing_config(config: TrainConfig, plan: Any) -> PackingConfig:
    """How a run packs, from its parallel layout and the model's sizes."""
    parallel, model = config.parallel, plan.config
    return PackingConfig(
        max_tokens=config.run.max_tokens_per_microbatch,
        pad_to_multiple=parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1,
        num_microbatches_multiple=(
            parallel.pipeline_model_parallel_size
            if parallel.virtual_pipeline_model_parallel_size
            else 1
        ),
        min_shared=config.rollout.min_shared,
        cost_model=CostModel.from_model_dims(
            hidden_size=model.hidden_size,
            num_layers=model.num_layers,
            ffn_hidden_size=model.ffn_hidden_size,
            vocab_size=plan.vocab_size,
            num_attention_heads=model.num_attention_heads,
            num_query_groups=model.num_query_groups,
            kv_channels=model.kv_channels,
            gated_linear_unit=model.gated_linear_unit,
        ),
    )


def _rollout_metrics(groups: Sequence[Group], rewards: Tensor) -> dict[str, float]:
    samples = [sample for group in groups for sample in group.samples]
    lens = [len(sample.response_ids) for sample in samples]
    truncated = sum(sample.status == "truncated" for sample in samples)
    return {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()) if len(rewards) > 1 else 0.0,
        "reward/max": float(rewards.max()),
        "reward/min": float(rewards.min()),
        "response_length/mean": sum(lens) / len(lens),
        "response_length/max": float(max(lens)),
        "response_length/truncated": truncated / len(samples),
        "prompt_length/mean": sum(len(s.prompt_ids) for s in samples) / len(samples),
    }


def _update_metrics(sums: dict[str, float]) -> dict[str, float]:
    updates, grad_norm = sums.pop("updates"), sums.pop("grad_norm")
    if not sums:
        return {}
    means = metric_means({name: torch.tensor(value) for name, value in sums.items()})
    shares = {"loss", "policy_loss", "kl_loss", "entropy_loss"}
    metrics = {
        f"actor/{name}": value / updates if name in shares else value
        for name, value in means.items()
        if name != "num_tokens"
    }
    return metrics | {
        "actor/grad_norm": grad_norm / updates,
        "actor/trained_tokens": sums["num_tokens"],
    }
