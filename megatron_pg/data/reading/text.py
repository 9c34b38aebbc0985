"""Text to tokens, with any tokenizer that has the interface of transformers."""

from __future__ import annotations

import json
from functools import cached_property
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


# Stands for what a user or a system prompt says.
_PROBE = "What\u2019s said"


class TextEncoder:
    """Tokenizes prompts and responses apart, as generation saw them.

    Chat messages go through the tokenizer's template, which writes the special tokens itself. So it
    has for a prompt that is a string and was rendered by it: it begins with the text of the
    tokenizer's beginning-of-sequence token, or begins and ends as the template does. Before any
    other string stands what the tokenizer puts before a text, unless it stands there already.
    Nothing is added behind a prompt or to a response.

    Args:
        tokenizer: anything with the interface of transformers.
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
                ids = self._encode(prompt) if self._is_rendered(prompt) else self._open(prompt)
            else:
                ids = self._encode(self._render(prompt))
            self._prompts[key] = ids
        return self._prompts[key]

    def encode_response(self, response: str, is_completed: bool) -> list[int]:
        """Tokens of a response."""
        ids = self._encode(response) if response else []
        if self._eos_id is not None and is_completed and ids[-1:] != [self._eos_id]:
            ids = [*ids, self._eos_id]
        return ids

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _open(self, text: str) -> list[int]:
        """``text`` with the special tokens that the tokenizer puts before it, none behind it."""
        ids, marked = self._encode(text), self._tokenizer.encode(text, add_special_tokens=True)
        for start in range(len(marked) - len(ids) + 1):
            if marked[start : start + len(ids)] == ids:
                opening = marked[:start]
                return ids if ids[:start] == opening else opening + ids
        raise ValueError("the tokenizer's special tokens change the tokens of the text itself")

    def _render(self, messages: Messages) -> str:
        rendered: str = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return rendered

    def _is_rendered(self, prompt: str) -> bool:
        bos = getattr(self._tokenizer, "bos_token", None)
        if isinstance(bos, str) and bos and prompt.lstrip().startswith(bos):
            return True
        return any(prompt.startswith(a) and prompt.endswith(b) for a, b in self._frames)

    @cached_property
    def _frames(self) -> list[tuple[str, str]]:
        """How the template begins and ends, with a system prompt and without one."""
        frames = []
        user = {"role": "user", "content": _PROBE}
        for messages in ([user], [{"role": "system", "content": _PROBE}, user]):
            try:
                parts = self._render(messages).split(_PROBE)
            except Exception:  # no template, or one that knows no such role
                continue
            if len(parts) == len(messages) + 1 and (parts[0] + parts[-1]).strip():
                frames.append((parts[0], parts[-1]))
        return frames


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
