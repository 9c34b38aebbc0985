"""Rollouts from the model in training itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...grpo import Ranks
from ...mcore import generate
from ...rollout import Prompt, Response, RolloutSource, SamplingParams, WeightExporter


class ModelSource(RolloutSource):
    """Samples from the model in training; every rank of the job takes part in each call.

    Prompts are divided over the data-parallel replicas; the first rank of each has its responses.
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
        sampled = (
            generate(
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
                prompt_numbers=list(self.numbers(len(prompts) * self.ranks.dp_size)),
            )
            if prompts
            else []
        )
        if not self.ranks.leads_replica:
            return None
        return [tuple(self._response(one) for one in of_prompt) for of_prompt in sampled]

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
