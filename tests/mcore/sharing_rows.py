"""The transparent model and the stock model, called alike on ordinary rows under one schedule."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_pg.mcore import (
    PrefixSharingGPTModel,
    with_prefix_grouped_attention,
    with_sequence_parallel_norms,
)
from tests.mcore import harness
from tests.mcore.harness import MAX_LEN, VOCAB, Case


class ThdAttention(harness.SizedDotProductAttention):
    """Megatron-Core's attention, called for each sequence of a packed row alone."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        packed_seq_params: Any = None,
        **more: Any,
    ) -> Tensor:
        if packed_seq_params is None:
            return super().forward(query, key, value, attention_mask, **more)
        params = packed_seq_params
        bounds = params.cu_seqlens_q_padded
        bounds = params.cu_seqlens_q if bounds is None else bounds
        # Newer latent attention pads values of packed rows, and takes the padding off again.
        self.hidden_size_per_partition = query.shape[1] * value.shape[2]
        outs = []
        for start, end in pairwise(bounds.tolist()):
            n = end - start
            mask = torch.triu(torch.ones(n, n, dtype=torch.bool), 1)[None, None]
            parts = [x[start:end].unsqueeze(1) for x in (query, key, value)]
            if n:
                outs.append(super().forward(*parts, mask, **more))
        return torch.cat(outs).squeeze(1)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A model with its parallel layout, and how rows are made and handed to it.

    Under context parallelism every sequence is padded to what its ranks cut it into, and a rank is
    fed its part. The stock model has replicas in the place of those ranks: each runs the whole row,
    and what it makes of the tokens of the part counts.

    Attributes:
        case: model and layout.
        positions: hand position_ids over.
        labels: the model returns losses.
        hidden: its head is turned off, so that the last stage returns hidden states.
        padded: every sequence in a padded place (``cu_seqlens_q_padded``).
        borders: say which sequences may share.
        shares: the rows have something to share.
        takes_thd: the given attention of ours runs packed rows too.
        core: that attention.
    """

    case: Case = field(default_factory=Case)
    positions: bool = False
    labels: bool = False
    hidden: bool = False
    padded: bool = False
    borders: bool = False
    shares: bool = True
    takes_thd: bool = False
    core: type = ThdAttention

    @property
    def stock(self) -> Variant:
        """As the stock model runs it."""
        return replace(self, case=self.case.without_context)


@dataclass(frozen=True)
class Row:
    """One microbatch as a framework hands it over, with a random cotangent for the output."""

    tokens: Tensor
    params: PackedSeqParams
    position_ids: Tensor
    group_sizes: list[int]
    cotangent: Tensor
    part: Tensor  # places of this rank's tokens in the row
    rank: int  # that is fed the part, of
    num_parts: int

    @property
    def sequences(self) -> list[Tensor]:
        bounds = self.params.cu_seqlens_q_padded
        bounds = self.params.cu_seqlens_q if bounds is None else bounds
        return [self.tokens[a:b] for a, b in pairwise(bounds.tolist())]


def make_groups(g: torch.Generator, extra: int, shares: bool) -> list[list[list[int]]]:
    """Ragged stars with equal prompts, a forest with equal sequences and a prefix, a lone one."""

    def tokens(n: int) -> list[int]:
        return torch.randint(1, VOCAB, (n,), generator=g).tolist()

    if not shares:
        # First tokens differ.
        return [[[i + 1, *tokens(5 + i + extra)] for i in range(4)]]
    prompt, stem, fork = tokens(9 + extra), tokens(6), tokens(5)
    star = [prompt + tokens(n) for n in (4, 7, 1)]
    again = [prompt + tokens(n) for n in (3, 5)]
    deep = [stem + fork + tokens(4), stem + fork + tokens(2), stem + tokens(3), stem + fork]
    deep += [deep[0]]
    return [star, again, deep, [tokens(6)]]


def make_row(variant: Variant, seed: int, extra: int, rank: int = 0, cp: int = 1) -> Row:
    """Groups one after another, an empty sequence, and padding in a last sequence of its own.

    ``rank`` is the one of ``cp`` that is fed a part.
    """
    g = torch.Generator().manual_seed(seed)
    groups = make_groups(g, extra, variant.shares)
    sequences = [torch.tensor(s) for group in groups for s in group]
    sequences += [torch.zeros(0, dtype=torch.int64)]
    lens = [len(s) for s in sequences]
    if variant.padded or cp > 1:
        multiple = max(4, 2 * cp)
        sequences = [torch.nn.functional.pad(s, (0, -len(s) % multiple)) for s in sequences]
    padding = -sum(len(s) for s in sequences) % 16 + 16
    sequences += [torch.zeros(padding, dtype=torch.int64)]
    bounds = torch.tensor([0, *[len(s) for s in sequences]]).cumsum(0).int()
    real = torch.tensor([0, *lens, padding]).cumsum(0).int()
    params = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=real if variant.padded else bounds,
        cu_seqlens_kv=real.clone() if variant.padded else bounds,
        max_seqlen_q=int(bounds.diff().max()),
        max_seqlen_kv=int(bounds.diff().max()),
        cu_seqlens_q_padded=bounds if variant.padded else None,
        cu_seqlens_kv_padded=bounds if variant.padded else None,
    )
    shape = (int(bounds[-1]), 1 if variant.labels else VOCAB)
    # Of every sequence, as trainers divide it: a chunk from the front and one from the back.
    whole = torch.arange(int(bounds[-1])).split(bounds.diff().tolist())
    chunks = [places.chunk(2 * cp) for places in whole if len(places)]
    part = [x for c in chunks for x in (c[rank], c[2 * cp - 1 - rank])] if cp > 1 else whole
    return Row(
        tokens=torch.cat(sequences),
        params=params,
        position_ids=torch.cat([torch.arange(len(s)) for s in sequences]),
        group_sizes=[len(group) for group in groups],
        cotangent=torch.randn(shape, generator=g, dtype=torch.float64),
        part=torch.cat([*part]),
        rank=rank,
        num_parts=cp,
    )


def make_rows(variant: Variant, num_rows: int) -> list[Row]:
    """Rows of this data-parallel rank, each of another length."""
    cp = variant.case.cp
    rank = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    seeds = [100 * (rank // cp) + i for i in range(num_rows)]
    return [make_row(variant, seed, 5 * i, rank % cp, cp) for i, seed in enumerate(seeds)]


def build(variant: Variant, config: TransformerConfig, ours: bool) -> list[Any]:
    """This rank's chunks of the transparent model, or of the stock one."""
    case, chunks = variant.case, []
    for stage in range(case.vpp or 1):
        vp_stage = stage if case.vpp else None
        layer = get_gpt_layer_local_spec(normalization=config.normalization, **case.spec)
        if variant.takes_thd or not ours:
            layer = with_core_attention(layer, variant.core)
        block: Any = with_sequence_parallel_norms(layer, config, vp_stage=vp_stage)
        place: Any = dict(ignore_virtual=False, vp_stage=vp_stage)
        chunk = (PrefixSharingGPTModel if ours else GPTModel)(
            config,
            with_prefix_grouped_attention(block, case.backend) if ours else block,
            vocab_size=VOCAB,
            max_sequence_length=MAX_LEN,
            pre_process=parallel_state.is_pipeline_first_stage(**place),
            post_process=parallel_state.is_pipeline_last_stage(**place),
            position_embedding_type=case.position_embedding_type,
            share_embeddings_and_output_weights=case.tied,
            vp_stage=vp_stage,
            **case.model,
        ).to(case.dtype)
        chunk.post_process &= not variant.hidden
        if ours:
            chunk.min_shared = 4
        chunks.append(chunk)
    return chunks


def with_core_attention(layer: Any, core: type) -> Any:
    attention = layer.submodules.self_attention
    parts = replace(attention.submodules, core_attention=core)
    attention = replace(attention, submodules=parts)
    return replace(layer, submodules=replace(layer.submodules, self_attention=attention))


def call(model: Any, row: Row, variant: Variant) -> Tensor:
    """The call that slime makes, on every pipeline stage."""
    is_ours = any(isinstance(m, PrefixSharingGPTModel) for m in model.modules())
    takes_positions = variant.positions or not is_ours
    more: Any = dict(group_sizes=row.group_sizes) if variant.borders and is_ours else {}
    fed = row.part if variant.case.cp > 1 else slice(None)
    return model(
        input_ids=row.tokens[fed][None],
        position_ids=row.position_ids[fed][None] if takes_positions else None,
        attention_mask=None,
        labels=row.tokens[fed][None] if variant.labels else None,
        packed_seq_params=row.params,
        loss_mask=torch.ones(1, len(row.tokens[fed])),
        **more,
    )


def run(variant: Variant, chunks: list[Any], rows: list[Row]) -> list[Tensor]:
    """Forward and backward under Megatron's schedule; outputs of the last stage, by row.

    Outputs are of the tokens of this rank's part, and so is the loss.
    """
    outputs: list[Tensor] = []
    per_token = get_model_config(chunks[0]).calculate_per_token_loss

    def step(batches: Iterator[Row], model: Any) -> Any:
        row = next(batches)
        output = call(model, row, variant)

        def loss_func(output: Tensor) -> Any:
            # Logits and losses of the row, or hidden states, split under sequence parallelism.
            output = output[:, 0] if variant.hidden else output[0]
            outputs.append(of_part(output.detach(), row, variant))
            places = places_of(output, row, variant)
            cotangent = cotangent_of(output, row, variant)[places]
            is_own = torch.isin(places, row.part)
            loss = (output * cotangent)[is_own].sum()
            # Replicas and context-parallel ranks are added up, or averaged.
            loss = loss if per_token else loss * row.num_parts
            num_tokens = int(row.rank == 0) if per_token else 1
            return loss, torch.tensor(num_tokens, dtype=torch.int), {"loss": loss.detach()}

        return output, loss_func

    harness.run_step(variant.case, chunks, step, rows)
    return outputs


def places_of(output: Tensor, row: Row, variant: Variant) -> Tensor:
    """In the row, of what this rank's output is of."""
    places = row.part if variant.case.cp > 1 else torch.arange(len(row.tokens))
    if len(output) == len(places):
        return places
    return places.chunk(variant.case.tp)[parallel_state.get_tensor_model_parallel_rank()]


def of_part(output: Tensor, row: Row, variant: Variant) -> Tensor:
    """The output of the part's tokens, from all ranks that sequence parallelism splits it over."""
    num_fed = len(row.part) if variant.case.cp > 1 else len(row.tokens)
    if len(output) < num_fed:
        parts = [torch.empty_like(output) for _ in range(variant.case.tp)]
        group = parallel_state.get_tensor_model_parallel_group()
        torch.distributed.all_gather(parts, output.contiguous(), group=group)
        output = torch.cat(parts)
    return output if num_fed == len(row.part) else output[row.part]


def cotangent_of(output: Tensor, row: Row, variant: Variant) -> Tensor:
    """Of the whole row, and this rank's part of the vocabulary."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    if variant.labels:
        return row.cotangent[:, 0]
    if variant.hidden:
        return row.cotangent[:, : output.shape[1]]
    return row.cotangent[:, rank * output.shape[1] :][:, : output.shape[1]]


@dataclass(frozen=True)
class Comparison:
    """A step of ours beside the stock model's, on one rank.

    Attributes:
        output_errors: by row, relative to the largest value; empty before the last stage.
        gradient_errors: by parameter, relative norms.
        least_gradient: of the stock model's, the smallest norm.
        calls: of attention, packed and ordinary.
        counted: tokens that ``count_shared_tokens`` tells of each chunk.
        seen: tokens that each chunk's first layer was fed, on all ranks that divide the row.
        logical: tokens of the rows.
    """

    output_errors: list[float]
    gradient_errors: dict[str, float]
    least_gradient: float
    calls: tuple[int, int]
    counted: list[tuple[int, int]]
    seen: list[int]
    logical: int


@contextmanager
def tokens_fed(chunks: list[Any]) -> Iterator[list[int]]:
    """Counts what the first layer of every chunk is given, by this rank."""
    seen = [0] * len(chunks)

    def watch(i: int) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            seen[i] += hidden.shape[0]

        return hook

    handles = [
        chunk.module.decoder.layers[0].register_forward_pre_hook(watch(i), with_kwargs=True)
        for i, chunk in enumerate(chunks)
    ]
    yield seen
    for handle in handles:
        handle.remove()
