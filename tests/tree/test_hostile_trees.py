"""Trees and rows of odd values: refused by name, or the tree that a plain walk describes."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from megatron_pg import PrefixTree, pack_trees
from tests.hostile import assert_both_occur, refused, seeds

HUGE = [2**31, 2**33, 2**62, 2**63, 2**64, 10**30]


def odd_length(rng: random.Random) -> tuple[Any, bool]:
    """A length in some form, and whether it is one."""
    n = rng.randint(1, 5)
    good: list[Any] = [n, np.int64(n), np.int32(n), np.uint8(n), np.uint64(n)]
    bad: list[Any] = [
        0, -n, np.int64(-n), True, np.bool_(True), float(n), n + 0.5, float("nan"), float("inf"),
        np.float32(n), str(n), None, [n], (n,), complex(n), rng.choice(HUGE), np.array([n]),
    ]  # fmt: skip
    is_good = rng.random() < 0.85
    return rng.choice(good if is_good else bad), is_good


@pytest.mark.parametrize("seed", seeds())
def test_groups_of_odd_lengths(seed: int) -> None:
    rng = random.Random(seed)
    prefix, is_good = odd_length(rng)
    names = [] if is_good else ["prefix_len"]
    suffixes = []
    for i in range(rng.randint(1, 3)):
        value, fits = odd_length(rng)
        suffixes.append(value)
        names += [] if fits or names else [f"suffix_lens[{i}]"]
    container = rng.choice([list, tuple, iter])
    if names:
        with refused(*names):
            PrefixTree.from_group(prefix, container(suffixes))
        return
    tree = PrefixTree.from_group(prefix, container(suffixes))
    assert tree.segment_lens.tolist() == [int(prefix), *map(int, suffixes)]
    assert tree.sample_lens.tolist() == [int(prefix) + int(n) for n in suffixes]
    assert tree.logical_tokens == sum(int(prefix) + int(n) for n in suffixes)


@pytest.mark.parametrize("lens", [None, 3, "12", b"12", {3: 1}, {3, 4}, 2.5])
def test_containers_without_an_order(lens: Any) -> None:
    with refused("suffix_lens", type(lens).__name__):
        PrefixTree.from_group(3, lens)
    with refused("sequences", type(lens).__name__):
        PrefixTree.from_sequences(lens)


def odd_sequence(rng: random.Random) -> tuple[Any, list[int] | None]:
    """A sample in some form, and its tokens; None if they are none."""
    tokens = [rng.choice([0, 0, 1, 2]) for _ in range(rng.randint(1, 6))]
    good = [
        tokens,
        tuple(tokens),
        np.array(tokens, dtype=rng.choice([np.int8, np.int32, np.int64, np.uint16, np.uint64])),
        np.array(tokens * 2)[::2],
        torch.tensor(tokens, dtype=rng.choice([torch.int32, torch.int64, torch.uint8])),
    ]
    bad: list[Any] = [
        [], np.empty(0, dtype=np.int64), [tokens], np.array(float(tokens[0])), tokens[0], None,
        [float(t) for t in tokens], [0.5], [True], np.array([False]), "01", ["0"], [None],
        [tokens, [1]], [2**63], np.array([2**63], dtype=np.uint64), [2**70], [float("nan")],
        torch.tensor([1.0]), torch.tensor([True]), torch.zeros(2, dtype=torch.int64, device="meta"),
        {1: 2}, np.array(["a"]), np.array([1 + 0j]),
    ]  # fmt: skip
    if rng.random() < 0.85:
        chosen = rng.randrange(len(good))
        return good[chosen], (tokens * 2)[::2] if chosen == 3 else tokens
    return rng.choice(bad), None


@pytest.mark.parametrize("seed", seeds())
def test_samples_of_odd_tokens(seed: int) -> None:
    rng = random.Random(seed)
    made = [odd_sequence(rng) for _ in range(rng.randint(1, 4))]
    given, tokens = [x for x, _ in made], [t for _, t in made]
    if None in tokens:
        with refused(f"sequences[{tokens.index(None)}]"):
            PrefixTree.from_sequences(given)
        return
    tree = PrefixTree.from_sequences(given)
    layout = pack_trees([tree], pad_to_multiple=rng.randint(1, 4))
    for i, want in enumerate(tokens):
        assert layout.token_ids[layout.sample_indices(i)].tolist() == want
    # Every run that starts alike is stored once.
    distinct = {tuple(t[: n + 1]) for t in tokens for n in range(len(t))}
    assert tree.unique_tokens == len(distinct)
    assert torch.equal(
        layout.pack_tokens(given)[: layout.unique_tokens], layout.token_ids[: len(distinct)]
    )


@pytest.mark.parametrize("seed", seeds())
def test_arrays_that_are_no_trees(seed: int) -> None:
    rng = random.Random(seed)
    count = rng.randint(1, 4)
    arrays: dict[str, Any] = dict(
        segment_lens=[rng.randint(1, 3) for _ in range(count)],
        segment_parents=[rng.randint(-1, i - 1) for i in range(count)],
        sample_segments=list(range(count)),
    )
    name = rng.choice(list(arrays))
    place = rng.randrange(count)
    value: Any = rng.choice([-2, 2**31, 2**62, 2**64, 0.5, "1", None, True, float("nan"), [1]])
    spoilt = {**arrays, name: [*arrays[name][:place], value, *arrays[name][place + 1 :]]}
    if value is True and count > 1:
        return  # Among integers it is one.
    with refused(name):
        PrefixTree(**spoilt)
    for empty in ([], None, 3, "123", np.empty((0, 2)), np.empty((1, 1), dtype=np.int64)):
        with refused():
            PrefixTree(**{**arrays, name: empty})


def test_what_is_given_stays_as_it_is() -> None:
    lens = np.array([2, 1])
    tree = PrefixTree(lens, np.array([-1, 0]), np.array([1]))
    lens[0] = 7
    assert tree.segment_lens.tolist() == [2, 1]


@pytest.mark.parametrize(
    ("trees", "pad", "names"),
    [
        ([], 1, ["trees is empty"]),
        (None, 1, ["trees must be a list"]),
        (PrefixTree.from_group(1, [1]), 1, ["one PrefixTree"]),
        ([PrefixTree.from_group(1, [1]), [1, 2]], 1, ["trees[1] is list"]),
        ({PrefixTree.from_group(1, [1])}, 1, ["trees must be a list"]),
        *(([PrefixTree.from_group(1, [1])], n, ["pad_to_multiple"]) for n in (0, -1, 1.0, True)),
        *(([PrefixTree.from_group(1, [1])], n, ["pad_to_multiple", n]) for n in HUGE),
        ([PrefixTree.from_group(2**30, [1])] * 2, 1, ["2147483647 tokens"]),
        ([PrefixTree.from_group(2**30, [2**30 - 1])], 2**30 + 1, ["total_tokens=2147483650"]),
    ],
)
def test_rows_of_odd_values(trees: Any, pad: Any, names: list[Any]) -> None:
    with refused(*names):
        pack_trees(trees, pad)


def test_pairs_of_many_long_samples_do_not_overflow() -> None:
    tree = PrefixTree.from_group(2**30, [1] * 100)
    assert tree.logical_attention_pairs == 100 * (2**30 + 1) * (2**30 + 2) // 2
    assert tree.attention_pairs == 2**30 * (2**30 + 1) // 2 + 100 * (2**30 + 1)


@pytest.mark.parametrize("bad", [[1.5, 2.0], [True, False], ["1", "2"], [2**64, 1], [None, 1]])
def test_rows_of_odd_tokens(bad: list[Any]) -> None:
    layout = pack_trees([PrefixTree.from_group(1, [1, 1])])
    with refused("sequences[1]"):
        layout.pack_tokens([[1, 2], bad])
    assert layout.pack_tokens([[1, 2], (1, 3)]).tolist() == [1, 2, 3]


def test_both_classes_occur() -> None:
    for make in (odd_length, odd_sequence):
        assert_both_occur([make(random.Random(seed))[1] not in (None, False) for seed in seeds()])
