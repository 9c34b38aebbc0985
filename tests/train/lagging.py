"""An engine that serves the weights that it was given last, and a run that asks it ahead."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_pg.rollout import Prompt, Response, RolloutSource, SamplingParams
from megatron_pg.train import TrainConfig
from tests.train import held_out, tiny

NUM_TOKENS = 4


class Engine(RolloutSource):
    """Samples with transformers; remembers its models and what it answered, call by call."""

    def __init__(self, tokenizer: Any, vocab_size: int, model: str, folder: str) -> None:
        self.folder = Path(folder)
        self.version = 0
        self.models = {0: load(Path(model))}
        self.answers: list[list[tuple[torch.Tensor, Response]]] = []

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams
    ) -> list[tuple[Response, ...]]:
        generator = torch.Generator().manual_seed(len(self.answers))
        found = [
            tuple(self._answer(prompt, generator) for _ in range(params.num_generations))
            for prompt in prompts
        ]
        pairs = zip(prompts, found)
        self.answers.append([(p.prompt_ids, one) for p, of_prompt in pairs for one in of_prompt])
        return found

    def update_weights(self, export: Any, version: int) -> None:
        folder = self.folder / str(version)
        export(folder)
        dist.barrier()
        self.models[version], self.version = load(folder), version

    def _answer(self, prompt: Prompt, generator: torch.Generator) -> Response:
        tokens = prompt.prompt_ids
        for _ in range(NUM_TOKENS):
            probs = logprobs_of(self.models[self.version], tokens)[-1].exp()
            tokens = torch.cat([tokens, torch.multinomial(probs, 1, generator=generator)])
        ids = tokens[len(prompt.prompt_ids) :]
        return Response(
            response_ids=ids,
            text="",
            rollout_logprobs=response_logprobs(self.models[self.version], prompt.prompt_ids, ids),
            metadata={"score": float(ids[0]) / 50, "version": self.version},
        )


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


@torch.no_grad()
def logprobs_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens[None]).logits[0].double().log_softmax(-1)


def response_logprobs(model: Any, prompt: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    found = logprobs_of(model, torch.cat([prompt, ids]))[len(prompt) - 1 : -1]
    return found.gather(1, ids[:, None])[:, 0]


def versions_and_weights(config: TrainConfig) -> tuple[list[int], list[tuple[float, float]]]:
    """Whose answers every step trained, and the mean |diff| and clipped ratio it must report."""
    with tiny.opened(config) as trainer:
        trainer.run()
        engine = trainer.stream.stream.source
    versions, want = [], []
    for step, answers in enumerate(engine.answers):
        versions.append(answers[0][1].metadata["version"])
        # What is trained in a step is the policy of all steps before it.
        diffs = torch.cat(
            [
                response_logprobs(engine.models[step], prompt, one.response_ids)
                - one.rollout_logprobs
                for prompt, one in answers
            ]
        )
        want.append((float(diffs.abs().mean()), float(diffs.exp().clamp(max=2).mean())))
    return versions, want


def threads_and_positions(config: TrainConfig) -> tuple[list[str], list[int], int]:
    """Threads that called the source, the stream's position after every step, threads left."""
    with tiny.opened(config) as trainer:
        positions = []
        for _ in range(config.run.num_steps):
            trainer.train_step()
            positions.append(trainer.stream.state_dict()["num_taken"])
        source = trainer.stream.stream.source
        assert isinstance(source, held_out.Source)
    alive = [t for t in threading.enumerate() if "_run" in t.name]
    return source.threads, positions, len(alive)
