"""A task and a source of one's own, as a new user writes them, and a short run with them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_pg.data import Group
from megatron_pg.rollout import Prompt, Response, RolloutSource, SamplingParams
from megatron_pg.train import TrainConfig
from tests.train import late_imports, tiny  # noqa: F401


class Task:
    """Equal prompts; it holds none of them out."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def prompts(self, start: int, count: int) -> list[Prompt]:
        numbers = range(start, start + count)
        return [Prompt(prompt_id=str(i), prompt_ids=torch.arange(3, 9)) for i in numbers]

    def __call__(self, prompt: Prompt, response: Response) -> float:
        return float(response.response_ids[0])


class Source(RolloutSource):
    """Random responses; fails where it is told to, on one rank."""

    def __init__(
        self, tokenizer: Any, vocab_size: int, fails_in: str = "", fails_on: int = 0
    ) -> None:
        self.fails = fails_in, fails_on

    def start(self) -> str:
        self._may_fail("start")
        return "random responses"

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams
    ) -> list[tuple[Response, ...]]:
        self._may_fail("generate")
        return [
            tuple(
                Response(response_ids=torch.randint(3, 20, (3,)), text="")
                for _ in range(params.num_generations)
            )
            for _ in prompts
        ]

    def update_weights(self, export: Any, version: int) -> None:
        self._may_fail("update_weights")

    def _may_fail(self, where: str) -> None:
        if self.fails == (where, dist.get_rank()):
            raise ValueError(f"no {where} here")


def run_or_refusal(config: TrainConfig) -> str:
    """What stopped a run on this rank."""
    try:
        with tiny.opened(config) as trainer:
            trainer.run()
    except ValueError as error:
        return str(error)
    return "nothing"


def groups_alive_in_backward(config: TrainConfig) -> tuple[int, int]:
    """Groups that a rank brought to a step, and those it still has when gradients are made."""
    with tiny.opened(config) as trainer:
        next_groups, backward = trainer.stream.next_groups, trainer.grpo.backward
        brought: list[weakref.ref[Group]] = []
        alive: list[int] = []

        def bring(num_groups: int) -> dict[int, Group]:
            groups: dict[int, Group] = next_groups(num_groups)
            brought.extend(weakref.ref(group) for group in groups.values())
            return groups

        def count(*arguments: Any) -> Any:
            gc.collect()
            alive.append(sum(group() is not None for group in brought))
            return backward(*arguments)

        trainer.stream.next_groups, trainer.grpo.backward = bring, count
        trainer.train_step()
        return len(brought), max(alive)
