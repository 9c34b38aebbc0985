"""Text to tokens, with any tokenizer that has the interface of transformers."""

from __future__ import annotations

import json
from typing import Any, Protocol

ROLES = ("system", "developer", "user", "assistant", "tool")

Messages = list[dict[str, Any]]


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    eos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def apply_chat_template(
        self, conversation: Messages, *, tokenize: bool, add_generation_prompt: bool
    ) -> Any: ...


class TextEncoder:
    """Tokenizes prompts and responses apart, as generation saw them.

    Args:
        tokenizer: chat messages go through its template; special tokens are added to prompts that
            are strings, never to responses.
        append_eos: end completed responses with the tokenizer's end-of-sequence token where it is
            not there yet.

    Raises:
        ValueError: if ``append_eos`` and the tokenizer has no such token.
    """

    def __init__(self, tokenizer: Tokenizer, append_eos: bool = False) -> None:
        if append_eos and tokenizer.eos_token_id is None:
            raise ValueError("append_eos=True needs a tokenizer with an eos_token_id")
        self._tokenizer = tokenizer
        self._eos_id = tokenizer.eos_token_id if append_eos else None
        # All responses of a group repeat the prompt, and templates are slow.
        self._prompts: dict[str, list[int]] = {}

    def encode_prompt(self, prompt: str | Messages) -> list[int]:
        """Tokens of a prompt, the opening of the assistant's turn included for chat messages."""
        key = json.dumps(prompt)
        if key not in self._prompts:
            if isinstance(prompt, str):
                ids = self._tokenizer.encode(prompt, add_special_tokens=True)
            else:
                text = self._tokenizer.apply_chat_template(
                    prompt, tokenize=False, add_generation_prompt=True
                )
                # The template writes the special tokens itself.
                ids = self._tokenizer.encode(text, add_special_tokens=False)
            self._prompts[key] = ids
        return self._prompts[key]

    def encode_response(self, response: str, is_completed: bool) -> list[int]:
        """Tokens of a response."""
        ids = self._tokenizer.encode(response, add_special_tokens=False)
        if self._eos_id is not None and is_completed and ids[-1:] != [self._eos_id]:
            ids = [*ids, self._eos_id]
        return ids


def check_prompt(value: Any) -> str | None:
    """What is wrong with a prompt given as text or chat messages; None when nothing is."""
    if isinstance(value, str):
        return None if value else "is an empty string"
    if not isinstance(value, list) or not value:
        return f"must be a string or a list of chat messages, got {type(value).__name__}"
    for i, message in enumerate(value):
        if not isinstance(message, dict) or "role" not in message:
            return f"message {i} must be an object with 'role' and 'content'"
        if message["role"] not in ROLES:
            return f"message {i} has role {message['role']!r}, known are {', '.join(ROLES)}"
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            return f"message {i} has no text under 'content'"
    return None
