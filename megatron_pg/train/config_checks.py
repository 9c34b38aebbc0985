"""What is wrong with a configuration, told before any work is done."""

from __future__ import annotations

import difflib
import importlib.util
import math
from collections.abc import Iterator, Sequence

from ..attention import ATTENTION_BACKENDS
from ..loss import ADVANTAGE_ESTIMATORS, AGGREGATION_MODES, KL_KINDS
from ..rollout import ANSWER_EXTRACTORS, RELOAD_PLANS
from .config import AlgorithmConfig, ParallelConfig, RolloutConfig, RunConfig, TrainConfig


def config_problems(config: TrainConfig) -> list[str]:
    """Everything that is wrong with the values alone, whatever the machine and the files."""
    problems = [
        *_out_of_range(config),
        *_parallel_problems(config.parallel),
        *_algorithm_problems(config.algorithm, config.rollout, config.run.groups_per_step),
        *_rollout_problems(config.rollout, config.run),
        *_reference_problems(config),
    ]
    if config.model.attention_backend not in ("auto", *ATTENTION_BACKENDS):
        names = ["auto", *ATTENTION_BACKENDS]
        problems.append(_no_name("model.attention_backend", config.model.attention_backend, names))
    if config.model.hf is None and config.model.vocab_size is None:
        problems.append(
            "model.vocab_size is needed for a model from scratch; or set model.hf to a Hugging "
            "Face folder"
        )
    if config.model.pretrained_checkpoint is not None and config.model.hf is None:
        problems.append(
            "model.pretrained_checkpoint needs model.hf, whose configuration and tokenizer it "
            "takes: set it to the checkpoint's huggingface/ folder"
        )
    if config.run.export_hf and config.model.hf is None:
        problems.append("run.export_hf needs model.hf, whose configuration and tokenizer it takes")
    if 0 <= config.optimizer.lr < config.optimizer.min_lr:
        problems.append(
            f"optimizer.min_lr={config.optimizer.min_lr:g} must not exceed optimizer.lr="
            f"{config.optimizer.lr:g}"
        )
    return problems


def launch_problems(parallel: ParallelConfig, world_size: int) -> list[str]:
    """What keeps a valid layout from running on ``world_size`` ranks."""
    problems = []
    if world_size % parallel.model_size:
        problems.append(
            f"{world_size} ranks hold no whole replica of tensor_model_parallel_size="
            f"{parallel.tensor_model_parallel_size} x pipeline_model_parallel_size="
            f"{parallel.pipeline_model_parallel_size}; launch a multiple of {parallel.model_size}"
        )
    elif (world_size // parallel.model_size) % parallel.expert_model_parallel_size:
        problems.append(
            f"{world_size // parallel.model_size} data-parallel ranks are no multiple of "
            f"expert_model_parallel_size={parallel.expert_model_parallel_size}"
        )
    return problems


def raise_problems(where: str, problems: Sequence[str]) -> None:
    """Raises: ValueError that lists all of ``problems``, unless there are none."""
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise ValueError(f"{len(problems)} problem(s) {where}:\n{listed}")


def nearest(name: str, valid: Sequence[str]) -> str:
    """A hint ``; did you mean ...?`` for a misspelt name, or the empty string."""
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


# key -> smallest value
_AT_LEAST: dict[str, float] = {
    "model.vocab_size": 1,
    "model.max_position_embeddings": 1,
    "model.make_vocab_size_divisible_by": 1,
    "parallel.tensor_model_parallel_size": 1,
    "parallel.pipeline_model_parallel_size": 1,
    "parallel.virtual_pipeline_model_parallel_size": 2,
    "parallel.expert_model_parallel_size": 1,
    "optimizer.lr": 0,
    "optimizer.min_lr": 0,
    "optimizer.lr_warmup_iters": 0,
    "optimizer.weight_decay": 0,
    "optimizer.adam_beta1": 0,
    "optimizer.adam_beta2": 0,
    "optimizer.clip_grad": 0,
    "rollout.num_generations": 1,
    "rollout.max_response_tokens": 1,
    "rollout.top_k": 0,
    "rollout.max_batch_samples": 1,
    "rollout.min_shared": 1,
    "rollout.task.size": 1,
    "rollout.server.max_concurrency": 1,
    "algorithm.std_floor": 0,
    "algorithm.ppo_epochs": 1,
    "algorithm.num_minibatches": 1,
    "algorithm.kl_coef": 0,
    "algorithm.overlong_buffer_len": 0,
    "algorithm.overlong_penalty_factor": 0,
    "run.num_steps": 1,
    "run.groups_per_step": 1,
    "run.max_tokens_per_microbatch": 1,
    "run.max_resident_tokens": 1,
    "run.logprob_chunk_tokens": 1,
    "run.seed": 0,
    "run.save_interval": 0,
    "run.keep_checkpoints": 1,
    "run.eval_prompts": 0,
    "run.eval_generations": 1,
    "run.self_check_interval": 0,
    "run.self_check_groups": 1,
}
_ABOVE_ZERO = (
    "model.rotary_base",
    "parallel.distributed_timeout_minutes",
    "optimizer.adam_eps",
    "rollout.temperature",
    "rollout.top_p",
    "rollout.server.timeout_seconds",
    "algorithm.loss_scale_factor",
)
_BELOW_ONE = ("optimizer.adam_beta1", "optimizer.adam_beta2")


def _out_of_range(config: TrainConfig) -> Iterator[str]:
    for path in (*_AT_LEAST, *_ABOVE_ZERO):
        value = _value(config, path)
        if value is None:
            continue
        if path in _ABOVE_ZERO:
            wrong, rule = not value > 0, "above 0"
        else:
            wrong, rule = value < _AT_LEAST[path], f"at least {_AT_LEAST[path]:g}"
        if wrong or not math.isfinite(value):
            yield f"{path}={value!r} must be {'finite and ' * (value != value)}{rule}"
    for path in _BELOW_ONE:
        if _value(config, path) >= 1:
            yield f"{path}={_value(config, path)!r} must be below 1"
    if config.rollout.top_p > 1:
        yield f"rollout.top_p={config.rollout.top_p!r} must be at most 1, which turns it off"


def _value(config: TrainConfig, path: str) -> float:
    value = config
    for name in path.split("."):
        value = getattr(value, name)
    return value  # type: ignore[return-value]


def _parallel_problems(parallel: ParallelConfig) -> Iterator[str]:
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size < 2:
        yield (
            "parallel.sequence_parallel=true needs parallel.tensor_model_parallel_size above 1; "
            "turn it off"
        )
    if (
        parallel.virtual_pipeline_model_parallel_size is not None
        and parallel.pipeline_model_parallel_size < 2
    ):
        yield (
            "parallel.virtual_pipeline_model_parallel_size="
            f"{parallel.virtual_pipeline_model_parallel_size} needs "
            "parallel.pipeline_model_parallel_size above 1; set it to null"
        )


def _algorithm_problems(
    algorithm: AlgorithmConfig, rollout: RolloutConfig, groups_per_step: int
) -> Iterator[str]:
    for name, value, valid in (
        ("adv_estimator", algorithm.adv_estimator, list(ADVANTAGE_ESTIMATORS)),
        ("loss_agg_mode", algorithm.loss_agg_mode, list(AGGREGATION_MODES)),
        ("kl_penalty", algorithm.kl_penalty, list(KL_KINDS)),
    ):
        if value not in valid:
            yield _no_name(f"algorithm.{name}", value, valid)
    if algorithm.adv_estimator != "grpo" and not algorithm.norm_adv_by_std_in_grpo:
        yield (
            "algorithm.norm_adv_by_std_in_grpo=false needs algorithm.adv_estimator=grpo, got "
            f"{algorithm.adv_estimator!r}"
        )
    if algorithm.std_floor > 0 and not (
        algorithm.adv_estimator == "grpo" and algorithm.norm_adv_by_std_in_grpo
    ):
        yield (
            f"algorithm.std_floor={algorithm.std_floor:g} needs algorithm.adv_estimator=grpo with "
            "norm_adv_by_std_in_grpo=true; set it to 0"
        )
    has_factor = algorithm.loss_scale_factor is not None
    if has_factor != (algorithm.loss_agg_mode == "seq-mean-token-sum-norm"):
        yield (
            f"algorithm.loss_scale_factor={algorithm.loss_scale_factor} and algorithm.loss_agg_mode"
            f"={algorithm.loss_agg_mode!r} do not belong together: seq-mean-token-sum-norm needs "
            "the factor (for example rollout.max_response_tokens), the other modes take none"
        )
    if algorithm.num_minibatches > groups_per_step:
        yield (
            f"algorithm.num_minibatches={algorithm.num_minibatches} must not exceed "
            f"run.groups_per_step={groups_per_step}: a minibatch holds whole groups"
        )
    if algorithm.overlong_buffer_len > rollout.max_response_tokens:
        yield (
            f"algorithm.overlong_buffer_len={algorithm.overlong_buffer_len} must not exceed "
            f"rollout.max_response_tokens={rollout.max_response_tokens}"
        )


def _rollout_problems(rollout: RolloutConfig, run: RunConfig) -> Iterator[str]:
    if rollout.source == "recorded":
        if not rollout.files:
            yield "rollout.files is empty: name the recorded files, or set another rollout.source"
        if run.eval_prompts:
            yield (
                f"run.eval_prompts={run.eval_prompts} needs a rollout.source that samples; set it "
                "to 0 with recorded rollouts"
            )
        if rollout.reward is not None:
            yield (
                f"rollout.reward={rollout.reward!r} would be ignored: recorded rollouts carry "
                "their rewards; set it to null"
            )
    else:
        yield from _sampling_problems(rollout, run)
    if run.wandb_project is not None and importlib.util.find_spec("wandb") is None:
        yield "run.wandb_project needs wandb: pip install 'megatron_pg[wandb]', or set it to null"


def _sampling_problems(rollout: RolloutConfig, run: RunConfig) -> Iterator[str]:
    if rollout.files:
        yield (
            f"rollout.files would be ignored with rollout.source={rollout.source!r}; empty it, or "
            "set rollout.source=recorded"
        )
    if rollout.task.extractor not in ANSWER_EXTRACTORS:
        yield _no_name("rollout.task.extractor", rollout.task.extractor, list(ANSWER_EXTRACTORS))
    most = max(rollout.num_generations, run.eval_generations if run.eval_prompts else 1)
    if rollout.max_batch_samples is not None and rollout.max_batch_samples < most:
        yield (
            f"rollout.max_batch_samples={rollout.max_batch_samples} must be at least {most}, the "
            "samples of one prompt, which are generated together"
        )
    if rollout.max_response_tokens >= run.max_tokens_per_microbatch:
        yield (
            f"run.max_tokens_per_microbatch={run.max_tokens_per_microbatch} must hold a prompt and "
            f"rollout.max_response_tokens={rollout.max_response_tokens}; raise it"
        )
    server = rollout.server
    if rollout.source == "server":
        if server.reload not in RELOAD_PLANS:
            yield _no_name("rollout.server.reload", server.reload, list(RELOAD_PLANS))
        if server.dialect == "text" and not server.allow_retokenize:
            yield "rollout.server.dialect=text needs rollout.server.allow_retokenize=true"


def _reference_problems(config: TrainConfig) -> Iterator[str]:
    algorithm = config.algorithm
    if not algorithm.needs_reference:
        if algorithm.ref_hf is not None:
            yield (
                "algorithm.ref_hf would be ignored: set algorithm.policy.kl_loss_coef above 0 or "
                "algorithm.use_kl_in_reward=true, or set it to null"
            )
    elif config.rollout.source != "recorded" and not (algorithm.ref_hf or config.model.hf):
        yield needs_reference_message()


def needs_reference_message() -> str:
    """What to do where a KL term has nothing to compare with."""
    return (
        "the KL to a reference (algorithm.policy.kl_loss_coef, algorithm.use_kl_in_reward) needs "
        "its weights: set algorithm.ref_hf or model.hf, or record ref_logprobs"
    )


def _no_name(what: str, value: object, valid: Sequence[str]) -> str:
    hint = nearest(str(value), valid)
    return f"{what}={value!r} must be one of {', '.join(valid)}{hint}"
