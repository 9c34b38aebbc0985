"""The report as tables in the terminal and as a page of plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_pg.data import StepTime


def print_report(report: dict[str, Any], console: Console | None = None) -> None:
    """Tables: what the rollouts share, what a step gains, what does not fit."""
    console = console or Console()
    table = Table(title="Sharing in these rollouts", show_header=False)
    for name, value in _facts(report):
        table.add_row(name, value)
    console.print(table)
    layout = ", ".join(f"{name}={report['settings'][name]}" for name in ("tp", "pp", "cp"))
    memory = Table(title=f"Peak memory of one rank, {layout}, {report['rows']} rows")
    sizes = {
        "activations": "activation_bytes",
        "resident prompts": "resident_bytes",
        "written out": "written_out_activation_bytes",
        "K and V": "kv_bytes",
    }
    for column in ("stage", "rows in flight", *sizes):
        memory.add_column(column, justify="right")
    for stage in report["memory"]:
        memory.add_row(
            str(stage["stage"]),
            str(stage["rows_in_flight"]),
            *(f"{stage[name] / 2**30:.2f} GiB" for name in sizes.values()),
        )
    console.print(memory)
    if report["does_not_fit"]:
        unfit = Table(title=f"Groups longer than a row of {report['row_budget']} tokens")
        for column in ("group", "unique tokens", "what would be done"):
            unfit.add_column(column)
        for group in report["does_not_fit"][:20]:
            unfit.add_row(group["group_id"], str(group["unique_tokens"]), group["action"])
        if len(report["does_not_fit"]) > 20:
            unfit.caption = f"and {len(report['does_not_fit']) - 20} more, all in --json"
        console.print(unfit)
    console.print(_verdict(report), markup=False)


def plot_report(
    report: dict[str, Any], budgets: Sequence[int], ratios: Sequence[float | None], file: Path
) -> None:
    """One page: lengths, reuse of the groups, gain over the token budget, memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7.5))
    axes[0, 0].hist(report["group_reuse"], bins=30)
    axes[0, 0].set(xlabel="reuse ratio of a group (logical / unique tokens)", ylabel="groups")
    axes[0, 1].hist(list(report["group_ratios"].values()), bins=30, color="tab:green")
    axes[0, 1].set(xlabel="predicted step-time ratio of a group", ylabel="groups")
    pairs = [(b, r) for b, r in zip(budgets, ratios) if r is not None]
    axes[1, 0].plot([b for b, _ in pairs], [r for _, r in pairs], "o-")
    axes[1, 0].axvline(report["max_tokens"], color="grey", linestyle=":")
    axes[1, 0].set(xlabel="token budget of a row", ylabel="predicted step-time ratio")
    stages = [str(stage["stage"]) for stage in report["memory"]]
    for name, offset in (("activation_bytes", -0.2), ("written_out_activation_bytes", 0.2)):
        heights = [stage[name] / 2**30 for stage in report["memory"]]
        label = "packed" if offset < 0 else "written out"
        places = [i + offset for i in range(len(stages))]
        axes[1, 1].bar(places, heights, 0.4, label=label)
        resident = [stage["resident_bytes"] / 2**30 for stage in report["memory"]]
        if offset < 0 and any(resident):
            axes[1, 1].bar(places, resident, 0.4, bottom=heights, label="resident prompts")
    axes[1, 1].set(xlabel="pipeline stage", ylabel="activations, GiB", xticks=range(len(stages)))
    axes[1, 1].legend()
    figure.suptitle(
        f"{report['groups']} groups, reuse ratio {report['reuse_ratio']:.2f}, "
        f"predicted step-time ratio {report['predicted_step_time_ratio']:.2f}"
    )
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _facts(report: dict[str, Any]) -> list[tuple[str, str]]:
    flops, seconds = report["step_flops"], report["predicted_seconds"]
    return [
        ("groups, samples", f"{report['groups']}, {report['samples']}"),
        *_rollout_facts(report["rollouts"]),
        ("prompt tokens", _spread(report["prompt_len"])),
        ("response tokens", _spread(report["response_len"])),
        ("depth of the deepest tree", str(report["depth"])),
        ("tokens unique / written out", f"{report['unique_tokens']} / {report['logical_tokens']}"),
        ("reuse ratio", f"{report['reuse_ratio']:.3f}"),
        *_route_facts(report),
        (
            "attention pairs",
            f"{report['attention_pairs']:.3e} / {report['logical_attention_pairs']:.3e}",
        ),
        ("FLOPs of a step", f"{flops['packed']:.3e} / {flops['written_out']:.3e}"),
        ("predicted step-time ratio", f"{report['predicted_step_time_ratio']:.2f}"),
        (
            f"predicted step on {report['settings']['card']}, at the least",
            str(StepTime(**{k: v for k, v in seconds.items() if k != "total"})),
        ),
        ("recommended token budget", str(report["recommended_max_tokens"])),
        ("token budget used here", str(report["max_tokens"])),
    ]


def _route_facts(report: dict[str, Any]) -> list[tuple[str, str]]:
    if not report["split_tokens"]:
        return []
    when = "included" if report["settings"]["replays_routes"] else "with --router-replay R3"
    return [("tokens more for their routes", f"{report['split_tokens']} ({when})")]


def _rollout_facts(rollouts: dict[str, Any]) -> list[tuple[str, str]]:
    if not rollouts["several_rows"]:
        return []
    growth, logical = rollouts["growth"], max(rollouts["logical_tokens"], 1)
    within, across = (rollouts[f"shared_{where}"] for where in ("within", "across"))
    return [
        ("rollouts, of several rows", f"{rollouts['count']}, {rollouts['several_rows']}"),
        ("rows of a rollout", _spread(rollouts["rows"])),
        (
            "shared within a rollout",
            f"{within} tokens, {within / logical:.0%} of those written out",
        ),
        ("shared across rollouts", f"{across} tokens, {across / logical:.0%}"),
        ("rows written out / a rollout", f"mean {growth['mean']:.2f}, at most {growth['max']:.2f}"),
    ]


def _spread(values: dict[str, float]) -> str:
    return (
        f"{values['min']:.0f} to {values['max']:.0f}, median {values['median']:.0f}, "
        f"mean {values['mean']:.0f}"
    )


def _verdict(report: dict[str, Any]) -> str:
    unpaid = len(report["does_not_pay"])
    ratio = report["predicted_step_time_ratio"]
    if report["training_refuses"] is not None:
        return (
            f"Training refuses this model: {report['training_refuses']}\n"
            f"Where one could train it, the predicted step-time ratio would be {ratio:.2f}."
        )
    if report["pays"]:
        text = f"Sharing pays: a step is predicted to take 1/{ratio:.2f} of its time."
    else:
        text = f"Sharing would not pay: predicted step-time ratio {ratio:.2f}."
    return text + (f" {unpaid} group(s) gain nothing on their own." if unpaid else "")
