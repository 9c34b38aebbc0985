"""Tasks with verifiable answers: prompts and rewards from reasoning-gym's procedural datasets."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from ..base import Tokenizer
from ..values import Prompt, Response
from .rendering import encode_rendered, render_question

Split = Literal["train", "held_out"]
_NUM_BUCKETS = 1000
_MAX_DRAWS = 2_000
# Draws of one index lie so far apart that the items of a data set never run into each other.
_DRAW_STRIDE = 1_000_003


def last_number(text: str) -> str | None:
    """Last number of a text, as written; a minus after a digit is an operator, not a sign."""
    found = re.findall(r"(?:(?<!\d)-)?\d+(?:,\d{3})*(?:\.\d+)?", text)
    return found[-1] if found else None


def answer_tag(text: str) -> str | None:
    """What stands between the last ``<answer>`` and ``</answer>``."""
    found = re.findall(r"<answer>(.*?)</answer>", text, flags=re.DOTALL)
    return found[-1].strip() if found else None


def whole_text(text: str) -> str | None:
    """The text without surrounding blanks."""
    return text.strip() or None


ANSWER_EXTRACTORS: Mapping[str, Callable[[str], str | None]] = {
    "last_number": last_number,
    "answer_tag": answer_tag,
    "whole_text": whole_text,
}


@dataclass(frozen=True, kw_only=True, eq=False)
class ReasoningGymTask:
    """Prompts of one reasoning-gym data set, and the reward of their responses.

    The instance is itself the reward function (``RewardFunction``). A question belongs to the
    held-out split by a checksum of its text, the same for every seed, so no question of the
    held-out split is ever trained on, although small data sets (sums of two digits) repeat theirs.

    Attributes:
        tokenizer: Hugging Face tokenizer; its chat template is used when it has one.
        name: name of the data set.
        config: its settings; the default is a sum or difference of two one-digit numbers.
        seed: of the questions.
        size: questions before they repeat.
        split: ``train`` or ``held_out``; see ``held_out``.
        held_out_share: share of distinct questions that are held out.
        template: text given to the model, with ``{question}`` in it.
        system_prompt: first message of the chat, or None.
        extractor: how the answer is read from a response: ``last_number``, ``answer_tag``,
            ``whole_text``.
        partial_credit: give the data set's own score; else 1.0 for a full score and 0.0 below.

    Raises:
        ImportError: if reasoning-gym is not installed.
        ValueError: on an unknown data set, extractor, split or setting.
    """

    tokenizer: Tokenizer
    name: str = "chain_sum"
    config: Mapping[str, Any] = field(default_factory=lambda: {"max_terms": 2, "max_digits": 1})
    seed: int = 0
    size: int = 10_000
    split: Split = "train"
    held_out_share: float = 0.1
    template: str = "{question}"
    system_prompt: str | None = None
    extractor: str = "last_number"
    partial_credit: bool = False
    _datasets: dict[int, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.extractor not in ANSWER_EXTRACTORS:
            raise ValueError(f"extractor={self.extractor!r} is none of {list(ANSWER_EXTRACTORS)}")
        if self.split not in ("train", "held_out"):
            raise ValueError(f"split={self.split!r} must be 'train' or 'held_out'")
        if not 0.01 <= self.held_out_share <= 0.99:
            raise ValueError(f"held_out_share={self.held_out_share} must lie in [0.01, 0.99]")
        if self.size < 1:
            raise ValueError(f"size={self.size} must be at least 1")
        if "{question}" not in self.template:
            raise ValueError(f"template={self.template!r} must contain {{question}}")
        for reserved in {"seed", "size"} & self.config.keys():
            raise ValueError(f"config sets {reserved!r}: give it as the task's own argument")
        self._dataset(0)

    def held_out(self) -> ReasoningGymTask:
        """The same task over the questions that training never sees."""
        return replace(self, split="held_out")

    def prompts(self, start: int, count: int) -> list[Prompt]:
        """Prompts number ``start`` to ``start + count - 1``.

        ``metadata`` holds ``entry`` (the data set's own record), ``question`` and ``answer``.

        Raises:
            ValueError: if the data set has no question of the split.
        """
        return [self._prompt(number) for number in range(start, start + count)]

    def __call__(self, prompt: Prompt, response: Response) -> float:
        """Score of the response's answer in [0, 1]; 0.0 where no answer can be read."""
        answer = ANSWER_EXTRACTORS[self.extractor](response.text)
        if answer is None:
            return 0.0
        score = float(self._dataset(0).score_answer(answer, prompt.metadata["entry"]))
        return score if self.partial_credit else float(score >= 1.0)

    def _prompt(self, number: int) -> Prompt:
        entry = self._entry(number % self.size)
        question = self.template.replace("{question}", entry["question"])
        text = render_question(self.tokenizer, question, self.system_prompt)
        return Prompt(
            prompt_id=f"{self.name}/{self.split}/{number}",
            prompt_ids=torch.tensor(encode_rendered(self.tokenizer, text), dtype=torch.int64),
            text=text,
            metadata={"entry": entry, "question": entry["question"], "answer": entry["answer"]},
        )

    def _entry(self, index: int) -> dict[str, Any]:
        """First draw of an index whose question belongs to the split."""
        for draw in range(_MAX_DRAWS):
            entry: dict[str, Any] = self._dataset(draw)[index]
            bucket = zlib.crc32(entry["question"].encode()) % _NUM_BUCKETS
            if (bucket < self.held_out_share * _NUM_BUCKETS) == (self.split == "held_out"):
                return entry
        raise ValueError(
            f"{_MAX_DRAWS} draws from {self.name} gave no question of the {self.split} split; "
            f"it has too few questions for held_out_share={self.held_out_share}"
        )

    def _dataset(self, draw: int) -> Any:
        if draw not in self._datasets:
            seed = self.seed + draw * _DRAW_STRIDE
            self._datasets[draw] = _create_dataset(self.name, self.config, seed, self.size)
        return self._datasets[draw]


def _create_dataset(name: str, config: Mapping[str, Any], seed: int, size: int) -> Any:
    try:
        import reasoning_gym
    except ImportError as error:
        raise ImportError(
            'reasoning-gym tasks need reasoning-gym: pip install "megatron_pg[rollout]"'
        ) from error
    try:
        return reasoning_gym.create_dataset(name, seed=seed, size=size, **config)
    except (ValueError, TypeError, AssertionError) as error:
        raise ValueError(
            f"reasoning-gym cannot create {name!r} with {dict(config)}: {error}"
        ) from error
