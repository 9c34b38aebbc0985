"""A step over many data-parallel ranks without them: what its plan leaves idle, predicted."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_pg.data import (
    CARDS,
    FORWARD,
    FORWARD_BACKWARD,
    CostModel,
    FlopWeights,
    GroupShape,
    PackPlan,
    ResidencyConfig,
    balance_costs,
    product_flops_on,
    seconds_on,
)
from megatron_pg.grpo import PackingConfig, count_tokens, plan_all_replicas
from tools.bench.pipeline import WaveTimes, pipeline_seconds
from tools.bench.populations import POPULATIONS
from tools.bench.registry import BenchmarkRow, Options, register

NUM_GROUPS, RANKS, STAGES = 4096, (8, 64, 256, 1024), (1, 4, 8)
CARD = "h100"
# Qwen3-8B. Stages are taken to be cut so that all take a row equally long.
COST = CostModel.from_model_dims(
    hidden_size=4096,
    num_layers=36,
    ffn_hidden_size=12288,
    vocab_size=151936,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=128,
)
_BACKWARD = FlopWeights(
    **{name: value - vars(FORWARD)[name] for name, value in vars(FORWARD_BACKWARD).items()}
)
FORWARD_SECONDS, BACKWARD_SECONDS, SECONDS = (
    seconds_on(CARDS[CARD], COST, passes) for passes in (FORWARD, _BACKWARD, FORWARD_BACKWARD)
)


@dataclass(frozen=True)
class Planned:
    """The plan of all replicas and what it took.

    Attributes:
        plans: waves of every replica.
        all_seconds: to plan them all in one process.
        step_seconds: what of it one replica does in a step: balancing, and its own rows.
    """

    plans: Sequence[Sequence[PackPlan]]
    all_seconds: float
    step_seconds: float

    @classmethod
    def of(
        cls, shapes: Sequence[GroupShape], max_tokens: int, num_ranks: int, num_stages: int
    ) -> Planned:
        """As the recipe plans a step by default."""
        packing = PackingConfig(
            max_tokens=max_tokens,
            pad_to_multiple=1,
            num_microbatches_multiple=1,
            min_shared=None,
            cost_model=product_flops_on(CARDS[CARD], COST),
            residency=ResidencyConfig(
                choice="auto", max_resident_tokens=max_tokens, num_stages=num_stages
            ),
        )
        started = time.process_time()
        plans = plan_all_replicas(shapes, num_ranks, packing)
        planned = time.process_time()
        balance_costs([shape.cost(COST) for shape in shapes], num_ranks)
        balancing = time.process_time() - planned
        each = (planned - started - balancing) / num_ranks
        return cls(plans, planned - started, balancing + max(each, 0.0))

    def times(self) -> list[WaveTimes]:
        """Seconds of all rows, by wave."""
        waves = list(zip(*self.plans, strict=True))
        prefix, rows = PackPlan.prefix_costs, PackPlan.row_costs
        return [
            WaveTimes(
                *(
                    np.array([costs(plan, model) for plan in wave]).T
                    for costs, model in (
                        (prefix, FORWARD_SECONDS),
                        (rows, FORWARD_SECONDS),
                        (rows, BACKWARD_SECONDS),
                        (prefix, BACKWARD_SECONDS),
                    )
                )
            )
            for wave in waves
        ]


@register("scale")
def scale(options: Options) -> Iterator[BenchmarkRow]:
    """4,096 groups planned for 8 to 1,024 data-parallel ranks, in predicted seconds of a card.

    By baseline, ``ours`` being the slowest rank's seconds unless said otherwise:

    * mean rank: of one stage. The bound is the mean over the longest group, where that is longer.
    * nothing cut: tokens of groups that all stand in one row over those encoded, times of the mean
      rank. The bound is 1.
    * no idle stage: of pipelines; the bound is what as many rows of equal length leave busy, of a
      rank that has the longest group where that is longer than the mean.
    * planning, smallest step: what one rank takes to plan the step.
    """
    num_groups = 32 if options.quick else NUM_GROUPS
    for population in POPULATIONS:
        shapes = population.shapes(num_groups)
        longest = max(group.cost(SECONDS) for group in shapes)
        first: float | None = None
        for num_ranks in (2, 4) if options.quick else RANKS:
            shape = dict(
                population=population.name,
                groups=num_groups,
                num_generations=population.num_generations,
                replicas=num_ranks,
                max_tokens=population.max_tokens,
                card=CARD,
            )
            for num_stages in STAGES:
                planned = Planned.of(shapes, population.max_tokens, num_ranks, num_stages)
                if num_stages > 1:
                    yield _idle(planned, num_stages, shape, longest)
                    continue
                first = first or planned.step_seconds
                yield from _one_stage(planned, shapes, shape, longest, first)


def _one_stage(
    planned: Planned,
    shapes: Sequence[GroupShape],
    shape: dict[str, Any],
    longest: float,
    first: float,
) -> Iterator[BenchmarkRow]:
    seconds = sum(times.work for times in planned.times())
    whole = sum(group.cost(SECONDS) for group in shapes)
    mean, slowest = float(np.mean(seconds)), float(np.max(seconds))
    yield _row("mean rank", shape, mean, slowest, bound=mean / max(mean, longest))
    tokens = [count_tokens(waves) for waves in planned.plans]
    encoded, logical = sum(t.unique for t in tokens), sum(t.logical for t in tokens)
    unique = sum(group.tree.unique_tokens for group in shapes)
    more = dict(reuse=logical / unique, reuse_kept=logical / encoded, rows=tokens[0].rows)
    more |= dict(waves=tokens[0].waves, fillers=sum(t.fillers for t in tokens))
    yield _row(
        "nothing cut",
        shape | more,
        whole / len(tokens),
        mean,
        ratio=unique / encoded,
    )
    yield _row(
        "planning, smallest step",
        shape | dict(all_ranks_seconds=planned.all_seconds),
        first,
        planned.step_seconds,
    )


def _idle(planned: Planned, num_stages: int, shape: dict[str, Any], longest: float) -> BenchmarkRow:
    times = planned.times()
    seconds = pipeline_seconds(times, num_stages)
    busy = float(np.mean(sum(wave.work for wave in times))) / num_stages
    rows = sum(len(wave.forward) for wave in times)
    return _row(
        "no idle stage",
        shape | dict(pp=num_stages, rows=rows, waves=len(times)),
        busy,
        float(seconds.max()),
        bound=rows / (rows + num_stages - 1) * min(1.0, busy * num_stages / longest),
    )


def _row(
    baseline: str,
    shape: dict[str, Any],
    baseline_seconds: float,
    seconds: float,
    *,
    bound: float = 1.0,
    ratio: float | None = None,
) -> BenchmarkRow:
    name = f"{shape['population']}, {shape['replicas']} ranks"
    return BenchmarkRow(
        benchmark="scale",
        shape={"name": name, **shape},
        baseline=baseline,
        ratio=baseline_seconds / seconds if ratio is None else ratio,
        bound=bound,
        ours_ms=seconds * 1e3,
        baseline_ms=baseline_seconds * 1e3,
    )


def plot_scale(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Slowest rank, reuse, idle stages and planning over the number of ranks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = (
        ("mean rank", "slowest rank / mean (dashed: longest group)", lambda x: 1 / x),
        ("nothing cut", "tokens encoded / in groups not cut", lambda x: 1 / x),
        ("no idle stage", "idle share of stages (dashed: equal rows)", lambda x: 1 - x),
        ("planning, smallest step", "planning of a rank's step, ms", None),
    )
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7), layout="constrained")
    for axis, (baseline, label, shown) in zip(axes.flat, panels):
        lines: dict[str, list[dict[str, Any]]] = {}
        for row in (row for row in rows if row["baseline"] == baseline):
            stages = f", pp {row['shape']['pp']}" if "pp" in row["shape"] else ""
            lines.setdefault(row["shape"]["population"] + stages, []).append(row)
        for name, line in lines.items():
            x = [row["shape"]["replicas"] for row in line]
            y = [row["ours_ms"] if shown is None else shown(row["ratio"]) for row in line]
            (drawn,) = axis.plot(x, y, "o-", label=name)
            if shown is not None:
                bounds = [shown(row["bound"]) for row in line]
                axis.plot(x, bounds, "--", color=drawn.get_color(), alpha=0.6)
        if baseline == "nothing cut":
            axis.set_ylim(0.9, max(1.1, *axis.get_ylim()))
        axis.set_xscale("log", base=2)
        axis.set_xticks(x, [str(n) for n in x])
        axis.minorticks_off()
        axis.set(xlabel="data-parallel ranks", ylabel=label)
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)
    pyplot.close(figure)
