"""Tensors in and out of shards, by the rows of the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .pieces import Piece, Shard


class Read(Protocol):
    """Reads indices ``[start, stop)`` of a Hugging Face tensor along ``dim``."""

    def __call__(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        """The slice, on the CPU."""


def copy_into_shard(target: Tensor, shard: Shard, read: Read, name: str) -> None:
    """Fill a shard in place from the Hugging Face tensors that it is made of.

    Raises:
        ValueError: if the target has another shape than the table gives it, or a dtype that does
            not hold the values.
    """
    if tuple(target.shape) != shard.shape:
        raise ValueError(
            f"parameter {name} is {list(target.shape)} on this rank, by config.json and the "
            f"parallel sizes it must be {list(shard.shape)}"
        )
    position = 0
    for piece in shard.pieces:
        width = piece.stop - piece.start
        source = shifted(_read_piece(read, piece, shard.dim), piece.shift)
        target.narrow(shard.dim, position, width).copy_(cast(source, target.dtype, piece.name))
        position += width
    if shard.padding:
        target.narrow(shard.dim, position, shard.padding).zero_()


def cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """A tensor in another dtype.

    Raises:
        ValueError: if a value becomes infinite, being beyond the dtype's range.
    """
    result = tensor.to(dtype)
    if torch.finfo(dtype).max < torch.finfo(tensor.dtype).max:
        check_finite(result, f"tensor {name} as {str(dtype).removeprefix('torch.')}")
    return result


def is_same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal in shape, dtype and values."""
    return a.dtype == b.dtype and torch.equal(a, b)


def check_finite(tensor: Tensor, what: str) -> None:
    """Refuse NaN and infinite weights, which no model computes with.

    Raises:
        ValueError: saying how many values of ``what`` are not finite.
    """
    finite = tensor.isfinite()
    if not finite.all():
        raise ValueError(
            f"{what}: {int((~finite).sum())} of {tensor.numel()} values are NaN or infinite; take "
            "a checkpoint from before, or a dtype that holds them"
        )


def make_shard(shard: Shard, read: Read, dtype: torch.dtype, name: str) -> Tensor:
    """A new tensor with the content of a shard."""
    target = torch.empty(shard.shape, dtype=dtype)
    copy_into_shard(target, shard, read, name)
    return target


def shifted(tensor: Tensor, shift: float) -> Tensor:
    """A tensor plus a number, in a dtype in which nothing is lost yet."""
    return tensor.double() + shift if shift else tensor


def _read_piece(read: Read, piece: Piece, dim: int) -> Tensor:
    place = piece.place
    if place is None:
        return read(piece.name, dim, piece.start, piece.stop)
    (expert,) = read(piece.name, 0, place.index, place.index + 1)
    return place.within(expert).narrow(dim, piece.start, piece.stop - piece.start)


class Merger:
    """Whole Hugging Face tensors out of all shards of Megatron's parameters, one after the other.

    A tensor that several parameters hold is kept until the last of them has come.

    Args:
        shapes: of the Hugging Face tensors.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = shapes
        # tensor, and how many of its elements which piece has filled
        self._begun: dict[str, tuple[Tensor, dict[Piece, int]]] = {}

    def add(self, specs: Sequence[Shard], shards: Sequence[Tensor]) -> dict[str, Tensor]:
        """The tensors that one parameter completes."""
        for spec, tensor in zip(specs, shards, strict=True):
            position = 0
            for piece in spec.pieces:
                width = piece.stop - piece.start
                self._fill(piece, spec.dim, tensor.narrow(spec.dim, position, width))
                position += width
        names = {piece.name for spec in specs for piece in spec.pieces}
        return {name: self._begun.pop(name)[0] for name in names if self._is_complete(name)}

    def _fill(self, piece: Piece, dim: int, content: Tensor) -> None:
        if piece.name not in self._begun:
            self._begun[piece.name] = content.new_empty(self._shapes[piece.name]), {}
        target, filled = self._begun[piece.name]
        if piece.place is not None:
            target = piece.place.within(target[piece.place.index])
        target.narrow(dim, piece.start, piece.stop - piece.start).copy_(
            shifted(content, -piece.shift)
        )
        filled[piece] = content.numel()

    def _is_complete(self, name: str) -> bool:
        tensor, filled = self._begun[name]
        return sum(filled.values()) == tensor.numel()
