"""The carrier: one microbatch's layout on its way to every layer and every pipeline stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from ..parallel import ParallelSizes
from ..tree import PackedLayout, within_window
from .predictions import Predictions
from .prefix_kv import PrefixKV
from .router_row import membership, multiplicity_digits
from .routes import RouteRecorder, check_routes


class _NotOfARow:
    """A field of ``PackedSeqParams`` that a row of shared tokens cannot have; reading it raises."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, row: Any, owner: type | None = None) -> Any:
        if row is None:
            return self
        raise NotImplementedError(
            f"a layer read {self.name} of a packed row, whose samples share tokens and have no "
            f"{self.name}; the layer does not know such rows: build the model from a spec of which "
            "with_prefix_grouped_attention wrapped every layer (see the layer in the traceback)"
        )

    def __set__(self, row: Any, value: object) -> None:
        if value is not None:
            raise ValueError(f"{self.name}={value!r}: a packed row has its layout instead")


@dataclass(kw_only=True, repr=False, eq=False)
class PositionedSeqParams(PackedSeqParams):
    """A row whose tokens stand at logical positions of their own; base of what layers accept.

    It is a ``thd`` row whose samples are no runs of tokens. A layer that knows packed rows asks
    for their ``cu_seqlens``, ``seq_idx`` or lengths; reading those here raises, so that one which
    is not wrapped cannot run across samples. ``max_seqlen_q`` bounds the positions of the row.

    Attributes:
        position_ids: ``[tokens of the row]`` int64 logical positions on the device.
        routed_experts: experts that its tokens go through; None leaves them to the routers.
        record_routes: where routers write down the experts that they took.
    """

    routed_experts: ClassVar[Tensor | None] = None
    record_routes: ClassVar[RouteRecorder | None] = None
    # Whether losses of every sequence take the row for one, as stock routers do a thd row.
    is_one_sequence: ClassVar[bool] = False

    qkv_format: str = field(default="thd", init=False)
    position_ids: Tensor
    _rotary_source: Tensor | None = field(default=None, init=False, repr=False)
    _rotary_gathered: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        """Nothing: Megatron-Core's derives fields from ``cu_seqlens``."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.position_ids)} tokens)"

    @property
    def row_mask(self) -> Tensor | None:
        """What layers get in the place of a padding mask: None for rows that nothing shares."""
        return None

    @property
    def has_whole_samples(self) -> bool:
        """Whether every sample stands in the row with all its tokens."""
        return True

    @property
    def multiplicity_digits(self) -> Tensor | None:
        """What routers count tokens by: None for rows whose tokens they count once each."""
        return None

    def attend(self, core: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of the row's tokens in one layer.

        Args:
            core: the layer's ``PrefixGroupedCoreAttention``.
            query: ``[tokens, num_heads, head_dim]`` of this rank, positions encoded.
            key: ``[tokens, num_query_groups, head_dim]``.
            value: as key.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what its tokens attend to")

    def gather_rotary(self, table: Any) -> Any:
        """Rows of a rotary table ``[max_seqlen_q, 1, 1, D]`` by logical position.

        Megatron's ``rope`` and ``yarn`` make one row per position and ignore ``position_ids``.
        The result is kept for the next layer, which is handed the same table.

        Raises:
            ValueError: if the table is not indexed by position (``mrope``).
        """
        if table is None:
            return None
        if isinstance(table, tuple):
            gathered = tuple(self.gather_rotary(part) for part in dict.fromkeys(table))
            return gathered * 2 if len(gathered) == 1 else gathered
        if table.shape[0] != self.max_seqlen_q or table.shape[1] != 1:
            raise ValueError(
                f"the rotary table has shape {tuple(table.shape)}, expected one row for each of "
                f"{self.max_seqlen_q} positions; use position_embedding_type 'rope', 'yarn', "
                "'learned_absolute' or 'none' ('mrope' is not supported)"
            )
        # Recompute hands in detached copies, so storage decides what is the same table.
        source = self._rotary_source
        if source is None or source.data_ptr() != table.data_ptr() or source.dtype != table.dtype:
            self._rotary_source = table.detach()
            self._rotary_gathered = self._rotary_source.index_select(0, self.position_ids)
        return self._rotary_gathered


# What models and layers read of every row; all else that a Megatron-Core may have is refused.
_READ_OF_EVERY_ROW = {"qkv_format", "max_seqlen_q", "max_seqlen_kv", "cp_group"}
_READ_OF_EVERY_ROW.add("tokens_per_sample")  # by layers with experts
for _name in {f.name for f in fields(PackedSeqParams)} - _READ_OF_EVERY_ROW:
    setattr(PositionedSeqParams, _name, _NotOfARow(_name))


@dataclass(frozen=True)
class WrappedRow:
    """A row as wrapped self-attention hands it to its core attention: ``[T, 1, heads, dim]``.

    Megatron-Core's ``Attention.forward`` between the two reads ``qkv_format`` alone. Core attention
    takes nothing else for a packed row, so neither runs one without the other.
    """

    params: PositionedSeqParams
    qkv_format: str = "sbhd"

    def attend(self, core: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See ``PositionedSeqParams``."""
        return self.params.attend(core, query, key, value)


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
    """

    layout: PackedLayout
    predictions: Predictions | None = None
    prefix_kv: PrefixKV | None = None
    resident: tuple[PrefixKV, ...] = ()
    sample_counts: tuple[int, ...] | None = None
    routed_experts: Tensor | None = None  # type: ignore[misc]
    record_routes: RouteRecorder | None = None  # type: ignore[misc]

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
            routed_experts = routed_experts.to(device, non_blocking=True)
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
                lambda: layout.position_ids.to(device, non_blocking=True),
            ),
            predictions=predictions,
            prefix_kv=prefix_kv,
            resident=tuple(resident),
            sample_counts=sample_counts,
            routed_experts=routed_experts,
            record_routes=record_routes,
            **own_fields,
        )

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
            lambda: membership(self.layout, self.sample_counts).to(device, non_blocking=True),
        )

    @property
    def has_whole_samples(self) -> bool:
        """See the base; resident prefixes stand in rows of their own."""
        return self.prefix_kv is None and not self.resident

    @property
    def multiplicity_digits(self) -> Tensor:
        """``[digits, total_tokens]`` bool on the device: see ``router_row``."""
        device = self.position_ids.device

        return self.layout.derived(
            ("multiplicity_digits", device, self.sample_counts),
            lambda: multiplicity_digits(self.layout, self.sample_counts).to(
                device, non_blocking=True
            ),
        )

    def attend(self, core: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See the base; the row's keys and values are kept if it is a prefix row."""
        window = core.kind.window
        if self.prefix_kv is not None:
            key, value = self.prefix_kv.keep(core, key, value, self.layout, window)
        resident = [kept.of(core) for kept in self.resident]
        layout = self.layout
        if resident and window is not None:
            layout = self._within(window) or layout
        out: Tensor = core.attend(query, key, value, layout, resident)
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
            "(tensor_model_parallel_size under sequence_parallel); call "
            f"pack_trees(trees, pad_to_multiple={multiple})"
        )
