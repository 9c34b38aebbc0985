"""Rollouts in several rows train as rows written out, on every layout and in every mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch

pytest.importorskip("megatron.core")

from megatron_pg.data import Group, group_tree  # noqa: E402
from megatron_pg.grpo import GrpoConfig, PrefixGroupConfig  # noqa: E402
from megatron_pg.mcore.versions import HAS_HYBRID_MODEL  # noqa: E402
from tests.data.forests import forest_groups  # noqa: E402
from tests.grpo.forest_steps import Weighted, forest_step  # noqa: E402
from tests.grpo.test_rollouts import rollouts_of  # noqa: E402
from tests.mcore.cases import FULL_RECOMPUTE, linear_hybrid  # noqa: E402
from tests.mcore.harness import Case  # noqa: E402
from tests.ranks import Pool  # noqa: E402

BOUND = 1e-10


@dataclass(frozen=True)
class Forest:
    """Groups, how they are packed, and what is optimised."""

    case: Case = field(default_factory=Case)
    mode: str = "token-mean"
    is_weighted: bool = False
    min_shared: int | None = None
    max_tokens: int = 200
    resident: str = "never"
    minibatches: int = 1

    @property
    def groups(self) -> list[Group]:
        return forest_groups(5, 4, is_weighted=self.is_weighted)


FORESTS = {
    "one": Forest(),
    "rollout_means": Forest(mode="seq-mean-token-mean", min_shared=1),
    "rollout_sums": Forest(mode="seq-mean-token-sum", max_tokens=40),
    "weighted": Forest(mode="seq-mean-token-mean", is_weighted=True, max_tokens=60),
    "weighted_tokens": Forest(is_weighted=True, minibatches=2),
    "resident": Forest(min_shared=1, max_tokens=40, resident="always"),
    "tp2_sp": Forest(Case(tp=2, sp=True), "seq-mean-token-mean", max_tokens=60),
    "pp2": Forest(Case(pp=2), "seq-mean-token-mean", max_tokens=60),
    "dp2": Forest(Case(dp=2), "seq-mean-token-mean", minibatches=2),
    "dp2_weighted": Forest(Case(dp=2), "seq-mean-token-sum", is_weighted=True),
    **(
        {
            "hybrid_pp2": Forest(Case(pp=2, **linear_hybrid("M*|-G")), max_tokens=60),
            "hybrid_resident": Forest(
                Case(**linear_hybrid("M*M")), min_shared=1, max_tokens=40, resident="always"
            ),
            "hybrid_cp2_resident": Forest(
                Case(cp=2, **linear_hybrid("M*G", **FULL_RECOMPUTE)),
                min_shared=1,
                max_tokens=40,
                resident="always",
            ),
        }
        if HAS_HYBRID_MODEL
        else {}
    ),
    "pp2_dp2_resident": Forest(Case(pp=2, dp=2), min_shared=1, max_tokens=40, resident="always"),
}


def by_hand(groups: Sequence[Group], forest: Forest) -> list[Weighted]:
    """Every row of a minibatch with the weight times the advantage of its tokens."""
    found: list[Weighted] = []
    rollouts = [[g.samples[i] for i in members] for g in groups for members in rollouts_of(g)]
    rows = [sample for g in groups for sample in g.samples]
    trained = sum((s.loss_weight or 1.0) * s.num_loss_tokens for s in rows)
    for group in groups:
        own = rollouts_of(group)
        rewards = torch.tensor([group.samples[members[0]].reward for members in own]).double()
        for number, members in enumerate(own):
            advantage = (rewards[number] - rewards.mean()) / (rewards.std() + 1e-6)
            of_rollout = sum(group.samples[i].num_loss_tokens for i in members)
            for sample in (group.samples[i] for i in members):
                count = sample.num_loss_tokens if forest.is_weighted else of_rollout
                times = sample.loss_weight or 1.0
                total = sum(s.loss_weight for s in rows if s.loss_weight) or len(rollouts)
                weight = times / trained
                if forest.mode != "token-mean":
                    weight = times / total
                if forest.mode == "seq-mean-token-mean":
                    weight /= max(count, 1)
                found.append((sample, weight * float(advantage)))
    return found


@pytest.mark.parametrize("name", FORESTS)
def test_a_step_equals_rows_written_out(ranks: Pool, name: str) -> None:
    forest = FORESTS[name]
    groups, half = forest.groups, len(forest.groups) // forest.minibatches
    parts = [groups[i : i + half] for i in range(0, len(groups), half)]
    truth = [by_hand(part, forest) for part in parts]
    algorithm = GrpoConfig(loss_agg_mode=forest.mode, num_minibatches=forest.minibatches)
    settings = PrefixGroupConfig(
        max_tokens_per_microbatch=forest.max_tokens,
        min_shared=forest.min_shared,
        prefix_resident=forest.resident,
        logprob_chunk_tokens=7,
    )
    arguments = (forest.case, algorithm, settings, groups, truth)
    found = ranks.run(forest.case.world_size, forest_step, *arguments)
    for rank in found:
        assert rank.check < 1e-12 and len(rank.minibatches) == forest.minibatches
        assert rank.tokens.logical > 1.3 * rank.tokens.unique
        for one in rank.minibatches:
            assert one.least > 0, "a gradient is zero: nothing is proven"
            beyond = {n: error for n, error in one.errors.items() if not error <= BOUND}
            assert not beyond, beyond
    for rows, one in zip(truth, found[0].minibatches):
        want = -sum(scale * sample.num_loss_tokens for sample, scale in rows)
        assert one.loss == pytest.approx(want, rel=1e-10, abs=1e-14)
    roots = [int((group_tree(g, forest.min_shared).segment_parents < 0).sum()) for g in groups]
    assert max(roots) > 1, "all rows of a group begin alike"
    tokens = found[0].tokens
    assert (tokens.resident_groups > 0) == (forest.resident == "always")
    if forest.resident == "never" and forest.max_tokens < 100:
        assert tokens.repeated_groups > 0, "no group is larger than a row"
