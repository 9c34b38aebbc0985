"""What layers that carry a state keep while sampling: of every live sample its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...linear import Forks, Scan, Tails, forked_convolution, forked_scan


@dataclass
class LayerStates:
    """State and last inputs of every row in one layer, on this tensor-parallel rank.

    A sample goes on from a copy of its prompt's, so memory follows live samples.

    Attributes:
        inputs: ``[rows, width - 1, channels]`` of the layer's convolution, oldest first; zeros
            before the first token.
        states: ``[rows, heads, ...]`` as the layer's scan keeps them.
    """

    inputs: Tensor
    states: Tensor

    def move_rows(self, movers: Tensor, holes: Tensor) -> None:
        """Rows ``movers`` take the places ``holes``, both int64 on the device."""
        for x in (self.inputs, self.states):
            x[holes] = x[movers]


@dataclass(eq=False)
class PromptStates:
    """``StatesOfRow`` of prompts, one tree of one segment each: what ends one begins its samples.

    Attributes:
        kept: takes the states by layer.
        layer: the module.
        forks: of the row.
        tails: of the row, for the layer's convolution.
        places: ``[num_prompts]`` int64: of every prompt among the row's roots, which are in an
            order of their own.
        num_generations: samples of each prompt.
    """

    kept: dict[torch.nn.Module, LayerStates]
    layer: torch.nn.Module
    forks: Forks
    tails: Tails
    places: Tensor
    num_generations: int

    def convolve(self, x: Tensor, convolve: Callable[[Tensor], Tensor]) -> Tensor:
        """See ``StatesOfRow``."""
        self._inputs = self.tails.take(x)
        return forked_convolution(x, self.forks, convolve)

    def scan(self, inputs: Sequence[Tensor], scan: Scan) -> Tensor:
        """See ``StatesOfRow``."""
        scanned = forked_scan(inputs, self.forks, scan, keeps_states=True)
        assert scanned.states is not None
        ends = (x.index_select(0, self.places) for x in (self._inputs, scanned.states))
        repeated = (x.repeat_interleave(self.num_generations, 0) for x in ends)
        self.kept[self.layer] = LayerStates(*repeated)
        return scanned.out


@dataclass(eq=False)
class SampleStates:
    """``StatesOfRow`` of one token of every live sample, a root each: it goes on from its own.

    Attributes:
        kept: of the layer.
        forks: of the row, whose padding follows.
        num_rows: live samples.
    """

    kept: LayerStates
    forks: Forks
    num_rows: int

    def convolve(self, x: Tensor, convolve: Callable[[Tensor], Tensor]) -> Tensor:
        """See ``StatesOfRow``."""
        before = self.kept.inputs[: self.num_rows]
        convolved = forked_convolution(x, self.forks, convolve, before)
        before.copy_(torch.cat([before[:, 1:], x[: self.num_rows, None]], 1))
        return convolved

    def scan(self, inputs: Sequence[Tensor], scan: Scan) -> Tensor:
        """See ``StatesOfRow``."""
        before = self.kept.states[: self.num_rows]
        scanned = forked_scan(inputs, self.forks, scan, before, keeps_states=True)
        assert scanned.states is not None
        before.copy_(scanned.states)
        return scanned.out
