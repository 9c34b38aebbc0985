"""How a config becomes a stream that samples, and what an evaluation makes of aborted responses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("reasoning_gym", reason='pip install "megatron_pg[rollout]"')

from megatron_pg.grpo import Ranks
from megatron_pg.rollout import (
    OpenAIServerSource,
    ReasoningGymTask,
    Response,
    RolloutSource,
    SampledRollouts,
    SamplingParams,
)
from megatron_pg.train import parallel_run
from megatron_pg.train.config import (
    ParallelConfig,
    RolloutConfig,
    RunConfig,
    ServerConfig,
    TrainConfig,
)
from megatron_pg.train.rollouts import make_stream
from megatron_pg.train.rollouts.evaluate import evaluate
from megatron_pg.train.rollouts.sampling import Sampling
from megatron_pg.train.rollouts.shared_stream import SharedStream
from tests.ranks import Pool
from tests.rollout.helpers import CharTokenizer, make_response
from tests.train import dealt_prompts

RANKS = Ranks(
    device=torch.device("cpu"), rank=0, world_size=1, dp_rank=0, dp_size=1, is_last_stage=True,
    tp_rank=0, leads_replica=True,
)  # fmt: skip
PARAMS = SamplingParams(num_generations=2, max_response_tokens=4)
ABORTED = Response(response_ids=torch.tensor([], dtype=torch.int64), text="", status="aborted")


def sampling() -> Sampling:
    task = ReasoningGymTask(tokenizer=CharTokenizer())
    return Sampling(tokenizer=CharTokenizer(), task=task, reward=lambda p, r: 1.0, params=PARAMS)


def test_prompts_are_dealt_over_context_parallel_ranks(ranks: Pool) -> None:
    """Two replicas of two ranks: no prompt is sampled twice, and the leaders have them in order."""
    found = ranks.run(4, dealt_prompts.sample, 10, 2)
    assert sorted(n for one in found for n in one["seen"]) == list(range(10))
    assert [one["own"] for one in found[::2]] == [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]]
    assert [len(one["seen"]) for one in found] == [3, 2, 3, 2]
    for replica, other in zip(found[::2], found[1::2]):
        assert replica["got"] == [[10 * n, 10 * n + 1] for n in replica["own"]]
        assert other["got"] is None
    assert [one["got"] for one in ranks.run(2, dealt_prompts.sample, 1, 2)] == [[[0, 1]], None]
    for one in ranks.run(2, dealt_prompts.sample, 4, 2, 3):
        assert one["error"] == "prompt 3 is none"


@pytest.mark.parametrize("kind", ["model", "server"])
def test_what_is_sampled_is_held_to_the_vocabulary_of_the_model(kind: Any) -> None:
    server = ServerConfig(api_key="secret", health_path="/up", reload="vllm")
    config = TrainConfig(rollout=RolloutConfig(source=kind, server=server))
    stream = make_stream(config, sampling(), [], 321, RANKS).stream
    assert isinstance(stream, SampledRollouts)
    assert stream.vocab_size == 321
    if kind == "server":
        assert isinstance(stream.source, OpenAIServerSource)
        assert (stream.source.vocab_size, stream.source.health_path) == (321, "/up")


class Source(RolloutSource):
    """Answers prompt i with the i-th pair of responses."""

    def __init__(self, *answers: tuple[Response, ...]) -> None:
        self.answers = list(answers)

    def generate(self, prompts: Any, params: Any) -> list[tuple[Response, ...]]:
        return self.answers[: len(prompts)]


@pytest.mark.parametrize(
    ("answers", "mean", "num_prompts"),
    [
        ([("ab", "c"), ("d", "")], (1.5 + 1) / 2, 2),
        ([("ab", "c"), ("", "")], 1.5, 1),
        ([("", ""), ("", "")], None, 0),
    ],
)
def test_an_evaluation_leaves_aborted_responses_out(
    answers: Any, mean: float | None, num_prompts: int
) -> None:
    pairs = [tuple(make_response(text) if text else ABORTED for text in pair) for pair in answers]
    inputs = replace(sampling(), reward=lambda prompt, response: len(response.text))
    sampled = SampledRollouts(inputs.task, Source(*pairs), inputs.reward, PARAMS)
    stream = SharedStream(sampled, is_first=True)
    run = RunConfig(eval_prompts=2, eval_generations=2)
    with parallel_run(ParallelConfig(), 0):
        if mean is None:
            message = "every response to a held-out prompt was aborted"
            with pytest.raises(ValueError, match=message):
                evaluate(run, stream)
            return
        result, _ = evaluate(run, stream)
    assert (result.mean, result.num_prompts) == (mean, num_prompts)
