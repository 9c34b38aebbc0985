"""On one rank: a step with resident prefixes, and the stock spec's on written-out samples."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_pg.data import (
    Group,
    PackPlan,
    PrefixRow,
    ResidencyConfig,
    Wave,
    equalize_num_microbatches,
    group_shape,
    make_wave,
    plan_waves,
    token_values,
)
from megatron_pg.mcore import (
    Predictions,
    PrefixGroupedSeqParams,
    prefix_resident_forward_backward,
)
from megatron_pg.mcore.schedule import (
    sequential_prefix_resident_forward_backward,
)
from tests.data.samples import make_large_groups
from tests.mcore import cases, harness

BUDGET = 18
# The smallest group stands whole; prefixes of 10, 8, 11 and 6 tokens take two waves.
MAX_RESIDENT_TOKENS = 20


def groups_of(dp_rank: int) -> list[Group]:
    """Large groups with a random weight, as advantage, for every response token."""
    generator = torch.Generator().manual_seed(dp_rank)

    def weighted(sample: Any) -> Any:
        count = len(sample.response_ids)
        values = torch.randn(count, generator=generator, dtype=torch.float64)
        return replace(sample, advantages=values)

    groups = make_large_groups(seed=dp_rank, vocab_size=harness.VOCAB)
    return [Group(g.group_id, tuple(map(weighted, g.samples))) for g in groups]


def members_of(dp_rank: int) -> range:
    """A second rank has a wave less."""
    return range(1, 4) if dp_rank else range(5)


def make_waves(case: harness.Case, mode: str) -> list[Wave]:
    """The waves of this data-parallel rank; ranks have equally many rows."""
    residency = ResidencyConfig(
        choice="always", mode=mode, max_resident_tokens=MAX_RESIDENT_TOKENS, num_stages=case.pp
    )
    pad = case.row_multiple
    plans: list[list[PackPlan]] = []
    for dp_rank in range(case.dp):
        shapes = [group_shape(group) for group in groups_of(dp_rank)]
        members = list(members_of(dp_rank))
        plans.append(plan_waves(shapes, BUDGET, residency, members=members, pad_to_multiple=pad))
    empty = replace(plans[-1][0], rows=(), prefix_rows=())
    number = max(map(len, plans))
    equal = [
        equalize_num_microbatches(
            [plan[i] if i < len(plan) else empty for plan in plans],
            multiple_of=case.pp if case.vpp else 1,
        )
        for i in range(number)
    ]
    rank = parallel_state.get_data_parallel_rank()
    assert number > 1 and any(row for wave in equal for row in wave[rank].prefix_rows)
    return [make_wave(wave[rank], groups_of(rank)) for wave in equal]


def resident_step(groups: list[Group]) -> Any:
    values = token_values([group_shape(g) for g in groups], dict(enumerate(groups)))
    assert values.advantages is not None
    advantages = values.advantages
    lens = torch.tensor([len(s.tokens) for g in groups for s in g.samples])

    def step(rows: Any, model: Any) -> Any:
        scheduled = next(rows)
        row = scheduled.row
        empty = torch.empty(0, dtype=torch.int64)
        is_prefix = isinstance(row, PrefixRow)
        params = PrefixGroupedSeqParams.from_layout(
            row.layout,
            "cpu",
            predictions=Predictions(
                predictor_ids=empty if is_prefix else row.predictor_ids,
                target_tokens=empty if is_prefix else row.target_tokens,
                chunk_tokens=7,
            ),
            prefix_kv=scheduled.prefix_kv,
            resident=scheduled.resident,
        )
        output = model(row.tokens[None], params.position_ids[None], None, packed_seq_params=params)

        def loss_func(output: Any) -> Any:
            logprobs, _ = output
            if is_prefix:
                return logprobs.sum(), torch.tensor(0, dtype=torch.int), {}
            weights = advantages[row.token_numbers].to(logprobs.dtype)
            loss = -(logprobs[row.prediction_ids] * weights).sum()
            numbers = row.sample_numbers[row.sample_numbers >= 0]
            count = (lens[numbers] - 1).sum().int()
            data = {"loss": loss.detach().clone()}
            if not model_config(model).calculate_per_token_loss:
                return loss, data
            return *harness.counted(model, loss, int(count)), data

        return output, loss_func

    return step


def model_config(model: Any) -> Any:
    from megatron.core.utils import get_model_config

    return get_model_config(model)


def token_scale(groups: list[Group]) -> float:
    """One over the tokens that are predicted, in fp32 as Megatron divides."""
    tokens = sum(len(s.tokens) - 1 for g in groups for s in g.samples)
    return float((1.0 / torch.tensor(tokens)).float())


def written_out_rows(groups: list[Group]) -> list[harness.Rows]:
    rows = []
    for group in groups:
        samples = group.samples
        weights = []
        for s in samples:
            own = torch.where(s.loss_mask, s.advantages, 0.0)
            weights.append(torch.cat([own.new_zeros(len(s.prompt_ids) - 1), own]))
        rows.append(harness.Rows(None, [s.tokens for s in samples], weights))
    return rows


@dataclass(frozen=True)
class ResidentStep:
    """One mode on one rank; errors of gradients are relative to the stock spec's.

    Attributes:
        losses: ours and the stock spec's, on the last stage.
        num_results: one for each row of responses.
        sequential_errors: of gradients by the sequential schedule, relative to ours.
    """

    errors: dict[str, float]
    losses: tuple[float, float] | None
    num_results: int
    num_rows: int
    sequential_errors: dict[str, float]


def truth(case: harness.Case, own: list[Group]) -> tuple[list[Any], float | None, dict[str, Any]]:
    """Weights of the stock spec, and its loss and gradients on written-out samples."""
    reference_config = replace(case, config={**case.config, "calculate_per_token_loss": True})
    stock_config = harness.make_config(reference_config)
    stock = harness.build(case, stock_config, packed=False)
    harness.make_states_reach_far(stock)
    weights = [
        {n: t.clone() for n, t in chunk.state_dict().items() if t is not None} for chunk in stock
    ]
    stock = harness.wrap_ddp(case, stock_config, stock)
    batches = harness.written_out_microbatches(case, written_out_rows(own))
    # The interleaved schedule takes a multiple of the stages; experts meet all ranks' tokens.
    count = torch.tensor(-(-len(batches) // case.pp) * case.pp if case.vpp else len(batches))
    dist.all_reduce(count, op=dist.ReduceOp.MAX)
    batches += [
        dict(tokens=b["tokens"], length=1, weights=b["weights"][:0])
        for b in batches[:1] * (int(count) - len(batches))
    ]
    loss = harness.run_step(case, stock, harness.written_out_step, batches)
    gradients = harness.named_gradients(stock)
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    return weights, loss, gradients


def relative_errors(got: dict[str, Any], want: dict[str, Any]) -> dict[str, float]:
    return {n: float((got[n] - x).abs().max() / x.abs().max()) for n, x in want.items()}


def run(name: str) -> dict[str, ResidentStep]:
    """Both modes."""
    case = cases.SCHEDULE[name]
    steps = {}
    with harness.on_cpu(case):
        harness.initialize(case)
        rank = parallel_state.get_data_parallel_rank()
        counted = groups_of(rank)
        own = [counted[i] for i in members_of(rank)]
        harness.initialize(case.without_context)
        weights, loss, want = truth(case.without_context, own)
        harness.initialize(case)
        for mode in ("retain", "recompute"):
            config = harness.make_config(case)
            chunks = harness.build(case, config, packed=True)
            for chunk, state in zip(chunks, weights):
                chunk.load_state_dict(state)
            chunks = harness.wrap_ddp(case, config, chunks)
            waves = make_waves(case, mode)
            for chunk in chunks:
                chunk.zero_grad_buffer()
            hooks = vars(config).copy()
            results = prefix_resident_forward_backward(
                forward_step_func=resident_step(counted),
                waves=waves,
                model=chunks,
                seq_length=harness.MAX_LEN,
                mode=mode,
            )
            assert vars(config) == hooks, "the schedule left its hooks in the configuration"
            gradients = harness.named_gradients(chunks)
            assert gradients.keys() == want.keys()
            if not config.calculate_per_token_loss:
                # Averaged over rows here, over tokens there.
                factor = len(results) * token_scale(own)
                gradients = {n: g * factor for n, g in gradients.items()}
            got = sum(float(r["loss"]) for r in results if r)
            compares = case.world_size == 1 and config.calculate_per_token_loss
            steps[mode] = ResidentStep(
                errors=relative_errors(gradients, want),
                losses=None if loss is None else (got, loss),
                num_results=len(results),
                num_rows=sum(len(wave.microbatches) for wave in waves),
                sequential_errors=sequential(chunks, waves, counted, gradients) if compares else {},
            )
    return steps


def sequential(
    chunks: list[Any], waves: list[Wave], groups: list[Group], gradients: dict[str, Any]
) -> dict[str, float]:
    """Errors relative to the gradients of the sequential reference."""
    (chunk,) = chunks
    chunk.zero_grad_buffer()
    results = sequential_prefix_resident_forward_backward(
        forward_step_func=resident_step(groups), waves=waves, model=chunk
    )
    assert len(results) == sum(len(wave.microbatches) for wave in waves)
    scale = token_scale(groups)
    plain = {name: value * scale for name, value in harness.named_gradients(chunks).items()}
    return relative_errors(gradients, plain)
