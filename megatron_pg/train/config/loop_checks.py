"""What is wrong with settings of the loop: evaluations, what is kept, asked ahead or logged."""

from __future__ import annotations

from collections.abc import Iterator

from .sections import TrainConfig


def loop_problems(config: TrainConfig) -> Iterator[str]:
    """Settings of the loop that do not belong together."""
    run, algorithm = config.run, config.algorithm
    is_recorded = config.rollout.source == "recorded"
    if run.eval_interval and not run.eval_prompts:
        yield f"run.eval_interval={run.eval_interval} needs run.eval_prompts, the prompts to judge"
    if run.keep_best and not run.eval_interval:
        yield "run.keep_best=true needs run.eval_interval, the steps between evaluations"
    if run.log_generations_interval is not None and is_recorded:
        yield (
            f"run.log_generations_interval={run.log_generations_interval} would write what the "
            "recorded files say; set it to null"
        )
    if algorithm.ref_offload and not algorithm.needs_reference:
        yield "algorithm.ref_offload=true would be ignored: no KL term needs a reference model"
    if algorithm.precompute_ref_logprobs:
        yield from _precompute_problems(config)
    if algorithm.filter_groups.enable and not is_recorded and config.rollout.num_generations < 2:
        yield (
            f"algorithm.filter_groups.enable=true with rollout.num_generations="
            f"{config.rollout.num_generations}: one response has no spread, so that nothing would "
            "be trained; sample at least 2"
        )
    if run.rollout_ahead:
        yield from _ahead_problems(config)
    if algorithm.router_replay == "R3":
        yield from _replay_problems(config)


def _precompute_problems(config: TrainConfig) -> Iterator[str]:
    if not config.algorithm.needs_reference:
        yield "algorithm.precompute_ref_logprobs=true would be ignored: no KL term needs them"
    elif config.rollout.source != "recorded":
        yield (
            "algorithm.precompute_ref_logprobs=true with rollout.source="
            f"{config.rollout.source!r}: responses that are not sampled yet have no logprobs; set "
            "it to false"
        )
    elif config.algorithm.ref_offload:
        yield (
            "algorithm.ref_offload=true would be ignored: with precompute_ref_logprobs=true the "
            "reference model is given up before the first step; set it to false"
        )


def _ahead_problems(config: TrainConfig) -> Iterator[str]:
    source = config.rollout.source
    if source in ("recorded", "model"):
        reason = {
            "recorded": "recorded groups are there already",
            "model": "the model cannot sample while it is trained",
        }[source]
        yield (
            f"run.rollout_ahead=true with rollout.source={source!r}: {reason}; set it to false, or "
            "ask a server"
        )
    elif config.algorithm.policy.importance_mode is None:
        yield (
            "run.rollout_ahead=true samples with older weights, which only importance weights make "
            "up for: set algorithm.policy.importance_mode, for example to token_truncate"
        )


def _replay_problems(config: TrainConfig) -> Iterator[str]:
    rollout = config.rollout
    if rollout.source == "model":
        yield (
            "algorithm.router_replay=R3 with rollout.source='model': the model that samples is the "
            "one in training and reports no routes; set it to R2, which records them in the pass "
            "of the old logprobs"
        )
    if rollout.source == "server" and rollout.server.allow_retokenize:
        yield (
            "algorithm.router_replay=R3 with rollout.server.allow_retokenize=true: routes belong "
            "to the exact tokens; set it to false"
        )
