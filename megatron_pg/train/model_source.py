"""Rollouts from the model in training itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from ..mcore import generate
from ..rollout import Prompt, Response, SamplingParams, WeightExporter


class ModelSource:
    """Samples from the model in training; every rank of the job takes part in each call.

    Prompts are divided over the data-parallel replicas and every rank gets all responses.
    """

    def __init__(
        self, chunks: Sequence[Any], tokenizer: Any, vocab_size: int, max_batch_samples: int | None
    ) -> None:
        self.chunks = chunks
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.max_batch_samples = max_batch_samples
        self.version = 0

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams
    ) -> list[tuple[Response, ...]]:
        """See ``RolloutSource.generate``."""
        rank = parallel_state.get_data_parallel_rank()
        size = parallel_state.get_data_parallel_world_size()
        numbers = range(rank, len(prompts), size)
        mine = (
            generate(
                self.chunks,
                [prompts[i].prompt_ids for i in numbers],
                num_generations=params.num_generations,
                max_response_tokens=params.max_response_tokens,
                seed=params.seed or 0,
                temperature=params.temperature,
                top_k=params.top_k,
                top_p=params.top_p,
                stop_token_ids=params.stop_token_ids,
                vocab_size=self.vocab_size,
                max_batch_samples=self.max_batch_samples,
                prompt_numbers=list(numbers),
            )
            if numbers
            else []
        )
        parts: list[Any] = [None] * size
        dist.all_gather_object(
            parts,
            mine,
            group=parallel_state.get_data_parallel_group_gloo()
            if torch.cuda.is_available()
            else parallel_state.get_data_parallel_group(),
        )
        return [
            tuple(self._response(sampled) for sampled in parts[i % size][i // size])
            for i in range(len(prompts))
        ]

    def update_weights(self, export: WeightExporter, version: int) -> None:
        """Nothing to move: the parameters are read in place."""
        self.version = version

    def _response(self, sampled: Any) -> Response:
        return Response(
            response_ids=sampled.response_ids,
            text=self.tokenizer.decode(sampled.response_ids.tolist(), skip_special_tokens=True),
            rollout_logprobs=sampled.logprobs.double(),
            status="completed" if sampled.is_finished else "truncated",
            metadata={"policy_version": self.version},
        )
