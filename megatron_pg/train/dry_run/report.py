"""Check a config for any number of ranks in one process, without building weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ...data import PackPlan, card_here, card_or_here
from ...grpo import TokenCounts, count_tokens
from ...parallel import ParallelSizes
from ...rollout import FilePrompts
from ..config import TrainConfig
from ..model import ModelPlan
from .inputs import RunInputs, read_inputs
from .memory import RESIDENT, RunMemory, StageMemory
from .parameters import ModelModules
from .prediction import predict_first_step
from .rows import FirstStep, StepRows, rows_of
from .text import memory_lines
from .verdict import judge

# Why groups of a step train nothing.
_LEFT_OUT = "(status, masks or rewards of their samples)"


@dataclass(frozen=True)
class DryRun:
    """What a run would do.

    Attributes:
        lines: a report for a person.
        stages: what a rank of every pipeline stage holds, by what takes it.
        fits: whether every rank fits its card; None on machines without CUDA.
    """

    lines: tuple[str, ...]
    stages: tuple[StageMemory, ...]
    fits: bool | None

    @property
    def parameters_per_rank(self) -> int:
        """Largest number of parameters on one rank."""
        return max(stage.parameters.total for stage in self.stages)

    @property
    def bytes_per_rank(self) -> int:
        """All that the fullest rank holds on its device."""
        return max(stage.total for stage in self.stages)

    @property
    def resident_bytes_per_rank(self) -> int:
        """Of these, what resident prompts keep."""
        return max(self.stages, key=lambda stage: stage.total).terms.get(RESIDENT, 0)

    @property
    def checkpoint_bytes_per_rank(self) -> int:
        """What one rank writes of a checkpoint, and holds in host memory until it is written."""
        return max(stage.checkpoint for stage in self.stages)


def dry_run(config: TrainConfig, world_size: int, card: str | None = None) -> DryRun:
    """Parallel layout, packing plan, memory estimate and every refusal of a run.

    Of a recorded run on such cards also what its first step takes at the least: counts over rates,
    no measurement.

    Left open is what depends on the machine of the run, on its inference server and on what lies
    in ``run.out``. Weights need not be there, and of those that are only the headers are read:
    those of another model than ``model.hf`` are refused by the run, when it loads them.

    Args:
        config: of the run.
        world_size: ranks of it.
        card: key of ``data.CARDS`` that each rank will have, with Transformer Engine, whatever this
            machine has; None for a run on machines like this one.

    Raises:
        ValueError: listing everything else that would stop the run.
    """
    inputs = read_inputs(config, world_size, card)
    plan, recording, first = inputs.plan, inputs.recording, inputs.first
    sizes = ParallelSizes.from_config(config.parallel, world_size)
    lines = [_layout_line(sizes)]
    plans: list[list[PackPlan]] | None = None
    if recording is not None and first is not None:
        plans = first.plans(inputs.packing, sizes.dp)
        lines.append(_packing_line(config, len(recording.groups), first, plans))
    if inputs.sampling is not None and isinstance(inputs.sampling.task, FilePrompts):
        lines.append(str(inputs.sampling.task))
    lines.append(_machine_line(config, plan, card))
    lines += [f"{folder} holds no weights, which the run will need" for folder in inputs.bare]
    memory = RunMemory(
        config=config,
        plan=plan,
        sizes=sizes,
        rows=StepRows.of_run(config, plan, plans, sizes.dp),
        modules=ModelModules.of_plan(plan),
        rows_of=rows_of(recording, first),
    )
    lines += memory_lines(memory)
    known = card or card_here()
    if plans and known:
        lines += _seconds_line(inputs, plans, memory, known)
    verdict = judge(memory, card) if plan.on_cuda else None
    lines += [str(verdict)] if verdict is not None else []
    return DryRun(tuple(lines), tuple(memory.stages), None if verdict is None else verdict.fits)


def _seconds_line(
    inputs: RunInputs, plans: Sequence[Sequence[PackPlan]], memory: RunMemory, card: str
) -> Iterator[str]:
    """Of a first step that trains something."""
    recording, first = inputs.recording, inputs.first
    if recording is None or first is None or not first.minibatches:
        return
    seconds = predict_first_step(
        memory.config,
        memory.plan,
        plans,
        sizes=memory.sizes,
        card=card,
        updated=max(stage.updated for stage in memory.stages),
        num_minibatches=len(first.minibatches),
        recorded=recording.fields,
    )
    is_piped = memory.sizes.pp > 1
    yield (
        f"first step on {card} cards in bf16, predicted, at the least: {seconds}"
        + (f"; pipeline idle {seconds.idle / seconds.total:.0%}" if is_piped else "")
    )


def _machine_line(config: TrainConfig, plan: ModelPlan, card: str | None) -> str:
    where = "machines like this one" if card is None else f"{card} cards"
    dtype = str(plan.config.params_dtype).removeprefix("torch.")
    installed = ", which must be installed there" if card is not None and plan.use_te else ""
    known = "" if card or card_here() else ", none of which is known here"
    return (
        f"planned for {where}: {dtype}, layers of {plan.layers} "
        f"(model.transformer_impl={config.model.transformer_impl}){installed}; rows balanced as on "
        f"{card_or_here(card)} cards{known}"
    )


def _layout_line(s: ParallelSizes) -> str:
    return (
        f"{s.world_size} rank{'s' if s.world_size > 1 else ''}: "
        f"tp {s.tp}{' with sp' if s.sp else ''} x pp {s.pp} "
        f"(vpp {s.vpp or 1}){f' x cp {s.cp}' if s.cp > 1 else ''} x dp {s.dp}"
        + (f"; experts: ep {s.ep} x etp {s.expert_tp}" if s.ep > 1 or s.etp else "")
    )


def _packing_line(
    config: TrainConfig, found: int, first: FirstStep, plans: Sequence[Sequence[PackPlan]]
) -> str:
    num_groups = config.run.groups_per_step
    groups = f"{num_groups} of {found} groups"
    if num_groups > found:
        groups = (
            f"{num_groups} groups, but {found} were recorded, and some of them stand in it "
            f"{-(-num_groups // found)} times (run.groups_per_step={num_groups})"
        )
    if not first.minibatches:
        return f"first step of {groups} trains nothing {_LEFT_OUT}; memory is that of full rows"
    if left_out := num_groups - first.num_trained:
        groups += f", {left_out} of which train nothing {_LEFT_OUT}"
    if (updates := len(first.minibatches)) > 1:
        groups += f", in {updates} minibatches"
    # Every replica has as many.
    waves = sum(bool(wave.prefix_rows) for wave in plans[0])
    tokens = replace(sum(map(count_tokens, plans), TokenCounts()), waves=waves)
    return (
        f"first step of {groups}: {tokens.logical:,} logical tokens, {tokens.unique:,} "
        f"encoded (reuse {tokens.logical / max(tokens.unique, 1):.2f}x), "
        f"{sum(len(wave.rows) for wave in plans[0])} microbatches a rank"
        + (f", {tokens.split:,} tokens more for their routes" if tokens.split else "")
        + _resident_clause(tokens)
    )


def _resident_clause(tokens: TokenCounts) -> str:
    if not tokens.resident_groups:
        return ""
    return (
        f"; prompts of {tokens.resident_groups} groups ({tokens.resident:,} tokens) are resident, "
        f"in {tokens.waves} wave(s)"
    )
