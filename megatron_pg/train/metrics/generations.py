"""Prompts, responses and rewards for a person to read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from ...data import Group, Sample
from ..checkpoints import write_atomically, writing
from ..rollouts import own_rewards

Split = Literal["train", "eval"]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One response.

    Attributes:
        group_id: of the prompt.
        prompt, response: as text; None where only tokens are known.
        reward: as it was given.
        status: whether the response ended by itself.
        num_tokens: of the response.
        data_source: of the prompt, where it is known.
        reward_metrics: what the reward said beside its number.
    """

    group_id: str
    prompt: str | None
    response: str | None
    reward: float
    status: str
    num_tokens: int
    data_source: str | None
    reward_metrics: Mapping[str, float]


@dataclass(frozen=True)
class Generations:
    """The responses of a training step or an evaluation.

    Attributes:
        split: which of the two.
        step: its number.
        samples: all of them.
        shown: a few, each of another prompt.
    """

    split: Split
    step: int
    samples: Sequence[Generation]
    shown: Sequence[Generation]


def make_generations(
    split: Split, step: int, groups: Mapping[int, Group], num_shown: int
) -> Generations:
    """Of groups by number, in their order."""
    ordered = [groups[number] for number in sorted(groups)]
    samples = [_of_group(group) for group in ordered]
    shown = [of_group[0] for of_group in samples[:num_shown]]
    return Generations(split, step, [one for of_group in samples for one in of_group], shown)


def write_generations(folder: Path, generations: Generations) -> None:
    """``<split>_<step>.jsonl``, an object a response; a step that is repeated replaces its file."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"step": generations.step} | asdict(one)) for one in generations.samples]
    file = folder / f"{generations.split}_{generations.step}.jsonl"
    write_atomically(file, "".join(line + "\n" for line in lines))


def printable(text: str, max_chars: int, *, keep_lines: bool = False) -> str:
    """A text that does nothing but stand there: what cannot be printed is written as escapes.

    Args:
        text: whatever a model has sampled.
        max_chars: what goes beyond is counted and left out.
        keep_lines: leave line ends as they are.
    """
    kept = "".join(
        char
        if char.isprintable() or (keep_lines and char == "\n")
        else char.encode("unicode_escape").decode()
        for char in text[:max_chars]
    )
    left = len(text) - max_chars
    return f"{kept} ... and {left:,} more characters" if left > 0 else kept


def _of_group(group: Group) -> list[Generation]:
    return [
        Generation(
            group_id=group.group_id,
            prompt=_text(sample, "prompt"),
            response=_text(sample, "response"),
            reward=sample.reward,
            status=sample.status,
            num_tokens=len(sample.response_ids),
            data_source=_text(sample, "data_source"),
            reward_metrics=own_rewards(sample),
        )
        for sample in group.samples
    ]


def _text(sample: Sample, name: str) -> str | None:
    found = sample.metadata.get(name)
    return found if isinstance(found, str) else None
