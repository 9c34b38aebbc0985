"""A task and a source whose rewards are told by the number of the weights, and runs with them."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_pg.rollout import Prompt, Response, RolloutSource, SamplingParams
from megatron_pg.train import TrainConfig, load_config
from tests.train import late_imports, tiny  # noqa: F401

# Held-out reward after so many steps.
HELD_OUT = (0.25, 0.25, 0.75, 0.5, 0.625, 0.5)


class Prompts:
    """Prompts by name and number; two data sources take turns."""

    def __init__(self, name: str) -> None:
        self.name = name

    def prompts(self, start: int, count: int) -> list[Prompt]:
        return [
            Prompt(
                prompt_id=f"{self.name}/{i}",
                prompt_ids=torch.arange(3, 7 + i % 3),
                metadata={"data_source": f"{self.name}_{i % 2}"},
            )
            for i in range(start, start + count)
        ]


class Six(Prompts):
    def __len__(self) -> int:
        return 6


class EndlessTask(Prompts):
    """The reward is what the source says it is."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__("train")

    def __call__(self, prompt: Prompt, response: Response) -> float:
        assert threading.current_thread() is threading.main_thread(), "rewards may use signals"
        return float(response.metadata["score"])

    def held_out(self) -> Prompts:
        return Prompts("held_out")


class Task(EndlessTask):
    def held_out(self) -> Prompts:
        return Six("held_out")


class ServedTask(EndlessTask):
    """Of a server, which tells no rewards."""

    def __call__(self, prompt: Prompt, response: Response) -> float:
        return float(response.response_ids[0]) / 50


class Source(RolloutSource):
    """Responses that depend on the prompt and its place alone, rewards of held-out ones do not.

    Groups of every third training prompt have no spread in their rewards, and all of ``flat``.

    Args:
        everywhere: called on all ranks, as a model that samples is; else on the first one.
        flat: no group has spread.
        fails_at: number of the call that fails, from 1.
        seconds: that a call takes.
    """

    def __init__(
        self,
        tokenizer: Any,
        vocab_size: int,
        everywhere: bool = False,
        flat: bool = False,
        fails_at: int = 0,
        seconds: float = 0,
    ) -> None:
        self.on_all_ranks, self.flat = everywhere, flat
        self.fails_at, self.seconds = fails_at, seconds
        self.version = 0
        self.is_sampling = False
        self.threads: list[str] = []

    def numbers(self, num_prompts: int) -> Sequence[int]:
        if self.on_all_ranks:
            return range(dist.get_rank(), num_prompts, dist.get_world_size())
        return range(num_prompts)

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams
    ) -> list[tuple[Response, ...]]:
        assert not self.is_sampling
        self.threads.append(threading.current_thread().name)
        if len(self.threads) == self.fails_at:
            raise ValueError(f"no answer to call {self.fails_at}")
        self.is_sampling = True
        time.sleep(self.seconds)
        found = [
            tuple(self._response(prompt, i) for i in range(params.num_generations))
            for prompt in prompts
        ]
        self.is_sampling = False
        return found

    def update_weights(self, export: Any, version: int) -> None:
        assert not self.is_sampling, "the weights change under the requests"
        self.version = version

    def _response(self, prompt: Prompt, place: int) -> Response:
        name, number = prompt.prompt_id.split("/")
        score = float((int(number) + place) % 2)
        if name == "held_out":
            score = HELD_OUT[self.version]
        elif self.flat or int(number) % 3 == 0:
            score = 1.0
        metadata = {"score": score, "prompt": f"question {number}", **prompt.metadata}
        metadata["reward_metrics"] = {"form": float(place)}
        ids = torch.tensor([8 + place, 9 + int(number) % 5, 7 + 2 * place])
        logprobs = torch.full((3,), -3.5, dtype=torch.float64)
        return Response(
            response_ids=ids, text=f"answer {place}", rollout_logprobs=logprobs, metadata=metadata
        )


def config_of(folder: Path, source_config: dict[str, Any] | None = None, **overrides: Any) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    sections = tiny.run_sections(folder)
    tiny.save_tokenizer(folder / "model")
    sections["rollout"] = {
        "source": "tests.train.held_out:Source",
        "source_config": source_config or {},
        "num_generations": 4,
        "max_response_tokens": 5,
        "task": {"name": "tests.train.held_out:Task"},
    }
    sections["prefix_group"]["max_tokens_per_microbatch"] = 90
    sections["run"] |= {"num_steps": 5, "groups_per_step": 4, "self_check_interval": None}
    path = tiny.write_config(folder / "config.yaml", sections, **overrides)
    config: TrainConfig = load_config(path)
    return config


def run_or_refusal(config: TrainConfig) -> str:
    """What stopped a run on this rank."""
    try:
        with tiny.opened(config) as trainer:
            trainer.run()
    except ValueError as error:
        return str(error)
    return "nothing"
