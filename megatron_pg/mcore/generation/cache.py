"""Keys and values while sampling: every prompt's once, every live sample's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...attention import AttentionKind
from ...tree import PackedLayout, PrefixTree, pack_trees, to_device
from .slots import PromptSlots
from .states import LayerStates

_FIRST_CAPACITY = 64


@dataclass
class LayerCache:
    """Keys and values of one layer, positions encoded, on this tensor-parallel rank.

    A window keeps what it can reach: the end of the prompts, and as many own tokens as it shows,
    each in the place of the one that it no longer does. Their order does not matter.

    Attributes:
        prompt_key, prompt_value: ``[num_prompts, num_query_groups, kept of the longest prompt,
            head_dim]``; prompts end together.
        own_key, own_value: ``[num_samples, num_query_groups, capacity, head_dim]``, of the tokens
            that a sample was given after its prompt; number i stands at ``i % room``.
        room: most own tokens that are ever kept.
    """

    prompt_key: Tensor
    prompt_value: Tensor
    own_key: Tensor
    own_value: Tensor
    room: int

    def make_room(self, own_len: int) -> None:
        """Make room for one more own token than ``own_len``."""
        capacity = min(2 * own_len, self.room)
        if self.own_key.shape[2] != own_len or capacity <= own_len:
            return
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
        states: by linear attention module.
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
        self.states: dict[torch.nn.Module, LayerStates] = {}
        # A prompt that is shorter than the longest repeats its first token; the copies are masked.
        longest = max(prompt_lens)
        place = (torch.arange(longest) - longest + self.prompt_lens[:, None]).clamp(min=0)
        starts = self.prompt_lens.cumsum(0) - self.prompt_lens
        (self._prompt_rows,) = to_device([starts[:, None] + place], device)
        self._slots = self._place_rows()
        self._row_layout: PackedLayout | None = None

    def store_prompts(
        self, layer: torch.nn.Module, key: Tensor, value: Tensor, window: int | None = None
    ) -> None:
        """Keep the prompts of a packed row ``[T, num_query_groups, head_dim]`` for a layer.

        Args:
            layer: that reads them.
            key: of the row.
            value: as key.
            window: of the layer, as in ``AttentionKind``.
        """
        rows, room = self._prompt_rows, self.max_own_len
        if window is not None:
            rows = rows[:, max(rows.shape[1] - window, 0) :]
            room = min(room, window + 1)
        own = (len(self.samples), key.shape[1], min(_FIRST_CAPACITY, room))
        self.layers[layer] = LayerCache(
            prompt_key=key[rows].transpose(1, 2).contiguous(),
            prompt_value=value[rows].transpose(1, 2).contiguous(),
            own_key=key.new_empty(*own, key.shape[2]),
            own_value=value.new_empty(*own, value.shape[2]),
            room=room,
        )

    def advance(self) -> Tensor:
        """Make room for every row's next token; their positions ``[rows]``, on the CPU."""
        position_ids = self.prompt_lens[self.samples // self.num_generations] + self.own_len
        for layer in self.layers.values():
            layer.make_room(self.own_len)
        self.own_len += 1
        return position_ids

    def row_layout(self, total_tokens: int) -> PackedLayout:
        """Every row as a root of one token, and padding; made anew when their number changes."""
        num_rows, kept = len(self.samples), self._row_layout
        if kept is None or (kept.num_samples, kept.total_tokens) != (num_rows, total_tokens):
            ones = np.ones(num_rows, dtype=np.int64)
            kept = pack_trees([PrefixTree(ones, -ones, np.arange(num_rows))], total_tokens)
            self._row_layout = kept
        return kept

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
        holes, movers = to_device([holes, movers], self.device)
        for layer in self.layers.values():
            for x in (layer.own_key, layer.own_value):
                # Beyond its length slicing stops, as a window's does.
                x[holes, :, : self.own_len] = x[movers, :, : self.own_len]
        for states in self.states.values():
            states.move_rows(movers, holes)
        self.samples = self.samples[order]
        has_rows = torch.isin(self.prompts, self.samples // self.num_generations)
        slots, holes, movers = _close_holes(has_rows)
        holes, movers = to_device([holes, movers], self.device)
        for layer in self.layers.values():
            for x in (layer.prompt_key, layer.prompt_value):
                x[holes] = x[movers]
        self.prompts = self.prompts[slots]
        if len(order):
            self._slots = self._place_rows()
        return order

    def _place_rows(self) -> PromptSlots:
        slot_of = torch.empty(len(self.prompt_lens), dtype=torch.int64)
        slot_of[self.prompts] = torch.arange(len(self.prompts))
        slots = slot_of[self.samples // self.num_generations]
        return PromptSlots.of(slots, self.prompt_lens[self.prompts], self.device)

    def attend(
        self,
        layer: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kind: AttentionKind,
        sink: Tensor | None,
    ) -> Tensor:
        """Attention of one token per row over its prompt and its own tokens, itself included.

        Equals the last row of causal attention over the written-out sample. Scores and softmax
        are fp32 for 16-bit inputs.

        Args:
            layer: whose keys and values are read; this token's are added to them.
            query: ``[rows, num_heads, head_dim]``, padding rows behind.
            key: ``[rows, num_query_groups, head_dim]``.
            value: as key.
            kind: of the layer's attention.
            sink: as in ``prefix_grouped_attention``.

        Returns:
            ``[rows, num_heads, head_dim]``, 0 on padding rows.
        """
        cache, num_rows, own_len = self.layers[layer], len(self.samples), self.own_len
        place = (own_len - 1) % cache.room
        cache.own_key[:num_rows, :, place] = key[:num_rows]
        cache.own_value[:num_rows, :, place] = value[:num_rows]
        num_own, placed = min(own_len, cache.room), self._slots
        reach = placed.longest
        if kind.window is not None:
            # The first token after the prompt sees one token of it less than the last of it does.
            reach = min(reach, max(kind.window + 1 - own_len, 0))
        slots, end = slice(len(self.prompts)), slice(cache.prompt_key.shape[2] - reach, None)
        prompt_key = cache.prompt_key[slots, :, end].flatten(0, 1)
        prompt_value = cache.prompt_value[slots, :, end].flatten(0, 1)
        own_key = cache.own_key[:num_rows, :, :num_own].flatten(0, 1)
        own_value = cache.own_value[:num_rows, :, :num_own].flatten(0, 1)

        grouped = query[:num_rows].unflatten(1, (key.shape[1], -1))
        shared = _scores(placed.to_slots(grouped), prompt_key)
        placed.mask_(shared, reach)
        own = _scores(grouped.flatten(0, 1), own_key).view(*grouped.shape[:3], num_own)
        scores = torch.cat([placed.from_slots(shared, grouped.shape[1]), own], dim=-1)
        weights = _weights(scores, kind, query.shape[-1], sink).to(value.dtype)
        shared_weights, own_weights = weights.split([reach, num_own], dim=-1)
        out = torch.bmm(own_weights.flatten(0, 1), own_value).unflatten(0, grouped.shape[:2])
        shared_out = torch.bmm(placed.to_slots(shared_weights), prompt_value)
        out += placed.from_slots(shared_out, grouped.shape[1])
        padding = (0, 0, 0, 0, 0, len(query) - num_rows)
        return torch.nn.functional.pad(out.flatten(1, 2), padding)


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


def _weights(scores: Tensor, kind: AttentionKind, head_dim: int, sink: Tensor | None) -> Tensor:
    """What ``AttentionKind`` makes of products ``[rows, groups, heads of a group, keys]``."""
    scores.mul_(kind.scale(head_dim))
    if kind.softcap is not None:
        scores = kind.softcap * torch.tanh(scores / kind.softcap)
    if sink is None:
        return scores.softmax(-1)
    column = sink.to(scores.dtype).view(*scores.shape[1:3], 1).expand(len(scores), -1, -1, -1)
    return torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1]
