"""Sampling on the fake device."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_pg.mcore import generate
from tests.fake_h100.record import Record
from tests.fake_h100.steps import Case, built

PROMPT_LENS, NUM_GENERATIONS, STOP_TOKEN = (20, 33), 4, 3


def sample(case: Case) -> dict[int, tuple[Record, list[int]]]:
    """By the longest response: what sampling does, and how long responses were.

    A response stops when its row of the batch samples ``STOP_TOKEN``: one each step, while there
    are so many rows.
    """

    def tokens(tensor: Tensor) -> Tensor | None:
        if tensor.dtype != torch.float64:
            return None
        chosen = torch.zeros(tensor.shape, dtype=torch.float64)
        chosen[0] = torch.arange(chosen[0].numel()).reshape(chosen[0].shape)
        return chosen

    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 512, (n,), generator=generator) for n in PROMPT_LENS]
    found = {}
    with built(case, tokens) as model:
        for longest in (4, 7):
            lens: list[int] = []

            def run(longest: int = longest, lens: list[int] = lens) -> None:
                groups = generate(
                    model.chunks,
                    prompts,
                    num_generations=NUM_GENERATIONS,
                    max_response_tokens=longest,
                    seed=1,
                    stop_token_ids=[STOP_TOKEN],
                    vocab_size=model.vocab_size,
                )
                lens += [len(x.response_ids) for group in groups for x in group]

            found[longest] = model.device.record(run), lens
    return found
