"""Rollouts of agents in several rows: turns, sub-agents, compacted contexts."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from megatron_pg.data import Group, Sample
from tests.data.samples import make_sample

Tokens = Callable[[int, int], list[int]]

# First tokens of an agent's context and of a sub-agent's.
AGENT, HELPER = 0, 1


def forest_groups(
    seed: int,
    num_groups: int = 3,
    *,
    vocab_size: int = 64,
    has_values: bool = False,
    is_weighted: bool = False,
) -> list[Group]:
    """Groups of two to four rollouts, at most 40 tokens a row.

    With ``has_values`` every row has advantages, old and engine's logprobs; with ``is_weighted``
    every row has a loss weight.
    """
    rng = random.Random(seed)

    def tokens(low: int, high: int) -> list[int]:
        return [rng.randrange(2, vocab_size) for _ in range(rng.randint(low, high))]

    groups = []
    for g in range(num_groups):
        system, helper = [AGENT, *tokens(2, 4)], [HELPER, *tokens(3, 5)]
        prompt, samples = system + tokens(1, 4), []
        for r in range(rng.randint(2, 4)):
            rows = _turns(rng, prompt, tokens)
            if rng.random() < 0.5:
                calls = [tokens(1, 3) for _ in range(rng.randint(1, 2))]
                rows += [make_sample(helper + call, tokens(2, 4)) for call in calls]
            if rng.random() < 0.5:
                # The context goes on from a summary; the tool's tokens in it are not trained.
                said, tool, again = tokens(1, 3), tokens(1, 2), tokens(1, 3)
                mask = [1] * len(said) + [0] * len(tool) + [1] * len(again)
                rows.append(make_sample(system + tokens(2, 4), said + tool + again, mask=mask))
            rows += _repeats(rng, rows)
            name = None if len(rows) == 1 else f"{r}"
            rows = [replace(row, reward=[1.0, 0.0, 0.25, 0.5][r], rollout_id=name) for row in rows]
            samples += rows
        if has_values:
            samples = [_with_values(rng, sample) for sample in samples]
        if is_weighted:
            samples = [replace(s, loss_weight=rng.choice([1.0, 0.5, 3.0])) for s in samples]
        groups.append(Group(f"forest{g}", tuple(samples)))
    return groups


def _turns(rng: random.Random, prompt: list[int], tokens: Tokens) -> list[Sample]:
    """A row for each turn, whose prompt holds all that was said before."""
    context, rows = list(prompt), []
    for _ in range(rng.randint(1, 3)):
        said = tokens(1, 3)
        rows.append(make_sample(context, said))
        context = context + said + tokens(1, 2)
    return rows


def _repeats(rng: random.Random, rows: Sequence[Sample]) -> list[Sample]:
    """A row once more, a row whose prompt is cut earlier, and one that ends earlier, untrained."""
    repeats = []
    row = rng.choice(rows)
    if rng.random() < 0.3:
        repeats.append(row)
    if rng.random() < 0.3:
        path, start = row.tokens.tolist(), max(len(row.prompt_ids) - 3, 1)
        mask = [0] * (len(row.prompt_ids) - start) + [1] * len(row.response_ids)
        repeats.append(make_sample(path[:start], path[start:], mask=mask))
    if rng.random() < 0.3 and len(row.response_ids) > 1:
        mask = [0] * (len(row.response_ids) - 1)
        part = make_sample(row.prompt_ids.tolist(), row.response_ids.tolist()[:-1], mask=mask)
        repeats.append(part)
    return repeats


def _with_values(rng: random.Random, sample: Sample) -> Sample:
    count = len(sample.response_ids)
    values = {name: [-rng.random() for _ in range(count)] for name in _NAMES}
    made = make_sample([0], [0] * count, **values)
    return replace(sample, **{name: getattr(made, name) for name in _NAMES})


_NAMES = ("advantages", "old_logprobs", "rollout_logprobs")
