"""On one rank: a step over rollouts in several rows, and the stock spec's on rows written out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from megatron_pg.data import Group, Sample
from megatron_pg.grpo import (
    GrpoConfig,
    GrpoStep,
    PrefixGroupConfig,
    TokenCounts,
    row_cost_model,
    total_over_replicas,
)
from tests.mcore import harness

Weighted = tuple[Sample, float]
"""A sample, and the weight times the advantage of each of its trained tokens."""


@dataclass(frozen=True)
class Compared:
    """One minibatch on one rank.

    Attributes:
        loss: over all replicas, on the first rank.
        errors: of gradients, relative to those of the written-out rows.
        least: the smallest norm of such a gradient.
    """

    loss: float | None
    errors: dict[str, float]
    least: float


@dataclass(frozen=True)
class Found:
    """A step on one rank.

    Attributes:
        check: of ``GrpoStep.self_check``.
        tokens: of the step's rows.
    """

    minibatches: list[Compared]
    check: float
    tokens: TokenCounts


def forest_step(
    case: harness.Case,
    algorithm: GrpoConfig,
    settings: PrefixGroupConfig,
    groups: Sequence[Group],
    truth: Sequence[Sequence[Weighted]],
) -> Found:
    """Both steps with one model; replica i brings every dp-th group, ``truth`` is by minibatch.

    Where others divide a row, the stock model has replicas.
    """
    with harness.on_cpu(case):
        harness.initialize(case)
        config = harness.make_config(case)
        packed = harness.build(case, config, packed=True)
        harness.make_states_reach_far(packed)
        step = GrpoStep(
            harness.wrap_ddp(case, config, packed),
            vocab_size=harness.VOCAB,
            algorithm=algorithm,
            settings=settings,
        )
        if case.pattern is not None:
            # Rows are balanced by the layers that the pattern names.
            costs = row_cost_model(config, harness.VOCAB, hybrid_layer_pattern=case.pattern)
            assert costs == step.packing.cost_model != row_cost_model(config, harness.VOCAB)
        rank = parallel_state.get_data_parallel_rank()
        mine = {i: g for i, g in enumerate(groups) if i % case.dp == rank}
        check = step.self_check(mine, len(groups))
        batch = step.prepare(mine)
        assert len(batch.minibatches) == len(truth)
        found = []
        for number in range(len(truth)):
            sums = step.backward(batch, number)
            loss = total_over_replicas(sums, step.ranks).get("loss")
            found.append((loss, harness.named_gradients(step.chunks)))
        case = case.without_context
        harness.initialize(case)
        rank = parallel_state.get_data_parallel_rank()
        config = harness.make_config(case)
        stock = harness.build(case, config, packed=False)
        for ours, theirs in zip(packed, stock):
            theirs.load_state_dict(ours.state_dict())
        control = harness.wrap_ddp(case, config, stock)
        compared = []
        for (loss, got), rows in zip(found, truth):
            harness.run_step(case, control, written_out_step, list(rows[rank :: case.dp]))
            want = harness.named_gradients(control)
            norms = {n: float(want[n].norm()) for n in want}
            compared.append(
                Compared(
                    loss=loss,
                    errors={n: float((got[n] - want[n]).norm()) / norms[n] for n in want},
                    least=min(norms.values()),
                )
            )
        return Found(compared, check, batch.tokens)


def written_out_step(rows: Iterator[Weighted], model: Any) -> Any:
    """A ``forward_step_func`` on one row, padded to what sequence parallelism divides."""
    sample, weight = next(rows)
    tail = torch.zeros(len(sample.tokens) % 2, dtype=torch.int64)
    tokens = torch.cat([sample.tokens, tail])
    mask = torch.triu(torch.ones(len(tokens), len(tokens), dtype=torch.bool), 1)[None, None]
    output = model(tokens[None], torch.arange(len(tokens))[None], mask)

    def loss_func(output: Tensor) -> Any:
        logits = gather_from_tensor_model_parallel_region(output)[0]
        ends = len(sample.prompt_ids) - 1, len(sample.tokens) - 1
        logprobs = logits[slice(*ends)].log_softmax(-1)
        logprobs = logprobs.gather(1, sample.response_ids[:, None])[:, 0]
        ratio = (logprobs - logprobs.detach()).exp()
        loss = -(weight * ratio * sample.loss_mask).sum()
        return loss, torch.tensor(0, dtype=torch.int), {}

    return output, loss_func
