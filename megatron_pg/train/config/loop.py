"""The sections of what a step optimises, and of the run around it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from ...grpo import GrpoConfig


@dataclass(frozen=True, kw_only=True)
class FilterGroupsConfig:
    """DAPO's dynamic sampling: groups whose rewards are all equal make room for others.

    Groups are asked for, ``run.groups_per_step`` at a time, until so many have spread in their
    rewards. What is left over then is dropped. Names follow verl.

    Attributes:
        enable: turn it on; groups without spread are never trained then.
        max_num_gen_batches: how often a step asks at most.
        at_limit: what becomes of a step that has too few groups with spread by then: "train" trains
            those it has, "raise" ends the run.
    """

    enable: bool = False
    max_num_gen_batches: int = 10
    at_limit: Literal["train", "raise"] = "train"


@dataclass(frozen=True, kw_only=True)
class AlgorithmConfig(GrpoConfig):
    """What is optimised.

    ``adv_estimator`` and ``policy.policy_loss`` may be ``module:name`` of your own (see
    ``loss.register_advantage_estimator`` and ``loss.register_policy_loss`` for what it is given).

    Attributes:
        ref_hf: Hugging Face folder of the reference model; None is the initial policy
            (``model.pretrained_checkpoint``, else ``model.hf``).
        ref_offload: keep the reference model in host memory between its passes.
        precompute_ref_logprobs: judge all recorded groups by the reference model before the first
            step, keep the logprobs and give up the model; pays when groups are trained repeatedly.
        filter_groups: see there.
    """

    ref_hf: str | None = None
    ref_offload: bool = False
    precompute_ref_logprobs: bool = False
    filter_groups: FilterGroupsConfig = field(default_factory=FilterGroupsConfig)

    @property
    def of_step(self) -> AlgorithmConfig:
        """What a step is told: it leaves out what groups were filtered for, filled up or not."""
        return replace(self, skip_groups_without_spread=True) if self.filter_groups.enable else self


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Length, budget, output and trust of a run.

    Attributes:
        out: folder of metrics, plots and checkpoints.
        num_steps: rollout-and-train steps.
        groups_per_step: groups of one step, over all data-parallel ranks.
        seed: of initialisation, sampling and order.
        save_interval: steps between checkpoints; 0 saves none.
        keep_checkpoints: how many of the newest are kept.
        async_save: write checkpoints beside the next steps, from a copy in host memory.
        load: continue from the newest checkpoint in ``out`` when there is one; False refuses to
            start where there is one.
        eval_prompts: held-out prompts judged before and after training; "all" for every one of a
            task that has so many, 0 turns it off.
        eval_generations: samples per held-out prompt.
        eval_interval: steps between judging them in training, too, the last step included; 0 is
            off.
        keep_best: keep the checkpoint of the step with the highest mean held-out reward, which is
            written for that; `summary.json` and the metric `eval/best_step` say which one it is.
        rollout_ahead: have a server sample the groups of the next step while this one is trained,
            with weights that are one step older.
        self_check_interval: steps between comparisons of packed and written-out logprobs; 0 checks
            the first step only, None never.
        self_check_groups: groups compared.
        log_generations_interval: steps between those whose prompts, responses and rewards are
            written to the folder ``generations`` in ``out``, as those of every evaluation are; 0
            writes the evaluations' only, None nothing.
        log_generations: how many of them are shown on the console, in TensorBoard and in Weights &
            Biases.
        tensorboard: write TensorBoard events.
        wandb_project: log to Weights & Biases under this project.
        export_hf: write the trained model as a Hugging Face folder at the end: ``hf_step_N`` in
            ``out``.
    """

    out: str = "runs/grpo"
    num_steps: int = 100
    groups_per_step: int = 8
    seed: int = 1234
    save_interval: int = 0
    keep_checkpoints: int = 2
    async_save: bool = False
    load: bool = True
    eval_prompts: int | Literal["all"] = 0
    eval_generations: int = 1
    eval_interval: int = 0
    keep_best: bool = False
    rollout_ahead: bool = False
    self_check_interval: int | None = 0
    self_check_groups: int = 1
    log_generations_interval: int | None = None
    log_generations: int = 3
    tensorboard: bool = True
    wandb_project: str | None = None
    export_hf: bool = False
