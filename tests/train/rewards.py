"""A reward that an untrained model earns in part."""

from __future__ import annotations

from megatron_pg.rollout import Prompt, Response


def share_of_digits(prompt: Prompt, response: Response) -> float:
    words = response.text.split()
    return sum(word.isdigit() for word in words) / max(len(words), 1)
