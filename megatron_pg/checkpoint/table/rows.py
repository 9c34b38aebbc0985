"""Rows of the weight table: a Megatron parameter, the tensors it is made of, and how it is cut.

::

    grouped_qkv   q rows of group 0 | k rows of group 0 | v rows of group 0 | q rows of group 1 ...
              (with gates: q rows of group 0 | gates of group 0 | k rows of group 0 | ...)
sections      this rank's heads of the first | of the second | ...
    joined        this rank's gate rows | this rank's up rows
    columns       this rank's columns
    vocabulary    this rank's rows of the vocabulary | zeros where it is padded
    whole         the same on every rank
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Shape = tuple[int, ...]
EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a matrix (or vector) lies in a tensor that holds those of all experts.

    Attributes:
        index: of the expert, in the first axis.
        first: of its columns, which are the matrix's rows: matrices lie there transposed.
        step: from one of its columns to the next.
    """

    index: int
    first: int = 0
    step: int = 1

    def moved(self, by: int) -> Place:
        """The same of another expert."""
        return replace(self, index=self.index + by)

    def within(self, expert: Tensor) -> Tensor:
        """A view of the matrix in what the tensor holds of its expert."""
        part = expert[..., self.first :: self.step]
        return part.mT if part.dim() == 2 else part


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows (or columns) ``[start, stop)`` of a Hugging Face tensor, or of a matrix in one.

    Attributes:
        shift: what is added to the tensor's values in the parameter.
    """

    name: str
    start: int
    stop: int
    place: Place | None = None
    shift: float = 0.0


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's part of a Megatron parameter: pieces joined along ``dim``, then zeros.

    Attributes:
        shape: of the shard.
        dim: axis along which the pieces are joined.
        pieces: in order.
        padding: rows of zeros after the pieces (padded vocabulary).
    """

    shape: Shape
    dim: int
    pieces: tuple[Piece, ...]
    padding: int = 0

    def moved(self, by: int) -> Shard:
        """The same of tensors whose experts are numbered so much higher."""
        pieces = (
            piece if piece.place is None else replace(piece, place=piece.place.moved(by))
            for piece in self.pieces
        )
        return replace(self, pieces=tuple(pieces))


@dataclass(frozen=True, slots=True)
class Row:
    """A parameter of the whole ``GPTModel``: blocks of pieces, joined along ``dim``.

    Attributes:
        name: in local-spec names, layer and expert numbered over the whole model.
        shapes: of the Hugging Face tensors, in the order in which they are written.
        blocks: each is cut evenly over the tensor-parallel ranks; a rank's part of the first is
            followed by its part of the second.
        dim: axis of the cut.
        is_cut: whether ranks have parts; else every rank has all.
        padding: rows of zeros behind the (only) block, cut with it.
        num_units: what the number of ranks must divide besides; attention heads.
        dtype: in which models keep it whatever theirs is; None: the model's.
        shape: of the matrices of its pieces, where they lie within tensors.
    """

    name: str
    shapes: dict[str, Shape]
    blocks: tuple[tuple[Piece, ...], ...]
    dim: int = 0
    is_cut: bool = True
    padding: int = 0
    num_units: int = 0
    dtype: torch.dtype | None = None
    shape: Shape | None = None

    @property
    def block_lengths(self) -> list[int]:
        """Of every block along ``dim``."""
        return [_length(block) for block in self.blocks]

    def shard(self, rank: int, size: int) -> Shard:
        """One tensor-parallel rank's part.

        Raises:
            ValueError: sizes that ``size`` does not divide.
        """
        rank, size = (rank, size) if self.is_cut else (0, 1)
        _divide(f"attention heads of {self.name}", self.num_units, size)
        pieces: list[Piece] = []
        length = 0
        for block in self.blocks:
            total = _length(block) + self.padding
            width = _divide(f"axis {self.dim} of {self.name}", total, size)
            pieces += _cut(block, rank * width, (rank + 1) * width)
            length += width
        shape = list(self.shape or next(iter(self.shapes.values())))
        shape[self.dim] = length
        return Shard(tuple(shape), self.dim, tuple(pieces), length - _length(pieces))


def _length(pieces: Sequence[Piece]) -> int:
    return sum(piece.stop - piece.start for piece in pieces)


def _cut(block: Sequence[Piece], low: int, high: int) -> Iterator[Piece]:
    """What of the pieces, one after the other, lies in ``[low, high)``."""
    at = 0
    for piece in block:
        end = at + piece.stop - piece.start
        start, stop = max(low, at), min(high, end)
        if start < stop:
            shift = piece.start - at
            yield replace(piece, start=start + shift, stop=stop + shift)
        at = end


def whole(
    name: str,
    tensor: str,
    shape: Shape,
    dtype: torch.dtype | None = None,
    shift: float = 0.0,
) -> Row:
    """A parameter that every rank holds whole."""
    block = (Piece(tensor, 0, shape[0], shift=shift),)
    return Row(name, {tensor: shape}, (block,), is_cut=False, dtype=dtype)


def outputs(name: str, tensor: str, shape: Shape, num_heads: int = 0) -> Row:
    """A matrix whose output is cut, between heads where it has some."""
    return Row(name, {tensor: shape}, ((Piece(tensor, 0, shape[0]),),), num_units=num_heads)


def vocabulary(name: str, tensor: str, shape: Shape, padded_rows: int) -> Row:
    """One row per token of the vocabulary, padded before it is cut."""
    block = (Piece(tensor, 0, shape[0]),)
    return Row(name, {tensor: shape}, (block,), padding=padded_rows - shape[0])


def columns(name: str, tensor: str, shape: Shape) -> Row:
    """A matrix whose input is cut."""
    return Row(name, {tensor: shape}, ((Piece(tensor, 0, shape[1]),),), dim=1)


def joined(name: str, tensors: Sequence[str], shape: Shape) -> Row:
    """Tensors of one shape whose outputs are cut, each rank's rows of one after the other's."""
    blocks = tuple((Piece(tensor, 0, shape[0]),) for tensor in tensors)
    return Row(name, dict.fromkeys(tensors, shape), blocks)


def grouped_qkv(
    name: str, tensors: Sequence[str], *, num_heads: int, num_groups: int, width: int, rest: Shape
) -> Row:
    """Rows of queries, keys and values, group by group.

    Megatron cuts them evenly, through a group where there are more ranks than groups.

    Args:
        name: of the parameter.
        tensors: queries, keys and values.
        num_heads: of queries.
        num_groups: of keys and values.
        width: of a head.
        rest: further axes: the input, or none for a bias.
    """
    rows = num_heads // num_groups * width, width, width
    parts = list(zip(tensors, rows, strict=True))
    block = tuple(
        Piece(tensor, group * count, (group + 1) * count)
        for group in range(num_groups)
        for tensor, count in parts
    )
    shapes = {tensor: (num_groups * count, *rest) for tensor, count in parts}
    return Row(name, shapes, (block,), num_units=num_heads)


def gated_qkv(
    name: str, tensors: Sequence[str], *, num_heads: int, num_groups: int, width: int, rest: Shape
) -> Row:
    """As ``grouped_qkv``, of queries whose tensor has every head's gate behind its query."""
    query, key, value = tensors
    per_group = num_heads // num_groups

    def of_group(group: int) -> Iterator[Piece]:
        for half in (0, 1):
            for head in range(group * per_group, (group + 1) * per_group):
                start = (2 * head + half) * width
                yield Piece(query, start, start + width)
        for tensor in (key, value):
            yield Piece(tensor, group * width, (group + 1) * width)

    block = tuple(piece for group in range(num_groups) for piece in of_group(group))
    shapes = {
        query: (2 * num_heads * width, *rest),
        **dict.fromkeys((key, value), (num_groups * width, *rest)),
    }
    return Row(name, shapes, (block,), num_units=num_heads)


def gated_mlp(
    ours: str,
    theirs: str,
    hidden: int,
    ffn: int,
    *,
    has_bias: bool = False,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> Iterator[Row]:
    """Rows of an MLP (or of one expert) with a gate.

    Args:
        ours: prefix of the parameters.
        theirs: prefix of the tensors.
        hidden: width of the layer.
        ffn: width of the MLP.
        has_bias: whether its linear layers have biases.
        names: of the gate, of what it multiplies and of the way down.
    """
    *halves, down = (f"{theirs}{name}." for name in names)
    yield joined(f"{ours}linear_fc1.weight", [f"{x}weight" for x in halves], (ffn, hidden))
    if has_bias:
        yield joined(f"{ours}linear_fc1.bias", [f"{x}bias" for x in halves], (ffn,))
    yield columns(f"{ours}linear_fc2.weight", f"{down}weight", (hidden, ffn))
    if has_bias:
        yield whole(f"{ours}linear_fc2.bias", f"{down}bias", (hidden,))


def gated_expert(
    ours: str, theirs: str, expert: int, num_experts: int, hidden: int, ffn: int
) -> Iterator[Row]:
    """Rows of one of many experts whose tensors are stored as one each, with biases.

    Gate and what it multiplies alternate there, and matrices are transposed.

    Args:
        ours: prefix of the expert's parameters.
        theirs: prefix of the tensors of all experts.
        expert: its number.
        num_experts: of the layer.
        hidden: width of the layer.
        ffn: width of an expert.
    """
    up, down, place = f"{theirs}gate_up_proj", f"{theirs}down_proj", Place(expert)
    halves = [Place(expert, first, 2) for first in (0, 1)]
    for name, rest in ("weight", (hidden,)), ("bias", ()):
        tensor = up if rest else f"{up}_bias"
        blocks = tuple((Piece(tensor, 0, ffn, half),) for half in halves)
        shapes = {tensor: (num_experts, *rest, 2 * ffn)}
        yield Row(f"{ours}linear_fc1.{name}", shapes, blocks, shape=(ffn, *rest))
    block = (Piece(down, 0, ffn, place),)
    shapes, shape = {down: (num_experts, ffn, hidden)}, (hidden, ffn)
    yield Row(f"{ours}linear_fc2.weight", shapes, (block,), dim=1, shape=shape)
    block = (Piece(f"{down}_bias", 0, hidden, place),)
    shapes = {f"{down}_bias": (num_experts, hidden)}
    yield Row(f"{ours}linear_fc2.bias", shapes, (block,), is_cut=False, shape=(hidden,))


def _divide(what: str, value: int, size: int) -> int:
    if value % size:
        raise ValueError(f"{what}={value} is no multiple of tensor-parallel size {size}")
    return value // size
