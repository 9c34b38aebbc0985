"""The scan of recurrent layers along every path of a row: one call a depth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .depths import Depth
from .forks import Forks

# Of one depth: its tokens' inputs and its segments' initial states, None for zeros, give outputs
# and final states. Those may be None where ``wants_states`` of the call is false.
Scan = Callable[[Depth, Sequence[Tensor], Tensor | None, bool], tuple[Tensor, Tensor | None]]
# The same of a padded batch, as a recurrence without varlen takes it.
BatchScan = Callable[[Sequence[Tensor], Tensor | None, bool], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True, eq=False)
class Scanned:
    """What a scan of a row gave.

    Attributes:
        out: ``[unique_tokens, ...]`` in depth-major order.
        states: final state of every segment of the forks in depth-major order, ``[segments, ...]``;
            None unless they were asked for.
    """

    out: Tensor
    states: Tensor | None


def forked_scan(
    inputs: Sequence[Tensor],
    forks: Forks,
    scan: Scan,
    history: Tensor | None = None,
    keeps_states: bool = False,
) -> Scanned:
    """Equals the scan of every written-out sample, each shared token scanned once.

    A segment starts from its parent's final state, whose gradient is the sum over its children in
    fp32 or wider. One call of ``scan`` a depth, however many segments there are.

    Args:
        inputs: ``[unique_tokens, ...]`` each, in depth-major order.
        forks: of the row.
        scan: see ``Scan``.
        history: ``[roots, ...]`` states before every root, in depth-major order; None for zeros.
        keeps_states: whether every final state is returned.
    """
    outs, states, state = [], [], history
    # Split rather than sliced: the gradient is one copy, not a row of zeros for every depth.
    lens = [depth.end - depth.begin for depth in forks.depths]
    for depth, parts in zip(forks.depths, zip(*(_divided(x, lens) for x in inputs))):
        if depth.parents is not None:
            assert state is not None
            state = depth.parents.take(state)
        out, state = scan(depth, parts, state, keeps_states or depth.is_continued)
        outs.append(out)
        states.append(state)
    kept = torch.cat([x for x in states if x is not None]) if keeps_states else None
    return Scanned(_joined(outs), kept)


def in_batches(scan: BatchScan) -> Scan:
    """A ``Scan`` of a recurrence that takes batches of equally long sequences.

    Shorter segments are followed by zeros, which must be steps that leave the state as it is and
    whose outputs are dropped. A call for each of ``Depth.batches``.
    """

    def run(
        depth: Depth, inputs: Sequence[Tensor], states: Tensor | None, wants_states: bool
    ) -> tuple[Tensor, Tensor | None]:
        outs, finals = [], []
        lens = [batch.num_tokens for batch in depth.batches]
        counts = [batch.shape[0] for batch in depth.batches]
        befores = [None] * len(counts) if states is None else _divided(states, counts)
        parts = zip(*(_divided(x, lens) for x in inputs))
        for batch, before, part in zip(depth.batches, befores, parts):
            out, final = scan([batch.pad(x) for x in part], before, wants_states)
            outs.append(batch.unpad(out))
            finals.append(final)
        kept = [x for x in finals if x is not None]
        return _joined(outs), _joined(kept) if wants_states else None

    return run


def _divided(x: Tensor, counts: list[int]) -> Sequence[Tensor]:
    return [x] if len(counts) == 1 else x.split(counts)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
