"""Routes are part of a token's identity, from samples to packed rows."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from megatron_pg.data import (
    UNKNOWN_ROUTE,
    Group,
    ResidencyConfig,
    RouteShape,
    carried_fields,
    content_checksum,
    group_shape,
    group_tree,
    make_wave,
    pack_groups,
    plan_rows,
    plan_waves,
)
from tests.data.routed import distinct_prefixes, random_routes, with_routes
from tests.data.samples import make_large_groups, make_sample, random_groups

SHAPE = (3, 2)


def routes_of(count: int, seed: int = 0) -> torch.Tensor:
    return random_routes(count, SHAPE, torch.Generator().manual_seed(seed))


def two(prompt_routes: list[torch.Tensor], response: list[int] | None = None) -> Group:
    """Two samples of one prompt of four tokens, with these routes of it."""
    responses = [[7, 8], response or [9]]
    samples = [
        replace(make_sample([1, 2, 3, 4], r), routed_experts=torch.cat([p, routes_of(len(r), 5)]))
        for p, r in zip(prompt_routes, responses)
    ]
    return Group("g", tuple(samples))


@pytest.mark.parametrize("rows", [5, 6])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_a_sample_keeps_int16_and_the_last_route_may_be_missing(rows, dtype):
    given = routes_of(rows)
    sample = replace(make_sample([1, 2], [3, 4, 5, 6]), routed_experts=given.to(dtype))
    assert sample.routed_experts.dtype == torch.int16
    assert sample.routed_experts.shape == (6, *SHAPE)
    assert torch.equal(sample.routed_experts[:rows], given)
    assert (sample.routed_experts[rows:] == UNKNOWN_ROUTE).all()
    assert torch.equal(replace(sample, reward=1.0).routed_experts, sample.routed_experts)


@pytest.mark.parametrize(
    ("routes", "message"),
    [
        (routes_of(4), "has 4 rows, prompt and response have 6 tokens"),
        (routes_of(7), "has 7 rows"),
        (routes_of(6)[:, 0], "must be integers [tokens, layers, topk], got shape (6, 2)"),
        (routes_of(6).float(), "dtype torch.float32"),
        (routes_of(6).int() + 40000, "no model has such experts"),
    ],
    ids=["short", "long", "flat", "float", "huge"],
)
def test_a_sample_refuses_routes_of_another_form(routes, message):
    with pytest.raises(ValueError) as error:
        replace(make_sample([1, 2], [3, 4, 5, 6]), routed_experts=routes)
    assert message in str(error.value)


@pytest.mark.parametrize("freq", [1, 2, [0, 1, 1, 0]], ids=str)
def test_layers_without_experts_are_not_read(freq):
    config = SimpleNamespace(
        num_moe_experts=4, moe_router_topk=2, num_layers=4, moe_layer_freq=freq
    )
    shape = RouteShape.from_config(config)
    wanted = {1: (1, 1, 1, 1), 2: (1, 0, 1, 0)}.get(freq if isinstance(freq, int) else 0, freq)
    assert shape.has_experts == tuple(map(bool, wanted))
    whole = random_routes(5, (4, 2), torch.Generator().manual_seed(1))
    dense = ~torch.tensor(shape.has_experts)
    garbage = whole.clone()
    garbage[:, dense] = 99
    found = shape.of_model(garbage)
    assert torch.equal(found[:, ~dense], whole[:, ~dense]) and (found[:, dense] == 0).all()
    assert torch.equal(shape.of_model(whole[:, ~dense]), found)
    garbage[3, 3 - wanted[::-1].index(1)] = 2
    with pytest.raises(ValueError, match=f"token 3 in layer {3 - wanted[::-1].index(1)} are "):
        shape.of_model(garbage)
    config.num_moe_experts = None
    assert RouteShape.from_config(config) is None


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ((3, 1, 0), 4, "of token 3 in layer 1 are [4, "),
        ((2, 0, 1), -2, "in [0, 4)"),
        ((0, 2, 0), -1, "of token 0 in layer 2"),
        ((4, 1, slice(None)), 3, "of token 4 in layer 1 are [3, 3], must be different experts"),
    ],
    ids=["beyond", "below", "half_unknown", "twice"],
)
def test_hostile_routes_are_refused(place, value, message):
    routes = routes_of(6)
    routes[place] = value
    with pytest.raises(ValueError) as error:
        RouteShape(4, 2, (True,) * 3).of_model(routes)
    assert message in str(error.value)


def test_routes_of_another_model_are_refused():
    for shape in (RouteShape(4, 2, (True,) * 4), RouteShape(4, 3, (True,) * 3)):
        with pytest.raises(ValueError, match="the model has"):
            shape.of_model(routes_of(6))
    unknown = torch.full((2, *SHAPE), UNKNOWN_ROUTE, dtype=torch.int16)
    assert torch.equal(RouteShape(4, 2, (True,) * 3).of_model(unknown), unknown)


@pytest.mark.parametrize("seed", range(5))
def test_sharing_is_the_trie_of_tokens_with_their_routes(seed):
    """Against the written-out trie; the same groups without routes share more."""
    split = 0
    groups = random_groups(seed, 12, max_len=8)
    for group in with_routes(groups, SHAPE, seed=seed, reports_last=True):
        tree = group_tree(group, min_shared=1)
        assert tree.unique_tokens == distinct_prefixes(group.samples)
        tokens = distinct_prefixes(group.samples, with_routes=False)
        assert tokens <= tree.unique_tokens
        split += tree.unique_tokens - tokens
    assert split > 5, "routes split nothing"


def test_a_prompt_is_shared_whole_or_up_to_the_first_other_route():
    one, other = routes_of(4, 1), routes_of(4, 1)
    assert group_tree(two([one, other])).unique_tokens == 7
    other[2, 1] = (other[2, 1] + 1) % 4
    # Four tokens are shared at least, as no prompt is longer.
    assert group_tree(two([one, other])).unique_tokens == 11
    assert group_tree(two([one, other]), min_shared=1).unique_tokens == 9


def test_no_less_than_nothing_is_split_where_responses_are_shared_instead():
    routes, other = routes_of(9), routes_of(9)
    other[2, 1] = (other[2, 1] + 1) % 4
    samples = [
        replace(make_sample([1, 2, 3, 4], [5, 6, 7, 8, last]), routed_experts=own)
        for last, own in enumerate([routes] * 4 + [other])
    ]
    group = Group("g", tuple(samples))
    # Without routes the prompt is shared, and responses stand apart.
    assert group_tree(group).unique_tokens == 8 + 4 + 9 < 4 + 5 * 5
    assert group_shape(group).split_tokens == 0


def test_an_equal_last_token_without_a_route_is_shared_with_what_goes_on():
    """A turn ends with a token that was not fed back; the next one begins with all of it."""
    routes = routes_of(8)
    turns = [
        replace(make_sample([1, 2], [3, 4]), routed_experts=routes[:3]),
        replace(make_sample([1, 2, 3, 4], [5, 6, 7, 8]), routed_experts=routes[:7]),
    ]
    for samples in (turns, turns[::-1]):
        group = Group("g", tuple(samples))
        assert group_tree(group, min_shared=1).unique_tokens == 8
        # As a model has them that has no experts in its first layer.
        of_model = RouteShape(4, 2, (False, True, True)).of_group(group)
        assert group_tree(of_model, min_shared=1).unique_tokens == 8
        (row,) = pack_groups([group], 20, advantages=torch.ones(2), min_shared=1)
        assert torch.equal(row.routed_experts[:7], routes[:7])
    other = routes.clone()
    other[1] = (other[1] + 1) % 4
    apart = Group("g", (turns[0], replace(turns[1], routed_experts=other[:7])))
    assert group_tree(apart, min_shared=1).unique_tokens == 1 + 3 + 7


def assert_rows_hold(rows, samples):
    """Every token of every sample stands in a row with its own route."""
    count = 0
    for row in rows:
        assert row.routed_experts.dtype == torch.int16
        assert (row.routed_experts[row.layout.unique_tokens :] == UNKNOWN_ROUTE).all()
        for place, number in enumerate(row.sample_numbers.tolist()):
            ids = row.layout.sample_indices(place)
            want = samples[number].routed_experts[-len(ids) :]
            found = row.routed_experts[ids]
            known = want >= 0
            assert torch.equal(found[known], want[known]) and known[:-1].all()
            count += len(ids)
    return count


@pytest.mark.parametrize("min_shared", [None, 1, 3])
def test_rows_hold_every_tokens_route(min_shared):
    groups = with_routes(random_groups(3, 8, max_len=8), SHAPE)
    samples = [sample for group in groups for sample in group.samples]
    shapes = [group_shape(group, min_shared) for group in groups]
    plan = plan_rows(shapes, 24, pad_to_multiple=4)
    count = assert_rows_hold(make_wave(plan, groups).microbatches, samples)
    assert count == sum(len(sample.tokens) for sample in samples)


def test_resident_prefixes_hold_their_routes():
    groups = with_routes(make_large_groups(), SHAPE, divergence=0.15, seed=4)
    shapes = [group_shape(group, 1) for group in groups]
    residency = ResidencyConfig(choice="always", max_resident_tokens=40)
    samples = [sample for group in groups for sample in group.samples]
    num_prefixes = 0
    for plan in plan_waves(shapes, 22, residency):
        wave = make_wave(plan, groups)
        assert_rows_hold(wave.microbatches, samples)
        for number, row in enumerate(wave.prefix_rows):
            place = 0
            for group in plan.prefix_rows[number]:
                shape = shapes[group]
                for root in (shape.resident_lens > 0).nonzero()[0]:
                    length = int(shape.resident_lens[root])
                    sample = list(shape.sample_roots).index(root)
                    want = groups[group].samples[sample].routed_experts[:length]
                    assert torch.equal(row.routed_experts[place : place + length], want)
                    place, num_prefixes = place + length, num_prefixes + 1
    assert num_prefixes > 2


def test_samples_that_disagree_on_a_shared_token_are_refused():
    one, other = routes_of(4, 1), routes_of(4, 1)
    plan = plan_rows([group_shape(two([one, other]))], 20)
    other[2, 1] = (other[2, 1] + 1) % 4
    with pytest.raises(ValueError, match="sample 1 at position 2 .* share only where routes agree"):
        make_wave(plan, [two([one, other])])


def test_samples_without_routes_leave_rows_as_they_were():
    groups = random_groups(3, 4)
    rows = pack_groups(groups, 40)
    assert all(row.routed_experts is None for row in rows)


def test_routes_are_carried_by_all_trained_samples_or_none():
    bare = make_sample([1, 2], [3])
    routed = replace(bare, routed_experts=routes_of(3))
    assert "routed_experts" in carried_fields([Group("a", (routed, routed))])
    with pytest.raises(ValueError, match="has no routed_experts"):
        carried_fields([Group("a", (routed, bare))])


def test_routes_count_in_the_checksum():
    sample = replace(make_sample([1, 2], [3]), routed_experts=routes_of(3))
    other = routes_of(3)
    other[1, 0] = (other[1, 0] + 1) % 4
    sums = {
        content_checksum([Group("a", (s,))])
        for s in (sample, make_sample([1, 2], [3]), replace(sample, routed_experts=other))
    }
    assert len(sums) == 3
