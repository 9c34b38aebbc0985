"""Which prompts each context-parallel rank samples, and in which order responses come back."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch

from megatron_pg.grpo import Ranks
from megatron_pg.mcore import GeneratedResponse
from megatron_pg.rollout import Prompt, SamplingParams
from megatron_pg.train import parallel_run
from megatron_pg.train.config import ParallelConfig
from megatron_pg.train.rollouts import model_source
from tests.rollout.helpers import CharTokenizer

PARAMS = SamplingParams(num_generations=2, max_response_tokens=4)


def sample(num_prompts: int, cp_size: int, fails: int | None = None) -> dict[str, Any]:
    """Numbers that this rank sampled, and the first tokens of the responses that it has."""
    seen: list[int] = []

    def generate(chunks: Any, prompts: Any, **settings: Any) -> list[tuple[Any, ...]]:
        numbers = list(settings["prompt_numbers"])
        assert len(numbers) == len(prompts)
        seen.extend(numbers)
        if fails in numbers:
            raise ValueError(f"prompt {fails} is none")
        return [
            tuple(
                GeneratedResponse(
                    response_ids=prompt[:1] + place,
                    logprobs=torch.zeros(1, dtype=torch.float64),
                    is_finished=True,
                )
                for place in range(settings["num_generations"])
            )
            for prompt in prompts
        ]

    with parallel_run(ParallelConfig(context_parallel_size=cp_size), 0):
        ranks = Ranks.from_megatron()
        source = model_source.ModelSource([], CharTokenizer(), 99, None, ranks)
        own = source.numbers(num_prompts)
        prompts = [Prompt(prompt_id=str(n), prompt_ids=torch.tensor([10 * n])) for n in own]
        with mock.patch.object(model_source, "generate", generate):
            try:
                groups = source.generate(prompts, PARAMS)
            except ValueError as error:
                return dict(seen=seen, error=str(error))
        got = groups and [[int(r.response_ids[0]) for r in of_prompt] for of_prompt in groups]
        return dict(seen=seen, got=got, own=list(own))
