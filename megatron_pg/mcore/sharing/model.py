"""A GPT model that finds by itself what the sequences of ordinary packed rows share."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor

from ...parallel import ParallelSizes
from ...tree import PackedLayout
from ..layers import PrefixGroupedCoreAttention
from ..model import PrefixGroupedGPTModel
from ..params import PositionedSeqParams, PrefixGroupedSeqParams
from .rows import OrdinaryRow, find_shared
from .write_out import write_out


class SharedTokens(NamedTuple):
    """Tokens of the ordinary rows that a model was given.

    Attributes:
        unique: those that went through its layers, padding included.
        logical: those of the rows.
    """

    unique: int
    logical: int

    @property
    def reuse_ratio(self) -> float:
        """Logical tokens per unique token; 1 before the first row."""
        return self.logical / self.unique if self.unique else 1.0


@dataclass(kw_only=True, repr=False, eq=False)
class SharingSeqParams(PrefixGroupedSeqParams):
    """A packed row that was found in an ordinary one.

    Attributes:
        given: what the caller passed, by ``_postprocess``'s names.
    """

    is_one_sequence: ClassVar[bool] = True

    given: dict[str, Any]


class PrefixSharingGPTModel(PrefixGroupedGPTModel):
    """``GPTModel`` that encodes once what the sequences of a ``thd`` row share.

    Equals the stock model on the same call: logits ``[1, T, V / tp]`` of the row as it came, or the
    loss when ``labels`` are given, and every gradient. In between, the layers and the output layer
    run the packed row, which is also what pipeline stages send each other; its logits are written
    out at the end, its hidden states where the caller takes those. Every stage needs ``input_ids``.
    Rows that share nothing run as they came. A ``PrefixGroupedSeqParams`` and batches without
    packing are taken as by the base class.

    Nothing waits for a device where ``input_ids`` and ``cu_seqlens_q`` lie on the CPU; otherwise
    they are fetched in one copy. ``count_shared_tokens`` says what was saved.

    Attributes:
        min_shared: shortest run of tokens that is shared; set it on the model. None finds nothing:
            rows run as in the stock model.
    """

    min_shared: int | None = 32
    num_unique_tokens: int = 0
    num_logical_tokens: int = 0

    def forward(
        self,
        input_ids: Any,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input: Tensor | None = None,
        labels: Tensor | None = None,
        inference_context: Any = None,
        packed_seq_params: Any = None,
        extra_block_kwargs: Any = None,
        runtime_gather_output: bool | None = None,
        *,
        group_sizes: Sequence[int] | None = None,
        **more: Any,
    ) -> Any:
        """As ``GPTModel.forward``; with a ``thd`` row see the class.

        Args:
            input_ids: ``[1, T]``, on the model's device or on the CPU.
            position_ids: read by learned position embeddings alone, as in the stock model; None
                takes the positions within each sequence.
            attention_mask: None with a row.
            decoder_input: None with a row.
            labels: as in the stock model.
            inference_context: None with a row.
            packed_seq_params: ``PackedSeqParams(qkv_format="thd", cu_seqlens_q=...)``.
            extra_block_kwargs: None with a row.
            runtime_gather_output: as in the stock model.
            group_sizes: sequences of each group of the row, in order, those that may share with
                each other; None lets all of them.
            more: the stock model's further arguments.

        Raises:
            ValueError: if the arguments describe no row, or ``position_ids`` differ where tokens
                are shared.
            NotImplementedError: with an argument that a row cannot have.
        """
        inputs = dict(position_ids=position_ids, attention_mask=attention_mask)
        others = dict(
            decoder_input=decoder_input,
            inference_context=inference_context,
            extra_block_kwargs=extra_block_kwargs,
        )
        more |= dict(labels=labels, runtime_gather_output=runtime_gather_output)
        if self.min_shared is None or not _is_ordinary_row(packed_seq_params):
            if group_sizes is not None:
                raise ValueError(
                    f"group_sizes={group_sizes} belong to a 'thd' row in which shared runs are "
                    f"found (min_shared={self.min_shared}); leave them out"
                )
            more["packed_seq_params"] = packed_seq_params
            return super().forward(input_ids, **inputs, **others, **more)
        self._refuse(attention_mask=attention_mask, **others, **more)
        row = OrdinaryRow.from_batch(input_ids, packed_seq_params)
        layout = self._layout(row, self.min_shared, group_sizes)
        device = next(self.parameters()).device
        if layout.unique_tokens == row.num_tokens and self._runs_thd_rows():
            if position_ids is None and self.position_embedding_type == "learned_absolute":
                position_ids = layout.position_ids[None]
            more["position_ids"] = None if position_ids is None else position_ids.to(device)
            more["packed_seq_params"] = _on_device(packed_seq_params, device)
            return super().forward(input_ids.to(device), attention_mask=None, **more)
        given = dict(input_ids=input_ids, packed_seq_params=packed_seq_params, **inputs)
        params = SharingSeqParams.from_layout(layout, device, given=given)
        return super().forward(
            layout.token_ids.to(device, non_blocking=True)[None],
            position_ids=self._packed_positions(params, position_ids)[None],
            attention_mask=None,
            packed_seq_params=params,
            **more,
        )

    def _postprocess(
        self, hidden_states: Tensor, *args: Any, packed_seq_params: Any = None, **kwargs: Any
    ) -> Any:
        if not isinstance(packed_seq_params, SharingSeqParams):
            kwargs["packed_seq_params"] = packed_seq_params
            return super()._postprocess(hidden_states, *args, **kwargs)
        layout = packed_seq_params.layout
        kwargs |= packed_seq_params.given
        # Not post_process, which callers turn off to be given the hidden states.
        if not self.decoder.post_process or layout.unique_tokens == layout.logical_tokens:
            return super()._postprocess(hidden_states, *args, **kwargs)
        index = layout.logical_to_packed
        if not self.post_process or kwargs.get("output_processor") is not None:
            is_split = ParallelSizes.from_config(self.config).sp_size > 1
            group = self.pg_collection.tp if is_split else None
            hidden_states = write_out(hidden_states, index, split_over=group)
            return super()._postprocess(hidden_states, *args, **kwargs)
        labels = kwargs.pop("labels", None)
        logits = super()._postprocess(hidden_states, *args, labels=None, **kwargs)
        logits = write_out(logits[0], index)[None]
        if labels is None:
            return logits
        return self.compute_language_model_loss(labels, logits.transpose(0, 1).contiguous())

    def _layout(
        self, row: OrdinaryRow, min_shared: int, group_sizes: Sequence[int] | None
    ) -> PackedLayout:
        multiple = ParallelSizes.from_config(self.config).row_multiple
        if row.num_tokens % multiple:
            raise ValueError(
                f"input_ids has {row.num_tokens} tokens, it must be a multiple of {multiple} "
                "(tensor_model_parallel_size under sequence_parallel); pad the row"
            )
        layout = find_shared(
            row, min_shared=min_shared, group_sizes=group_sizes, pad_to_multiple=multiple
        )
        self.num_unique_tokens += layout.total_tokens
        self.num_logical_tokens += row.num_tokens
        return layout

    def _runs_thd_rows(self) -> bool:
        """Whether the given attention of every layer does; Megatron-Core's unfused one refuses."""
        calls: list[Any] = [
            super(PrefixGroupedCoreAttention, core).forward for core in self._wrapped_cores()
        ]
        return all(call.__func__ is not DotProductAttention.forward for call in calls)

    def _packed_positions(self, params: SharingSeqParams, position_ids: Tensor | None) -> Tensor:
        """What the embedding of the packed row reads; rotary tables take the sequences' own."""
        if position_ids is None or self.position_embedding_type != "learned_absolute":
            return params.position_ids
        layout, given = params.layout, position_ids.reshape(-1).cpu()
        if len(given) != layout.logical_tokens:
            raise ValueError(
                f"position_ids has shape {tuple(position_ids.shape)}, the row has "
                f"{layout.logical_tokens} tokens"
            )
        packed, index = layout.position_ids.clone(), layout.logical_to_packed
        packed[index] = given
        if not torch.equal(packed[index], given):
            raise ValueError(
                "position_ids differ where sequences share their tokens, and learned position "
                "embeddings read them; count from 0 in every sequence, or pass None"
            )
        return packed.to(params.position_ids.device, non_blocking=True)

    def _refuse(self, **arguments: Any) -> None:
        for name, reason in _NOT_OF_A_ROW.items():
            if arguments.get(name) is not None:
                raise NotImplementedError(f"{name} with a 'thd' row: {reason}; pass {name}=None")
        if (cp := ParallelSizes.from_config(self.config).cp) > 1:
            raise NotImplementedError(
                f"context_parallel_size={cp}: rows that are split over context-parallel ranks are "
                "not supported by PrefixSharingGPTModel; set context_parallel_size=1"
            )
        if self.position_embedding_type == "mrope":
            raise NotImplementedError(
                "position_embedding_type='mrope' is not supported with a 'thd' row; use 'rope', "
                "'yarn', 'learned_absolute' or 'none'"
            )


_NOT_OF_A_ROW = {
    "attention_mask": "cu_seqlens_q say what a token sees",
    "decoder_input": "what is shared is found from token ids",
    "inference_context": "sampling goes through mcore.generate",
    "inference_params": "sampling goes through mcore.generate",
    "extra_block_kwargs": "the layers run other tokens than the row's",
    "padding_mask": "padding runs as tokens of a sequence, as without it",
}


def count_shared_tokens(model: torch.nn.Module) -> SharedTokens:
    """Tokens of all ordinary rows so far, forward passes without gradients included.

    Of one model chunk; every chunk and pipeline stage is given the same rows.
    """
    chunks = [m for m in model.modules() if isinstance(m, PrefixSharingGPTModel)]
    return SharedTokens(
        unique=sum(chunk.num_unique_tokens for chunk in chunks),
        logical=sum(chunk.num_logical_tokens for chunk in chunks),
    )


def _is_ordinary_row(params: Any) -> bool:
    is_packed = isinstance(params, PackedSeqParams) and not isinstance(params, PositionedSeqParams)
    return is_packed and params.qkv_format == "thd"


def _on_device(params: Any, device: torch.device) -> Any:
    """The same with every tensor there."""
    moved = copy(params)
    for name, value in vars(params).items():
        if torch.is_tensor(value):
            setattr(moved, name, value.to(device, non_blocking=True))
    return moved
