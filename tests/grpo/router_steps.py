"""A step of a model whose routers lose too, and the stock routers on all its samples."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from torch import Tensor

from megatron_pg import PrefixTree, pack_trees
from megatron_pg.data import Group, Sample
from megatron_pg.grpo import GrpoStep, PrefixGroupConfig
from tests.data.samples import make_large_groups
from tests.mcore import harness
from tests.mcore.router_steps import RouterCase, relative, routers, stock_batches, stock_step
from tests.train import late_imports  # noqa: F401


def groups_of(dp_rank: int, advantage: float) -> list[Group]:
    """Groups of one replica, an even number of tokens; the second has fewer, and gets fillers."""
    groups = make_large_groups(seed=dp_rank, vocab_size=harness.VOCAB)[: 2 if dp_rank else 5]
    groups = groups[1:]

    def advantaged(sample: Any, number: int) -> Any:
        own = torch.full((len(sample.response_ids),), advantage * (-1) ** number)
        return replace(sample, advantages=own.double(), old_logprobs=None)

    return [
        Group(f"{dp_rank}.{g.group_id}", tuple(advantaged(s, i) for i, s in enumerate(g.samples)))
        for g in groups
    ]


def all_samples_in_one_row(case: RouterCase) -> harness.Rows:
    groups = [g for rank in range(case.dp) for g in groups_of(rank, 0.0)]
    sequences = [s.tokens for g in groups for s in g.samples]
    layout = pack_trees([PrefixTree.from_sequences([s.tolist()]) for s in sequences])
    weights = [torch.zeros(len(s) - 1, dtype=torch.float64) for s in sequences]
    return harness.Rows(layout, sequences, weights)


def packed(
    case: RouterCase, settings: PrefixGroupConfig, advantage: float
) -> tuple[list[Any], dict[str, Tensor], dict[str, Tensor], Any]:
    """Chunks, gradients, counts of experts and token counts of a step."""
    config = harness.make_config(case)
    chunks = harness.wrap_ddp(case, config, harness.build(case, config, packed=True))
    counts = counted(config, chunks)
    step = GrpoStep(chunks, vocab_size=harness.VOCAB, settings=settings)
    batch = step.prepare(groups_of(step.ranks.dp_rank, advantage))
    step.backward(batch)
    return chunks, harness.named_gradients(chunks), counts, batch.tokens


def counted(config: Any, chunks: list[Any]) -> dict[str, Tensor]:
    """What routers count until gradients are finalized, over all ranks."""
    counts: dict[str, Tensor] = {}

    def finalize(*args: Any, **kwargs: Any) -> None:
        for router in routers(chunks):
            count = router.local_tokens_per_expert.clone()
            group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
            dist.all_reduce(count, group=group)
            counts[f"count {router.layer_number}"] = count
        finalize_model_grads(*args, **kwargs)

    config.finalize_model_grads_func = finalize
    return counts


def against_stock(case: RouterCase, settings: PrefixGroupConfig) -> tuple[dict[str, float], Any]:
    """Errors of gradients of the routers' losses alone, and of counts; the step's token counts."""
    with harness.on_cpu():
        harness.initialize(case)
        ours, got, counts, tokens = packed(case, settings, advantage=0.0)
        averaged = replace(
            case.without_context, config=case.config | dict(calculate_per_token_loss=False)
        )
        harness.initialize(averaged)
        config = harness.make_config(averaged)
        stock = harness.wrap_ddp(averaged, config, harness.build(averaged, config, packed=False))
        for theirs, chunk in zip(stock, ours):
            theirs.load_state_dict(chunk.state_dict())
        expected = counted(config, stock)
        rows = stock_batches(averaged, [all_samples_in_one_row(case)])
        harness.run_step(averaged, stock, stock_step, rows)
        # Every replica has run all samples.
        got |= {name: count * averaged.dp for name, count in counts.items()}
        want = harness.named_gradients(stock) | expected
        reached = [name for name, x in want.items() if x.any()]
        assert any("layers.0" in name for name in reached) or case.pp > 1
        return {name: relative(got[name], want[name]) for name in reached}, tokens


def even_groups() -> list[Group]:
    """Prompts and responses of even lengths; nothing is gained by them."""
    generator = torch.Generator().manual_seed(5)

    def tokens(length: int) -> Tensor:
        return torch.randint(2, harness.VOCAB, (length,), generator=generator)

    groups = []
    for number, (prompt_len, lens) in enumerate([(8, (2, 6, 4)), (4, (2, 2, 8, 6)), (10, (4, 4))]):
        prompt = tokens(prompt_len)
        samples = [
            Sample(
                prompt_ids=prompt,
                response_ids=tokens(length),
                reward=0.0,
                loss_mask=torch.ones(length, dtype=torch.bool),
                advantages=torch.zeros(length, dtype=torch.float64),
            )
            for length in lens
        ]
        groups.append(Group(f"even{number}", tuple(samples)))
    return groups


def rows_against_stock(
    case: RouterCase, settings: PrefixGroupConfig
) -> tuple[dict[str, float], int]:
    """Errors of gradients of the routers' losses alone; the number of rows.

    The stock model gets the samples of one row after the other, each row weighted by its share of
    the tokens; under a loss of every sample one sample after the other.
    """
    with harness.on_cpu():
        harness.initialize(case)
        config = harness.make_config(case)
        chunks = harness.wrap_ddp(case, config, harness.build(case, config, packed=True))
        groups = even_groups()
        step = GrpoStep(chunks, vocab_size=harness.VOCAB, settings=settings)
        batch = step.prepare(groups)
        step.backward(batch)
        got = harness.named_gradients(chunks)
        stock_case = replace(
            case.without_context, config=case.config | dict(calculate_per_token_loss=False)
        )
        harness.initialize(stock_case)
        stock_config = harness.make_config(stock_case)
        built = harness.build(stock_case, stock_config, packed=False)
        stock = harness.wrap_ddp(stock_case, stock_config, built)
        for theirs, chunk in zip(stock, chunks):
            theirs.load_state_dict(chunk.state_dict())
        samples = [sample for group in groups for sample in group.samples]
        total = sum(len(sample.tokens) for sample in samples)
        rows = [row for part in batch.minibatches for row in part.rows]
        by_sample = case.config["moe_router_load_balancing_type"] == "seq_aux_loss"
        want = {name: torch.zeros_like(gradient) for name, gradient in got.items()}
        for row in rows:
            own = [samples[number].tokens for number in row.sample_numbers.tolist()]
            share = sum(map(len, own)) / total
            parts = [[tokens] for tokens in own] if by_sample else [own]
            for part in parts:
                run_alone(stock_case, stock, part)
                for name, gradient in harness.named_gradients(stock).items():
                    want[name] += gradient * (share / len(parts))
        reached = [name for name, x in want.items() if x.any()]
        return {name: relative(got[name], want[name]) for name in reached}, len(rows)


def run_alone(case: RouterCase, stock: list[Any], sequences: list[Tensor]) -> None:
    """A step of these samples in one microbatch."""
    layout = pack_trees([PrefixTree.from_sequences([s.tolist()]) for s in sequences])
    weights = [torch.zeros(len(s) - 1, dtype=torch.float64) for s in sequences]
    harness.run_step(
        case, stock, stock_step, stock_batches(case, [harness.Rows(layout, sequences, weights)])
    )


def main_loss_alone(
    cases: tuple[RouterCase, RouterCase], settings: PrefixGroupConfig
) -> dict[str, float]:
    """Differences of gradients between routers that lose next to nothing and that lose nothing."""
    with harness.on_cpu():
        harness.initialize(cases[0])
        found = []
        for case in cases:
            torch.manual_seed(1)
            found.append(packed(case, settings, advantage=1.0)[1])
        assert all(x.any() for name, x in found[0].items() if "router" not in name)
        return {n: relative(found[0][n], x) for n, x in found[1].items() if x.any()}
