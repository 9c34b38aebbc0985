"""A GPT model that finds by itself what the sequences of ordinary packed rows share."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor

from ...parallel import ParallelSizes
from ...tree import PackedLayout
from ..layers import PrefixGroupedCoreAttention
from ..model import PrefixGroupedGPTModel
from ..params import PrefixGroupedSeqParams
from ..positioned import PositionedSeqParams
from .arguments import names_arguments_of, refuse_arguments
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
        packed_ids: ``[n]`` int64 on the CPU: where each of the caller's tokens is packed, of this
            context-parallel rank's alone.
    """

    is_one_sequence: ClassVar[bool] = True

    given: dict[str, Any]
    packed_ids: Tensor


class PrefixSharingGPTModel(PrefixGroupedGPTModel):
    """``GPTModel`` that encodes once what the sequences of a ``thd`` row share.

    Equals the stock model on the same call: logits ``[1, T, V / tp]`` of the row as it came, or the
    loss when ``labels`` are given, and every gradient. In between, the layers and the output layer
    run the packed row, which is also what pipeline stages send each other; its logits are written
    out at the end, its hidden states where the caller takes those. Every stage needs ``input_ids``.
    Rows that share nothing run as they came. A ``PrefixGroupedSeqParams`` and batches without
    packing are taken as by the base class.

    Context-parallel ranks are each fed their tokens of a row, in Megatron-Core's zigzag, and get
    the outputs of these: T is a rank's number of tokens then, ``cu_seqlens_q`` is of the whole row.

    Nothing waits for a device where ``input_ids`` and ``cu_seqlens_q`` lie on the CPU of one
    context-parallel rank; otherwise they are fetched in one copy. ``count_shared_tokens`` says what
    was saved.

    Attributes:
        min_shared: shortest run of tokens that is shared; set it on the model. None finds nothing:
            rows run as in the stock model.
    """

    min_shared: int | None = 32
    num_unique_tokens: int = 0
    num_logical_tokens: int = 0

    @names_arguments_of(GPTModel.forward)
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
            ValueError: if the arguments describe no row, or none that ranks can divide, or
                ``position_ids`` differ where tokens are shared.
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
        refuse_arguments(
            self.position_embedding_type, attention_mask=attention_mask, **others, **more
        )
        device, context = next(self.parameters()).device, self._context_group
        row = OrdinaryRow.from_batch(input_ids, packed_seq_params, context, device)
        layout = self._layout(row, self.min_shared, group_sizes)
        own: Any = slice(None)
        if context is not None and row.places is not None:
            own = torch.from_numpy(row.places[context.rank()])
        if layout.unique_tokens == row.num_tokens and self._runs_thd_rows():
            if position_ids is None and self.position_embedding_type == "learned_absolute":
                position_ids = layout.position_ids[own][None]
            more["position_ids"] = None if position_ids is None else position_ids.to(device)
            more["packed_seq_params"] = _on_device(packed_seq_params, device)
            return super().forward(input_ids.to(device), attention_mask=None, **more)
        given = dict(input_ids=input_ids, packed_seq_params=packed_seq_params, **inputs)
        params = SharingSeqParams.from_layout(
            layout, device, given=given, packed_ids=layout.logical_to_packed[own]
        )
        return super().forward(
            layout.token_ids.to(device, non_blocking=True)[None],
            position_ids=self._packed_positions(params, row, position_ids)[None],
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
        layout, ids = packed_seq_params.layout, packed_seq_params.packed_ids
        context = self._context_group
        kwargs |= packed_seq_params.given
        is_whole = context is None and layout.unique_tokens == layout.logical_tokens
        # Not post_process, which callers turn off to be given the hidden states.
        if not self.decoder.post_process or is_whole:
            return super()._postprocess(hidden_states, *args, **kwargs)
        if not self.post_process or kwargs.get("output_processor") is not None:
            hidden_states = self._written_out(hidden_states, ids)
            return super()._postprocess(hidden_states, *args, **kwargs)
        if context is not None:
            # The output layer runs what this rank's tokens need, once.
            needed, ids = ids.unique(return_inverse=True)
            hidden_states = self._written_out(hidden_states, needed)
        labels = kwargs.pop("labels", None)
        logits = super()._postprocess(hidden_states, *args, labels=None, **kwargs)
        logits = write_out(logits[0], ids)[None]
        if labels is None:
            return logits
        return self.compute_language_model_loss(labels, logits.transpose(0, 1).contiguous())

    def _written_out(self, hidden_states: Tensor, packed_ids: Tensor) -> Tensor:
        """Of the tokens at ``packed_ids``, filled up to what sequence parallelism splits evenly."""
        groups, num_slices = self.pg_collection, ParallelSizes.from_config(self.config).sp_size
        packed_ids = torch.cat([packed_ids, packed_ids[:1].expand(-len(packed_ids) % num_slices)])
        if num_slices == 1:
            return write_out(hidden_states, packed_ids, split_over=self._context_group)
        own = packed_ids.chunk(num_slices)[groups.tp.rank()]
        group = groups.tp if self._context_group is None else groups.tp_cp
        return write_out(hidden_states, own, split_over=group)

    @property
    def _context_group(self) -> dist.ProcessGroup | None:
        """Ranks that are each fed a part of a row; None if there is one."""
        group: dist.ProcessGroup = self.pg_collection.cp
        return group if group.size() > 1 else None

    def _layout(
        self, row: OrdinaryRow, min_shared: int, group_sizes: Sequence[int] | None
    ) -> PackedLayout:
        multiple = ParallelSizes.from_config(self.config).row_multiple
        if row.num_tokens % multiple:
            raise ValueError(
                f"input_ids has {row.num_tokens} tokens, it must be a multiple of {multiple} "
                "(context_parallel_size, times tensor_model_parallel_size under "
                "sequence_parallel); pad the row"
            )
        layout = find_shared(
            row, min_shared=min_shared, group_sizes=group_sizes, pad_to_multiple=multiple
        )
        self.num_unique_tokens += layout.total_tokens
        self.num_logical_tokens += row.num_tokens
        return layout

    def _runs_thd_rows(self) -> bool:
        """Whether the given attention of every layer does; Megatron-Core's unfused one refuses."""
        mixers = self._wrapped_cores()
        cores = [core for core in mixers if isinstance(core, PrefixGroupedCoreAttention)]
        if len(cores) < len(mixers):
            return False  # linear attention does by its kernels alone, and not in every version
        calls: list[Any] = [super(PrefixGroupedCoreAttention, core).forward for core in cores]
        if any(core.splits_rows for core in cores):
            return False
        return all(call.__func__ is not DotProductAttention.forward for call in calls)

    def _packed_positions(
        self, params: SharingSeqParams, row: OrdinaryRow, position_ids: Tensor | None
    ) -> Tensor:
        """What the embedding of the packed row reads; rotary tables take the sequences' own."""
        if position_ids is None or self.position_embedding_type != "learned_absolute":
            return params.position_ids
        layout, num_given = params.layout, len(params.packed_ids)
        if position_ids.numel() != num_given:
            raise ValueError(
                f"position_ids has shape {tuple(position_ids.shape)}, the row has {num_given} "
                "tokens"
            )
        given = row.whole(position_ids, self._context_group, params.position_ids.device)
        packed, index = layout.position_ids.clone(), layout.logical_to_packed
        packed[index] = given
        if not torch.equal(packed[index], given):
            raise ValueError(
                "position_ids differ where sequences share their tokens, and learned position "
                "embeddings read them; count from 0 in every sequence, or pass None"
            )
        return packed.to(params.position_ids.device, non_blocking=True)


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
