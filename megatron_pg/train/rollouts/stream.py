"""The stream that a configuration describes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...data import Group, RouteShape
from ...grpo import Ranks
from ...parallel import on_first_rank
from ...rollout import (
    OpenAIServerSource,
    RecordedRollouts,
    RolloutSource,
    SampledRollouts,
    load_callable,
)
from ..config import (
    TrainConfig,
)
from .model_source import ModelSource
from .recording import Recording
from .sampling import Sampling
from .shared_stream import SharedStream


def make_stream(
    config: TrainConfig,
    inputs: Recording | Sampling,
    chunks: Sequence[Any],
    vocab_size: int,
    ranks: Ranks,
    routes: RouteShape | None = None,
) -> SharedStream:
    """The stream that a config describes.

    Args:
        config: of the run.
        inputs: recorded groups, or what responses are sampled with.
        chunks: of the policy.
        vocab_size: of the policy.
        ranks: this rank's place.
        routes: of the policy, where those of the rollout engine are replayed.
    """
    is_first = ranks.rank == 0
    if isinstance(inputs, Recording):
        recorded = None
        if is_first:
            recorded = recorded_stream(config, inputs.groups)
        return SharedStream(recorded, is_first=is_first)
    source = _make_source(config, inputs.tokenizer, chunks, vocab_size, ranks, routes)
    if config.run.rollout_ahead and source.on_all_ranks:
        raise ValueError(
            f"run.rollout_ahead=true, but rollout.source={config.rollout.source} is called on all "
            "ranks, which are training meanwhile; set it to false"
        )
    sampled = SampledRollouts(
        inputs.task, source, inputs.reward, inputs.params, vocab_size=vocab_size
    )
    return SharedStream(sampled, is_first=is_first)


def recorded_stream(config: TrainConfig, groups: Sequence[Group]) -> RecordedRollouts:
    """Recorded groups in the order in which a run trains them."""
    return RecordedRollouts(groups, shuffle=config.rollout.shuffle, seed=config.run.seed)


def _make_source(
    config: TrainConfig,
    tokenizer: Any,
    chunks: Sequence[Any],
    vocab_size: int,
    ranks: Ranks,
    routes: RouteShape | None,
) -> RolloutSource:
    rollout, server = config.rollout, config.rollout.server
    if rollout.source == "model":
        return ModelSource(chunks, tokenizer, vocab_size, rollout.max_batch_samples, ranks)
    if rollout.source != "server":
        make = load_callable("rollout.source", rollout.source)
        source = make(tokenizer=tokenizer, vocab_size=vocab_size, **rollout.source_config)
        if not isinstance(source, RolloutSource):
            raise ValueError(
                f"rollout.source={rollout.source} made a {type(source).__name__}; make a subclass "
                "of megatron_pg.rollout.RolloutSource"
            )
        return source
    return OpenAIServerSource(
        server.base_url,
        model=server.model or None,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        dialect=server.dialect,
        allow_retokenize=server.allow_retokenize,
        max_concurrency=server.max_concurrency,
        timeout_seconds=server.timeout_seconds,
        health_path=server.health_path,
        api_key=server.api_key,
        reload=server.reload,
        export_dir=server.export_dir or str(Path(config.run.out) / "export"),
        routes=routes,
        on_first=on_first_rank,
    )
