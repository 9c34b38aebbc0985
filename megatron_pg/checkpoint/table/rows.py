"""Rows of the weight table, by how Megatron cuts a parameter over tensor-parallel ranks.

::

    grouped_qkv   q rows of group 0 | k rows of group 0 | v rows of group 0 | q rows of group 1 ...
    gated_qkv     q rows of group 0 | gates of group 0 | k rows of group 0 | v rows of group 0 ...
    joined        this rank's gate rows | this rank's up rows
    outputs       this rank's rows
    columns       this rank's columns
    vocabulary    this rank's rows of the vocabulary | zeros where it is padded
    whole         the same on every rank
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from .pieces import Piece, Place, Row, Shape

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


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
