"""Where a run's groups come from, the same on every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from ..data import Group, read_rollouts
from ..mcore import generate
from ..rollout import (
    GroupStream,
    OpenAIServerSource,
    Prompt,
    ReasoningGymTask,
    RecordedRollouts,
    Response,
    RewardFunction,
    SampledRollouts,
    SamplingParams,
    WeightExporter,
    load_reward,
)
from .config import RolloutConfig, TrainConfig
from .ranks import Ranks, from_first_rank


class ModelSource:
    """Samples from the model in training; every rank of the job takes part in each call.

    Prompts are divided over the data-parallel replicas and every rank gets all responses.
    """

    def __init__(
        self, chunks: Sequence[Any], tokenizer: Any, vocab_size: int, max_batch_samples: int | None
    ) -> None:
        self.chunks = chunks
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.max_batch_samples = max_batch_samples
        self.version = 0

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams
    ) -> list[tuple[Response, ...]]:
        """See ``RolloutSource.generate``."""
        rank = parallel_state.get_data_parallel_rank()
        size = parallel_state.get_data_parallel_world_size()
        numbers = range(rank, len(prompts), size)
        mine = (
            generate(
                self.chunks,
                [prompts[i].prompt_ids for i in numbers],
                num_generations=params.num_generations,
                max_response_tokens=params.max_response_tokens,
                seed=params.seed or 0,
                temperature=params.temperature,
                top_k=params.top_k,
                top_p=params.top_p,
                stop_token_ids=params.stop_token_ids,
                vocab_size=self.vocab_size,
                max_batch_samples=self.max_batch_samples,
                prompt_numbers=list(numbers),
            )
            if numbers
            else []
        )
        parts: list[Any] = [None] * size
        dist.all_gather_object(
            parts,
            mine,
            group=parallel_state.get_data_parallel_group_gloo()
            if torch.cuda.is_available()
            else parallel_state.get_data_parallel_group(),
        )
        return [
            tuple(self._response(sampled) for sampled in parts[i % size][i // size])
            for i in range(len(prompts))
        ]

    def update_weights(self, export: WeightExporter, version: int) -> None:
        """Nothing to move: the parameters are read in place."""
        self.version = version

    def _response(self, sampled: Any) -> Response:
        return Response(
            response_ids=sampled.response_ids,
            text=self.tokenizer.decode(sampled.response_ids.tolist(), skip_special_tokens=True),
            rollout_logprobs=sampled.logprobs.double(),
            status="completed" if sampled.is_finished else "truncated",
            metadata={"policy_version": self.version},
        )


class SharedStream:
    """A stream whose groups every rank receives from the first rank.

    Args:
        stream: the stream; on other ranks it is only called when sampling needs all ranks.
        needs_all_ranks: whether ``next_groups`` is a collective of its own.
        is_first: whether this is rank 0.
    """

    def __init__(self, stream: GroupStream, needs_all_ranks: bool, is_first: bool) -> None:
        self.stream = stream
        self.needs_all_ranks = needs_all_ranks
        self.is_first = is_first

    def next_groups(self, num_groups: int) -> list[Group]:
        """The next groups, equal on every rank; an error on one rank is raised on all."""
        groups, error = None, None
        if self.needs_all_ranks:
            groups = self.stream.next_groups(num_groups)
        elif self.is_first:
            try:
                groups = self.stream.next_groups(num_groups)
            except Exception as problem:  # passed on to every rank below
                error = problem
        groups, error = from_first_rank((groups, error))
        if error is not None:
            raise error
        return list(groups)

    def update_weights(self, export: WeightExporter, version: int) -> None:
        """Bring the source to the current policy; ``export`` is a collective of all ranks."""
        source = getattr(self.stream, "source", None)
        if not isinstance(source, OpenAIServerSource):
            self.stream.update_weights(export, version)
            return
        folder = Path(source.export_dir or "export") / f"version_{version}"
        export(folder)
        error = None
        if self.is_first:
            try:
                source.reload_weights(folder, version)
            except Exception as problem:  # passed on to every rank below
                error = problem
        error = from_first_rank(error)
        if error is not None:
            raise error

    def state_dict(self) -> dict[str, Any]:
        """Position in the stream, as the first rank knows it."""
        return dict(from_first_rank(self.stream.state_dict()))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where the state was taken."""
        self.stream.load_state_dict(state)


def load_tokenizer(config: TrainConfig) -> Any:
    """The tokenizer of ``model.hf``. Raises ValueError when the folder has none."""
    if config.model.hf is None:
        raise ValueError(
            f"rollout.source={config.rollout.source} needs a tokenizer: set model.hf to a Hugging "
            "Face folder, or train from recorded token ids"
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(config.model.hf)
    except (OSError, ValueError) as error:
        raise ValueError(f"{config.model.hf} has no usable tokenizer: {error}") from error


def make_task(config: RolloutConfig, tokenizer: Any) -> ReasoningGymTask:
    """The prompts of a run."""
    task = config.task
    return ReasoningGymTask(
        tokenizer=tokenizer,
        name=task.name,
        config=task.config,
        seed=task.seed,
        size=task.size,
        held_out_share=task.held_out_share,
        template=task.template,
        system_prompt=task.system_prompt,
        extractor=task.extractor,
        partial_credit=task.partial_credit,
    )


def make_reward(config: RolloutConfig, task: ReasoningGymTask) -> RewardFunction:
    """The reward named by the config, else the task's own."""
    return task if config.reward is None else load_reward(config.reward)


def sampling_params(config: TrainConfig, tokenizer: Any) -> SamplingParams:
    """How responses are sampled; the tokenizer's end token stops them."""
    rollout = config.rollout
    stops = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    return SamplingParams(
        num_generations=rollout.num_generations,
        max_response_tokens=rollout.max_response_tokens,
        temperature=rollout.temperature,
        top_k=rollout.top_k or None,
        top_p=rollout.top_p,
        stop_token_ids=stops,
        seed=config.run.seed,
    )


def read_recorded(config: TrainConfig, vocab_size: int) -> list[Group]:
    """All recorded groups of a run.

    Raises:
        ValueError: naming file, row and field of everything that is wrong.
    """
    rollout = config.rollout
    if not rollout.files:
        raise ValueError("rollout.files is empty: name the recorded files, or another source")
    tokenizer = load_tokenizer(config) if config.model.hf is not None else None
    return read_rollouts(
        rollout.files, format=rollout.format, tokenizer=tokenizer, vocab_size=vocab_size
    )


def make_stream(
    config: TrainConfig, chunks: Sequence[Any], vocab_size: int, ranks: Ranks
) -> SharedStream:
    """The stream that a config describes."""
    rollout, is_first = config.rollout, ranks.rank == 0
    if rollout.source == "recorded":
        groups = read_recorded(config, vocab_size)
        recorded = RecordedRollouts(groups, shuffle=rollout.shuffle, seed=config.run.seed)
        # Every rank read the same files: nothing to send around.
        return SharedStream(recorded, needs_all_ranks=True, is_first=is_first)
    tokenizer = load_tokenizer(config)
    task = make_task(rollout, tokenizer)
    reward = make_reward(rollout, task)
    params = sampling_params(config, tokenizer)
    if rollout.source == "model":
        own = ModelSource(chunks, tokenizer, vocab_size, rollout.max_batch_samples)
        stream = SampledRollouts(task, own, reward, params)
        return SharedStream(stream, needs_all_ranks=True, is_first=is_first)
    server = OpenAIServerSource(
        rollout.server.base_url,
        model=rollout.server.model or None,
        tokenizer=tokenizer,
        dialect=rollout.server.dialect,
        allow_retokenize=rollout.server.allow_retokenize,
        max_concurrency=rollout.server.max_concurrency,
        timeout_seconds=rollout.server.timeout_seconds,
        export_dir=rollout.server.export_dir or str(Path(config.run.out) / "export"),
    )
    stream = SampledRollouts(task, server, reward, params)
    return SharedStream(stream, needs_all_ranks=False, is_first=is_first)
