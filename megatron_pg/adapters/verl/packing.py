"""The packed rows of a verl mini-batch, as many of them on every replica."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu

from ...data import GroupShape, PackedRow, PackPlan, RowPart, Wave, make_wave
from ...grpo import (
    PackingConfig,
    Replicas,
    TokenCounts,
    count_tokens,
    plan_rows_of_replica,
)
from .grouping import find_groups, make_group, make_shape
from .rows import VerlRow


@dataclass(frozen=True, eq=False, kw_only=True)
class Samples:
    """What packing reads of a verl batch, on the CPU.

    Attributes:
        sequences: prompt and response of every sample.
        prompt_lens: tokens of every prompt.
        first_predicted: place of every sample's first predicted token.
        temperatures: ``[N]`` of the samples' logits.
        groups: samples of every group.
        routes: of every sample's tokens, to be replayed; None where the routers decide.
    """

    sequences: Sequence[Tensor]
    prompt_lens: Sequence[int]
    first_predicted: Sequence[int]
    temperatures: Tensor
    groups: Sequence[Sequence[int]]
    routes: Sequence[Tensor | None]

    @classmethod
    def of(
        cls,
        data: TensorDict,
        *,
        responses_only: bool,
        routes: Sequence[Tensor] | None = None,
    ) -> Samples:
        """Of a batch without padding.

        Args:
            data: as verl hands it to its engine.
            responses_only: whether only the tokens of responses are read; all are predicted
                otherwise, and where the batch does not say which tokens respond.
            routes: of every sample, to be replayed; None leaves them to the routers.

        Raises:
            ValueError: if lengths contradict each other.
        """
        input_ids = data["input_ids"].cpu()
        sequences = list(input_ids.unbind())
        lens = [len(sequence) for sequence in sequences]
        uids = _uids(data, len(sequences))
        if "responses" in data:
            counts = _response_lens(data)
            prompt_lens = [n - count for n, count in zip(lens, counts)]
            if min(prompt_lens) < 1:
                raise ValueError(
                    f"a sample has {lens} tokens and {counts} of them respond; verl's engine takes "
                    "input_ids of prompt and response, with at least one token of prompt"
                )
        else:
            responses_only, prompt_lens = False, [1] * len(sequences)
            # Nothing tells what was given and what was sampled, so nothing is a group.
            uids = list(range(len(sequences))) if uids is None else uids
        return cls(
            sequences=sequences,
            prompt_lens=prompt_lens,
            first_predicted=prompt_lens if responses_only else [1] * len(sequences),
            temperatures=_temperatures(data, len(sequences)),
            groups=find_groups(sequences, prompt_lens, uids),
            routes=[None] * len(sequences) if routes is None else routes,
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class MiniBatch:
    """The rows of one call of verl's ``forward_backward_batch``.

    Attributes:
        waves: whose microbatches are ``VerlRow``.
        indices: samples of the batch in every row, in the row's order.
        tokens: over the rows of all replicas.
    """

    waves: tuple[Wave, ...]
    indices: list[list[int]]
    tokens: TokenCounts

    @property
    def micro_batches(self) -> list[TensorDict]:
        """The samples of every row."""
        rows: list[Any] = [row for wave in self.waves for row in wave.microbatches]
        return [row.batch for row in rows]


def pack_mini_batch(
    data: TensorDict,
    samples: Samples,
    packing: PackingConfig,
    replicas: Replicas,
    *,
    min_shared: int | None,
    samples_per_row: int | None = None,
) -> MiniBatch:
    """Rows of this replica's part of a mini-batch; a collective of the replicas.

    Args:
        data: the batch.
        samples: of the batch.
        packing: decides the rows.
        replicas: of the model.
        min_shared: see ``make_shape``.
        samples_per_row: rows of so many consecutive samples instead of a token budget, as verl has
            without ``use_dynamic_bsz``.

    Raises:
        ValueError: on every replica, if a sample fits in no row; if the batch has no whole number
            of rows.
    """
    groups = [
        make_group(
            str(number),
            [samples.sequences[i] for i in members],
            [samples.first_predicted[i] for i in members],
            [samples.routes[i] for i in members],
        )
        for number, members in enumerate(samples.groups)
    ]
    shapes = [
        make_shape(group, [samples.prompt_lens[i] for i in members], min_shared)
        for group, members in zip(groups, samples.groups)
    ]
    if samples_per_row is None:
        (planned,) = plan_rows_of_replica(shapes, [range(len(shapes))], packing, replicas)
        plans, tokens = planned.waves, planned.tokens
    else:
        plans = (_rows_of_samples(samples, shapes, samples_per_row, packing.pad_to_multiple),)
        counts = replicas.gather(lambda: count_tokens(plans))
        tokens = sum(counts, TokenCounts())
    waves, indices = [], []
    for plan in plans:
        wave = make_wave(plan, groups)
        own = [[samples.groups[p.group][i] for p in row for i in p.samples] for row in plan.rows]
        rows = [_row(row, data, samples, i) for row, i in zip(wave.microbatches, own)]
        waves.append(Wave(wave.prefix_rows, tuple(rows)))
        indices += own
    return MiniBatch(waves=tuple(waves), indices=indices, tokens=tokens)


def _rows_of_samples(
    samples: Samples, shapes: Sequence[GroupShape], samples_per_row: int, pad_to_multiple: int
) -> PackPlan:
    count = len(samples.sequences)
    if count % samples_per_row:
        raise ValueError(
            f"{count} samples are no multiple of micro_batch_size_per_gpu={samples_per_row}; "
            "choose a divisor, or use_dynamic_bsz=True"
        )
    rows: list[dict[int, list[int]]] = [{} for _ in range(count // samples_per_row)]
    for group, members in enumerate(samples.groups):
        for place, sample in enumerate(members):
            rows[sample // samples_per_row].setdefault(group, []).append(place)
    parts = [tuple(RowPart(g, tuple(own)) for g, own in sorted(row.items())) for row in rows]
    return PackPlan(tuple(shapes), tuple(parts), pad_to_multiple)


def _row(packed: PackedRow, data: TensorDict, samples: Samples, indices: list[int]) -> VerlRow:
    if not indices:
        nothing = TensorDict({}, batch_size=[0])
        none = torch.empty(0, dtype=torch.int64)
        return VerlRow.of(packed, nothing, none, torch.empty(0))
    return VerlRow.of(
        packed,
        tu.index_select_tensor_dict(data, indices),
        torch.tensor([len(samples.sequences[i]) for i in indices]),
        samples.temperatures[indices],
    )


def _response_lens(data: TensorDict) -> list[int]:
    """Tokens of every response, which verl's older trainer pads."""
    responses = data["responses"]
    if responses.is_nested:
        lens = responses.offsets().diff()
    else:
        lens = data["attention_mask"][:, -responses.shape[1] :].sum(dim=1)
    counts: list[int] = lens.tolist()
    return counts


def _uids(data: TensorDict, count: int) -> list[Any] | None:
    uids: Any = data.get("uid", None)
    if uids is None:
        return None
    found = uids.tolist() if hasattr(uids, "tolist") else list(uids)
    return found if isinstance(found, list) else [found] * count


def _temperatures(data: TensorDict, count: int) -> Tensor:
    """``[count]`` float32 on the CPU of a number, or of one for each sample."""
    given = torch.as_tensor(tu.get_non_tensor_data(data, "temperature", None))
    values = given.detach().float().cpu().flatten()
    if len(values) not in (1, count):
        raise ValueError(f"{len(values)} temperatures for {count} samples")
    return values.expand(count)
