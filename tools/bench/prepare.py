"""Preparing a step on one of many replicas: numbers told, groups moved, rows planned and filled."""

from __future__ import annotations

import pickle
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from megatron_pg.data import (
    CostModel,
    Group,
    ResidencyConfig,
    Sample,
    balance_costs,
    group_shape,
)
from megatron_pg.grpo import (
    GrpoConfig,
    PackingConfig,
    encode_groups,
    pack_batch,
    place_groups,
)
from tools.bench.registry import BenchmarkMismatch, BenchmarkRow, Options, register

T = TypeVar("T")

NUM_GENERATIONS, PROMPT, RESPONSE = 16, 256, 256
PACKING = PackingConfig(
    max_tokens=16384,
    pad_to_multiple=1,
    num_microbatches_multiple=1,
    min_shared=None,
    cost_model=CostModel(),
    residency=ResidencyConfig(max_resident_tokens=16384),
)


class OneOfMany:
    """The first of ``size`` replicas, all of which bring equal groups (see ``grpo.Replicas``).

    What the others tell and send is decoded once for each of them, as their messages would be.

    Attributes:
        received_bytes: of messages from the others.
    """

    rank, num_ranks, leads = 0, 1, True

    def __init__(self, size: int, groups: Sequence[Group]) -> None:
        self.size = size
        self.received_bytes = 0
        shapes = [group_shape(group) for group in groups]
        costs = [shape.cost(PACKING.cost_model) for shape in shapes]
        others = [n for n in balance_costs(costs * size, size)[0] if n >= len(groups)]
        self._sent = encode_groups(
            [(n, groups[n % len(groups)], shapes[n % len(groups)]) for n in others]
        )

    def gather(self, action: Callable[[], T]) -> list[T]:
        """The own answer, as often as there are replicas."""
        message = pickle.dumps(action())
        self.received_bytes += (self.size - 1) * len(message)
        return [pickle.loads(message) for _ in range(self.size)]

    def exchange(self, parts: Sequence[bytes]) -> list[bytes]:
        """What the others sent, as if one of them had all of it."""
        self.received_bytes += len(self._sent)
        return [self._sent, *[b""] * (len(parts) - 1)]

    def share(self, action: Callable[[], T]) -> T:
        """The replica is one rank."""
        return action()

    def from_last_stage(self, values: Tensor | None, count: int) -> Tensor:
        """The replica is one stage."""
        assert values is not None and len(values) == count
        return values


@register("prepare")
def prepare(options: Options) -> Iterator[BenchmarkRow]:
    """A step's preparation on one of 8, 64 and 512 replicas, from its groups to its rows.

    Numbers are told, groups moved, rows planned and filled. Once the step is the same for any
    number of replicas, and once every replica brings 16 groups, so that the step grows with them.
    Baseline: the step on 8 replicas. The ratio is that time over this, and 1, where the number of
    ranks does not matter, its bound; the peak is of what Python and numpy hold.
    """
    sizes = (2, 4) if options.quick else (8, 64, 512)
    whole = 8 if options.quick else 1024
    yield from _compare("one step", {size: whole // size for size in sizes}, options)
    yield from _compare("16 groups each", dict.fromkeys(sizes, 4 if options.quick else 16), options)


def _compare(what: str, counts: Mapping[int, int], options: Options) -> Iterator[BenchmarkRow]:
    """Rows for the groups that a replica brings, by number of replicas."""
    num_rounds, baseline = options.num_rounds(5), min(counts)
    seconds: dict[int, float] = {}
    peaks: dict[int, int] = {}
    for size, count in counts.items():
        groups = [_group(number) for number in range(count)]
        times = sorted(_prepare(groups, size) for _ in range(num_rounds))
        seconds[size] = times[len(times) // 2]
        tracemalloc.start()
        _prepare(groups, size)
        peaks[size] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        yield BenchmarkRow(
            benchmark="prepare",
            shape=dict(
                name=f"{what}, {size} replicas",
                replicas=size,
                groups=count * size,
                num_generations=NUM_GENERATIONS,
            ),
            baseline=f"{baseline} replicas",
            ratio=seconds[baseline] / seconds[size],
            bound=1.0,
            ours_ms=seconds[size] * 1e3,
            baseline_ms=seconds[baseline] * 1e3,
            rounds=num_rounds,
            clock="cpu",
            ours_peak_bytes=peaks[size],
            baseline_peak_bytes=peaks[baseline],
        )


def _prepare(groups: Sequence[Group], size: int) -> float:
    """Seconds; checks that the replica packs its share of the step and nothing else."""
    replicas = OneOfMany(size, groups)
    started = time.process_time()
    placement = place_groups(groups, GrpoConfig(), PACKING, replicas)
    batch = pack_batch(placement, GrpoConfig(), PACKING, replicas)
    seconds = time.process_time() - started
    (minibatch,) = batch.minibatches
    rows = sum(len(row.tokens) for row in minibatch.rows)
    num_samples = len(groups) * size * NUM_GENERATIONS
    if len(batch.shape.rewards) != num_samples or not len(placement.groups):
        raise BenchmarkMismatch(f"{num_samples} samples were brought, not all of them are known")
    if minibatch.tokens.unique != rows * size:
        raise BenchmarkMismatch(f"{rows} tokens are packed here, {minibatch.tokens.unique} by all")
    return seconds


def _group(seed: int) -> Group:
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(0, 1000, (PROMPT,), generator=generator)
    lens = torch.randint(RESPONSE // 2, RESPONSE, (NUM_GENERATIONS,), generator=generator)
    responses = [torch.randint(0, 1000, (int(n),), generator=generator) for n in lens]
    return Group(
        str(seed),
        tuple(
            Sample(
                prompt_ids=prompt,
                response_ids=response,
                reward=float(i % 2),
                loss_mask=torch.ones(len(response), dtype=torch.bool),
            )
            for i, response in enumerate(responses)
        ),
    )
