"""Waves against the written-out samples, and what the cost model chooses."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_pg.data import (
    CostModel,
    Group,
    GroupShape,
    ResidencyConfig,
    equalize_num_microbatches,
    group_shape,
    make_wave,
    plan_rows,
    plan_waves,
    step_cost,
)
from megatron_pg.tree import PrefixTree
from tests.data.forests import forest_groups
from tests.data.samples import make_sample, random_groups

BUDGET = 22


def shape(prompt: int, responses: list[int], name: str = "g") -> GroupShape:
    tree = PrefixTree.from_group(prompt, responses)
    return GroupShape(name, tree, np.array(responses), np.full(len(responses), prompt))


def always(tokens: int = 1000, **changes) -> ResidencyConfig:
    return ResidencyConfig(**{"choice": "always", "max_resident_tokens": tokens, **changes})


def large_groups(seed: int, min_shared: int | None) -> list[Group]:
    """Groups most of which are larger than a row of BUDGET tokens; some have two prompts."""
    groups = random_groups(
        seed, 5, max_samples=8, max_len=7, same_prompt=seed % 2 == 0, has_empty=seed % 3 == 0
    )
    long = [[7] * 11, [8] * 9]
    for number in range(2):
        samples = [make_sample(long[number], [1 + i, 2, 3, 4 + number]) for i in range(7)]
        groups.append(Group(f"long{number}", tuple(samples)))
    return [
        Group(g.group_id, tuple(make_sample(s.prompt_ids.tolist(), s.response_ids.tolist(),
              mask=s.loss_mask.int().tolist() if s.loss_mask.any() else None) for s in g.samples))
        for g in groups
    ]  # fmt: skip


seen = {"resident": 0, "rows": 0, "waves": 0, "two_roots": 0, "forest": 0}


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([None, 1, 3]),
    st.sampled_from([12, 40]),
    st.booleans(),
)
def test_every_token_is_seen_as_in_its_sample(seed, min_shared, max_resident, is_forest) -> None:
    groups = forest_groups(seed) if is_forest else large_groups(seed, min_shared)
    # Some rows of a forest are longer than a row of BUDGET tokens beside any prefix.
    budget = 2 * BUDGET if is_forest else BUDGET
    shapes = [group_shape(g, min_shared) for g in groups]
    # Groups without a prefix worth keeping are repeated, as "auto" may decide too.
    plans = plan_waves(
        shapes,
        budget,
        ResidencyConfig(choice="auto", max_resident_tokens=max_resident),
        pad_to_multiple=2,
        cost_model=CostModel(per_token=1.0, per_attention_pair=0.0, per_loss_token=0.0),
    )
    places: dict[int, int] = {}
    trained = 0
    samples = [s for g in groups for s in g.samples]
    for plan in plans:
        wave = make_wave(plan, groups)
        assert (
            sum(plan.prefix_layout(i).unique_tokens for i in range(len(plan.prefix_rows)))
            <= max(max_resident, 0)
            or not plan.prefix_rows
        )
        for row in (*wave.prefix_rows, *wave.microbatches):
            assert row.layout.total_tokens <= budget and len(row.tokens) % 2 == 0
        for batch in wave.microbatches:
            layout = batch.layout
            before = [[] for _ in range(layout.total_tokens)]
            for spans in layout.resident_spans:
                prefix_row = wave.prefix_rows[spans.row]
                for (q0, q1), (k0, k1) in zip(spans.q_spans.tolist(), spans.kv_spans.tolist()):
                    assert prefix_row.layout.position_ids[k0:k1].tolist() == list(range(k1 - k0))
                    for q in range(q0, q1):
                        before[q] = prefix_row.tokens[k0:k1].tolist()
            for i, number in enumerate(batch.sample_numbers.tolist()):
                places[number] = places.get(number, 0) + 1
                index = layout.sample_indices(i)
                resident = before[int(index[0])]
                whole = resident + batch.tokens[index].tolist()
                assert whole == samples[number].tokens.tolist()
                assert layout.position_ids[index].tolist() == list(range(len(resident), len(whole)))
                seen["resident"] += bool(resident)
            for entry, position in enumerate(batch.positions.tolist()):
                number = int(batch.sample_numbers[batch.sample_ids[entry]])
                target = int(batch.target_tokens[batch.prediction_ids[entry]])
                assert target == int(samples[number].tokens[position])
                trained += 1
            seen["rows"] += len(layout.resident_spans) > 0
            seen["forest"] += is_forest and len(layout.resident_spans) > 0
        seen["waves"] += len(plans) > 1
        seen["two_roots"] += any(
            (shapes[g].resident_lens > 0).sum() > 1 for row in plan.prefix_rows for g in row
        )
    assert places == dict.fromkeys(range(len(samples)), 1)
    assert trained == sum(s.num_loss_tokens for s in samples)


def test_the_waves_were_interesting() -> None:
    assert min(seen.values()) > 5, seen


def test_auto_takes_what_costs_less() -> None:
    cost_model = CostModel(per_token=1.0, per_attention_pair=0.0, per_loss_token=0.0)
    long, tight = shape(40, [10] * 6, "long"), shape(60, [2] * 3, "tight")

    def choose(chosen, **changes):
        config = ResidencyConfig(max_resident_tokens=1000, **changes)
        return plan_waves([chosen], 64, config, cost_model=cost_model)

    for mode, again in (("retain", 0), ("recompute", 1)):
        (plan,) = choose(long, choice="auto", mode=mode)
        # 39 tokens once, with 1 + 2 passes and one more when recomputed; a 40th in each row.
        assert plan.prefix_rows == ((0,),)
        config = ResidencyConfig(max_resident_tokens=1000, mode=mode)
        want = 3 * (60 + len(plan.rows)) + (3 + again) * 39
        assert step_cost([plan], config, cost_model) == want
        assert want < step_cost(choose(long, choice="never"), config, cost_model)
    # Two fills of the pipeline by the prefix cost more than two rows with the prompt repeated.
    (plan,) = choose(tight, choice="auto", mode="recompute", num_stages=8)
    assert plan.prefix_rows == ()
    for changes in ({"mode": "recompute"}, {"mode": "retain", "num_stages": 8}):
        assert choose(tight, choice="auto", **changes)[0].prefix_rows == ((0,),)


def test_step_cost_counts_the_idle_time_of_every_phase() -> None:
    cost_model = CostModel(per_token=1.0, per_attention_pair=0.0, per_loss_token=0.0)
    shapes = [shape(40, [10] * 6)]
    config = always(num_stages=3)
    (plan,) = plan_waves(shapes, 64, config, cost_model=cost_model)
    rows = plan.row_costs(cost_model)
    want = 3 * (sum(rows) + 2 * max(rows)) / 3 + (1 + 2) * (39 + 2 * 39) / 3
    assert step_cost([plan], config, cost_model) == pytest.approx(want)


@pytest.mark.parametrize(
    ("group", "config", "message"),
    [
        (shape(40, [5] * 9), always(), "39 tokens, a row holds 32; raise max_tokens"),
        (shape(30, [5] * 9), always(20), "29 tokens, max_resident_tokens=20 .* raise max_resident"),
        (shape(9, [40, 5]), always(), "41 tokens after its prefix, a row holds 32; raise max_tok"),
        (shape(1, [20, 20]), always(), "no untrained prefix"),
        (shape(30, [5] * 9), always(20, choice="auto"), "raise max_resident_tokens"),
    ],
)
def test_a_budget_that_is_too_small_says_which(group, config, message) -> None:
    with pytest.raises(ValueError, match=message):
        plan_waves([group], 32, config)


@pytest.mark.parametrize(
    "changes",
    [{"choice": "often"}, {"mode": "keep"}, {"num_stages": 0}, {"max_resident_tokens": 0}],
)
def test_config_refusals(changes) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        always(**changes)


def test_ranks_get_equally_many_rows_of_both_kinds() -> None:
    shapes = (shape(20, [5] * 9), shape(18, [3] * 12), shape(4, [3]))
    plans = [plan_waves(shapes, 32, always(), members=members)[0] for members in ([0, 1], [2])]
    equal = equalize_num_microbatches(plans, multiple_of=2)
    assert [len(p.prefix_rows) for p in equal] == [2, 2]
    assert len({len(p.rows) for p in equal}) == 1 and len(equal[0].rows) % 2 == 0
    assert equal[1].prefix_rows == ((), ())
    assert equal[1].prefix_layout(0).unique_tokens == 2
    # A divided row of a resident group stays resident.
    assert all(part.is_resident for row in equal[0].rows for part in row)


def test_stages_get_prefix_rows_to_fill_the_pipeline_with() -> None:
    shapes = [shape(9, [5] * 9, str(i)) for i in range(8)]
    (one,) = plan_waves(shapes, 32, always())
    (two,) = plan_waves(shapes, 32, always(num_stages=2))
    assert [len(row) for row in one.prefix_rows] == [4, 4]
    assert two.prefix_rows == tuple((i,) for i in range(8))
    many = [shape(9, [5] * 9, str(i)) for i in range(16)]
    (two,) = plan_waves(many, 32, always(num_stages=2))
    assert [len(row) for row in two.prefix_rows] == [2] * 8
    (two,) = plan_waves(many * 7, 32, always(num_stages=2))
    assert [len(row) for row in two.prefix_rows] == [4] * 28


def test_never_is_the_ordinary_plan() -> None:
    shapes = [shape(20, [5] * 9), shape(18, [3] * 12)]
    (plan,) = plan_waves(shapes, 32, always(choice="never"))
    assert plan.rows == plan_rows(shapes, 32).rows
