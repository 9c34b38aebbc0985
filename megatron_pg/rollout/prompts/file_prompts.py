"""Prompts from files: endless, shuffled by epoch, the same ones at every call."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, get_args

import torch

from ...data import Problems
from ..base import Tokenizer
from ..values import Prompt
from .files import find_files, read_records
from .rendering import encode_rendered
from .rows import RowReader
from .store import RowStore

TooLong = Literal["refuse", "leave_out"]


class FilePrompts:
    """Prompts of files, epoch after epoch, each epoch in its own order.

    Every column of a row is in ``Prompt.metadata``, with ``answer`` beside. A prompt's id is the
    place of its row; from the second epoch on it gains ``#<epoch>``, so that a step which spans two
    epochs holds no id twice.

    Args:
        files: JSONL (gzipped or not), JSON or parquet files, patterns and folders.
        val_files: likewise, of prompts that training never sees.
        tokenizer: Hugging Face tokenizer; its chat template is used where it has one.
        prompt_key: column of the prompts, text or chat messages; ``a.b`` is ``b`` within ``a``.
        answer_key: column of the answers, likewise; None takes ``reward_model.ground_truth`` where
            rows have it, as verl's data sets do.
        template: text around a prompt that is text, with ``{question}`` in it.
        system_prompt: first message of the chat, or None.
        max_prompt_tokens: longest prompt; None is no limit.
        too_long: whether longer prompts are refused ("refuse") or left out and counted
            ("leave_out").
        limit: what sets ``max_prompt_tokens``, for messages.
        shuffle: draw a new order every epoch from ``seed``; else the order of the files.
        seed: of the orders.

    Raises:
        ValueError: on anything malformed. One error lists the problems of all files, up to 20, each
            with file, row and column.
        ImportError: on parquet files without pyarrow.
    """

    def __init__(
        self,
        files: Sequence[str],
        *,
        tokenizer: Tokenizer,
        val_files: Sequence[str] = (),
        prompt_key: str = "prompt",
        answer_key: str | None = None,
        template: str = "{question}",
        system_prompt: str | None = None,
        max_prompt_tokens: int | None = None,
        too_long: TooLong = "refuse",
        limit: str = "max_prompt_tokens",
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        if "{question}" not in template:
            raise ValueError(f"template={template!r} must contain {{question}}")
        if too_long not in (known := get_args(TooLong)):
            raise ValueError(f"too_long={too_long!r} must be one of {', '.join(known)}")
        reader = RowReader(
            tokenizer=tokenizer,
            prompt_key=prompt_key,
            answer_key=answer_key,
            template=template,
            system_prompt=system_prompt,
        )
        self.shuffle, self.seed = shuffle, seed
        problems = Problems(what="prompts")
        bound = _Bound(max_prompt_tokens, too_long, limit)
        self._train = _PromptRows(files, reader, bound, problems)
        self._held_out = _PromptRows(val_files, reader, bound, problems) if val_files else None
        if self._held_out is not None:
            for file in self._train.files & self._held_out.files:
                problems.add(file, "is among files and val_files; held-out prompts train nothing")
        problems.raise_if_any()
        self._order = lru_cache(maxsize=2)(self._draw_order)

    def __len__(self) -> int:
        """Prompts of an epoch."""
        return len(self._train)

    def __str__(self) -> str:
        held_out = "" if self._held_out is None else f"; held out: {self._held_out}"
        return f"prompts: {self._train}{held_out}"

    def prompts(self, start: int, count: int) -> list[Prompt]:
        """See ``PromptSource.prompts``."""
        return [self._prompt(number) for number in range(start, start + count)]

    def held_out(self) -> HeldOutPrompts:
        """The prompts of ``val_files``, in their order.

        Raises:
            ValueError: if there are none.
        """
        if self._held_out is None:
            raise ValueError("no prompts are held out; name some in rollout.prompts.val_files")
        return HeldOutPrompts(self._held_out)

    def identity(self) -> dict[str, Any]:
        """See ``Identified``: equal for equal rows, wherever their files lie."""
        return {
            "num_prompts": len(self),
            "content": self._train.content,
            "shuffle": self.shuffle,
            "seed": self.seed,
        }

    def _prompt(self, number: int) -> Prompt:
        epoch, place = divmod(number, len(self))
        return self._train.prompt(self._order(epoch)[place], f"#{epoch}" if epoch else "")

    def _draw_order(self, epoch: int) -> Sequence[int]:
        if not self.shuffle:
            return range(len(self))
        order = list(range(len(self)))
        random.Random(f"{self.seed}/{epoch}").shuffle(order)
        return order


class HeldOutPrompts:
    """Prompts in the order of their files; beyond the last one they repeat under new ids."""

    def __init__(self, rows: _PromptRows) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def prompts(self, start: int, count: int) -> list[Prompt]:
        """See ``PromptSource.prompts``."""
        places = (divmod(number, len(self)) for number in range(start, start + count))
        return [self._rows.prompt(place, f"#{epoch}" if epoch else "") for epoch, place in places]


class _Bound:
    """How long a prompt may be, and what becomes of a longer one."""

    def __init__(self, max_tokens: int | None, too_long: TooLong, limit: str) -> None:
        self.max_tokens, self.too_long, self.limit = max_tokens, too_long, limit

    def excess(self, tokenizer: Tokenizer, text: str) -> int | None:
        """Tokens of a prompt that has too many."""
        if self.max_tokens is None:
            return None
        # A token has a byte at least, and there are few special ones: most need no tokenizer.
        if len(text.encode()) + 8 <= self.max_tokens:
            return None
        number = len(encode_rendered(tokenizer, text))
        return number if number > self.max_tokens else None


class _PromptRows:
    """The rows of some files that are prompts."""

    def __init__(
        self, entries: Sequence[str], reader: RowReader, bound: _Bound, problems: Problems
    ) -> None:
        self.reader, self.bound = reader, bound
        self.rows = RowStore()
        self.num_left_out = 0
        found = find_files(entries, problems)
        self.files = {str(file.resolve()) for file in found}
        settings = (reader.prompt_key, reader.answer_key, reader.template, reader.system_prompt)
        self._digest = hashlib.sha256(json.dumps(settings).encode())
        self._first: tuple[str, bool] | None = None
        for file in found:
            num_rows, num_problems = 0, problems.total
            for place, row in read_records(file, problems):
                num_rows += 1
                self._add(place, row, problems)
            if num_rows == 0 and problems.total == num_problems:
                problems.add(str(file), "has no rows")
        if found and not len(self.rows) and not problems.total:
            problems.add(", ".join(entries), f"all prompts are too long: {self}")

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        told = f"{len(self):,} from {len(self.files)} file{'s' * (len(self.files) != 1)}"
        if self.bound.too_long == "leave_out" and self.bound.max_tokens is not None:
            told += f", {self.num_left_out:,} left out for more than {self.bound.max_tokens} tokens"
        return told

    @property
    def content(self) -> str:
        """SHA-256 of all rows in their order and of what makes prompts of them."""
        return self._digest.hexdigest()

    def prompt(self, number: int, suffix: str) -> Prompt:
        """The prompt of a row."""
        place, row = self.rows[number]
        text = self.reader.text(row)
        return Prompt(
            prompt_id=place + suffix,
            prompt_ids=torch.tensor(
                encode_rendered(self.reader.tokenizer, text), dtype=torch.int64
            ),
            metadata=self.reader.metadata(row),
            text=text,
            messages=self.reader.messages(row),
        )

    def _add(self, place: str, row: dict[str, Any], problems: Problems) -> None:
        text = self.reader.check(row)
        if not isinstance(text, str):
            for column, message in text:
                problems.add(place, message, column)
            return
        has_answer = self.reader.has_answer(row)
        first = self._first = self._first or (place, has_answer)
        if has_answer != first[1]:
            told = f"must be in every row or in none; compare {first[0]}"
            problems.add(place, told, "reward_model")
        if excess := self.bound.excess(self.reader.tokenizer, text):
            if self.bound.too_long == "refuse":
                told = f"has {excess} tokens, {self.bound.limit} allows {self.bound.max_tokens}"
                problems.add(place, f"{told}; shorten it, or set too_long to leave_out")
            self.num_left_out += 1
            return
        self.rows.append(place, row)
        self._digest.update(json.dumps(row, sort_keys=True, default=str).encode())
