"""Detection of shared runs: a compressed radix tree over token sequences."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from .checks import IntArray

Labels = npt.NDArray[Any]
"""``[num_tokens, ...]``: what tokens have to agree in besides themselves."""


@dataclass(eq=False)
class _Node:
    """One run of tokens under construction, the samples that end with it and its children."""

    tokens: IntArray
    labels: Labels | None = None
    samples: list[int] = field(default_factory=list)
    children: list[_Node] = field(default_factory=list)


def build_radix_segments(
    sequences: list[IntArray], min_shared: int, labels: Sequence[Labels] | None = None
) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """Segments in pre-order of the compressed tree of ``sequences``.

    What samples share before they part has at least ``min_shared`` tokens, and equal ``labels``.

    Returns:
        ``(segment_lens, segment_parents, sample_segments, token_ids)`` as ``PrefixTree`` takes
        them. Children keep the order in which their first sample came.
    """
    root = _insert_all(sequences, labels or [None] * len(sequences))
    if min_shared > 1:
        _write_out_short_runs(root, min_shared)
    return _flatten(root, len(sequences))


def _insert_all(sequences: list[IntArray], labels: Sequence[Labels | None]) -> _Node:
    root = _Node(np.empty(0, dtype=np.int64))
    # Child by first token, kept beside the nodes because only insertion needs it.
    by_token: dict[_Node, dict[Hashable, int]] = {root: {}}

    def add_child(parent: _Node, child: _Node) -> None:
        by_token[parent][_first(child.tokens, child.labels)] = len(parent.children)
        parent.children.append(child)
        by_token.setdefault(child, {})

    for sample, (tokens, own) in enumerate(zip(sequences, labels)):
        node, rest = root, tokens
        while len(rest):
            slot = by_token[node].get(_first(rest, own))
            if slot is None:
                leaf = _Node(rest, own)
                add_child(node, leaf)
                node = leaf
                break
            child = node.children[slot]
            shared = _common_len(child.tokens, rest)
            if own is not None and child.labels is not None:
                shared = _common_len(child.labels[:shared], own[:shared])
            if shared < len(child.tokens):
                head = _Node(child.tokens[:shared], _cut(child.labels, slice(shared)))
                child.tokens = child.tokens[shared:]
                child.labels = _cut(child.labels, slice(shared, None))
                by_token[head] = {}
                add_child(head, child)
                node.children[slot] = head
                child = head
            node, rest, own = child, rest[shared:], _cut(own, slice(shared, None))
        node.samples.append(sample)
    return root


def _first(tokens: IntArray, labels: Labels | None) -> Hashable:
    return int(tokens[0]), None if labels is None else labels[0].tobytes()


def _cut(labels: Labels | None, part: slice) -> Labels | None:
    return None if labels is None else labels[part]


def _common_len(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> int:
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    if differs.ndim > 1:
        differs = differs.reshape(n, -1).any(axis=1)
    first = int(np.argmax(differs))
    return first if differs[first] else n


def _write_out_short_runs(root: _Node, min_shared: int) -> None:
    """Push every run shorter than ``min_shared`` down to where samples part after it.

    A run with one way on, or none, attends like one segment with it, so that sharing it is free.
    """
    stack = [root]
    while stack:
        node = stack.pop()
        kept: list[_Node] = []
        pending = node.children[::-1]
        while pending:
            chain = _until_fork(pending.pop())
            forks = chain[-1].children
            if not forks or sum(len(part.tokens) for part in chain) >= min_shared:
                kept.append(chain[0])
                stack.append(chain[-1])
                continue
            tokens = chain[0].tokens[:0]
            for part in chain:
                tokens = np.concatenate([tokens, part.tokens])
                kept += [_Node(tokens, samples=[sample]) for sample in part.samples]
            for fork in forks:
                fork.tokens = np.concatenate([tokens, fork.tokens])
            pending += forks[::-1]
        node.children = kept


def _until_fork(node: _Node) -> list[_Node]:
    """The node and all that follows it alone."""
    chain = [node]
    while len(chain[-1].children) == 1:
        chain += chain[-1].children
    return chain


def _flatten(root: _Node, num_samples: int) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    runs: list[IntArray] = []
    parents: list[int] = []
    sample_segments = np.empty(num_samples, dtype=np.int64)
    stack = [(child, -1) for child in root.children[::-1]]
    while stack:
        node, parent = stack.pop()
        index = len(runs)
        runs.append(node.tokens)
        parents.append(parent)
        sample_segments[node.samples] = index
        stack += [(child, index) for child in node.children[::-1]]
    lens = np.array([len(run) for run in runs], dtype=np.int64)
    return lens, np.array(parents, dtype=np.int64), sample_segments, np.concatenate(runs)
