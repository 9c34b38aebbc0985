"""Rollouts from the model in training itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core import parallel_state

from ...grpo import Ranks
from ...mcore import GeneratedResponse, generate
from ...parallel import from_all_ranks
from ...rollout import Prompt, Response, RolloutSource, SamplingParams, WeightExporter


class ModelSource(RolloutSource):
    """Samples from the model in training; every rank of the job takes part in each call.

    Prompts are divided over the data-parallel replicas, and within one over its context-parallel
    ranks, which each hold whole weights; the first rank of every replica has its responses.
    """

    on_all_ranks = True

    def __init__(
        self,
        chunks: Sequence[Any],
        tokenizer: Any,
        vocab_size: int,
        max_batch_samples: int | None,
        ranks: Ranks,
    ) -> None:
        self.chunks = chunks
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.max_batch_samples = max_batch_samples
        self.ranks = ranks
        self.version = 0

    def numbers(self, num_prompts: int) -> Sequence[int]:
        """See ``RolloutSource.numbers``."""
        return range(self.ranks.dp_rank, num_prompts, self.ranks.dp_size)

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams
    ) -> list[tuple[Response, ...]] | None:
        """See ``RolloutSource.generate``."""
        context: Any = parallel_state.get_context_parallel_group()
        numbers = self.numbers(len(prompts) * self.ranks.dp_size)
        own = slice(context.rank(), None, context.size())
        parts = from_all_ranks(lambda: self._sample(prompts[own], numbers[own], params), context)
        if not self.ranks.leads_replica:
            return None
        dealt = (parts[i % len(parts)][i // len(parts)] for i in range(len(prompts)))
        return [tuple(self._response(one) for one in of_prompt) for of_prompt in dealt]

    def _sample(
        self, prompts: Sequence[Prompt], numbers: Sequence[int], params: SamplingParams
    ) -> Sequence[Sequence[GeneratedResponse]]:
        return generate(
            self.chunks,
            [prompt.prompt_ids for prompt in prompts],
            num_generations=params.num_generations,
            max_response_tokens=params.max_response_tokens,
            seed=params.seed or 0,
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            stop_token_ids=params.stop_token_ids,
            vocab_size=self.vocab_size,
            max_batch_samples=self.max_batch_samples,
            prompt_numbers=numbers,
        )

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
