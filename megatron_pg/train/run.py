"""The parts of a run, made from its configuration after all that can be refused was looked at."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..grpo import GrpoStep, Ranks, with_ref_logprobs
from ..rollout import RecordedRollouts
from .checkpoints import Checkpoints, hold_folders, resume_run
from .config import TrainConfig, config_dict, config_problems, raise_problems
from .metrics import make_sinks
from .model import (
    build_reference,
    build_trained_model,
    check_attention,
    plan_model,
    validate_trainable,
    validate_weights,
)
from .rollouts import (
    Recording,
    check_held_out,
    make_stream,
    open_sampling,
    routes_of_run,
    share_recording,
)
from .trainer import Trainer


@contextmanager
def open_run(config: TrainConfig, ranks: Ranks) -> Iterator[Trainer]:
    """The trainer of a run, where its newest checkpoint left off; its folders are held meanwhile.

    Args:
        config: of the run.
        ranks: this rank's place.

    Raises:
        ValueError: on whatever would stop the run later, rollouts and a folder in use by another
            run included. Nothing is built then, except where weights turn out to be another model's
            or a checkpoint cannot be loaded.
        NotImplementedError: on a model that is not supported.
    """
    raise_problems("of this run", config_problems(config))
    run = config.run
    checkpoints = Checkpoints(
        Path(run.out) / "checkpoints", keep=run.keep_checkpoints, is_async=run.async_save
    )
    with hold_folders(config) as told:
        newest = _newest(checkpoints, run.load)
        trainer = _build(config, checkpoints, ranks)
        if newest is not None:
            progress, note = resume_run(newest, config, trainer.model, trainer.stream)
            trainer.resume(progress)
            told += [f"resuming from step {progress.step}: {newest}"]
            told += [note] if note is not None else []
        if config.algorithm.precompute_ref_logprobs:
            told.append(_precompute_ref_logprobs(config, trainer))
        if ranks.rank == 0:
            trainer.sinks = make_sinks(run, config_dict(config), trainer.step)
            for sink in trainer.sinks:
                for line in told:
                    sink.say(line)
        try:
            yield trainer
        finally:
            trainer.stream.close()


def _newest(checkpoints: Checkpoints, may_load: bool) -> Path | None:
    newest = checkpoints.find()
    if newest is not None and not may_load:
        raise ValueError(
            f"run.load=false, but {newest.parent} holds checkpoints, which a fresh run would "
            "mix with its own; choose another run.out, or remove that folder"
        )
    return newest


def _build(config: TrainConfig, checkpoints: Checkpoints, ranks: Ranks) -> Trainer:
    plan = plan_model(config.model, config.parallel)
    validate_trainable(plan)
    validate_weights(config)
    routes = routes_of_run(config, plan)
    check_attention(plan, config.prefix_group.attention_backend, ranks.device)
    inputs = (
        share_recording(config, plan, plan.packing(config.prefix_group), ranks)
        if config.rollout.source == "recorded"
        else open_sampling(config, plan.max_positions)
    )
    if not isinstance(inputs, Recording):
        check_held_out(config.run, inputs.task, inputs.reward)
    algorithm = config.algorithm
    updates = config.run.num_steps * algorithm.ppo_epochs * algorithm.num_minibatches
    model = build_trained_model(config, plan, updates)
    recorded = inputs.fields if isinstance(inputs, Recording) else ()
    needs_reference = algorithm.needs_reference and "ref_logprobs" not in recorded
    step = GrpoStep(
        model.chunks,
        vocab_size=plan.vocab_size,
        algorithm=algorithm.of_step,
        settings=config.prefix_group,
        reference=build_reference(config) if needs_reference else None,
        offload_reference=algorithm.ref_offload,
        temperature=config.rollout.temperature,
        max_response_tokens=config.rollout.max_response_tokens,
    )
    stream = make_stream(config, inputs, model.chunks, plan.vocab_size, ranks, routes)
    return Trainer(config, stream=stream, step=step, model=model, checkpoints=checkpoints)


def _precompute_ref_logprobs(config: TrainConfig, trainer: Trainer) -> str:
    """Judge all recorded groups by the reference model and give it up; what was done."""
    started = time.perf_counter()
    recorded = trainer.stream.stream
    assert recorded is None or isinstance(recorded, RecordedRollouts)
    groups = () if recorded is None else recorded.groups
    judged = with_ref_logprobs(trainer.grpo, groups, config.run.groups_per_step)
    if recorded is not None:
        recorded.add_values(judged)
    trainer.grpo.drop_reference()
    seconds = time.perf_counter() - started
    return f"reference logprobs of {len(judged)} groups computed in {seconds:.1f} s"
