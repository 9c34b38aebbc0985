"""Balance against the best assignment, and counts that agree on all ranks."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_pg.data import (
    CostModel,
    GroupShape,
    PackPlan,
    RowPart,
    balance_costs,
    balance_groups,
    equalize_num_microbatches,
    make_microbatches,
    plan_rows,
)
from megatron_pg.tree import PrefixTree
from tests.data.samples import random_groups, shapes_of

TOKENS = CostModel(per_attention_pair=0, per_loss_token=0)


def shapes_with_lens(lens):
    return [GroupShape("g", PrefixTree.from_group(1, [n - 1]), np.array([n - 1])) for n in lens]


@settings(deadline=None, max_examples=60)
@given(lens=st.lists(st.integers(2, 40), min_size=1, max_size=7), dp_size=st.integers(1, 3))
def test_greatest_cost_is_near_the_least(lens, dp_size):
    ranks = balance_groups(shapes_with_lens(lens), dp_size, TOKENS)
    assert sorted(i for members in ranks for i in members) == list(range(len(lens)))
    assert all(members == sorted(members) for members in ranks) and len(ranks) == dp_size

    def greatest(owner):
        return max(sum(n for n, r in zip(lens, owner) if r == rank) for rank in range(dp_size))

    best = min(greatest(owner) for owner in product(range(dp_size), repeat=len(lens)))
    got = max(sum(lens[i] for i in members) for members in ranks)
    # The guarantee of "longest processing time first", which differencing keeps.
    assert got <= (4 / 3 - 1 / (3 * dp_size)) * best


def test_exchanges_beat_differencing_and_longest_first():
    # Longest first gives 8 + 5 + 4 = 17 against 7 + 6 = 13, differencing 16 against 14.
    ranks = balance_groups(shapes_with_lens([8, 7, 6, 5, 4]), 2, TOKENS)
    assert sorted(sum([8, 7, 6, 5, 4][i] for i in members) for members in ranks) == [15, 15]


def test_groups_are_exchanged_where_differencing_leaves_a_rank_behind():
    """Four groups a rank, as many ranks as a large job has; by differencing alone 6 % too much."""
    rng = np.random.default_rng(0)
    costs = rng.lognormal(0.0, 0.3, 1024).tolist()
    ranks = balance_costs(costs, 256)
    assert sorted(i for members in ranks for i in members) == list(range(1024))
    loads = [sum(costs[i] for i in members) for members in ranks]
    assert max(loads) < 1.01 * sum(costs) / 256
    # What one group alone takes is the least that any assignment takes.
    ranks = balance_costs([*costs, 40.0], 256)
    assert max(sum([*costs, 40.0][i] for i in members) for members in ranks) == 40.0
    assert balance_costs([0.0] * 5, 2) == balance_costs([0.0] * 5, 2)


def test_balance_is_deterministic_and_takes_groups_or_shapes():
    groups = random_groups(4, 20)
    ranks = balance_groups(groups, 4)
    assert ranks == balance_groups(groups, 4) == balance_groups(shapes_of(groups), 4)
    detected = balance_groups(groups, 4, min_shared=1)
    assert detected == balance_groups(shapes_of(groups, 1), 4)


def test_fewer_groups_than_ranks_and_none():
    ranks = balance_groups(shapes_with_lens([5, 9]), 4)
    assert sorted(ranks) == [[], [], [0], [1]]
    assert balance_groups([], 2) == [[], []]
    with pytest.raises(ValueError, match="dp_size=0 must be at least 1"):
        balance_groups([], 0)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    num_groups=st.integers(1, 10),
    dp_size=st.integers(1, 4),
    multiple_of=st.sampled_from([1, 2, 4]),
    min_shared=st.sampled_from([None, 1]),
)
def test_equal_counts_and_nothing_lost(seed, num_groups, dp_size, multiple_of, min_shared):
    groups = random_groups(seed, num_groups)
    shapes = shapes_of(groups, min_shared)
    ranks = balance_groups(shapes, dp_size)
    before = [plan_rows(shapes, 40, members=members) for members in ranks]
    after = equalize_num_microbatches(before, multiple_of=multiple_of)
    counts = {len(plan.rows) for plan in after}
    most = max(len(plan.rows) for plan in before)
    assert counts == {-(-most // multiple_of) * multiple_of}
    for old, new, members in zip(before, after, ranks):
        seen = sorted((p.group, i) for row in new.rows for p in row for i in p.samples)
        assert seen == [(g, i) for g in members for i in range(len(groups[g].samples))]
        parts = [part for row in old.rows for part in row]
        # Fillers only where every row is down to one part, none of which is divided.
        assert sorted(part for row in new.rows for part in row) == sorted(parts)
        assert new.num_fillers == max(0, len(new.rows) - len(parts))
        for row in range(len(new.rows)):
            assert new.row_layout(row).total_tokens <= 40
        weight = sum(float(mb.weights.sum()) for mb in make_microbatches(new, groups))
        want = sum(float(mb.weights.sum()) for mb in make_microbatches(old, groups))
        assert weight == pytest.approx(want, rel=1e-12)


def test_groups_are_parted_and_what_they_share_is_not_repeated():
    shapes = [
        GroupShape("g", PrefixTree.from_group(4, lens), np.array(lens))
        for lens in ([3, 3], [3, 3], [9, 9])
    ]
    short = plan_rows(shapes, 22, members=[0, 1])
    long = plan_rows(shapes, 22, members=[0, 1, 2])
    assert (len(short.rows), len(long.rows)) == (1, 2)
    equal, same = equalize_num_microbatches([short, long])
    assert [[part.group for part in row] for row in equal.rows] == [[0], [1]]
    assert same.rows == long.rows
    four = equalize_num_microbatches([short, long], multiple_of=4)[0]
    assert four.rows == (*equal.rows, (), ()) and four.num_fillers == 2


def test_a_row_of_groups_is_divided_and_a_dear_group_is_not():
    lens = ([9, 9], [1], [1])
    shapes = tuple(GroupShape("g", PrefixTree.from_group(1, r), np.array(r)) for r in lens)
    rows = ((RowPart(0, (0, 1)),), (RowPart(1, (0,)), RowPart(2, (0,))))
    three = plan_rows(shapes_with_lens([19] * 3), 19)
    equal = equalize_num_microbatches([PackPlan(shapes, rows), three])[0]
    assert sorted([part.group for part in row] for row in equal.rows) == [[0], [1], [2]]


def test_dearest_row_is_divided_first():
    shapes = shapes_with_lens([10, 10, 30, 30])
    halves = [plan_rows(shapes, 60, members=members).rows for members in ([0, 1], [2, 3])]
    plan = PackPlan(tuple(shapes), halves[0] + halves[1])
    assert [[p.group for p in row] for row in plan.rows] == [[0, 1], [2, 3]]
    longer = plan_rows(shapes_with_lens([60, 60, 60]), 60)
    equal = equalize_num_microbatches([plan, longer])[0]
    assert sorted([p.group for p in row] for row in equal.rows) == [[0, 1], [2], [3]]


def test_rows_rise_and_fall_in_cost():
    """Each rank's, divided or not; a stage finds its neighbours' rows like its own."""
    shapes = shapes_with_lens([9, 2, 7, 5, 8, 3])
    plan = plan_rows(shapes, 9, cost_model=TOKENS)
    assert plan.row_costs(TOKENS) == [8, 9, 9, 8]
    parts = [RowPart(i, (0,)) for i in range(6)]
    held = ((parts[0], parts[1], parts[2]), (parts[3],), (parts[4],), (parts[5],))
    two = [PackPlan(tuple(shapes), held), PackPlan(tuple(shapes), tuple((p,) for p in parts))]
    six, same = equalize_num_microbatches(two, cost_model=TOKENS)
    assert six.row_costs(TOKENS) == same.row_costs(TOKENS) == [2, 5, 8, 9, 7, 3]


def test_equalize_refuses_nothing_and_zero():
    with pytest.raises(ValueError, match="0 plans"):
        equalize_num_microbatches([])
    with pytest.raises(ValueError, match="multiple_of=0"):
        equalize_num_microbatches([plan_rows([], 10)], multiple_of=0)
