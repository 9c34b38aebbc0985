"""Rewards of one's own in every convention, good and bad, as a user's module has them."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import numpy as np
import torch


def ours(prompt: Any, response: Any) -> float:
    return len(response.text) + float(prompt.metadata.get("answer", 0))


def verl(data_source: str, solution_str: str, ground_truth: Any, extra_info: Any = None) -> dict:
    found = {"score": float(solution_str == ground_truth), "acc": solution_str == ground_truth}
    return found | {"pred": solution_str, "source_len": len(data_source), "index": extra_info["i"]}


def verl_more(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: Any, *, scale: float
) -> float:
    return scale * (solution_str == ground_truth)


def verl_all(solution_str: str, **kwargs: Any) -> int:
    assert kwargs.keys() >= {"data_source", "ground_truth", "extra_info"}, sorted(kwargs)
    return len(solution_str)


def trl(
    prompts: list[Any], completions: list[Any], answer: list[str], **kwargs: Any
) -> list[float]:
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    assert len(prompts) == len(texts) == len(kwargs["completion_ids"]) == len(kwargs["level"])
    return [float(text == right) for text, right in zip(texts, answer)]


def trl_few(completions: list[str]) -> list[float]:
    """Sees all samples at once: 1 for the longest."""
    longest = max(map(len, completions))
    return [float(len(text) == longest) for text in completions]


def trl_some(completions: list[str], **kwargs: Any) -> list[float | None]:
    return [None if text == "b" else 1.0 for text in completions]


async def awaited(prompt: Any, response: Any) -> float:
    await asyncio.sleep(0.01)
    return float(len(response.text))


class Gate:
    """The most calls that were under way at once."""

    def __init__(self, scale: float = 1.0) -> None:
        self.now = self.most = 0
        self.scale = scale

    async def __call__(self, prompt: Any, response: Any) -> float:
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0.01)
        self.now -= 1
        return self.scale


async def awaits_forever(prompt: Any, response: Any) -> float:
    if response.text == "hang":
        await asyncio.sleep(1000)
    return 1.0


async def awaited_list(prompts: Any, completions: list[str], **columns: Any) -> list[int]:
    await asyncio.sleep(0)
    return [len(text) for text in completions]


class Scaled:
    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, prompt: Any, response: Any) -> Any:
        return np.float32(self.scale) * len(response.text)


def counts_itself(prompt: Any, response: Any) -> dict[str, float]:
    return {"score": 1.0, "errors": 5.0, "timeouts": 3.0}


def by_text(prompt: Any, response: Any) -> Any:
    """What the response's text says, for every way to go wrong."""
    return {
        "tensor": lambda: torch.tensor(2.5),
        "flag": lambda: True,
        "none": lambda: None,
        "nan": lambda: float("nan"),
        "infinite": lambda: float("inf"),
        "text": lambda: "0.5",
        "list": lambda: [1.0],
        "object": lambda: object(),
        "dict": lambda: {"acc": 1.0},
        "dict_none": lambda: {"score": None},
        "dict_nan": lambda: {"score": 1.0, "acc": float("nan")},
        "huge": lambda: 10**400,
        "raises": lambda: {}["missing"],
        "exits": lambda: sys.exit(3),
        "fine": lambda: 1.0,
    }[response.text]()


def wrong_length(completions: list[str], **kwargs: Any) -> list[float]:
    return [1.0] * (len(completions) + 1)


def no_list(completions: list[str], **kwargs: Any) -> float:
    return 1.0


def two_unknown(completion: str, answer: str) -> float:
    return 1.0


def needs_more(data_source: str, solution_str: str, ground_truth: str, tokenizer: Any) -> float:
    return 1.0


def needs_column(prompts: list[str], completions: list[str], difficulty: list[int]) -> list[float]:
    return [1.0] * len(prompts)
