"""Groups reach the replica that packs them whole, once, and with the step's own numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")

from megatron_pg.data import (  # noqa: E402
    CostModel,
    Group,
    ResidencyConfig,
    group_shape,
    without_aborted,
)
from megatron_pg.grpo import (  # noqa: E402
    GrpoConfig,
    PackingConfig,
    StepBatch,
    StepShape,
    compute_advantages,
    decode_groups,
    encode_groups,
    pack_batch,
    place_groups,
    plan_all_replicas,
    trained_minibatches,
)
from megatron_pg.loss import ADVANTAGE_ESTIMATORS  # noqa: E402
from tests.data.forests import forest_groups  # noqa: E402
from tests.data.samples import make_sample  # noqa: E402
from tests.grpo.threads import ThreadReplica, on_replicas  # noqa: E402
from tests.train.tiny import make_groups  # noqa: E402

PACKING = PackingConfig(
    max_tokens=40,
    pad_to_multiple=4,
    num_microbatches_multiple=1,
    min_shared=None,
    cost_model=CostModel(),
    residency=ResidencyConfig(max_resident_tokens=40),
)
GROUPS = make_groups(11, has_rollout_logprobs=True)
TWO = GrpoConfig(num_minibatches=2, loss_agg_mode="seq-mean-token-mean")


def own(groups: list[Group], replica: Any) -> dict[int, Group]:
    return {i: g for i, g in enumerate(groups) if i % replica.size == replica.rank}


def batches(groups: list[Group], size: int, algorithm: GrpoConfig = TWO) -> list[StepBatch]:
    def prepare(replica: ThreadReplica) -> StepBatch:
        placement = place_groups(own(groups, replica), algorithm, PACKING, replica)
        return pack_batch(placement, algorithm, PACKING, replica)

    found = on_replicas(size, prepare)
    for batch in found:
        if isinstance(batch, Exception):
            raise batch
    return found


def values_by_token(batches: list[StepBatch]) -> dict[tuple[int, int, int], tuple[float, ...]]:
    """(sample, position, token) -> weight and engine's logprob, over all rows of all replicas."""
    found = {}
    for batch in batches:
        assert batch.values.rollout_logprobs is not None
        ready = replace(batch.values, advantages=torch.zeros(batch.num_tokens).double())
        for row in (row for minibatch in batch.minibatches for row in minibatch.rows):
            micro = row.with_values(ready)
            if row.is_filler:
                assert not row.num_loss_tokens
                continue
            samples = batch.sample_numbers[row.sample_numbers[row.sample_ids]].tolist()
            tokens = row.target_tokens[row.prediction_ids].tolist()
            entries = zip(
                samples,
                row.positions.tolist(),
                tokens,
                zip(micro.weights.tolist(), micro.rollout_logprobs.tolist()),
            )
            for sample, position, token, values in entries:
                assert (sample, position, token) not in found
                found[sample, position, token] = values
    return found


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_every_token_is_packed_once_with_its_values(size: int) -> None:
    found = values_by_token(batches(GROUPS, size))
    want = {}
    samples = [s for g in GROUPS for s in g.samples]
    halves = [[s for g in part for s in g.samples] for part in (GROUPS[:5], GROUPS[5:])]
    counts = {id(s): len(half) for half in halves for s in half}
    for number, sample in enumerate(samples):
        for place in torch.nonzero(sample.loss_mask).flatten().tolist():
            position = len(sample.prompt_ids) + place
            key = number, position, int(sample.response_ids[place])
            weight = 1 / counts[id(sample)] / sample.num_loss_tokens
            want[key] = weight, float(sample.rollout_logprobs[place])
    assert found.keys() == want.keys() and len(want) > 100
    for key, (weight, logprob) in want.items():
        assert found[key][0] == pytest.approx(weight, rel=1e-14) and found[key][1] == logprob


@pytest.mark.parametrize(("size", "num_minibatches"), [(2, 1), (3, 1), (2, 3)])
def test_replicas_plan_what_one_process_plans_for_all(size: int, num_minibatches: int) -> None:
    shapes = [group_shape(g) for g in GROUPS]
    algorithm = GrpoConfig(num_minibatches=num_minibatches)
    plans = plan_all_replicas(shapes, size, PACKING, trained_minibatches(GROUPS, algorithm))
    found = batches(GROUPS, size, algorithm)
    for waves, batch in zip(plans, found, strict=True):
        want = [[wave.row_layout(i).total_tokens for i in range(len(wave.rows))] for wave in waves]
        assert len(batch.minibatches) == num_minibatches
        made = [wave for minibatch in batch.minibatches for wave in minibatch.waves]
        assert [[len(row.tokens) for row in wave.microbatches] for wave in made] == want
    for minibatch in range(num_minibatches):
        assert len({len(batch.minibatches[minibatch].rows) for batch in found}) == 1
    assert found[0].tokens == found[-1].tokens and found[0].tokens.logical > 300


def test_ranks_know_the_numbers_of_all_groups_and_the_tokens_of_their_own() -> None:
    aborted = replace(GROUPS[1].samples[0], status="aborted")
    groups = [*GROUPS, Group("gone", (aborted,))]
    groups[1] = replace(groups[1], samples=(aborted, *groups[1].samples[1:]))
    for batch in batches(groups, 3):
        assert batch.rollout.group_ids == tuple(g.group_id for g in groups)
        judged = without_aborted(groups)
        assert batch.shape.group_ids == tuple(g.group_id for g in judged)
        assert len(batch.shape.rewards) == sum(len(g.samples) for g in judged)
        assert 0 < len(batch.counts) < len(batch.shape.rewards)
        assert batch.rollout.statistics()["response_length/aborted"] == 2 / len(
            [s for g in groups for s in g.samples]
        )


def test_groups_in_order_stand_after_those_of_the_replicas_before() -> None:
    def prepare(replica: ThreadReplica) -> tuple[str, ...]:
        first = 6 * replica.rank
        mine = GROUPS[first : first + 6]
        return place_groups(mine, TWO, PACKING, replica).rollout.group_ids

    assert on_replicas(2, prepare) == [tuple(g.group_id for g in GROUPS)] * 2


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({0: {0: GROUPS[0]}, 1: {0: GROUPS[1]}}, "two replicas brought one group"),
        ({0: {}, 1: {}}, "no replica brought a group"),
        ({0: [GROUPS[0]], 1: {1: GROUPS[1]}}, "some replicas brought their groups by number"),
        (
            {0: {0: GROUPS[0]}, 1: {1: make_groups(1)[0]}},
            "differ in carrying rollout_logprobs; give them for all",
        ),
        (
            {0: {0: forest_groups(0, 1)[0]}, 1: {1: forest_groups(0, 1, is_weighted=True)[0]}},
            "differ in carrying loss_weight; give them for all",
        ),
        ({0: {0: GROUPS[0]}, 1: {1: Group("long", (make_sample([1] * 50, [2]),))}}, "a row holds"),
    ],
    ids=["twice", "none", "two-ways", "differing", "weights", "too-long"],
)
def test_a_refusal_on_one_replica_is_raised_on_all(groups: Any, message: str) -> None:
    def prepare(replica: ThreadReplica) -> None:
        plain = {0: groups[replica.rank]}[0]
        if "row" in message:
            bare = [replace(s, rollout_logprobs=None) for s in GROUPS[0].samples]
            plain = plain if replica.rank else {0: Group("bare", tuple(bare))}
        placement = place_groups(plain, GrpoConfig(), PACKING, replica)
        pack_batch(placement, GrpoConfig(), PACKING, replica)

    for error in on_replicas(2, prepare):
        assert isinstance(error, ValueError) and message in str(error), error


def test_a_message_keeps_all_but_metadata() -> None:
    samples = tuple(
        replace(s, sample_id=str(i), rollout_id="e", loss_weight=0.5, metadata={"text": "x"})
        for i, s in enumerate(GROUPS[0].samples)
    )
    sent = [(7, replace(GROUPS[0], samples=samples), group_shape(GROUPS[0]))]
    sent.append((2, GROUPS[4], group_shape(GROUPS[4])))
    got = decode_groups(encode_groups(sent))
    assert [n for n, _, _ in got] == [7, 2] and decode_groups(encode_groups([])) == []
    for (_, before, shape), (_, after, moved) in zip(sent, got, strict=True):
        assert after.group_id == before.group_id
        assert (moved.tree.segment_lens == shape.tree.segment_lens).all()
        for a, b in zip(before.samples, after.samples, strict=True):
            for name in ("prompt_ids", "response_ids", "loss_mask", "rollout_logprobs"):
                assert torch.equal(getattr(a, name), getattr(b, name))
            for name in ("reward", "status", "sample_id", "rollout_id", "loss_weight"):
                assert getattr(a, name) == getattr(b, name)
            assert b.metadata == {} and b.advantages is None


def test_a_message_takes_values_of_any_floating_dtype() -> None:
    kinds = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
    samples = tuple(
        replace(s, advantages=torch.linspace(0, 1, len(s.response_ids)).to(kind).requires_grad_())
        for s, kind in zip(GROUPS[0].samples, kinds, strict=True)
    )
    sent = [(0, Group("g", samples), group_shape(GROUPS[0]))]
    ((_, got, _),) = decode_groups(encode_groups(sent))
    for before, after in zip(samples, got.samples, strict=True):
        assert before.advantages is not None and after.advantages is not None
        assert torch.equal(before.advantages.detach().double(), after.advantages)


def test_an_estimator_of_one_s_own_knows_the_trained_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(ADVANTAGE_ESTIMATORS, "counts", lambda groups: groups.trained_counts)
    shape, algorithm = StepShape.of(GROUPS), GrpoConfig(adv_estimator="counts")
    counts = [s.num_loss_tokens for g in GROUPS for s in g.samples]
    got = compute_advantages(shape, torch.from_numpy(shape.rewards), algorithm)
    assert got.tolist() == counts and len(set(counts)) > 3


def test_taking_groups_takes_their_samples() -> None:
    shape = StepShape.of(GROUPS)
    part = shape.take([4, 1])
    assert part.group_ids == ("g4", "g1") and part.num_samples.tolist() == [4, 4]
    assert part.rewards.tolist() == [s.reward for i in (4, 1) for s in GROUPS[i].samples]
    assert StepShape.of([GROUPS[2], GROUPS[3], GROUPS[0]]).has_spread.tolist() == [
        False,
        False,
        True,
    ]
