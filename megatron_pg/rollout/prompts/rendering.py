"""A question or chat messages as the text that a model is given, and its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..base import Tokenizer
from ..values import Message


def as_messages(question: str, system_prompt: str | None) -> list[Message]:
    """A user's question as a chat."""
    chat: list[Message] = [{"role": "user", "content": question}]
    if system_prompt is not None:
        chat.insert(0, {"role": "system", "content": system_prompt})
    return chat


def render_question(tokenizer: Tokenizer, question: str, system_prompt: str | None) -> str:
    """The text of a question: by the tokenizer's chat template where it has one."""
    if has_chat_template(tokenizer):
        return render_messages(tokenizer, as_messages(question, system_prompt))
    return question if system_prompt is None else f"{system_prompt}\n{question}"


def render_messages(tokenizer: Tokenizer, messages: Sequence[Message]) -> str:
    """The text of chat messages, the opening of the assistant's turn included."""
    text: str = tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=True
    )
    return text


def encode_rendered(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokens of a rendered text; a chat template writes the special tokens itself."""
    # Rendered first, encoded second: what tokenize=True returns differs between versions.
    if has_chat_template(tokenizer):
        return tokenizer.encode(text, add_special_tokens=False)
    return tokenizer.encode(text)


def has_chat_template(tokenizer: Any) -> bool:
    """Whether the tokenizer knows how a chat is written."""
    return bool(getattr(tokenizer, "chat_template", None))
