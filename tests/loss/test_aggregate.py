"""Weights of samples that are parts of rollouts, or that say how often they count."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_pg.loss import AGGREGATION_MODES, aggregation_weights

FACTOR = 16.0


def weights_of(counts: list[int], mode: str, **given: Tensor) -> Tensor:
    factor = FACTOR if mode.endswith("norm") else None
    return aggregation_weights(torch.tensor(counts), mode, loss_scale_factor=factor, **given)


def by_hand(counts: list[int], mode: str, rollouts: list[int]) -> list[float]:
    """The mean over rollouts, as a sum over rollouts of what each contributes."""
    members = {r: [n for n, own in zip(counts, rollouts) if own == r] for r in rollouts}
    found = []
    for n, own in zip(counts, rollouts):
        tokens = sum(members[own])
        share = {
            "token-mean": 1 / sum(counts),
            "seq-mean-token-mean": 1 / max(tokens, 1) / len(members),
            "seq-mean-token-sum": 1 / len(members),
            "seq-mean-token-sum-norm": 1 / FACTOR / len(members),
        }[mode]
        found.append(share if n else 0.0)
    return found


@pytest.mark.parametrize("mode", AGGREGATION_MODES)
@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(-3, 3)), min_size=1, max_size=12).filter(
        lambda samples: any(n for n, _ in samples)
    )
)
def test_a_rollout_counts_once(mode: str, samples: list[tuple[int, int]]) -> None:
    counts, rollouts = [n for n, _ in samples], [r for _, r in samples]
    got = weights_of(counts, mode, rollouts=torch.tensor(rollouts))
    want = by_hand(counts, mode, rollouts)
    # A sample without trained tokens has a weight that no token takes.
    is_trained = torch.tensor(counts) > 0
    assert got[is_trained].tolist() == pytest.approx(
        torch.tensor(want).double()[is_trained].tolist()
    )
    # Parts count as the whole: every token's weight is that of the rollouts in one piece.
    names = list(dict.fromkeys(rollouts))
    whole = [sum(n for n, r in samples if r == name) for name in names]
    joined = weights_of(whole, mode)
    assert torch.equal(got, joined[[names.index(r) for r in rollouts]])


@pytest.mark.parametrize("mode", AGGREGATION_MODES)
def test_loss_weights_say_how_often_a_sample_counts(mode: str) -> None:
    counts = [3, 1, 4, 0]
    ones = weights_of(counts, mode, loss_weights=torch.ones(4))
    assert torch.equal(ones, weights_of(counts, mode))
    # Twice is as two equal samples, of which each has half of the weight.
    got = weights_of(counts, mode, loss_weights=torch.tensor([2, 1, 1, 1]))
    again = weights_of([3, 3, 1, 4, 0], mode)
    assert torch.allclose(got, torch.stack([2 * again[0], *again[2:]]), rtol=1e-15)
    for scale in (1e-300, 0.3, 1e300):
        scaled = weights_of(
            counts, mode, loss_weights=scale * torch.tensor([2.0, 1, 1, 1]).double()
        )
        assert torch.allclose(got, scaled, rtol=1e-14)
    # A sample without trained tokens may be left out of the count.
    assert torch.equal(
        weights_of(counts, mode, loss_weights=torch.tensor([1.0, 1.0, 1.0, 0.0]))[:3],
        weights_of(counts[:3], mode),
    )


def test_one_over_the_samples_of_a_rollout_is_a_mean_of_means() -> None:
    counts, rollouts = [3, 1, 4], [0, 0, 1]
    got = weights_of(counts, "seq-mean-token-mean", loss_weights=torch.tensor([0.5, 0.5, 1.0]))
    assert got.tolist() == pytest.approx([1 / 2 / 2 / 3, 1 / 2 / 2 / 1, 1 / 2 / 4])
    # Their tokens in proportion give back what the rollout in one piece weighs.
    got = weights_of(counts, "seq-mean-token-mean", loss_weights=torch.tensor([0.75, 0.25, 1.0]))
    want = weights_of(counts, "seq-mean-token-mean", rollouts=torch.tensor(rollouts))
    assert torch.allclose(got, want, rtol=1e-15)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rollouts": [0, 0], "loss_weights": [1.0, 1.0]}, "pass one of them"),
        ({"loss_weights": [1.0, 0.0]}, r"loss_weights\[1\]=0.0 must be"),
        ({"loss_weights": [float("nan"), 1.0]}, r"loss_weights\[0\]=nan must be"),
        ({"loss_weights": [1.0, -2.0]}, "above 0"),
        ({"loss_weights": [1.0]}, "the length of trained_counts"),
        ({"rollouts": [0, 1, 2]}, "the length of trained_counts"),
    ],
)
def test_refusals(given: dict[str, list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weights_of([1, 2], "token-mean", **{k: torch.tensor(v) for k, v in given.items()})
