"""Prompts, tokenizers and recorded groups for the rollout tests."""

from __future__ import annotations

from typing import Any

import torch

from megatron_pg.data import Group, Sample
from megatron_pg.rollout import Prompt, Response


class CharTokenizer:
    """One token per character (its code point); 1 is the end token; no chat template."""

    eos_token_id: int | None = 1
    chat_template: Any = None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [ord(char) for char in text]

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        return "".join(chr(token) for token in token_ids)

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        assert kwargs == {"tokenize": False, "add_generation_prompt": True}
        return (
            "".join(f"<{turn['role']}>{turn['content']}" for turn in conversation) + "<assistant>"
        )


def make_prompt(number: int = 0, **metadata: Any) -> Prompt:
    ids = torch.tensor([100 + number, 7], dtype=torch.int64)
    return Prompt(prompt_id=f"p{number}", prompt_ids=ids, metadata=metadata)


def make_response(text: str, **fields: Any) -> Response:
    ids = torch.tensor([ord(char) for char in text] or [1], dtype=torch.int64)
    return Response(response_ids=ids, text=text, **fields)


def make_recording(num_groups: int) -> list[Group]:
    sample = Sample(
        prompt_ids=torch.tensor([1]),
        response_ids=torch.tensor([2]),
        reward=0.0,
        loss_mask=torch.tensor([True]),
    )
    return [Group(f"g{i}", (sample, sample)) for i in range(num_groups)]
