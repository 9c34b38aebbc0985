"""Pieces of Hugging Face tensors, and what is made of them: a rank's shard, a whole parameter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Shape = tuple[int, ...]


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


def _divide(what: str, value: int, size: int) -> int:
    if value % size:
        raise ValueError(f"{what}={value} is no multiple of tensor-parallel size {size}")
    return value // size
