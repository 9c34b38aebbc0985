"""Rows of sampling: whole prompts, and then one token of every live sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...linear import of_layout, tails_of
from ...tree import PackedLayout, to_device
from ..params import PrefixGroupedSeqParams
from ..positioned import PositionedSeqParams
from .cache import GenerationCache
from .states import PromptStates, SampleStates


@dataclass(kw_only=True, repr=False, eq=False)
class PrefillSeqParams(PrefixGroupedSeqParams):
    """Encodes whole prompts, one tree of one segment each, and keeps their keys and values.

    Attributes:
        cache: takes the keys and values.
        output_rows: ``[num_prompts]`` int64 on the CPU, last token of every prompt: the rows whose
            logits the model returns on the last stage.
    """

    cache: GenerationCache
    output_rows: Tensor
    is_divided: ClassVar[bool] = False

    @classmethod
    def from_prompts(cls, layout: PackedLayout, cache: GenerationCache) -> PrefillSeqParams:
        """Prepare a row that holds the prompts of ``cache``."""
        last = cache.prompt_lens.cumsum(0) - 1
        return cls.from_layout(layout, cache.device, cache=cache, output_rows=last)

    def attend(self, core: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See ``PositionedSeqParams``."""
        out = super().attend(core, query, key, value)
        self.cache.store_prompts(core, key, value, core.kind.window)
        return out

    def states(self, layer: Any, width: int) -> PromptStates:
        """See ``PositionedSeqParams``."""
        layout, device = self.layout, self.position_ids.device
        forks = of_layout(layout, width, device)
        # A tree is a prompt.
        (places,) = layout.derived(
            ("prompts", device),
            lambda: to_device([torch.argsort(torch.tensor(forks.roots))], device),
        )
        return PromptStates(
            self.cache.states,
            layer,
            forks,
            tails_of(layout, width, device),
            places,
            self.cache.num_generations,
        )


@dataclass(kw_only=True, repr=False, eq=False)
class DecodeSeqParams(PositionedSeqParams):
    """Gives every live sample one token.

    Attributes:
        cache: what the tokens attend to.
        output_rows: ``[rows]`` int64 on the CPU: all rows but the padding.
    """

    cache: GenerationCache
    output_rows: Tensor

    def attend(self, core: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See ``PositionedSeqParams``."""
        return self.cache.attend(core, query, key, value, core.kind, core.sink(query.device))

    @classmethod
    def of_rows(cls, cache: GenerationCache, pad_to_multiple: int = 1) -> DecodeSeqParams:
        """The call argument with which every row of ``cache`` is given its next token.

        Args:
            cache: of the rows.
            pad_to_multiple: rows without meaning follow until their number is a multiple of this.
        """
        position_ids = cache.advance()
        num_rows = len(position_ids)
        position_ids = torch.nn.functional.pad(position_ids, (0, -num_rows % pad_to_multiple))
        return cls(
            max_seqlen_q=cache.max_seqlen,
            max_seqlen_kv=cache.max_seqlen,
            position_ids=to_device([position_ids], cache.device)[0],
            cache=cache,
            output_rows=torch.arange(num_rows),
        )

    def states(self, layer: Any, width: int) -> SampleStates:
        """See ``PositionedSeqParams``: every row is a root of one token."""
        layout = self.cache.row_layout(len(self.position_ids))
        forks = of_layout(layout, width, self.position_ids.device)
        return SampleStates(self.cache.states[layer], forks, len(self.output_rows))
