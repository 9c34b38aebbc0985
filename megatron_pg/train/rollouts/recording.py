"""Recorded groups of a run, checked against it before the model is built."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...checkpoint import has_tokenizer
from ...data import (
    Group,
    GroupShape,
    RouteShape,
    carried_fields,
    group_shape,
    plan_waves,
    read_rollouts,
    without_aborted,
    without_routes,
)
from ...grpo import PackingConfig, Ranks, check_carried
from ...parallel import on_first_rank
from ..config import (
    AlgorithmConfig,
    TrainConfig,
    needs_reference_message,
    raise_problems,
)
from ..model import ModelPlan
from .positions import recorded_position_problems
from .replay import routes_of_run
from .tokenizer import load_tokenizer


@dataclass(frozen=True, kw_only=True)
class Recording:
    """Recorded groups that fit the run.

    Attributes:
        groups: all of them on the first rank, none on the others.
        fields: optional per-token values that every sample carries (see ``carried_fields``).
        routes: of the model, where those of the samples are replayed.
    """

    groups: Sequence[Group]
    fields: tuple[str, ...]
    routes: RouteShape | None = None

    def as_trained(self, groups: Iterable[Group] | None = None) -> list[Group]:
        """Some of the groups, or all, without aborted samples and with routes as they share."""
        kept = without_aborted(self.groups if groups is None else groups)
        return kept if self.routes is None else [self.routes.of_group(group) for group in kept]


def read_recording(config: TrainConfig, plan: ModelPlan, packing: PackingConfig) -> Recording:
    """Read all recorded groups and check them against the run.

    Raises:
        ValueError: naming file, row and field of everything that is malformed, or everything
            that keeps the groups from being trained as configured.
    """
    rollout = config.rollout
    hf = config.model.hf
    # Recorded token ids need no tokenizer; rows of text are refused without one.
    tokenizer = load_tokenizer(config) if hf is not None and has_tokenizer(Path(hf)) else None
    groups = read_rollouts(
        rollout.files,
        format=rollout.format,
        tokenizer=tokenizer,
        vocab_size=plan.vocab_size,
        reward_key=rollout.reward_key,
        group_across_files=rollout.group_across_files,
    )
    routes = routes_of_run(config, plan)
    if routes is None:
        groups = [without_routes(group) for group in groups]
    recording = Recording(groups=groups, fields=carried_fields(groups), routes=routes)
    problems = _recording_problems(config, recording)
    wrong_routes = list(_route_problems(groups, routes))
    problems += wrong_routes or _length_problems(recording, packing)
    problems += recorded_position_problems(groups, plan.max_positions)
    raise_problems("of the recorded rollouts", problems)
    return recording


def share_recording(
    config: TrainConfig, plan: ModelPlan, packing: PackingConfig, ranks: Ranks
) -> Recording:
    """``read_recording`` on the first rank; a refusal there is raised on every rank."""
    own: list[Recording] = []

    def read() -> tuple[str, ...]:
        own.append(read_recording(config, plan, packing))
        return own[0].fields

    fields = on_first_rank(read)
    return own[0] if own else Recording(groups=(), fields=fields)


# Settings of how advantages come from rewards.
_OF_REWARDS = (
    "adv_estimator",
    "norm_adv_by_std_in_grpo",
    "std_floor",
    "skip_groups_without_spread",
    "use_kl_in_reward",
    "overlong_buffer_len",
)


def _recording_problems(config: TrainConfig, recording: Recording) -> list[str]:
    algorithm, fields = config.algorithm, recording.fields
    problems = []
    if algorithm.policy.importance_mode is not None and "rollout_logprobs" not in fields:
        problems.append(
            f"algorithm.policy.importance_mode={algorithm.policy.importance_mode!r} needs "
            "rollout_logprobs on every row; record them, or set it to null"
        )
    has_reference = algorithm.ref_hf or config.model.hf or "ref_logprobs" in fields
    if algorithm.needs_reference and not has_reference:
        problems.append(needs_reference_message())
    try:
        check_carried(algorithm, fields)
    except ValueError as error:
        problems.append(f"algorithm.{error}")
    if algorithm.precompute_ref_logprobs and "ref_logprobs" in fields:
        problems.append(
            "algorithm.precompute_ref_logprobs=true would be ignored: the rows carry ref_logprobs; "
            "set it to false"
        )
    if "advantages" in fields:
        for name in _OF_REWARDS:
            if getattr(algorithm, name) != getattr(AlgorithmConfig, name):
                problems.append(
                    f"algorithm.{name}={getattr(algorithm, name)!r} concerns rewards, but the rows "
                    "carry advantages, which are used instead; leave out the one or the other"
                )
    if not any(s.num_loss_tokens for group in recording.groups for s in group.samples):
        problems.append(
            "no row has a trained token: every response is aborted or empty, or its loss_mask is 0 "
            "throughout"
        )
    return [*problems, *_rollout_problems(recording.groups, algorithm)]


def _route_problems(groups: Sequence[Group], routes: RouteShape | None) -> Iterator[str]:
    """The first sample whose routes the model does not have; none of all is another problem."""
    for group in groups if routes is not None else ():
        for number, sample in enumerate(group.samples):
            try:
                if routes is not None and sample.routed_experts is not None:
                    routes.of_model(sample.routed_experts)
            except ValueError as error:
                yield f"sample {number} of group {group.group_id!r}: {error}"
                return


def _rollout_problems(groups: Sequence[Group], algorithm: AlgorithmConfig) -> Iterator[str]:
    """Rewards shaped by a sample's own length or KL would differ within a rollout."""
    split = next((g for g in groups if len(g.rollouts.unique()) < len(g.samples)), None)
    for name in ("use_kl_in_reward", "overlong_buffer_len"):
        if split is not None and (value := getattr(algorithm, name)):
            yield (
                f"algorithm.{name}={value!r} changes the reward of every sample, but group "
                f"{split.group_id!r} has rollouts of several samples, which share one reward; "
                "turn it off, or leave rollout_id out"
            )


def unfit_groups(shapes: Iterable[GroupShape], packing: PackingConfig) -> Iterator[str]:
    """Of every group that fits in no way, why."""
    for shape in shapes:
        try:
            plan_waves(
                [shape],
                packing.max_tokens,
                packing.residency,
                cost_model=packing.cost_model,
                pad_to_multiple=packing.pad_to_multiple,
            )
        except ValueError as error:
            yield str(error)


def _length_problems(recording: Recording, packing: PackingConfig) -> list[str]:
    """The first group that fits in no way, and how many there are."""
    shapes = (group_shape(group, packing.min_shared) for group in recording.as_trained())
    refusals = list(unfit_groups(shapes, packing))
    if not refusals:
        return []
    return [
        f"{refusals[0]} (prefix_group.max_tokens_per_microbatch={packing.max_tokens}, "
        f"prefix_group.max_resident_tokens={packing.residency.max_resident_tokens}, "
        f"prefix_group.prefix_resident={packing.residency.choice}; {len(refusals)} of "
        f"{len(recording.groups)} groups do not fit)"
    ]
