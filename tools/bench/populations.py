"""Lengths of the groups of a step, drawn from distributions of published rollouts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_pg import PrefixTree
from megatron_pg.data import GroupShape
from megatron_pg.tree import IntArray

# The longest response, and the longest context of an agent.
MAX_LEN = 32768


@dataclass(frozen=True)
class LogNormal:
    """Lengths whose logarithms are normal, cut at both ends.

    Attributes:
        median: tokens.
        sigma: of the logarithm.
        low: shortest.
        high: longest.
    """

    median: float
    sigma: float
    low: int
    high: int

    def at(self, normal: np.ndarray) -> IntArray:
        """Lengths at standard normal deviates."""
        lens = self.median * np.exp(self.sigma * np.asarray(normal))
        return np.clip(lens, self.low, self.high).astype(np.int64)


# Prompts of a mathematics set: 96 to 759 tokens with a mean of 170 in a step that verl logged
# (verl-project/verl#816).
QUESTIONS = LogNormal(157, 0.4, 64, 2048)
# Documents, tools or examples before the question, up to half of a context; no published source.
DOCUMENTS = LogNormal(4096, 0.7, 512, 16384)
# Reasoning: the 99th percentile is ten times the median (jiahuanglin.xyz, "Long-tail rollouts"),
# cut at 32k, which 2 in 100 responses meet.
LONG = LogNormal(4096, 0.99, 16, MAX_LEN)
SHORT = LogNormal(1024, 0.99, 16, MAX_LEN)
# Of the spread of a response's length, half is its prompt's: responses to one prompt are alike
# (Seer, arXiv 2511.14617); how much is not published.
WITHIN = 0.5
# Contexts and turns of 15,000 coding agents: medians 23,840 tokens and 36 turns, 95th percentiles
# 69,274 and 87 (huggingface.co/datasets/thoughtworks/agentic-coding-trajectories).
CONTEXTS = LogNormal(23840, 0.648, 2048, MAX_LEN)
TURNS = LogNormal(36, 0.536, 2, 120)
# System prompt and task of an agent, and what a helper is told; a context goes on from another
# branch (history that is rewritten, a summary, a retry) about once in nine turns. Of its tokens
# the agent wrote a third, the others are its tools'. No published source.
TASKS = LogNormal(4096, 0.5, 1024, 8192)
HELPERS = LogNormal(2048, 0.5, 512, 4096)
TURNS_OF_A_BRANCH, HAS_HELPER, WRITTEN = 9, 0.3, 1 / 3


@dataclass(frozen=True)
class Population:
    """Groups of one kind.

    Attributes:
        name: in results.
        draw: a group of so many rollouts from a generator.
        num_generations: rollouts of a group.
        max_tokens: budget of a row: the longest response and a prompt, two contexts of an agent.
    """

    name: str
    draw: Callable[[np.random.Generator, int], GroupShape]
    num_generations: int
    max_tokens: int

    def shapes(self, num_groups: int) -> list[GroupShape]:
        """The same groups on every call."""
        random = np.random.default_rng(0)
        return [self.draw(random, self.num_generations) for _ in range(num_groups)]


def star(prompts: LogNormal, responses: LogNormal) -> Callable[..., GroupShape]:
    """Groups of one prompt whose responses share nothing more."""

    def draw(random: np.random.Generator, num_generations: int) -> GroupShape:
        prompt = int(prompts.at(random.standard_normal(())))
        common, own = random.standard_normal(()), random.standard_normal(num_generations)
        lens = responses.at(np.sqrt(1 - WITHIN) * common + np.sqrt(WITHIN) * own)
        tree = PrefixTree.from_group(prompt, lens.tolist())
        return GroupShape("g", tree, lens, np.full(num_generations, prompt))

    return draw


def agents(random: np.random.Generator, num_generations: int) -> GroupShape:
    """Groups of agents on one task: branches of every context, helpers with a root of their own."""
    task, helper = (int(x.at(random.standard_normal(()))) for x in (TASKS, HELPERS))
    common = random.standard_normal(())
    lens, parents, ends, untrained = [task], [-1], [], []
    for own in random.standard_normal(num_generations):
        normal = np.sqrt(1 - WITHIN) * common + np.sqrt(WITHIN) * own
        context = max(int(CONTEXTS.at(normal)) - task, 64)
        num_branches = max(int(TURNS.at(normal)) // TURNS_OF_A_BRANCH, 1)
        # Each branch leaves the trunk where it had grown by an equal part, and ends as long.
        part, parent = context // num_branches, 0
        for branch in range(num_branches):
            is_last = branch == num_branches - 1
            if not is_last:
                lens.append(part)
                parents.append(parent)
                parent = len(lens) - 1
            lens.append(context - part * branch if is_last else part)
            parents.append(parent)
            ends.append(len(lens) - 1)
            untrained.append(task)
    num_helpers = int(random.binomial(num_generations, HAS_HELPER))
    if num_helpers:
        root = len(lens)
        lens += [helper, *CONTEXTS.at(random.standard_normal(num_helpers) - 2).tolist()]
        parents += [-1] + [root] * num_helpers
        ends += range(root + 1, root + 1 + num_helpers)
        untrained += [helper] * num_helpers
    tree = PrefixTree(np.array(lens), np.array(parents), np.array(ends))
    trained = (tree.segment_lens[tree.sample_segments] * WRITTEN).astype(np.int64)
    return GroupShape("g", tree, trained, np.array(untrained))


POPULATIONS = (
    Population("reasoning", star(QUESTIONS, LONG), 16, 40960),
    Population("long prompts", star(DOCUMENTS, SHORT), 16, 49152),
    Population("agents", agents, 8, 65536),
)
