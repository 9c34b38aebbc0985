"""The sections of a run's configuration and their defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from ...data import RolloutFormat
from ...grpo import PrefixGroupConfig
from ...parallel import ParallelSizes
from ...rollout import Dialect, TooLong
from .loop import AlgorithmConfig, RunConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model, in Megatron's own argument names.

    Attributes:
        hf: Hugging Face folder that gives architecture, weights and tokenizer; None trains from
            scratch.
        pretrained_checkpoint: Megatron checkpoint (torch_dist, of any layout) that gives the
            weights instead; ``hf`` may be its ``huggingface/``.
        vocab_size: tokens of the vocabulary, for a model from scratch.
        max_position_embeddings: longest sample; that of ``hf`` when None, from scratch 4096. More
            than ``hf`` says trains positions that the model was not made for.
        make_vocab_size_divisible_by: the vocabulary is padded to a multiple of this times tp.
        untie_embeddings_and_output_weights: give the output layer weights of its own, for a model
            from scratch.
        position_embedding_type: how positions are told, for a model from scratch.
        rotary_base: base of RoPE's frequencies, for a model from scratch.
        transformer_impl: "auto" takes Transformer Engine where it runs.
        transformer: any further field of ``TransformerConfig``, e.g. ``recompute_granularity``, and
            of ``MLATransformerConfig`` with ``multi_latent_attention: true``. dtypes and the
            activation are given by name (``bfloat16``, ``silu``).
    """

    hf: str | None = None
    pretrained_checkpoint: str | None = None
    vocab_size: int | None = None
    max_position_embeddings: int | None = None
    make_vocab_size_divisible_by: int = 1
    untie_embeddings_and_output_weights: bool = False
    position_embedding_type: Literal["rope", "learned_absolute", "none"] = "rope"
    rotary_base: float = 10000
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    transformer: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model is laid over ranks, in Megatron's own argument names.

    What is left of the ranks after tensor, context and pipeline parallelism is data parallel. The
    sizes are those of ``parallel.ParallelSizes``, at least 1 each.

    Attributes:
        context_parallel_size: ranks that divide the tokens of a row, and in attention the heads:
            a rank's share of the heads must be a multiple of it.
        cp_comm_type: how these ranks exchange in attention: all tokens of some heads for all heads
            of some tokens, which is exact for any tree of samples; other types of Megatron's
            (``p2p``, ``all_gather``, ``a2a+p2p``) know whole samples alone.
        expert_tensor_parallel_size: ranks that divide an expert's widths; as many as divide other
            layers' when None.
        sequence_parallel: whether tensor-parallel ranks divide the tokens, too, between the layers
            whose heads and widths they divide.
        use_distributed_optimizer: divide the optimizer's state over data-parallel ranks.
        overlap_grad_reduce: reduce gradients while the backward pass goes on.
        distributed_timeout_minutes: longest wait of ranks for each other.
    """

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    context_parallel_size: int = 1
    cp_comm_type: Literal["a2a"] = "a2a"
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None
    sequence_parallel: bool = False
    use_distributed_optimizer: bool = False
    overlap_grad_reduce: bool = False
    distributed_timeout_minutes: float = 10

    @property
    def sizes(self) -> ParallelSizes:
        """The sizes alone, with their rules."""
        return ParallelSizes.from_config(self)


@dataclass(frozen=True, kw_only=True)
class OptimizerSection:
    """Megatron's optimizer and learning-rate schedule, in its own argument names.

    The schedule counts updates (minibatches), not steps: ``lr_warmup_iters`` updates of warmup and
    a decay over all updates that the run plans.

    Attributes:
        optimizer: Adam with decoupled weight decay.
        lr: learning rate after the warmup.
        min_lr: learning rate that the decay ends at.
        lr_decay_style: how the learning rate falls from ``lr`` to ``min_lr``.
        lr_warmup_iters: updates over which the learning rate rises from 0.
        weight_decay: of all weights but biases and norms.
        adam_beta1: decay of the mean of gradients.
        adam_beta2: decay of the mean of their squares.
        adam_eps: added to the root of that mean.
        clip_grad: largest norm of an update's gradients, which are scaled down to it; 0 is off.
    """

    optimizer: Literal["adam"] = "adam"
    lr: float = 1e-6
    min_lr: float = 0.0
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root"] = "constant"
    lr_warmup_iters: int = 0
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    clip_grad: float = 1.0


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """Prompts, and the reward of their responses: a ``rollout.ReasoningGymTask`` or one's own.

    Attributes:
        name: of the data set; ``module:name`` is a ``rollout.PromptSource`` of your own, made from
            the tokenizer and ``config``, and the other settings are not read then.
        config: of the task; when None, sums are of two numbers of one digit, and every other task
            has its own defaults.
    """

    name: str = "chain_sum"
    config: dict[str, Any] | None = None
    seed: int = 0
    size: int = 10_000
    held_out_share: float = 0.1
    template: str = "{question}"
    system_prompt: str | None = None
    extractor: str = "last_number"
    partial_credit: bool = False

    def __post_init__(self) -> None:
        if self.config is None:
            short = {"max_terms": 2, "max_digits": 1} if self.name == "chain_sum" else {}
            object.__setattr__(self, "config", short)


@dataclass(frozen=True, kw_only=True)
class PromptsConfig:
    """Prompts of your own, as ``rollout.FilePrompts`` takes them; ``rollout.reward`` judges.

    Attributes:
        max_prompt_tokens: longest prompt; None is what the model's positions leave beside
            ``rollout.max_response_tokens``, which is the most in any case.
    """

    files: list[str] = field(default_factory=list)
    val_files: list[str] = field(default_factory=list)
    prompt_key: str = "prompt"
    answer_key: str | None = None
    template: str = "{question}"
    system_prompt: str | None = None
    max_prompt_tokens: int | None = None
    too_long: TooLong = "refuse"


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """An OpenAI-compatible server, as ``rollout.OpenAIServerSource`` takes it.

    Attributes:
        model: served name; empty takes the first one that ``/v1/models`` lists.
        api_key: bearer token, or null. ``${oc.env:NAME}`` takes it from an environment variable, so
            that no file holds it; what a run writes and prints never does.
        export_dir: folder that the server can read too, for the trained weights; null is the folder
            ``export`` in ``run.out``.
        reload: how the server is told to take the trained weights: a key of
            ``rollout.RELOAD_PLANS``.
    """

    base_url: str = "http://127.0.0.1:8000"
    model: str = ""
    dialect: Dialect | None = None
    allow_retokenize: bool = False
    max_concurrency: int = 32
    timeout_seconds: float = 600
    health_path: str = "/health"
    api_key: str | None = field(default=None, repr=False)
    export_dir: str | None = None
    reload: str | None = None


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Where groups come from.

    Attributes:
        source: "recorded" reads files, "model" samples from the trained model itself,
            "server" asks an inference server; ``module:name`` is a ``rollout.RolloutSource`` of
            your own.
        source_config: arguments of a source of your own, beside tokenizer and vocab_size.
        files: recorded rollouts.
        format: of the files; "auto" goes by their suffix and fields.
        reward_key: part or parts of the reward that are summed (see ``data.read_rollouts``).
        group_across_files: whether equal group ids of several files mean one group.
        shuffle: draw a new order of recorded groups, or of the prompts of files, every epoch.
        prompts: prompts of "model" and "server" from files.
        task: prompts and rewards of "model" and "server", instead.
        reward: what judges, instead of the task's own reward: ``module:name`` (``f(prompt,
            response)`` of ``rollout.Prompt`` and ``rollout.Response``, whose text is
            ``response.text``, verl's ``compute_score`` or TRL's ``f(prompts, completions,
            **columns)``, ``async`` or not), "math" (math-verify), a mapping of the fields of
            ``rollout.RewardSettings`` (name, kwargs, weight, timeout_seconds, num_processes,
            max_concurrency, on_error, error_score), or a list of these, whose weighted scores are
            added.
        num_generations: responses per prompt.
        max_response_tokens: longest response.
        temperature: of sampling, and of the logprobs that are trained.
        top_k: sample among this many likeliest tokens; 0 for all.
        top_p: sample among the likeliest tokens of this total probability; 1 for all.
        max_batch_samples: samples that "model" generates at once.
    """

    source: str = "recorded"
    source_config: dict[str, Any] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    format: RolloutFormat = "auto"
    reward_key: str | list[str] = field(default_factory=list)
    group_across_files: bool = False
    shuffle: bool = True
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    reward: str | dict[str, Any] | list[str | dict[str, Any]] | None = None
    num_generations: int = 8
    max_response_tokens: int = 512
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_batch_samples: int | None = None
    server: ServerConfig = field(default_factory=ServerConfig)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    prefix_group: PrefixGroupConfig = field(default_factory=PrefixGroupConfig)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    run: RunConfig = field(default_factory=RunConfig)
