"""A forward and a sampling step over the pipeline stages of a model, outside of any schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core.utils import unwrap_model
from torch import Tensor

from ...parallel import ParallelSizes, from_all_ranks
from ...tree import PrefixTree, pack_trees, to_device
from ..model import PrefixGroupedModel
from .cache import GenerationCache
from .rows import DecodeSeqParams, PrefillSeqParams
from .sampling import Sampler

T = TypeVar("T")


class ModelStages:
    """This rank's chunks of a model and its exchange with the other stages.

    Hidden states go from stage to stage, once around the stages for each virtual one; tokens are
    sampled on one rank of the last stage and sent to all ranks, so that all ranks agree on them
    even where a kernel's sums are not reproducible.

    Replicas that share experts all take part in every forward, each with a row of its own: those
    that have none left run one token without meaning.

    Attributes:
        chunks: the models inside the given modules, in order of virtual stage.
        config: their settings.
        row_multiple: what the length of a row must be a multiple of.
        device: where their parameters live.

    Raises:
        ValueError: if a chunk is no ``PrefixGroupedModel``.
    """

    def __init__(self, model_chunks: Sequence[torch.nn.Module]) -> None:
        self.chunks: list[Any] = unwrap_model(list(model_chunks))
        if not self.chunks:
            raise ValueError("model_chunks is empty: pass the list of this rank's model chunks")
        for chunk in self.chunks:
            if not isinstance(chunk, PrefixGroupedModel):
                raise ValueError(
                    f"a model chunk is {type(chunk).__name__}; generation needs "
                    "PrefixGroupedGPTModel or PrefixGroupedHybridModel built on a spec from "
                    "with_prefix_grouped_attention"
                )
        first = self.chunks[0]
        self.config = first.config
        # Context-parallel ranks each run the whole row.
        sizes = ParallelSizes.from_config(self.config)
        self.row_multiple = sizes.sp_size
        self.device = next(first.parameters()).device
        self._tp_group, self._pp_group = first.pg_collection.tp, first.pg_collection.pp
        self._pp_ranks = dist.get_process_group_ranks(self._pp_group)
        self._stage = dist.get_rank(self._pp_group)
        # The replicas of this stage: those that share experts are among them, on every stage alike.
        self._sharing_group: dist.ProcessGroup | None = None
        if self.config.num_moe_experts and sizes.shares_experts:
            self._sharing_group = first.pg_collection.dp_cp

    def before_sampling(self, action: Callable[[], T]) -> T:
        """What ``action`` returns; its error is raised on all replicas that would wait here."""
        group = self._sharing_group
        return action() if group is None else from_all_ranks(action, group)[group.rank()]

    def forward(self, tokens: Tensor, params: PrefillSeqParams | DecodeSeqParams) -> Tensor | None:
        """Logits ``[output rows, padded vocabulary]`` on the last stage, None on the others.

        Args:
            tokens: ``[row]`` int64 on the CPU, padding included.
            params: the row's call argument, equal on every rank.
        """
        self._any_goes_on(True)
        return self._run(tokens, params)

    def finish(self) -> None:
        """Take part in the forwards of other replicas until all of them have come here."""
        layout = pack_trees([PrefixTree.from_sequences([[0]])], pad_to_multiple=self.row_multiple)
        params = PrefillSeqParams.from_prompts(layout, GenerationCache([1], 1, 1, self.device))
        while self._any_goes_on(False):
            self._run(layout.token_ids, params)

    def _any_goes_on(self, goes_on: bool) -> bool:
        """Whether a replica runs a row next, of those that wait for each other."""
        if self._sharing_group is None:
            return goes_on
        flag = torch.tensor(int(goes_on), device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._sharing_group)
        return bool(flag)

    def _run(self, tokens: Tensor, params: PrefillSeqParams | DecodeSeqParams) -> Tensor | None:
        (tokens,) = to_device([tokens], self.device)
        output: Any = None
        for chunk in self.chunks:
            if not chunk.pre_process:
                chunk.set_input_tensor(self._receive(len(tokens)))
            output = chunk(tokens[None], params.position_ids[None], None, packed_seq_params=params)
            if not chunk.pre_process:
                chunk.set_input_tensor(None)
            if not chunk.post_process:
                dist.send(output.contiguous(), self._neighbour(1), group=self._pp_group)
        return output if self.chunks[-1].post_process else None

    def sample(
        self, logits: Tensor | None, sampler: Sampler, uniforms: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``(tokens int64, logprobs float64)`` of ``uniforms``' shape, on the CPU of every rank.

        Args:
            logits: what ``forward`` returned.
            sampler: how to choose.
            uniforms: ``[R, S]`` float64 on the CPU; see ``Sampler``.
        """
        # Token ids below 2 ** 53 are exact in float64, so one message carries both.
        chosen = torch.empty(2, *uniforms.shape, dtype=torch.float64, device=self.device)
        if logits is not None:
            if dist.get_rank(self._tp_group) == 0:
                tokens, logprobs = sampler(logits, *to_device([uniforms], self.device))
                chosen[0], chosen[1] = tokens, logprobs
            if dist.get_world_size(self._tp_group) > 1:
                source = dist.get_global_rank(self._tp_group, 0)
                dist.broadcast(chosen, source, group=self._tp_group)
        if len(self._pp_ranks) > 1:
            dist.broadcast(chosen, self._pp_ranks[-1], group=self._pp_group)
        chosen = chosen.cpu()
        return chosen[0].long(), chosen[1]

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode without gradients; every module's mode is put back at the end."""
        modes = [(m, m.training) for chunk in self.chunks for m in chunk.modules()]
        try:
            for chunk in self.chunks:
                chunk.eval()
            # Not inference_mode: Megatron keeps rotary tables, which training reads later.
            with torch.no_grad():
                yield
        finally:
            for module, mode in modes:
                module.training = mode

    def _receive(self, row_tokens: int) -> Tensor:
        shape = (row_tokens // self.row_multiple, 1, self.config.hidden_size)
        hidden = torch.empty(shape, dtype=self.config.pipeline_dtype, device=self.device)
        dist.recv(hidden, self._neighbour(-1), group=self._pp_group)
        return hidden

    def _neighbour(self, distance: int) -> int:
        return self._pp_ranks[(self._stage + distance) % len(self._pp_ranks)]
