"""Keys and values while sampling: every prompt's once, every live sample's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...tree import PackedLayout
from ..params import PositionedSeqParams, PrefixGroupedSeqParams

_FIRST_CAPACITY = 64


@dataclass
class LayerCache:
    """Keys and values of one layer, positions encoded, on this tensor-parallel rank.

    Attributes:
        prompt_key, prompt_value: ``[num_prompts, num_query_groups, longest prompt, head_dim]``.
        own_key, own_value: ``[num_samples, num_query_groups, capacity, head_dim]``, of the tokens
            that a sample was given after its prompt.
    """

    prompt_key: Tensor
    prompt_value: Tensor
    own_key: Tensor
    own_value: Tensor

    def grow(self, own_len: int, capacity: int) -> None:
        """Make room for ``capacity`` own tokens, of which ``own_len`` are kept."""
        for name in ("own_key", "own_value"):
            old = getattr(self, name)
            new = old.new_empty(*old.shape[:2], capacity, old.shape[3])
            new[:, :, :own_len] = old[:, :, :own_len]
            setattr(self, name, new)


class GenerationCache:
    """The live samples of some prompts, in lock-step, and what they attend to in every layer.

    A sample's row is its place in the model's input; all rows have been given equally many tokens.
    When samples end, the last rows move into their places, so that work follows the live samples
    and at most one row is copied for each that ended. The order of rows has no meaning.

    Attributes:
        samples: ``[rows]`` int64 sample of every row; samples of prompt 0 come first.
        prompts: ``[slots]`` int64 prompt of every slot of ``prompt_key``; those with live samples.
        own_len: tokens that every row was given after its prompt.
        layers: by core attention module.
    """

    def __init__(
        self,
        prompt_lens: Sequence[int],
        num_generations: int,
        max_response_tokens: int,
        device: torch.device,
    ) -> None:
        self.num_generations = num_generations
        self.device = device
        # The last sampled token is never given to the model.
        self.max_own_len = max_response_tokens - 1
        self.max_seqlen = max(prompt_lens) + max_response_tokens
        self.prompt_lens = torch.tensor(prompt_lens)
        self.prompts = torch.arange(len(prompt_lens))
        self.samples = torch.arange(len(prompt_lens) * num_generations)
        self.own_len = 0
        self.layers: dict[torch.nn.Module, LayerCache] = {}
        # A prompt that is shorter than the longest repeats its last token; the copies are masked.
        place = torch.arange(max(prompt_lens)).minimum(self.prompt_lens[:, None] - 1)
        starts = self.prompt_lens.cumsum(0) - self.prompt_lens
        self._prompt_rows = (starts[:, None] + place).to(device)
        self._place_rows()

    def store_prompts(self, layer: torch.nn.Module, key: Tensor, value: Tensor) -> None:
        """Keep the prompts of a packed row ``[T, num_query_groups, head_dim]`` for a layer."""
        capacity = min(_FIRST_CAPACITY, self.max_own_len)
        own_shape = (len(self.samples), key.shape[1], capacity, key.shape[2])
        prompt_key, prompt_value = (
            x[self._prompt_rows].transpose(1, 2).contiguous() for x in (key, value)
        )
        self.layers[layer] = LayerCache(
            prompt_key, prompt_value, key.new_empty(own_shape), value.new_empty(own_shape)
        )

    def advance(self, pad_to_multiple: int = 1) -> DecodeSeqParams:
        """The call argument with which every row is given its next token.

        Args:
            pad_to_multiple: rows without meaning follow until their number is a multiple of this.
        """
        position_ids = self.prompt_lens[self.samples // self.num_generations] + self.own_len
        num_rows = len(self.samples)
        position_ids = torch.nn.functional.pad(position_ids, (0, -num_rows % pad_to_multiple))
        for layer in self.layers.values():
            if layer.own_key.shape[2] == self.own_len:
                layer.grow(self.own_len, min(2 * self.own_len, self.max_own_len))
        self.own_len += 1
        return DecodeSeqParams(
            max_seqlen_q=self.max_seqlen,
            max_seqlen_kv=self.max_seqlen,
            position_ids=position_ids.to(self.device, non_blocking=True),
            cache=self,
            output_rows=torch.arange(num_rows),
        )

    def drop_rows(self, is_live: Tensor) -> Tensor:
        """Take the rows out that are not live.

        Args:
            is_live: ``[rows]`` bool on the CPU.

        Returns:
            ``[live rows]`` int64: the row that each of the new rows was.
        """
        order, holes, movers = _close_holes(is_live)
        if len(order) == len(is_live):
            return order
        for layer in self.layers.values():
            for x in (layer.own_key, layer.own_value):
                x[holes, :, : self.own_len] = x[movers, :, : self.own_len]
        self.samples = self.samples[order]
        has_rows = torch.isin(self.prompts, self.samples // self.num_generations)
        slots, holes, movers = _close_holes(has_rows)
        for layer in self.layers.values():
            for x in (layer.prompt_key, layer.prompt_value):
                x[holes] = x[movers]
        self.prompts = self.prompts[slots]
        if len(order):
            self._place_rows()
        return order

    def attend(
        self,
        layer: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        softmax_scale: float | None,
    ) -> Tensor:
        """Attention of one token per row over its prompt and its own tokens, itself included.

        Equals the last row of causal attention over the written-out sample. Scores and softmax
        are fp32 for 16-bit inputs.

        Args:
            layer: whose keys and values are read; this token's are added to them.
            query: ``[rows, num_heads, head_dim]``, padding rows behind.
            key: ``[rows, num_query_groups, head_dim]``.
            value: as key.
            softmax_scale: factor on the scores; ``head_dim ** -0.5`` when None.

        Returns:
            ``[rows, num_heads, head_dim]``, 0 on padding rows.
        """
        cache, num_rows, own_len = self.layers[layer], len(self.samples), self.own_len
        cache.own_key[:num_rows, :, own_len - 1] = key[:num_rows]
        cache.own_value[:num_rows, :, own_len - 1] = value[:num_rows]
        slots = slice(len(self.prompts))
        prompt_key = cache.prompt_key[slots, :, : self._longest].flatten(0, 1)
        prompt_value = cache.prompt_value[slots, :, : self._longest].flatten(0, 1)
        own_key = cache.own_key[:num_rows, :, :own_len].flatten(0, 1)
        own_value = cache.own_value[:num_rows, :, :own_len].flatten(0, 1)

        grouped = query[:num_rows].unflatten(1, (key.shape[1], -1))
        shared = _scores(self._to_slots(grouped), prompt_key)
        if self._is_padding is not None:
            shared.unflatten(0, (len(self.prompts), -1)).masked_fill_(self._is_padding, -torch.inf)
        own = _scores(grouped.flatten(0, 1), own_key).view(*grouped.shape[:3], own_len)
        scores = torch.cat([self._from_slots(shared, grouped.shape[1]), own], dim=-1)
        scale = query.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        weights = scores.mul_(scale).softmax(-1).to(value.dtype)
        shared_weights, own_weights = weights.split([self._longest, own_len], dim=-1)
        out = torch.bmm(own_weights.flatten(0, 1), own_value).view(grouped.shape)
        shared_out = torch.bmm(self._to_slots(shared_weights), prompt_value)
        out += self._from_slots(shared_out, grouped.shape[1])
        padding = (0, 0, 0, 0, 0, len(query) - num_rows)
        return torch.nn.functional.pad(out.flatten(1, 2), padding)

    def _place_rows(self) -> None:
        """Give every row a place beside the other rows of its prompt.

        For rows of prompts 0 1 1 the grid has 2 slots of width 2 and the rows stand at 0 2 3.
        """
        slot_of = torch.empty(len(self.prompt_lens), dtype=torch.int64)
        slot_of[self.prompts] = torch.arange(len(self.prompts))
        slots = slot_of[self.samples // self.num_generations]
        counts = torch.bincount(slots, minlength=len(self.prompts))
        self._width = int(counts.max())
        by_slot = torch.argsort(slots, stable=True)
        grid = slots * self._width
        grid[by_slot] += torch.arange(len(slots)) - (counts.cumsum(0) - counts)[slots[by_slot]]
        is_trivial = torch.equal(grid, torch.arange(len(self.prompts) * self._width))
        self._grid = None if is_trivial else grid.to(self.device)
        lens = self.prompt_lens[self.prompts]
        self._longest = int(lens.max())
        is_padding = torch.arange(self._longest) >= lens[:, None]
        self._is_padding = (
            is_padding[:, None, None].to(self.device) if bool(is_padding.any()) else None
        )

    def _to_slots(self, x: Tensor) -> Tensor:
        """``[rows, groups, heads, X]`` to ``[slots * groups, width * heads, X]``."""
        if self._grid is not None:
            places = x.new_zeros(len(self.prompts) * self._width, *x.shape[1:])
            x = places.index_copy_(0, self._grid, x)
        x = x.unflatten(0, (len(self.prompts), self._width)).transpose(1, 2)
        return x.flatten(2, 3).flatten(0, 1)

    def _from_slots(self, x: Tensor, num_groups: int) -> Tensor:
        """``[slots * groups, width * heads, X]`` to ``[rows, groups, heads, X]``."""
        x = x.unflatten(0, (-1, num_groups)).unflatten(2, (self._width, -1))
        x = x.transpose(1, 2).flatten(0, 1)
        return x if self._grid is None else x.index_select(0, self._grid)


@dataclass(kw_only=True, repr=False, eq=False)
class PrefillSeqParams(PrefixGroupedSeqParams):
    """Encodes whole prompts, one tree of one segment each, and keeps their keys and values.

    Attributes:
        cache: takes the keys and values.
        output_rows: ``[num_prompts]`` int64 on the CPU, last token of every prompt: the rows whose
            logits ``PrefixGroupedGPTModel`` returns on the last stage.
    """

    cache: GenerationCache
    output_rows: Tensor

    @classmethod
    def from_prompts(cls, layout: PackedLayout, cache: GenerationCache) -> PrefillSeqParams:
        """Prepare a row that holds the prompts of ``cache``."""
        last = cache.prompt_lens.cumsum(0) - 1
        return cls.from_layout(layout, cache.device, cache=cache, output_rows=last)

    def attend(self, core: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See ``PositionedSeqParams``."""
        out = super().attend(core, query, key, value)
        self.cache.store_prompts(core, key, value)
        return out


@dataclass(kw_only=True, repr=False, eq=False)
class DecodeSeqParams(PositionedSeqParams):
    """Gives every live sample one token.

    Attributes:
        cache: what the tokens attend to.
        output_rows: ``[rows]`` int64 on the CPU: all rows but the padding.
    """

    cache: GenerationCache
    output_rows: Tensor

    def attend(self, core: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See ``PositionedSeqParams``."""
        return self.cache.attend(core, query, key, value, core.kind.softmax_scale)


def _close_holes(is_kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(order, holes, movers)``: kept entries beyond the new end move into the holes before it.

    For kept 1 0 1 0 1 the new length is 3, entry 4 moves into hole 1: order ``0 4 2``.
    """
    count = int(is_kept.sum())
    holes = torch.nonzero(~is_kept[:count]).flatten()
    movers = torch.nonzero(is_kept[count:]).flatten() + count
    order = torch.arange(count)
    order[holes] = movers
    return order, holes, movers


def _scores(query: Tensor, key: Tensor) -> Tensor:
    """``query @ key.T`` per batch entry, in fp32 for 16-bit inputs (rounding once, as kernels)."""
    key = key.transpose(1, 2)
    if query.dtype.itemsize >= 4:
        return torch.bmm(query, key)
    if query.is_cuda:
        return torch.bmm(query, key, out_dtype=torch.float32)
    return torch.bmm(query.float(), key.float())
