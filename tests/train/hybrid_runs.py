"""What a run samples first, and a plain model's logprobs of it."""

from __future__ import annotations

import torch
import transformers
from torch import Tensor

from megatron_pg.train import TrainConfig
from tests.train import late_imports, tiny  # noqa: F401

Sampled = tuple[Tensor, Tensor, Tensor]


def first_samples(config: TrainConfig) -> list[Sampled]:
    """Prompt, response and logprobs of all samples of the first step that this rank brings."""
    with tiny.opened(config) as trainer:
        groups = trainer.stream.next_groups(config.run.groups_per_step)
        samples = [one for group in groups.values() for one in group.samples]
        return [(one.prompt_ids, one.response_ids, one.rollout_logprobs) for one in samples]


def plain_logprobs(config: TrainConfig, samples: list[Sampled]) -> list[Tensor]:
    """By transformers, every sample written out alone."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        config.model.hf, attn_implementation="eager", dtype=torch.float32
    )
    found = []
    with torch.no_grad():
        for prompt, response, _ in samples:
            logits = model(torch.cat([prompt, response])[None], use_cache=False).logits[0]
            scores = logits[len(prompt) - 1 : -1].log_softmax(-1)
            found.append(scores.gather(1, response[:, None])[:, 0])
    return found
