"""The carrier: one microbatch's layout on its way to every layer and every pipeline stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Self

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from ..linear import of_layout
from ..parallel import ContextPart, ParallelSizes
from ..tree import PackedLayout, to_device, within_window
from .positioned import PositionedSeqParams, StatesOfRow
from .predictions import Predictions
from .resident import PrefixKV, RowStates
from .routers import RouteRecorder, check_routes, membership, multiplicity_digits
from .row_rotary import RowRotary


@dataclass(kw_only=True, repr=False, eq=False)
class PrefixGroupedSeqParams(PositionedSeqParams):
    """Layout and positions of one packed row, for ``GPTModel(..., packed_seq_params=)``.

    A call argument, never a global: under recompute and interleaved schedules each microbatch
    keeps its own. Cheap to make for every pass over a row: what a row has on the device, and what
    attention makes of it, is kept with the layout and made once.

    Attributes:
        layout: where every token stands.
        predictions: what ``PrefixGroupedGPTModel`` returns on the last stage instead of logits.
        prefix_kv: keeps the row's keys and values, when it is a prefix row.
        resident: kept by the prefix rows that ``layout.resident_spans`` name.
        sample_counts: samples of the batch that each of the row's stands for, as routers count
            them: those that continue a resident prefix, 0 for a row that belongs to none. None:
            one each.
        routed_experts: ``[total_tokens, num_layers, topk]`` integers on the device: the experts of
            every token in every decoder layer, counted over the whole model, in the order of
            top-k; -1 for all of a token's leaves them to the router. Those of dense layers are not
            read. Replayed in every pass, recomputed ones included; the probabilities of the experts
            stay the router's own.
        record_routes: where routers write down the experts that they took.
        context: what this rank runs of the row under context parallelism. ``position_ids`` are
            those of its tokens then, all else is of the whole row.
    """

    layout: PackedLayout
    predictions: Predictions | None = None
    prefix_kv: PrefixKV | None = None
    resident: tuple[PrefixKV, ...] = ()
    sample_counts: tuple[int, ...] | None = None
    routed_experts: Tensor | None = None  # type: ignore[misc]
    record_routes: RouteRecorder | None = None  # type: ignore[misc]
    context: ContextPart | None = field(default=None, init=False)  # type: ignore[misc]
    is_divided: ClassVar[bool] = True

    @classmethod
    def from_layout(
        cls,
        layout: PackedLayout,
        device: torch.device | str = "cpu",
        *,
        predictions: Predictions | None = None,
        config: TransformerConfig | None = None,
        prefix_kv: PrefixKV | None = None,
        resident: Sequence[PrefixKV] = (),
        sample_counts: Sequence[int] | None = None,
        routed_experts: Tensor | None = None,
        record_routes: RouteRecorder | None = None,
        **own_fields: Any,
    ) -> Self:
        """Prepare one microbatch for the device its tokens live on.

        Args:
            layout: the packed row.
            device: where the model runs.
            predictions: tokens to predict (see ``PrefixGroupedGPTModel``).
            config: when given, the row's length is checked against its parallel layout, and
                ``routed_experts`` against the model.
            prefix_kv: see the class; the resident schedule hands it out.
            resident: see the class; the resident schedule hands it out.
            sample_counts: see the class.
            routed_experts: see the class; on any device.
            record_routes: see the class.
            own_fields: what a subclass has beyond these.

        Raises:
            ValueError: if sequence parallelism cannot split the row evenly; on routes or counts
                that the row or the model cannot have.
            NotImplementedError: on routes for a router that takes no others than its own.
        """
        if config is not None:
            check_row_length(layout.total_tokens, config)
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        if routed_experts is not None:
            check_routes(routed_experts, layout.total_tokens, config)
            (routed_experts,) = to_device([routed_experts], device)
        if sample_counts is not None:
            sample_counts = tuple(sample_counts)
            if len(sample_counts) != layout.num_samples or min(sample_counts, default=0) < 0:
                raise ValueError(
                    f"sample_counts={sample_counts} must be a number from 0 for each of "
                    f"{layout.num_samples} samples"
                )
        max_seqlen = layout.max_position + 1
        return cls(
            max_seqlen_q=max_seqlen,
            max_seqlen_kv=max_seqlen,
            layout=layout,
            position_ids=layout.derived(
                ("position_ids", device),
                lambda: to_device([layout.position_ids], device)[0],
            ),
            predictions=predictions,
            prefix_kv=prefix_kv,
            resident=tuple(resident),
            sample_counts=sample_counts,
            routed_experts=routed_experts,
            record_routes=record_routes,
            **own_fields,
        )

    def on_context_ranks(self, group: dist.ProcessGroup) -> Self:
        """The row as one of these ranks runs it; the model makes it so itself."""
        part = copy(self)
        part.context = ContextPart(group, self.layout.total_tokens)
        part.position_ids = self.position_ids[part.context.tokens]
        part.rotary = RowRotary(part.position_ids, self.max_seqlen_q)
        return part

    def cut(self, tokens: Tensor | None) -> Tensor | None:
        """This rank's part of ``[1, total_tokens]``; stages that embed nothing may be fed None.

        Raises:
            ValueError: on every rank, if it is not of the whole row.
        """
        assert self.context is not None
        if tokens is None:
            return None
        if tokens.shape[-1] != self.context.total_tokens:
            raise ValueError(
                f"the model was given {tokens.shape[-1]} tokens, the layout describes one row of "
                f"{self.context.total_tokens}; under context parallelism feed every rank the "
                "whole row, which the model divides"
            )
        return tokens[:, self.context.tokens]

    @property
    def row_mask(self) -> Tensor:
        """``[num_samples, total_tokens, 1]`` bool on the device: sample s holds token t.

        Sums over samples are the multiplicity, 0 on padding; sums over tokens are the samples'
        lengths. A sample stands there as often as ``sample_counts`` says. It reaches routers and
        MLPs of your own that have a true ``reads_row_mask`` as their ``padding_mask``, from which
        its third dimension tells it.
        """
        device = self.position_ids.device
        return self.layout.derived(
            ("row_mask", device, self.sample_counts),
            lambda: to_device([membership(self.layout, self.sample_counts)], device)[0],
        )

    @property
    def has_whole_samples(self) -> bool:
        """See the base; resident prefixes stand in rows of their own."""
        return self.prefix_kv is None and not self.resident

    @property
    def multiplicity_digits(self) -> Tensor:
        """``[digits, total_tokens]`` bool on the device: see ``routers.row``."""
        device = self.position_ids.device
        return self.layout.derived(
            ("multiplicity_digits", device, self.sample_counts),
            lambda: to_device([multiplicity_digits(self.layout, self.sample_counts)], device)[0],
        )

    def states(self, layer: Any, width: int) -> StatesOfRow:
        """See the base; indices are made once a row."""
        keeps_states = self.prefix_kv is not None
        forks = of_layout(self.layout, width, self.position_ids.device, keeps_states)
        return RowStates(layer, self.layout, forks, self.prefix_kv, self.resident)

    def attend(self, core: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See the base; the row's keys and values are kept if it is a prefix row."""
        return self.on_whole_row(partial(self._attend, core), query, key, value)

    def on_whole_row(
        self, attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        """``attend(query, key, value, heads)`` of all tokens; ``heads`` are those of this rank.

        Args:
            attend: given all tokens of the row, and a part of the heads under context parallelism.
            query: of this rank's tokens, as what comes back.
            key: see ``query``.
            value: see ``query``.
        """
        context, num_heads = self.context, query.shape[1]
        if context is None:
            return attend(query, key, value, slice(None))
        kv = context.spread(key, num_heads), context.spread(value, num_heads)
        out = attend(*context.heads_from_tokens(query, *kv), context.heads(num_heads))
        return context.tokens_from_heads(out)

    def _attend(self, core: Any, query: Tensor, key: Tensor, value: Tensor, heads: slice) -> Tensor:
        window = core.kind.window
        if self.prefix_kv is not None:
            key, value = self.prefix_kv.keep(core, key, value, self.layout, window)
        resident = [kept.of(core) for kept in self.resident]
        layout = self.layout
        if resident and window is not None:
            layout = self._within(window) or layout
        out: Tensor = core.attend(query, key, value, layout, resident, heads)
        return out

    def _within(self, window: int) -> PackedLayout | None:
        """The row beside what layers with this window keep of prefix rows, made once."""
        prefix_rows = [kept.layout for kept in self.resident if kept.layout is not None]
        lens = [row.forest.segment_lens.tobytes() for row in prefix_rows]
        return self.layout.derived(
            ("within_window", window, *lens),
            lambda: within_window(self.layout, window, prefix_rows),
        )


def check_row_length(total_tokens: int, config: TransformerConfig) -> None:
    """Raise ValueError if the ranks cannot split a row of this length evenly."""
    multiple = ParallelSizes.from_config(config).row_multiple
    if total_tokens % multiple:
        raise ValueError(
            f"total_tokens={total_tokens} must be a multiple of {multiple} "
            "(context_parallel_size, times tensor_model_parallel_size under sequence_parallel); "
            f"call pack_trees(trees, pad_to_multiple={multiple})"
        )
