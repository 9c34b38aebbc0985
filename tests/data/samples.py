"""Small random groups, written the obvious way."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from megatron_pg.data import Group, GroupShape, Sample, group_shape


def make_sample(
    prompt: Sequence[int],
    response: Sequence[int],
    *,
    mask: Sequence[int] | None = None,
    reward: float = 0.0,
    **values: Sequence[float],
) -> Sample:
    return Sample(
        prompt_ids=torch.tensor(prompt, dtype=torch.int64),
        response_ids=torch.tensor(response, dtype=torch.int64),
        reward=reward,
        loss_mask=torch.tensor(mask or [1] * len(response), dtype=torch.bool),
        **{name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()},
    )


def random_groups(
    seed: int,
    num_groups: int,
    *,
    max_samples: int = 5,
    max_len: int = 6,
    vocab_size: int = 3,
    same_prompt: bool = True,
    has_empty: bool = False,
) -> list[Group]:
    """Groups with holes in their masks; a small vocabulary makes shared runs frequent.

    With ``has_empty`` about a third of the responses has no tokens, half of them no values either.
    """
    rng = random.Random(seed)

    def tokens() -> list[int]:
        return [rng.randrange(vocab_size) for _ in range(rng.randint(1, max_len))]

    groups = []
    for g in range(num_groups):
        prompt, samples = tokens(), []
        for _ in range(rng.randint(1, max_samples)):
            is_empty = has_empty and rng.random() < 0.3
            response = [] if is_empty else tokens()
            if is_empty and rng.random() < 0.5:
                samples.append(make_sample(prompt, [], reward=99.0))
                continue
            samples.append(
                make_sample(
                    prompt if same_prompt or rng.random() < 0.5 else [prompt[0], *tokens()],
                    response,
                    mask=[rng.random() < 0.7 for _ in response],
                    reward=rng.random(),
                    advantages=[rng.random() for _ in response],
                    old_logprobs=[-rng.random() for _ in response],
                    rollout_logprobs=[-rng.random() for _ in response],
                )
            )
        groups.append(Group(f"g{g}", tuple(samples)))
    return groups


def shapes_of(groups: Sequence[Group], min_shared: int | None = None) -> list[GroupShape]:
    return [group_shape(group, min_shared) for group in groups]


def make_large_groups(seed: int = 2, vocab_size: int = 50) -> list[Group]:
    """Ragged groups that fill 1, 2, 3, 7 and 2 rows of 18 tokens beside a resident prompt."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(length: int) -> torch.Tensor:
        return torch.randint(2, vocab_size, (length,), generator=generator)

    groups = []
    lens = [[3, 4], [8, 7, 6, 5], [9, 8, 1, 8, 4, 7], [8, 7] * 7, [10, 6, 5]]
    for number, (prompt_len, responses) in enumerate(zip([5, 11, 9, 12, 7], lens)):
        prompt, samples = tokens(prompt_len), []
        for place, length in enumerate(responses):
            mask = torch.ones(length, dtype=torch.bool)
            if place == 1 and length > 4:
                mask[:2] = False
            reward = float(torch.rand(1, generator=generator))
            samples.append(
                Sample(
                    prompt_ids=prompt,
                    response_ids=tokens(length),
                    reward=reward,
                    loss_mask=mask,
                )
            )
        groups.append(Group(f"large{number}", tuple(samples)))
    return groups


TENSORS = (
    "prompt_ids",
    "response_ids",
    "loss_mask",
    "rollout_logprobs",
    "old_logprobs",
    "ref_logprobs",
    "advantages",
    "routed_experts",
)


def assert_same_groups(got: list[Group], want: list[Group]) -> None:
    assert [g.group_id for g in got] == [g.group_id for g in want]
    for a, b in zip(got, want):
        assert len(a.samples) == len(b.samples)
        for x, y in zip(a.samples, b.samples):
            for name in TENSORS:
                p, q = getattr(x, name), getattr(y, name)
                assert (p is None) == (q is None), name
                assert p is None or (p.dtype == q.dtype and torch.equal(p, q)), name
            for name in ("reward", "status", "sample_id", "rollout_id", "loss_weight", "metadata"):
                assert getattr(x, name) == getattr(y, name)


class LetterTokenizer:
    """One token per letter, 1 before strings; chat messages become ``role:content|``."""

    eos_token_id = 3

    def encode(self, text, *, add_special_tokens):
        return [1] * add_special_tokens + [ord(letter) for letter in text]

    def apply_chat_template(self, conversation, *, tokenize, add_generation_prompt):
        assert not tokenize and add_generation_prompt
        return "".join(f"{m['role']}:{m['content']}|" for m in conversation) + "assistant:"
