"""Two steps of routers that keep statistics, on packed rows and on written-out samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from torch import Tensor

from megatron_pg import PrefixTree, pack_trees
from megatron_pg.mcore import (
    Predictions,
    PrefixGroupedSeqParams,
    take_router_losses,
    undivided_router_losses,
)
from megatron_pg.mcore.layers import PrefixGroupedRouter
from megatron_pg.mcore.routers import RouterRow
from tests.mcore import harness
from tests.mcore.harness import VOCAB, Case, Rows

NUM_EXPERTS = 4


@dataclass(frozen=True, kw_only=True)
class RouterCase(Case):
    """A layout and a router.

    Attributes:
        equal: samples of one length, which the stock model gets as a batch; else as one row of
            blocks that do not see each other.
        replay: random routes are replayed on both sides.
        mutant: what is broken in ours; see ``MUTANTS``.
    """

    equal: bool = False
    replay: bool = False
    mutant: str | None = None
    # The stock model gets several samples in one row.
    position_embedding_type: str = "learned_absolute"
    bound: float = 1e-6


@dataclass
class RouterSteps:
    """What one rank found; errors are relative.

    Attributes:
        errors: by step and name of a loss, gradient, count, bias or logged value.
        zero: gradients that were zero.
        least_count: smallest count of tokens of an expert.
    """

    errors: dict[str, float]
    zero: list[str]
    least_count: float


def make_router_rows(case: RouterCase, seed: int) -> Rows:
    """A star, a deeper tree with a prefix sample and a lone sample; padding; an even length."""
    g = torch.Generator().manual_seed(seed)

    def tokens(n: int) -> list[int]:
        return torch.randint(0, VOCAB, (n,), generator=g).tolist()

    prompt, stem, fork = tokens(9 + 2 * (seed % 3)), tokens(5), tokens(3)
    if case.equal:
        n = len(prompt) + 5
        star = [prompt + tokens(5) for _ in range(3)]
        deep = [stem + fork + tokens(n - 8), stem + fork + tokens(n - 8), stem + tokens(n - 5)]
        lone = [tokens(n)]
    else:
        star = [prompt + tokens(n) for n in (4, 7, 1)]
        deep = [stem + fork + tokens(4), stem + fork + tokens(2), stem + tokens(3), stem + fork]
        lone = [tokens(6)]
        lone[0] += tokens(sum(map(len, star + deep + lone)) % 2)
    samples = star + deep + lone
    trees = [PrefixTree.from_sequences(part) for part in (star, deep, lone)]
    layouts = [pack_trees(trees, multiple) for multiple in (8, 12, 20)]
    layout = next(x for x in layouts if x.total_tokens > x.unique_tokens)
    weights = [torch.randn(len(s) - 1, generator=g, dtype=torch.float64) for s in samples]
    return Rows(layout, [torch.tensor(s) for s in samples], weights)


def make_routes(row: Rows, num_layers: int, seed: int) -> Tensor:
    """Two different experts for every token of the packed row in every layer."""
    g = torch.Generator().manual_seed(seed)
    return torch.rand(row.layout.total_tokens, num_layers, NUM_EXPERTS, generator=g).topk(2)[1]


def packed_batches(case: RouterCase, rows: list[Rows]) -> list[dict[str, Any]]:
    batches = harness.packed_microbatches(case, rows)
    for i, (batch, row) in enumerate(zip(batches, rows)):
        layout, tokens = row.layout, batch["tokens"]
        batch["params"] = PrefixGroupedSeqParams.from_layout(
            layout,
            predictions=Predictions(
                predictor_ids=layout.predictor_ids,
                target_tokens=tokens[layout.target_ids],
                chunk_tokens=7,
            ),
            routed_experts=make_routes(row, case.num_layers, i) if case.replay else None,
        )
    return batches


def packed_step(iterator: Any, model: Any) -> Any:
    """As the harness's, counting every token once for every sample."""
    batch = next(iterator)
    output, loss_func = harness.packed_step(iter([batch]), model)

    def all_tokens(output: Any) -> Any:
        *_, told = loss_func(output)
        loss = -(output[0] * batch["weights"]).sum()
        return *harness.counted(model, loss, batch["params"].layout.logical_tokens), told

    return output, all_tokens


def stock_batches(case: RouterCase, rows: list[Rows]) -> list[dict[str, Any]]:
    batches = []
    for row in rows:
        lens = row.layout.sample_lens
        positions = torch.cat([torch.arange(int(n)) for n in lens])
        owner = torch.repeat_interleave(lens)
        mask = (owner[:, None] != owner[None]) | torch.ones(len(owner), len(owner)).triu(1).bool()
        weights = torch.cat([torch.cat([w, w.new_zeros(1)]) for w in row.weights])
        targets = torch.cat([torch.cat([s[1:], s.new_zeros(1)]) for s in row.sequences])
        batch = dict(tokens=torch.cat(row.sequences), positions=positions)
        batch |= dict(weights=weights.to(case.dtype), targets=targets)
        if case.equal:
            batch = {k: v.reshape(len(lens), -1) for k, v in batch.items()}
            mask = torch.ones(int(lens[0]), int(lens[0])).triu(1).bool()
        else:
            batch = {k: v[None] for k, v in batch.items()}
        batches.append(batch | dict(mask=mask[None, None]))
    return batches


def stock_step(iterator: Any, model: Any) -> Any:
    batch = next(iterator)
    output = model(batch["tokens"], batch["positions"], batch["mask"])

    def loss_func(output: Tensor) -> Any:
        logits = harness.gather_from_tensor_model_parallel_region(output)
        logprobs = logits.log_softmax(-1).gather(-1, batch["targets"][..., None])[..., 0]
        loss = -(logprobs * batch["weights"]).sum()
        count = torch.tensor(batch["tokens"].numel(), dtype=torch.int)
        return loss, count, {"loss": loss.detach().clone()}

    return output, loss_func


def replaying_step(case: RouterCase, rows: list[Rows], iterator: Any, model: Any) -> Any:
    """``stock_step`` with Megatron's own replay of the written-out routes."""
    number, batch = next(iterator)
    routes = rows[number].layout.expand(make_routes(rows[number], case.num_layers, number))
    for router in routers([model]):
        own = routes[:, router.layer_number - 1]
        if case.equal:  # a batch has its first tokens first
            own = own.unflatten(0, batch["tokens"].shape).transpose(0, 1).flatten(0, 1)
        if case.sp:
            own = own.chunk(case.tp)[router.tp_group.rank()]
        router.router_replay.set_target_indices(own)
    RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    return stock_step(iter([batch]), model)


def scaled(step: Any, share: float, iterator: Any, model: Any) -> Any:
    """A forward step whose loss is multiplied; what it tells of it is not."""
    output, loss_func = step(iterator, model)

    def shared_loss(output: Any) -> Any:
        loss, *others = loss_func(output)
        return loss * share, *others

    return output, shared_loss


def routers(chunks: list[Any]) -> list[TopKRouter]:
    return [m for chunk in chunks for m in chunk.modules() if isinstance(m, TopKRouter)]


def two_steps(case: RouterCase) -> RouterSteps:
    """Both sides, step by step; the second one with the bias that the first one has updated."""
    with harness.on_cpu(case):
        harness.initialize(case)
        first = 100 * parallel_state.get_data_parallel_rank()
        rows = [make_router_rows(case, first + i) for i in range(4 if case.vpp else 2)]
        assert all(r.layout.total_tokens > r.layout.unique_tokens for r in rows), "no padding"
        assert all(r.layout.reuse_ratio > 1.3 for r in rows), "nothing is shared"
        ours = Side(case, packed=True)
        theirs = Side(case.without_context, packed=False)
        ours.start_like(theirs)
        written_out: Any = stock_batches(case, rows)
        step: Any = stock_step
        if case.replay:
            written_out, step = list(enumerate(written_out)), partial(replaying_step, case, rows)
        result = RouterSteps({}, [], float("inf"))
        for number in range(2):
            with MUTANTS[case.mutant]() if case.mutant else nullcontext():
                got = ours.step(packed_step, packed_batches(case, rows))
            want = theirs.step(step, written_out)
            assert got.keys() == want.keys()
            result.errors |= {f"{number} {n}": relative(got[n], want[n]) for n in want}
            result.zero += [n for n, x in want.items() if "grad" in n and not x.any()]
            counts = [float(x.min()) for n, x in want.items() if n.startswith("count")]
            result.least_count = min([result.least_count, *counts])
        return result


class Side:
    """One of the two models."""

    def __init__(self, case: RouterCase, *, packed: bool) -> None:
        if case.replay and not packed:
            # Megatron's replay knows no recompute.
            settings = {k: v for k, v in case.config.items() if not k.startswith("recompute")}
            case = replace(case, config=settings | dict(moe_enable_routing_replay=True))
        harness.initialize(case)
        self.case, self.config = case, harness.make_config(case)
        chunks = harness.build(case, self.config, packed=packed)
        harness.make_experts_differ(chunks)
        assert all(packed == isinstance(r, PrefixGroupedRouter) for r in routers(chunks))
        self.chunks = harness.wrap_ddp(case, self.config, chunks)
        self.config.finalize_model_grads_func = self._finalize
        self.counts: dict[str, Tensor] = {}

    def start_like(self, other: Side) -> None:
        for ours, theirs in zip(self.chunks, other.chunks):
            assert list(ours.state_dict()) == list(theirs.state_dict())
            for router in routers([theirs]):
                if router.enable_expert_bias:
                    g = torch.Generator().manual_seed(router.layer_number)
                    router.expert_bias.copy_(torch.randn(NUM_EXPERTS, generator=g) * 0.02)
            ours.load_state_dict(theirs.state_dict())

    def step(self, step: Callable[..., Any], batches: list[Any]) -> dict[str, Tensor]:
        harness.initialize(self.case)
        with undivided_router_losses(self.config) as share:
            loss = harness.run_step(self.case, self.chunks, partial(scaled, step, share), batches)
        found = {f"grad {n}": g for n, g in harness.named_gradients(self.chunks).items()}
        if loss is not None:
            found["loss"] = torch.tensor(loss, dtype=torch.float64)
        for router in routers(self.chunks):
            if router.enable_expert_bias:
                found[f"bias {router.layer_number}"] = router.expert_bias.clone()
        rows = len(batches) * self.case.dp
        for name, value in take_router_losses(self.config, rows, torch.device("cpu")).items():
            # Of its z-loss the stock router logs on every rank the mean of the rank's tokens.
            is_partial = self.case.tp == 1 or name != "z_loss"
            found |= {f"logged {name}": torch.tensor(value)} if is_partial else {}
        return found | self.counts

    def _finalize(self, *args: Any, **kwargs: Any) -> None:
        for router in routers(self.chunks):
            if router.enable_expert_bias:
                count = router.local_tokens_per_expert.clone()
                group = parallel_state.get_tensor_and_data_parallel_group(
                    with_context_parallel=True
                )
                dist.all_reduce(count, group=group)
                # Where others divide a row, the stock model has replicas.
                count /= self.case.dp
                self.counts[f"count {router.layer_number}"] = count
        finalize_model_grads(*args, **kwargs)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30))


@contextmanager
def _unweighted() -> Iterator[None]:
    once = property(lambda row: (row.weights.sum(0) > 0).long())
    with mock.patch.object(RouterRow, "multiplicity", once):
        yield


@contextmanager
def _padding_counted() -> Iterator[None]:
    least_one = property(lambda row: row.weights.sum(0).clamp(min=1))
    with mock.patch.object(RouterRow, "multiplicity", least_one):
        yield


@contextmanager
def _local_denominator() -> Iterator[None]:
    given = PrefixGroupedRouter._with_z_loss

    def local(self: Any, logits: Tensor, row: RouterRow, total: Tensor) -> Tensor:
        return given(self, logits, row, row.multiplicity.sum())

    with mock.patch.object(PrefixGroupedRouter, "_with_z_loss", local):
        yield


@contextmanager
def _local_lengths() -> Iterator[None]:
    given = PrefixGroupedRouter._with_balance_losses

    def local(self: Any, probs: Tensor, logits: Tensor, row: RouterRow, lens: Tensor) -> Tensor:
        return given(self, probs, logits, row, row.weights.sum(1))

    with mock.patch.object(PrefixGroupedRouter, "_with_balance_losses", local):
        yield


@contextmanager
def _other_layers_routes() -> Iterator[None]:
    given = PrefixGroupedRouter._mask_of

    def next_layer(self: Any, params: Any) -> Any:
        rolled = copy(params)
        rolled.routed_experts = params.routed_experts.roll(1, 1)
        return given(self, rolled)

    with mock.patch.object(PrefixGroupedRouter, "_mask_of", next_layer):
        yield


MUTANTS = {
    "unweighted": _unweighted,
    "padding_counted": _padding_counted,
    "local_denominator": _local_denominator,
    "local_lengths": _local_lengths,
    "other_layers_routes": _other_layers_routes,
}
