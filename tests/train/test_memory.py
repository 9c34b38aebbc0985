"""What residency is for, a group that does not fit as one row, and what it is said to take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.utils import run_ranks

MEGABYTES = "700"
# K and V of 2 layers, 2 heads of 8 channels each.
KV_ELEMENTS = 2 * 2 * 2 * 8
# Of 2 layers: four inputs of hidden size, q three times, K, V and rotated K, the MLP.
ACTIVATIONS = 2 * (4 * 64 + 3 * 64 + 3 * 16 + 3 * 176)
# "The local modules keep about half as much again" as the fused ones that the estimate counts.
LOCAL_FACTOR = 1.75


def test_sixty_four_responses_on_4096_tokens_train_where_their_row_does_not_fit() -> None:
    output = run_ranks("tests.train.memory_worker", 1, "resident", MEGABYTES, timeout=300)
    assert "trained resident" in output
    with pytest.raises(AssertionError, match="can't allocate memory"):
        run_ranks("tests.train.memory_worker", 1, "row", MEGABYTES, timeout=300)


def test_the_dry_run_says_what_resident_prompts_take(tmp_path: Path) -> None:
    output = run_ranks("tests.train.estimate_worker", 1, str(tmp_path), timeout=300)
    lines = [x.removeprefix("measured ") for x in output.splitlines() if x.startswith("measured ")]
    cases = {(case["mode"], case["at_once"]): case for case in map(json.loads, lines)}
    assert set(cases) == {(m, n) for m in ("retain", "recompute") for n in (2, 8)}
    for (mode, at_once), case in cases.items():
        assert case["resident_groups"] == 8 and case["waves"] == 8 // at_once
        # The last of 256 prompt tokens stands with the responses. 4 bytes a value and a gradient.
        tokens = at_once * 255
        kept = tokens * KV_ELEMENTS * (4 + 4)
        assert case["kept"] == kept
        by_hand = kept if mode == "recompute" else tokens * (ACTIVATIONS + KV_ELEMENTS) * 4
        assert case["estimate_resident"] == by_hand
        # Weights, gradients and two moments of Adam are 16 bytes a parameter.
        estimate = case["estimate"] - 16 * case["parameters"]
        assert estimate <= case["peak"] <= LOCAL_FACTOR * estimate, (mode, at_once)
    # Six prompts more at once, and everything else alike.
    for mode, low, high in (("retain", 1.0, LOCAL_FACTOR), ("recompute", 0.99, 1.01)):
        more = {
            name: cases[mode, 8][name] - cases[mode, 2][name]
            for name in ("peak", "estimate_resident")
        }
        assert low <= more["peak"] / more["estimate_resident"] <= high, (mode, more)
