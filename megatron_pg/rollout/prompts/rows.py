"""Rows of prompts files: which columns mean what, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ...data import check_prompt, show
from ..base import Tokenizer
from ..values import Message
from .rendering import has_chat_template, render_messages, render_question

# Where verl's data sets have the answer.
_VERL_ANSWER = "reward_model.ground_truth"
# Columns that other trainers read beside the prompt.
_NOT_TEXT = ("image", "images", "videos")
_MISSING = object()
# (column, what is wrong with it)
Errors = list[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class RowReader:
    """Makes prompts of rows.

    Attributes:
        tokenizer: its chat template is used where it has one.
        prompt_key: column of the prompt, text or chat messages; ``a.b`` is ``b`` within ``a`` where
            there is no column of that whole name.
        answer_key: column of the answer, likewise; None takes ``reward_model.ground_truth`` where
            rows have it, as verl's data sets do.
        template: text around a prompt that is text, with ``{question}`` in it.
        system_prompt: first message of the chat, or None.
    """

    tokenizer: Tokenizer
    prompt_key: str = "prompt"
    answer_key: str | None = None
    template: str = "{question}"
    system_prompt: str | None = None

    def check(self, row: Mapping[str, Any]) -> str | Errors:
        """What is sent of a row, or everything that keeps it from being a prompt."""
        found = [*self._prompt_problems(row)]
        answer = self.answer_key and take(row, self.answer_key)
        if answer is _MISSING or answer is None and self.answer_key:
            told = "is missing" if answer is _MISSING else "is null"
            found.append((str(self.answer_key), f"{told}; answer_key names it{_columns(row)}"))
        source = row.get("data_source")
        if source is not None and not isinstance(source, str):
            found.append(("data_source", f"must be text, got {show(source)}"))
        told = "is not read, as prompts are text alone; drop the column"
        found += [(name, told) for name in _NOT_TEXT if row.get(name)]
        return found or self._check_text(row)

    def messages(self, row: Mapping[str, Any]) -> list[Message] | None:
        """The chat that is sent; None for a prompt that is text."""
        prompt = take(row, self.prompt_key)
        if isinstance(prompt, str):
            return None
        # A parquet column of messages has every field in every message.
        chat = [{k: v for k, v in message.items() if v is not None} for message in prompt]
        if self.system_prompt is not None:
            chat.insert(0, {"role": "system", "content": self.system_prompt})
        return chat

    def text(self, row: Mapping[str, Any]) -> str:
        """What is sent."""
        messages = self.messages(row)
        if messages is not None:
            return render_messages(self.tokenizer, messages)
        question = self.template.replace("{question}", take(row, self.prompt_key))
        return render_question(self.tokenizer, question, self.system_prompt)

    def metadata(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Every column by name, and ``answer``."""
        answer = take(row, self.answer_key or _VERL_ANSWER)
        kept = {k: v for k, v in row.items() if v is not None or k != "data_source"}
        return kept if answer in (_MISSING, None) else {**kept, "answer": answer}

    def has_answer(self, row: Mapping[str, Any]) -> bool:
        """Whether a row has the answer that is taken without ``answer_key``."""
        return take(row, self.answer_key or _VERL_ANSWER) not in (_MISSING, None)

    def _prompt_problems(self, row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        key, prompt = self.prompt_key, take(row, self.prompt_key)
        if prompt is _MISSING or prompt is None:
            told = "is missing" if prompt is _MISSING else "is null"
            yield key, f"{told}; prompt_key names the column of the prompts{_columns(row)}"
        elif wrong := check_prompt(prompt):
            yield key, wrong
        elif isinstance(prompt, str):
            if not prompt.strip():
                yield key, "is blank"
        else:
            if not has_chat_template(self.tokenizer):
                yield key, "is chat messages, and the tokenizer has no chat template"
            if self.template != "{question}":
                yield key, "is chat messages, which template does not concern; leave it out"
            if prompt[-1]["role"] == "assistant":
                yield key, "ends with the assistant's message; leave out what is to be sampled"
            if self.system_prompt is not None and prompt[0]["role"] == "system":
                yield key, "begins with a system message; leave system_prompt out"

    def _check_text(self, row: Mapping[str, Any]) -> str | Errors:
        try:
            text = self.text(row)
        except Exception as error:  # whatever a template raises
            return [(self.prompt_key, f"is refused by the chat template: {error}")]
        try:
            text.encode()
        except UnicodeEncodeError as error:
            told = f"is no Unicode: half a surrogate pair, {text[error.start]!r}"
            return [(self.prompt_key, told)]
        return text


def take(row: Mapping[str, Any], key: str) -> Any:
    """The column ``key``, or what its parts name one within the other."""
    if key in row:
        return row[key]
    value: Any = row
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return _MISSING
        value = value[part]
    return value


def _columns(row: Mapping[str, Any]) -> str:
    return f" (columns: {', '.join(map(str, list(row)[:8]))})"
