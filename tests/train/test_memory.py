"""What residency is for, a group that does not fit as one row, and what it is said to take."""

from __future__ import annotations

import pytest

from tests.ranks import Pool, RanksFailed
from tests.train.large_group import train
from tests.train.resident_memory import Measured, measure_all

MEGABYTES = 700
# K and V of 2 layers, 2 heads of 8 channels each.
KV_ELEMENTS = 2 * 2 * 2 * 8
# Of 2 layers: what norms read, scale and return, q three times, K, V and rotated K, a log-sum-exp a
# head, the MLP, whose gate is a kernel of its own.
ACTIVATIONS = 2 * (6 * 64 + 3 * 64 + 3 * 16 + 8 + 5 * 176)


def test_sixty_four_responses_on_4096_tokens_train_with_their_prompt_resident(
    ranks: Pool,
) -> None:
    (gradient,) = ranks.run(1, train, "resident", MEGABYTES, timeout=300)
    assert gradient > 0


def test_their_row_does_not_fit_into_the_same_memory(ranks: Pool) -> None:
    with pytest.raises(RanksFailed, match="can't allocate memory"):
        ranks.run(1, train, "row", MEGABYTES, timeout=300)


@pytest.fixture(scope="module")
def measured(
    ranks: Pool, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, int], Measured]:
    (cases,) = ranks.run(1, measure_all, tmp_path_factory.mktemp("memory"), timeout=300)
    return cases


@pytest.mark.parametrize("at_once", [2, 8])
@pytest.mark.parametrize("mode", ["retain", "recompute"])
def test_the_dry_run_says_what_resident_prompts_take(measured, mode: str, at_once: int) -> None:
    case = measured[mode, at_once]
    assert (case.mode, case.at_once) == (mode, at_once)
    assert case.resident_groups == 8 and case.waves == 8 // at_once
    # The last of 256 prompt tokens stands with the responses. 4 bytes a value and a gradient.
    tokens = at_once * 255
    kept = tokens * KV_ELEMENTS * (4 + 4)
    assert case.kept == kept
    by_hand = kept if mode == "recompute" else tokens * (ACTIVATIONS + KV_ELEMENTS) * 4
    assert case.estimate_resident == by_hand
    # Weights, gradients and two moments of Adam are 16 bytes a parameter.
    estimate = case.estimate - 16 * case.parameters
    assert case.peak == pytest.approx(estimate, rel=0.05)


@pytest.mark.parametrize("mode", ["retain", "recompute"])
def test_six_prompts_more_at_once_take_what_the_dry_run_adds(measured, mode: str) -> None:
    more, less = measured[mode, 8], measured[mode, 2]
    ratio = (more.peak - less.peak) / (more.estimate_resident - less.estimate_resident)
    assert ratio == pytest.approx(1, rel=0.01)
