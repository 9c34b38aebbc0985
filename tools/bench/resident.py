"""Groups larger than a row: prefix resident against prefix repeated, and against one long row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, get_args

import torch

from megatron_pg.data import (
    Group,
    PackPlan,
    ResidencyChoice,
    ResidencyConfig,
    ResidentMode,
    Sample,
    Wave,
    group_shape,
    make_wave,
    part_shape,
    part_tree,
    plan_waves,
    token_values,
)
from megatron_pg.grpo import HeadConfig, Ranks, train_pass
from megatron_pg.loss import PolicyLossConfig
from tools.bench.gpt import Dims, make_dims, megatron
from tools.bench.ranks import Comparison, parallel_dims, run_comparisons
from tools.bench.registry import BenchmarkRow, Options, register
from tools.bench.timing import peak_bytes, time_interleaved
from tools.bench.training import Trainer
from tools.flops import FORWARD, FORWARD_BACKWARD, FlopWeights, packed_flops

MODES: tuple[ResidentMode, ...] = get_args(ResidentMode)


@dataclass(frozen=True)
class Case:
    """Groups of one shape and the rows that they are larger than."""

    prefix_len: int
    suffix_len: int
    num_generations: int
    num_groups: int
    max_tokens: int

    def groups(self, vocab_size: int) -> list[Group]:
        """Random tokens, every response token trained."""
        generator = torch.Generator().manual_seed(0)

        def sample(prompt: torch.Tensor) -> Sample:
            response = torch.randint(0, vocab_size, (self.suffix_len,), generator=generator)
            return Sample(
                prompt_ids=prompt,
                response_ids=response,
                reward=0.0,
                loss_mask=torch.ones(len(response), dtype=torch.bool),
                advantages=torch.rand(len(response), generator=generator, dtype=torch.float64),
            )

        prompts = torch.randint(
            0, vocab_size, (self.num_groups, self.prefix_len), generator=generator
        )
        return [
            Group(str(i), tuple(sample(prompt) for _ in range(self.num_generations)))
            for i, prompt in enumerate(prompts)
        ]

    def describe(self, **more: Any) -> dict[str, Any]:
        """The ``shape`` field of a row."""
        name = f"P{self.prefix_len} R{self.suffix_len} G{self.num_generations}"
        name += f" x{self.num_groups} in {self.max_tokens}"
        return {"name": name, **vars(self), **more}


@register("resident")
def resident(options: Options) -> Iterator[BenchmarkRow]:
    """Forward and backward of groups larger than a row, in both modes, on one rank and on pp=2.

    Baseline: the same budget with the prompt repeated in every row. The bound weighs what either
    encodes by FLOPs, the second forward pass of "recompute" included; by the wall clock stages
    also wait for each other, and ``reachable`` counts that.
    """
    case = Case(512, 64, 32, 8, 1024)
    if options.quick:
        case = Case(16, 2, 16, 2, 24)
    elif options.device.type == "cuda":
        case = Case(2048, 512, 16, 4, 4096)
    tokens = case.num_groups * case.prefix_len + case.max_tokens
    yield from run_comparisons(
        (
            Comparison(f"resident {mode}", dims, tokens, partial(_compare, case, mode, dims))
            for dims in parallel_dims("resident", options)
            if dims.tp == 1
            for mode in MODES
        ),
        options,
    )


@register("resident_memory")
def resident_memory(options: Options) -> Iterator[BenchmarkRow]:
    """Peak activation memory of one group as its responses grow in number.

    Baseline: the group in one packed row. The bound is its tokens over those of the prefix and the
    largest row.
    """
    dims = make_dims(options, chunk_tokens=64)
    base = Case(16, 4, 4, 1, 24) if options.quick else Case(1024, 128, 8, 1, 1024)
    with megatron(dims):
        trainer = Trainer(dims, options.dtype)
        for factor in (1, 2, 4) if options.quick else (1, 2, 4, 8):
            case = replace(base, num_generations=base.num_generations * factor)
            yield _compare_memory(case, dims, options, trainer)


def _compare(case: Case, mode: ResidentMode, dims: Dims, options: Options) -> BenchmarkRow:
    trainer = Trainer(dims, options.dtype)
    groups = case.groups(dims.vocab_size)
    plans = {
        "ours": _plan(case, groups, "always", mode, dims),
        "prompt repeated": _plan(case, groups, "never", mode, dims),
    }
    paths = {
        name: partial(_run, trainer, _waves(plan, groups), groups, mode, dims, options)
        for name, plan in plans.items()
    }
    error = trainer.check_equal(paths, "prompt repeated")
    times = time_interleaved(paths, options.num_rounds(3), options.clock)
    work = {name: phases(plan, mode, dims) for name, plan in plans.items()}
    flops, idle = (
        {name: sum(phase.time(stages) for phase in found) for name, found in work.items()}
        for stages in (1, dims.pp)
    )
    waits = dims.pp > 1 and options.clock == "wall"
    rows = {name: sum(len(wave.rows) for wave in plan) for name, plan in plans.items()}
    return BenchmarkRow(
        benchmark="resident",
        shape=case.describe(
            **dims.describe(),
            mode=mode,
            rows=rows["ours"],
            baseline_rows=rows["prompt repeated"],
            dtype=str(options.dtype),
        )
        | {"name": f"{case.describe()['name']} {mode}"},
        baseline="prompt repeated",
        bound=flops["prompt repeated"] / flops["ours"],
        reachable=idle["prompt repeated"] / idle["ours"] if waits else None,
        max_error=error,
        ours_flops=flops["ours"],
        **times.against("prompt repeated"),
    )


def _compare_memory(case: Case, dims: Dims, options: Options, trainer: Trainer) -> BenchmarkRow:
    groups = case.groups(dims.vocab_size)
    ours = _plan(case, groups, "always", "retain", dims)
    whole_tokens = case.prefix_len + case.num_generations * case.suffix_len
    whole = _plan(replace(case, max_tokens=whole_tokens), groups, "never", "retain", dims)
    plans = {"ours": ours, "one row": whole}
    paths = {
        name: partial(_run, trainer, _waves(plan, groups), groups, "retain", dims, options)
        for name, plan in plans.items()
    }
    error = trainer.check_equal(paths, "one row")
    peaks = {name: peak_bytes(run) for name, run in paths.items()}
    (wave,) = ours
    largest = max(wave.row_layout(i).total_tokens for i in range(len(wave.rows)))
    return BenchmarkRow(
        benchmark="resident_memory",
        shape=case.describe(**dims.describe(), dtype=str(options.dtype), sweep="num_generations"),
        baseline="one row",
        ratio=peaks["one row"] / peaks["ours"],
        bound=whole_tokens / (case.prefix_len - 1 + largest),
        ours_peak_bytes=peaks["ours"],
        baseline_peak_bytes=peaks["one row"],
        max_error=error,
    )


def _plan(
    case: Case, groups: list[Group], choice: ResidencyChoice, mode: ResidentMode, dims: Dims
) -> list[PackPlan]:
    residency = ResidencyConfig(
        choice=choice,
        mode=mode,
        max_resident_tokens=case.num_groups * case.prefix_len,
        num_stages=dims.pp,
    )
    shapes = [group_shape(group) for group in groups]
    return plan_waves(shapes, case.max_tokens, residency, cost_model=dims.cost_model)


def _waves(plans: list[PackPlan], groups: list[Group]) -> list[Wave]:
    return [make_wave(plan, groups) for plan in plans]


def _run(
    trainer: Trainer,
    waves: list[Wave],
    groups: list[Group],
    mode: ResidentMode,
    dims: Dims,
    options: Options,
) -> float | None:
    """Loss on the last stage; gradients are left in the model."""
    head = HeadConfig(
        temperature=1.0,
        vocab_size=dims.vocab_size,
        chunk_tokens=dims.chunk_tokens,
        resident_mode=mode,
    )
    shapes = [group_shape(group) for group in groups]
    values = token_values(shapes, dict(enumerate(groups)))
    ranks = Ranks.from_megatron()
    logical_tokens = sum(int(shape.tree.sample_lens.sum()) for shape in shapes)
    sums = train_pass(
        [trainer.model],
        waves,
        values,
        PolicyLossConfig(),
        head,
        ranks,
        logical_tokens=logical_tokens,
    )
    return sums.get("loss")


@dataclass(frozen=True)
class Phase:
    """Rows that pass all stages one after the other, before and after which the pipeline is empty.

    Attributes:
        layers: FLOPs of each row's layers, on all stages.
        heads: FLOPs of its predictions, on the last stage.
    """

    layers: list[float]
    heads: list[float]

    def time(self, num_stages: int) -> float:
        """FLOPs until the last stage is done: what the slowest one computes, the fill of others."""
        inner = [x / num_stages for x in self.layers]
        last = [x + y for x, y in zip(inner, self.heads)]
        return sum(last) + (num_stages - 1) * max(inner, default=0.0)


def phases(plans: list[PackPlan], mode: ResidentMode, dims: Dims) -> list[Phase]:
    """Of a forward and backward pass: prefixes forward, rows both ways, prefixes back."""
    cost, found = dims.cost_model, []
    inside = replace(cost, per_loss_token=0)
    for wave in plans:
        parts = [list(row) for row in wave.rows]
        layers, heads = [], []
        for row in parts:
            trees = [part_tree(wave.shapes, part) for part in row]
            layers.append(sum(packed_flops(tree, 0, inside, FORWARD_BACKWARD) for tree in trees))
            lens = [part_shape(wave.shapes, p).loss_lens[list(p.samples)].sum() for p in row]
            heads.append(FORWARD_BACKWARD.per_loss_token * cost.per_loss_token * float(sum(lens)))
        found.append(Phase(layers, heads))
        again = FORWARD.per_token if mode == "recompute" else 0.0
        prefixes = [[wave.shapes[group].prefixes for group in row] for row in wave.prefix_rows]
        for weights in (FORWARD, backward(again)):
            rows = [sum(packed_flops(t, 0, inside, weights) for t in row) for row in prefixes]
            found.append(Phase(rows, [0.0] * len(rows)))
    return found


def backward(again: float) -> FlopWeights:
    """Of a backward pass after ``again`` forward passes."""
    both = vars(FORWARD_BACKWARD)
    return FlopWeights(*(both[name] - (1 - again) * vars(FORWARD)[name] for name in both))
