"""The numbers of a step and of a run, computed from what happened."""

from __future__ import annotations

import json
import math
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ...grpo import Minibatch, StepBatch
from ...loss import LOSS_SHARES, metric_means
from ..checkpoints import Best, write_atomically
from ..config import TrainConfig
from ..rollouts import Evaluation

METRICS: dict[str, str] = {
    "step": "number of the step, from 1; 0 for what was judged before, with run.eval_interval",
    "reward/mean": "mean reward, as given, of the rollouts that were not aborted",
    "reward/std": "their standard deviation",
    "reward/max": "largest reward",
    "reward/min": "smallest reward",
    "reward/kl_penalty": "mean KL taken off the rewards; with algorithm.use_kl_in_reward",
    "reward/<name>": "mean of a number that a reward gives beside the reward",
    "response_length/mean": "mean tokens of a response",
    "response_length/max": "tokens of the longest response",
    "response_length/truncated": "share of responses that were cut off",
    "response_length/aborted": "share of responses that were aborted or empty",
    "prompt_length/mean": "mean tokens of a sample's prompt",
    "groups/without_spread": "groups whose rewards, as given, are all equal",
    "groups/skipped": "groups left out for that; all where too few tokens are trained to whiten",
    "filter_groups/batches": "how often groups were asked for; with algorithm.filter_groups",
    "filter_groups/without_spread": "groups asked for whose rewards are all equal",
    "filter_groups/surplus": "groups with spread that were left over and dropped",
    "filter_groups/reward": "mean reward of all that was asked for",
    "rollout/lag_steps": "updates of the weights since the groups were asked for; if asked ahead",
    "check/packed_vs_written_out": "largest |logprob(packed) - logprob(written out)|; when checked",
    "actor/updates": "optimizer steps made; 0 when every group was left out",
    "actor/trained_tokens": "trained tokens over all updates",
    "actor/loss": "mean loss of an update, and of its terms:",
    "actor/policy_loss": "policy loss",
    "actor/kl_loss": "KL to the reference; with kl_loss_coef",
    "actor/entropy_loss": "minus the entropy bonus; with entropy_coeff",
    "actor/ratio": "mean ratio of current to old probability",
    "actor/ppo_kl": "mean of old minus current logprob",
    "actor/clipfrac_low": "share of tokens clipped at 1 - clip_ratio_low",
    "actor/clipfrac_high": "share of tokens clipped at 1 + clip_ratio_high",
    "actor/clipfrac_dual": "share of tokens under the dual clip",
    "actor/kl": "mean KL estimate to the reference; with a reference",
    "actor/entropy": "mean entropy of a prediction, in nats; where it is calculated",
    "actor/rollout_logprob_diff": "mean |old - rollout engine's logprob|; when recorded",
    "actor/importance_weight": "mean importance weight; with importance_mode",
    "actor/grad_norm": "mean gradient norm of an update, before clipping",
    "router/load_balancing_loss": "mean aux_loss of routers over rows and layers, unweighted",
    "router/seq_load_balancing_loss": "the same of their seq_aux_loss",
    "router/z_loss": "the same of their z-loss; each with a coefficient above 0",
    "optimizer/lr": "learning rate after the step",
    "tokens/unique": "tokens encoded in one pass over the step's groups",
    "tokens/logical": "tokens an ordinary run would have encoded",
    "tokens/padded": "padding tokens",
    "tokens/reuse_ratio": "logical / unique",
    "packing/microbatches": "rows of all data-parallel ranks, fillers included",
    "packing/fillers": "rows that only keep ranks in step",
    "packing/efficiency": "unique tokens / (rows * token budget)",
    "packing/resident_groups": "groups larger than a row whose prompt is resident",
    "packing/repeated_groups": "groups larger than a row that repeat their prompt",
    "packing/waves": "waves of a minibatch; above 1 when not all prompts are resident at once",
    "packing/predicted_cost": "of one pass over the minibatches, in FLOPs of a stage's products",
    "packing/predicted_cost_repeated": "the same if prompts were repeated; when groups are divided",
    "tokens/split_by_routes": "tokens encoded once more, since samples route them to other experts",
    "tokens/resident": "tokens of resident prompts, counted in tokens/unique too",
    "pipeline/bubble": "estimated idle share of a pipeline stage (1F1B)",
    "time/rollout": "seconds for rollouts; of those asked ahead only the wait",
    "time/self_check": "seconds for the self-check; when checked",
    "time/pack": "seconds for packing",
    "time/logprobs": "seconds for old and reference logprobs",
    "time/train": "seconds for forward and backward",
    "time/optimizer": "seconds for optimizer steps",
    "time/sync": "seconds for handing the weights to the sampler",
    "time/step": "seconds of the step, checkpoint and evaluation left out",
    "time/eval": "seconds for judging held-out prompts; with run.eval_interval",
    "perf/unique_tokens_per_second": "tokens/unique / time/step",
    "perf/logical_tokens_per_second": "tokens/logical / time/step",
    "perf/peak_memory_bytes": "largest memory of a rank so far",
    "eval/prompts": "held-out prompts judged; this and what follows with run.eval_interval",
    "eval/reward/mean@<n>": "mean over prompts of the mean reward of n samples",
    "eval/standard_error": "of that mean, over prompts",
    "eval/reward/pass@<k>": "unbiased estimate of the best reward of k samples, mean over prompts",
    "eval/<data_source>/reward/mean@<n>": "the mean over the prompts of a data source",
    "eval/<data_source>/reward/pass@<k>": "the best of k over the prompts of a data source",
    "eval/reward/<name>": "mean of a number that a reward gives beside the reward",
    "eval/best": "highest mean so far; with run.keep_best",
    "eval/best_step": "its step, whose checkpoint is kept",
}
"""Every name of ``metrics.jsonl``. Sums and means are over all ranks, seconds the first rank's.

A step without updates has none of the names that describe updates. What stands in angle brackets is
a number, or named by the user.
"""


def batch_metrics(batch: StepBatch) -> dict[str, float]:
    """Rewards and lengths of a step's samples, and which groups were left out."""
    metrics = batch.rollout.statistics()
    if batch.kl_of_samples is not None and len(batch.kl_of_samples):
        metrics["reward/kl_penalty"] = float(batch.kl_of_samples.mean())
    metrics["groups/without_spread"] = float((~batch.shape.has_spread).sum())
    metrics["groups/skipped"] = float(batch.num_skipped)
    return metrics


def update_metrics(sums: Mapping[str, float], grad_norms: Sequence[float]) -> dict[str, float]:
    """Means over the updates of a step.

    Args:
        sums: of ``grpo_loss`` over all updates and ranks.
        grad_norms: one per update.
    """
    updates = len(grad_norms)
    if not updates:
        return {"actor/updates": 0.0}
    means = metric_means({name: torch.tensor(value) for name, value in sums.items()})
    return {
        "actor/updates": float(updates),
        "actor/trained_tokens": means.pop("num_tokens"),
        "actor/grad_norm": sum(grad_norms) / updates,
    } | {
        f"actor/{name}": value / (updates if name in LOSS_SHARES else 1)
        for name, value in means.items()
    }


def token_metrics(config: TrainConfig, batch: StepBatch, dp_size: int) -> dict[str, float]:
    """What one pass over the groups of a step encoded, and how full the rows were."""
    tokens, num_minibatches = batch.tokens, len(batch.minibatches)
    metrics = {
        "tokens/unique": float(tokens.unique),
        "tokens/logical": float(tokens.logical),
        "tokens/padded": float(tokens.padded),
        "packing/microbatches": float(tokens.rows),
        "packing/fillers": float(tokens.fillers),
        "packing/resident_groups": float(tokens.resident_groups),
        "packing/repeated_groups": float(tokens.repeated_groups),
        "tokens/resident": float(tokens.resident),
        "tokens/split_by_routes": float(tokens.split),
    }
    if not num_minibatches:
        return metrics
    sizes = config.parallel.sizes
    stages, chunks = sizes.pp, sizes.vpp or 1
    rows_per_pass = tokens.rows / dp_size / num_minibatches
    return metrics | {
        "packing/waves": tokens.waves / num_minibatches,
        "tokens/reuse_ratio": tokens.logical / tokens.unique,
        "packing/efficiency": tokens.unique
        / (tokens.rows * config.prefix_group.max_tokens_per_microbatch),
        # 1F1B: stages - 1 slots idle of every rows_per_pass * chunks + stages - 1.
        "pipeline/bubble": (stages - 1) / (rows_per_pass * chunks + stages - 1),
    }


def cost_metrics(minibatches: Sequence[Minibatch]) -> dict[str, float]:
    """What the cost model chose, beside what it would have taken with prompts repeated."""
    metrics = {"packing/predicted_cost": sum(batch.predicted_cost for batch in minibatches)}
    repeated = [
        batch.predicted_cost
        if batch.predicted_cost_repeated is None
        else batch.predicted_cost_repeated
        for batch in minibatches
    ]
    if any(batch.predicted_cost_repeated is not None for batch in minibatches):
        metrics["packing/predicted_cost_repeated"] = sum(repeated)
    return metrics


def peak_memory_bytes(device: torch.device) -> float:
    """Largest memory of a rank so far, on every rank."""
    if device.type == "cuda":
        peak = float(torch.cuda.max_memory_allocated())
    else:
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak = float(resident if sys.platform == "darwin" else resident * 1024)
    largest = torch.tensor(peak, dtype=torch.float64)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return float(largest)


def write_summary(
    path: Path,
    history: Sequence[Mapping[str, float]],
    evaluations: Mapping[str, Evaluation],
    totals: Mapping[str, float],
    changes: Sequence[Mapping[str, Any]],
    attention_backends: Sequence[str],
    best: Best | None = None,
) -> None:
    """``summary.json``: rewards before and after, totals, settings changed on the way, backends.

    Rewards are those of the held-out prompts where they were judged, with the standard error of
    their difference; else those of the first and the last step's samples, without one (null). Of
    a run that was judged at one of its ends only, the other one's is null.
    """
    before, after = evaluations.get("before"), evaluations.get("after")
    trained: list[float | None] = [] if evaluations else [m["reward/mean"] for m in history]
    error = None
    if before and after:
        error = math.hypot(before.standard_error, after.standard_error)
    summary = {
        "reward_before": before.mean if before else (trained or [None])[0],
        "reward_after": after.mean if after else (trained or [None])[-1],
        "standard_error": error,
        **totals,
        "evaluations": {name: dict(one.metrics) for name, one in evaluations.items()},
        "best": None if best is None else asdict(best),
        "changed_settings": list(changes),
        "attention_backends": list(attention_backends),
    }
    write_atomically(path, json.dumps(summary, indent=1) + "\n")


def closing_table(
    history: Sequence[Mapping[str, float]],
    totals: Mapping[str, float],
    layers: str,
    attention_calls: Mapping[str, int],
) -> Any:
    """A rich table: tokens encoded beside those of an ordinary run, seconds per phase.

    Args:
        history: metrics of every step.
        totals: of the run.
        layers: whose layers the model has, see ``ModelPlan``.
        attention_calls: by kind of attention.
    """
    from rich.table import Table

    table = Table(title="What sharing saved, and where the time went")
    table.add_column("")
    table.add_column("value", justify="right")
    unique, logical = totals["unique_tokens"], totals["logical_tokens"]
    table.add_row("tokens an ordinary run encodes", f"{logical:,}")
    table.add_row("tokens this run encoded", f"{unique:,}")
    if unique:
        table.add_row("reuse ratio", f"{logical / unique:.2f}x")
    for name in sorted({k for m in history for k in m if k.startswith("time/")}):
        total = sum(m.get(name, 0.0) for m in history)
        table.add_row(f"seconds: {name.removeprefix('time/')}", f"{total:.1f}")
    table.add_row("seconds: checkpoints", f"{totals['checkpoint_seconds']:.1f}")
    table.add_row("layers", layers)
    for kind, calls in attention_calls.items():
        table.add_row(f"attention calls, {kind}", f"{calls:,}")
    return table


def plot_reward(
    history: Sequence[Mapping[str, float]], evaluations: Mapping[str, Evaluation], path: Path
) -> None:
    """Curve of the training reward, and the held-out reward before and after, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    steps = [m["step"] for m in history]
    axes.plot(steps, [m["reward/mean"] for m in history], marker=".", label="training prompts")
    axes.set(xlabel="step", ylabel="mean reward", title="GRPO on packed groups")
    judged = [
        (x, evaluations[k]) for x, k in ((0, "before"), (steps[-1], "after")) if k in evaluations
    ]
    if judged:
        axes.errorbar(
            [x for x, _ in judged],
            [e.mean for _, e in judged],
            yerr=[e.standard_error for _, e in judged],
            marker="o",
            linestyle="--",
            capsize=3,
            label="held-out prompts, ± standard error",
        )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
