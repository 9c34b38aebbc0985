"""What layers ask of a packed row, whatever row it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Protocol

from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from ..linear import Forks, Scan
from ..parallel import ContextPart
from .routers import RouteRecorder
from .row_rotary import RowRotary


class StatesOfRow(Protocol):
    """A row in one layer that carries a state: what its paths continue, and what stays of it."""

    @property
    def forks(self) -> Forks:
        """Of the row, for the layer's convolution."""

    def convolve(self, x: Tensor, convolve: Callable[[Tensor], Tensor]) -> Tensor:
        """``forked_convolution`` of ``[total_tokens, channels]``, histories included."""

    def scan(self, inputs: Sequence[Tensor], scan: Scan) -> Tensor:
        """Outputs of ``forked_scan`` over ``[unique_tokens, ...]``, histories included."""


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


class _OneRank:
    """What rotary embeddings get as ``cp_group``: they slice no table, whose rows are gathered."""

    def size(self) -> int:
        """Of the group."""
        return 1

    def rank(self) -> int:
        """In the group."""
        return 0


# One object: rotary embeddings keep their tables by what they are called with.
_ONE_RANK: Any = _OneRank()


@dataclass(kw_only=True, repr=False, eq=False)
class PositionedSeqParams(PackedSeqParams):
    """A row whose tokens stand at logical positions of their own; base of what layers accept.

    It is a ``thd`` row whose samples are no runs of tokens. A layer that knows packed rows asks
    for their ``cu_seqlens``, ``seq_idx`` or lengths; reading those here raises, so that one which
    is not wrapped cannot run across samples. ``max_seqlen_q`` bounds the positions of the row.

    Attributes:
        position_ids: ``[tokens of the row]`` int64 logical positions on the device.
        rotary: rows of rotary tables by these positions.
        routed_experts: experts that its tokens go through; None leaves them to the routers.
        record_routes: where routers write down the experts that they took.
    """

    routed_experts: ClassVar[Tensor | None] = None
    record_routes: ClassVar[RouteRecorder | None] = None
    # Whether losses of every sequence take the row for one, as stock routers do a thd row.
    is_one_sequence: ClassVar[bool] = False
    # Whether context-parallel ranks run a part of the row each, or all of it.
    is_divided: ClassVar[bool] = False
    context: ClassVar[ContextPart | None] = None

    qkv_format: str = field(default="thd", init=False)
    cp_group: Any = field(default=_ONE_RANK, init=False)
    position_ids: Tensor
    rotary: RowRotary = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Megatron-Core's derives fields from ``cu_seqlens``."""
        self.rotary = RowRotary(self.position_ids, self.max_seqlen_q)

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

    def states(self, layer: Any, width: int) -> StatesOfRow:
        """Where a layer that carries a state finds it, and leaves it.

        Args:
            layer: the module.
            width: kernel size of its causal convolution.
        """
        raise NotImplementedError(
            f"{type(self).__name__} does not say which states its tokens continue: it is no row of "
            "a model with linear attention"
        )

    def gather_rotary(self, table: Any) -> Any:
        """Rows of a table ``[max_seqlen_q, 1, 1, D]`` by logical position; see ``RowRotary``.

        Raises:
            ValueError: if the table is not indexed by position (``mrope``).
        """
        return self.rotary.gather(table)


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

    Attributes:
        params: of the row.
        rotary: table by which core attention turns queries and keys; None if that is done.
    """

    params: PositionedSeqParams
    rotary: Tensor | None = None
    qkv_format: str = "sbhd"

    def attend(self, core: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See ``PositionedSeqParams``."""
        return self.params.attend(core, query, key, value)
