"""What is wrong with a configuration, told before any work is done."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterator, Sequence

from ...attention import ATTENTION_BACKENDS
from ...grpo import PrefixGroupConfig
from ...loss import ADVANTAGE_ESTIMATORS, AGGREGATION_MODES, KL_KINDS
from ...rollout import (
    ANSWER_EXTRACTORS,
    RELOAD_PLANS,
    api_key_problem,
    base_url_problem,
    dialect_problem,
    health_path_problem,
    reward_settings,
)
from .loop import AlgorithmConfig, RunConfig
from .loop_checks import loop_problems
from .ranges import out_of_range
from .sections import ModelConfig, PromptsConfig, RolloutConfig, TaskConfig, TrainConfig


def config_problems(config: TrainConfig) -> list[str]:
    """Everything that is wrong with the values alone, whatever the machine and the files."""
    problems = [
        *out_of_range(config),
        *_model_problems(config.model),
        *_prefix_group_problems(config.prefix_group, config.rollout),
        *config.parallel.sizes.problems(),
        *_algorithm_problems(config.algorithm, config.rollout, config.run.groups_per_step),
        *_rollout_problems(config.rollout, config.run),
        *_reference_problems(config),
        *loop_problems(config),
    ]
    folders = {"run.out": config.run.out}
    folders["rollout.server.export_dir"] = config.rollout.server.export_dir or ""
    # What is read is missing there; what is written would make a folder of that name.
    problems += [
        f"{name}={folder!r} begins with ~, which only a shell reads as a home; write the whole path"
        for name, folder in folders.items()
        if folder.startswith("~")
    ]
    if config.run.export_hf and config.model.hf is None:
        problems.append("run.export_hf needs model.hf, whose configuration and tokenizer it takes")
    if 0 <= config.optimizer.lr < config.optimizer.min_lr:
        problems.append(
            f"optimizer.min_lr={config.optimizer.min_lr:g} must not exceed optimizer.lr="
            f"{config.optimizer.lr:g}"
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


def _model_problems(model: ModelConfig) -> Iterator[str]:
    if model.hf is not None:
        for name in _FROM_SCRATCH:
            if getattr(model, name) != getattr(ModelConfig, name):
                yield (
                    f"model.{name}={getattr(model, name)!r} would be ignored, model.hf says it; "
                    "remove it, or remove model.hf to train a model from scratch"
                )
        return
    if model.vocab_size is None:
        yield needs_vocab_size_message()
    if model.pretrained_checkpoint is not None:
        yield (
            "model.pretrained_checkpoint needs model.hf, whose configuration and tokenizer it "
            "takes: set it to the checkpoint's huggingface/ folder"
        )


def _prefix_group_problems(settings: PrefixGroupConfig, rollout: RolloutConfig) -> Iterator[str]:
    backends = ["auto", *ATTENTION_BACKENDS]
    if settings.attention_backend not in backends:
        yield _no_name("prefix_group.attention_backend", settings.attention_backend, backends)
    row = settings.max_tokens_per_microbatch
    if rollout.source != "recorded" and rollout.max_response_tokens >= row:
        yield (
            f"prefix_group.max_tokens_per_microbatch={row} must hold a prompt and "
            f"rollout.max_response_tokens={rollout.max_response_tokens}; raise it"
        )


_FROM_SCRATCH = (
    "vocab_size",
    "untie_embeddings_and_output_weights",
    "position_embedding_type",
    "rotary_base",
)


def needs_vocab_size_message() -> str:
    """What to do where nothing says how large the vocabulary is."""
    return (
        "model.vocab_size is needed for a model from scratch; or set model.hf to a Hugging Face "
        "folder"
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


_SOURCES = ("recorded", "model", "server")


def _rollout_problems(rollout: RolloutConfig, run: RunConfig) -> Iterator[str]:
    if rollout.source not in _SOURCES and ":" not in rollout.source:
        yield _no_name("rollout.source", rollout.source, [*_SOURCES, "module:name"])
        return
    if rollout.source in _SOURCES and rollout.source_config:
        yield (
            f"rollout.source_config={rollout.source_config!r} would be ignored with "
            f"rollout.source={rollout.source!r}; it is for a source of your own (module:name)"
        )
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
        if rollout.prompts != PromptsConfig():
            yield (
                "rollout.prompts would be ignored with rollout.source='recorded'; remove it, or "
                "set rollout.source to what samples"
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
    for name in ("reward_key", "group_across_files"):
        if value := getattr(rollout, name):
            yield (
                f"rollout.{name}={value!r} would be ignored with rollout.source="
                f"{rollout.source!r}; remove it, or set rollout.source=recorded"
            )
    yield from _prompts_problems(rollout, run)
    yield from _reward_problems(rollout)
    if rollout.task.extractor not in ANSWER_EXTRACTORS:
        yield _no_name("rollout.task.extractor", rollout.task.extractor, list(ANSWER_EXTRACTORS))
    most = max(rollout.num_generations, run.eval_generations if run.eval_prompts else 1)
    if rollout.max_batch_samples is not None and rollout.max_batch_samples < most:
        yield (
            f"rollout.max_batch_samples={rollout.max_batch_samples} must be at least {most}, the "
            "samples of one prompt, which are generated together"
        )
    if rollout.source == "server":
        yield from _server_problems(rollout)


def _prompts_problems(rollout: RolloutConfig, run: RunConfig) -> Iterator[str]:
    prompts = rollout.prompts
    if not prompts.files:
        if prompts != PromptsConfig():
            yield "rollout.prompts.files is empty: name the files, or remove rollout.prompts"
        return
    if rollout.task != TaskConfig():
        yield "rollout.task and rollout.prompts both give prompts; remove one of them"
    if rollout.reward is None:
        yield "rollout.prompts.files judge no responses: set rollout.reward"
    if "{question}" not in prompts.template:
        yield f"rollout.prompts.template={prompts.template!r} must contain {{question}}"
    if run.eval_prompts and not prompts.val_files:
        yield (
            f"run.eval_prompts={run.eval_prompts} needs prompts that training never sees: name "
            "them in rollout.prompts.val_files, or set it to 0"
        )
    if prompts.val_files and not run.eval_prompts:
        yield (
            "rollout.prompts.val_files would be ignored: set run.eval_prompts to how many of them "
            'are judged, or "all"; or remove them'
        )


def _reward_problems(rollout: RolloutConfig) -> Iterator[str]:
    if rollout.reward is None:
        return
    try:
        settings = reward_settings(rollout.reward)
    except ValueError as error:
        yield str(error)
        return
    if any(one.name == "math" for one in settings) and not importlib.util.find_spec("math_verify"):
        yield "rollout.reward=math needs math-verify: pip install 'megatron_pg[math]'"


def _server_problems(rollout: RolloutConfig) -> Iterator[str]:
    server = rollout.server
    for problem in (
        base_url_problem(server.base_url),
        health_path_problem(server.health_path),
        api_key_problem(server.api_key),
    ):
        if problem is not None:
            yield f"rollout.server.{problem}"
    if server.reload not in RELOAD_PLANS:
        yield _no_name("rollout.server.reload", server.reload, list(RELOAD_PLANS))
    if server.dialect == "text" and not server.allow_retokenize:
        yield "rollout.server.dialect=text needs rollout.server.allow_retokenize=true"
    if server.dialect and (problem := dialect_problem(server.dialect, rollout.top_k or None)):
        yield f"rollout.top_k={rollout.top_k} with rollout.server.dialect=text: {problem}"


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
