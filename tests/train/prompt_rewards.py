"""One rule in every convention: the share of digits among the words of a response."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any


def share(text: str) -> float:
    words = text.split()
    return sum(word.isdigit() for word in words) / max(len(words), 1)


def ours(prompt: Any, response: Any) -> float:
    assert prompt.metadata["answer"] == prompt.metadata["n"]
    return share(response.text)


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: Any = None
) -> dict[str, Any]:
    assert (data_source, extra_info["n"]) == ("digits", ground_truth)
    return {"score": share(solution_str), "words": len(solution_str.split()), "pred": solution_str}


def trl(prompts: list[str], completions: list[str], n: list[int], **columns: Any) -> list[float]:
    assert len(prompts) == len(n) == len(columns["data_source"])
    return [share(text) for text in completions]


async def later(prompt: Any, response: Any) -> float:
    await asyncio.sleep(0)
    return share(response.text)


def hangs_on(data_source: str, solution_str: str, ground_truth: int, *, answer: int) -> float:
    if ground_truth == answer:
        time.sleep(1000)
    return share(solution_str)


def raises_after(data_source: str, solution_str: str, *, file: str, calls: int) -> float:
    """Counts its calls in a file, and is at an end after so many."""
    with Path(file).open("a") as notes:
        notes.write(".")
    if Path(file).stat().st_size > calls:
        raise OSError(28, "no space left for verdicts")
    return share(solution_str)
