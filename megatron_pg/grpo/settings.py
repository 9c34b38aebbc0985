"""The settings of a step: how it shares and packs, and what it optimises."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..data import ResidencyChoice, ResidentMode
from ..loss import PolicyLossConfig

RouterReplay = Literal["disabled", "R2", "R3"]
"""Which experts tokens go to, by verl's words: see ``GrpoConfig``."""


@dataclass(frozen=True, kw_only=True)
class PrefixGroupConfig:
    """How shared prefixes are found, packed and attended to.

    Attributes:
        attention_backend: "auto", which takes the fastest that can run, or a key of
            ``attention.ATTENTION_BACKENDS``.
        min_shared: share every common run of at least this many tokens; None shares the prompt,
            and of rollouts of several samples what their contexts have in common.
        max_tokens_per_microbatch: budget of a packed row in unique tokens.
        prefix_resident: what becomes of a group that is larger than a row: "never" repeats its
            prompt in each of its rows, "always" encodes it once and keeps it resident on every
            pipeline stage, "auto" does what the cost model finds cheaper, but repeats it under a
            router's ``seq_aux_loss``, which is of every whole sample.
        prefix_resident_mode: "retain" keeps the graph of resident prompts, "recompute" encodes them
            once more in the backward pass.
        max_resident_tokens: prompt tokens that are resident at once; more take several waves.
            ``max_tokens_per_microbatch`` when None.
        logprob_chunk_tokens: predictions whose logits exist at once; when None 1,024, on CUDA as
            many as 1.25 GiB of logits hold, up to 4,096.
    """

    attention_backend: str = "auto"
    min_shared: int | None = None
    max_tokens_per_microbatch: int = 8192
    prefix_resident: ResidencyChoice = "auto"
    prefix_resident_mode: ResidentMode = "retain"
    max_resident_tokens: int | None = None
    logprob_chunk_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class GrpoConfig:
    """What is optimised; names follow verl where it has them, defaults need not.

    ``policy`` clips above at DAPO's 0.28 and has no dual clip, unless told otherwise.

    Attributes:
        adv_estimator: see ``loss.ADVANTAGE_ESTIMATORS``.
        norm_adv_by_std_in_grpo: divide by the group's standard deviation; False is Dr.GRPO.
        std_floor: smallest standard deviation divided by.
        skip_groups_without_spread: leave out groups whose rewards, as they were given, are all
            equal. A step that is left without groups updates nothing and still counts as a step.
        loss_agg_mode: see ``loss.AGGREGATION_MODES``; averages over sequences are over rollouts,
            or as the samples' ``loss_weight`` say.
        loss_scale_factor: constant of "seq-mean-token-sum-norm".
        ppo_epochs: passes over the groups of a step.
        num_minibatches: optimizer steps per pass; whole groups in the order of the rollout, as
            even as can be.
        policy: see ``loss.PolicyLossConfig``.
        calculate_entropy: report the mean entropy of predictions, without a gradient unless
            ``entropy_coeff`` asks for one, which needs it anyway. On CUDA it is summed where logits
            are read for the logprobs; elsewhere it is one more pass over them.
        use_kl_in_reward: subtract the KL to the reference from the reward.
        kl_coef: weight of the KL in the reward.
        kl_penalty: estimator of the KL in the reward, one of ``loss.KL_KINDS``.
        overlong_buffer_len: DAPO's soft punishment of responses that end in the last tokens before
            the longest allowed one; 0 is off.
        overlong_penalty_factor: what is taken off the reward of a response of the longest length.
        router_replay: which experts tokens go to, by verl's words. "disabled": the routers decide
            in every pass. "R3": the routes of the rollout engine, which the samples carry, are
            replayed in old, reference and training passes. "R2": what the routers decide in the
            pass of the old logprobs is replayed in training; a step of one update has no such
            pass, and trains with the very routes that it would record; the reference model's
            routers decide by themselves.
    """

    adv_estimator: str = "grpo"
    norm_adv_by_std_in_grpo: bool = True
    std_floor: float = 0.0
    skip_groups_without_spread: bool = False
    loss_agg_mode: str = "token-mean"
    loss_scale_factor: float | None = None
    ppo_epochs: int = 1
    num_minibatches: int = 1
    policy: PolicyLossConfig = field(default_factory=PolicyLossConfig)
    calculate_entropy: bool = True
    use_kl_in_reward: bool = False
    kl_coef: float = 0.001
    kl_penalty: str = "k1"
    overlong_buffer_len: int = 0
    overlong_penalty_factor: float = 1.0
    router_replay: RouterReplay = "disabled"

    @property
    def needs_reference(self) -> bool:
        """Whether some term compares with a reference model."""
        return self.use_kl_in_reward or self.policy.kl_loss_coef != 0

    @property
    def needs_old_logprobs(self) -> bool:
        """Whether the policy that is updated differs from the one that the loss compares with."""
        is_on_policy = self.ppo_epochs == 1 and self.num_minibatches == 1
        return not is_on_policy or self.policy.importance_mode is not None

    @property
    def runs_old_pass(self) -> bool:
        """Whether something reads the old policy's logprobs: the loss, or the KL in the reward."""
        return self.needs_old_logprobs or self.use_kl_in_reward

    @property
    def needs_entropy(self) -> bool:
        """Whether a metric or the bonus reads the entropy of predictions."""
        return self.calculate_entropy or self.policy.entropy_coeff != 0

    @property
    def whitens(self) -> bool:
        """Whether advantages are whitened over the step."""
        return self.adv_estimator.startswith("reinforce_plus_plus")
