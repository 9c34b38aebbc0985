"""Advantages, weights and metrics of rollouts in several samples, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("megatron.core")

from megatron_pg.data import CostModel, Group, ResidencyConfig  # noqa: E402
from megatron_pg.grpo import (  # noqa: E402
    GrpoConfig,
    PackingConfig,
    StepBatch,
    StepShape,
    compute_advantages,
    pack_batch,
    place_groups,
)
from megatron_pg.grpo.advantages import sample_weights  # noqa: E402
from tests.data.forests import forest_groups  # noqa: E402
from tests.grpo.threads import ThreadReplica, on_replicas  # noqa: E402
from tests.hostile import seeds  # noqa: E402

MODES = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum")
FORESTS = forest_groups(5)


def rollouts_of(group: Group) -> list[list[int]]:
    """Samples of every rollout."""
    members: dict[object, list[int]] = {}
    for place, sample in enumerate(group.samples):
        members.setdefault(sample.rollout_id or place, []).append(place)
    return list(members.values())


def test_the_baseline_counts_a_rollout_once() -> None:
    shape = StepShape.of(FORESTS)
    got = compute_advantages(shape, torch.from_numpy(shape.rewards), GrpoConfig()).tolist()
    want = []
    for group in FORESTS:
        rollouts = rollouts_of(group)
        assert max(map(len, rollouts)) > 1
        rewards = torch.tensor([group.samples[r[0]].reward for r in rollouts]).double()
        own = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
        of_sample = {place: own[i] for i, r in enumerate(rollouts) for place in r}
        want += [float(of_sample[place]) for place in range(len(group.samples))]
    assert got == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("is_weighted", [False, True])
def test_the_loss_is_a_mean_over_rollouts_unless_samples_are_weighted(
    mode: str, is_weighted: bool
) -> None:
    groups = forest_groups(5, is_weighted=is_weighted)
    samples = [s for g in groups for s in g.samples]
    losses = [torch.randn(s.num_loss_tokens).double() for s in samples]
    own: list[list[int]] = []
    first = 0
    for group in groups:
        sequences = [[i] for i in range(len(group.samples))] if is_weighted else rollouts_of(group)
        own += [[first + place for place in members] for members in sequences]
        first += len(group.samples)
    times = [samples[r[0]].loss_weight or 1.0 for r in own]
    sums = [sum(float(losses[i].sum()) for i in r) for r in own]
    counts = [sum(len(losses[i]) for i in r) for r in own]
    if mode == "token-mean":
        total = sum(t * n for t, n in zip(times, counts))
        want = sum(t * s for t, s in zip(times, sums)) / total
    else:
        means = [s / max(n, 1) if mode.endswith("mean") else s for s, n in zip(sums, counts)]
        want = sum(t * m for t, m in zip(times, means)) / sum(times)
    weights = sample_weights(StepShape.of(groups), GrpoConfig(loss_agg_mode=mode))
    got = sum(float(w * x.sum()) for w, x in zip(weights, losses))
    assert got == pytest.approx(want, rel=1e-12, abs=1e-14)
    if not is_weighted and mode != "token-mean":
        alone = [Group(g.group_id, tuple(replace(s, rollout_id=None) for s in g.samples))
                 for g in groups]  # fmt: skip
        other = sample_weights(StepShape.of(alone), GrpoConfig(loss_agg_mode=mode))
        assert not torch.allclose(weights, other)


def test_an_untrained_sample_without_weight_does_not_count() -> None:
    (group,) = forest_groups(5, 1, is_weighted=True)
    masked = replace(
        group.samples[0],
        loss_mask=torch.zeros_like(group.samples[0].loss_mask),
        loss_weight=None,
    )
    algorithm = GrpoConfig(loss_agg_mode="seq-mean-token-mean")
    with_it = StepShape.of([replace(group, samples=(*group.samples, masked))])
    want = sample_weights(StepShape.of([group]), algorithm)
    assert torch.equal(sample_weights(with_it, algorithm)[:-1], want)


def test_weights_on_some_of_the_trained_samples_are_refused() -> None:
    (group,) = forest_groups(5, 1, is_weighted=True)
    bare = replace(group.samples[1], loss_weight=None)
    with pytest.raises(ValueError, match="has no loss_weight, sample 0 .* has; give them for all"):
        StepShape.of([replace(group, samples=(group.samples[0], bare))])


def test_mean_rewards_are_over_rollouts() -> None:
    aborted = replace(FORESTS[0].samples[0], status="aborted", reward=9.0)
    group = Group("g", (aborted, *FORESTS[0].samples))
    rewards = [FORESTS[0].samples[r[0]].reward for r in rollouts_of(FORESTS[0])]
    found = StepShape.of([group]).statistics()
    assert found["reward/mean"] == pytest.approx(sum(rewards) / len(rewards))
    assert found["reward/max"] == max(rewards)
    assert len(rewards) < len(FORESTS[0].samples)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("seed", seeds(10))
def test_every_row_is_packed_once_with_its_weight(seed: int, size: int) -> None:
    """Forests larger than a row, on replicas of which each brings some, with resident roots."""
    is_weighted = seed % 2 == 0
    groups = forest_groups(seed, 5, has_values=True, is_weighted=is_weighted)
    packing = PackingConfig(
        max_tokens=48,
        pad_to_multiple=1 + seed % 3,
        num_microbatches_multiple=1,
        min_shared=[None, 1, 2][seed % 3],
        cost_model=CostModel(),
        residency=ResidencyConfig(
            choice=("auto", "never")[seed // 2 % 2], max_resident_tokens=16 + seed % 9
        ),
    )
    algorithm = GrpoConfig(loss_agg_mode=MODES[seed % len(MODES)], num_minibatches=1)

    def prepare(replica: ThreadReplica) -> StepBatch:
        mine = {i: g for i, g in enumerate(groups) if i % replica.size == replica.rank}
        placement = place_groups(mine, algorithm, packing, replica)
        return pack_batch(placement, algorithm, packing, replica)

    found: dict[tuple[int, int, int], tuple[float, float]] = {}
    for batch in on_replicas(size, prepare):
        assert isinstance(batch, StepBatch), batch
        for row in (row for part in batch.minibatches for row in part.rows if not row.is_filler):
            micro = row.with_values(batch.values)
            numbers = batch.sample_numbers[row.sample_numbers[row.sample_ids]].tolist()
            targets = row.target_tokens[row.prediction_ids].tolist()
            values = zip(micro.weights.tolist(), micro.advantages.tolist())
            for key, value in zip(zip(numbers, row.positions.tolist(), targets), values):
                assert key not in found
                found[key] = value
    weights = sample_weights(StepShape.of(groups), algorithm)
    want = {}
    for number, sample in enumerate(s for g in groups for s in g.samples):
        for place in torch.nonzero(sample.loss_mask).flatten().tolist():
            key = number, len(sample.prompt_ids) + place, int(sample.response_ids[place])
            want[key] = float(weights[number]), float(sample.advantages[place])
    assert found == want and len(want) > 50


def test_a_shaped_reward_of_a_sample_is_refused() -> None:
    shape = StepShape.of(FORESTS)
    shaped = torch.from_numpy(shape.rewards) - torch.from_numpy(shape.response_lens)
    with pytest.raises(ValueError, match="one reward, which no penalty of a sample's own"):
        compute_advantages(shape, shaped, GrpoConfig())
