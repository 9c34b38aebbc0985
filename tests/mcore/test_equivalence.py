"""Packed equals written out on every parallel layout; see ``equivalence_worker``."""

from __future__ import annotations

import pytest

from tests.mcore import cases
from tests.utils import run_ranks

pytestmark = pytest.mark.megatron


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_gradients_equal_the_stock_specs_on_written_out_samples(world_size: int) -> None:
    output = run_ranks("tests.mcore.equivalence_worker", world_size, timeout=900)
    expected = {n for n, case in cases.EQUIVALENCE.items() if case.world_size == world_size}
    proven = {line.split(":")[0] for line in output.splitlines() if " gradients, worst " in line}
    assert proven == expected and len(expected) >= 9


def test_twenty_optimizer_steps_end_at_the_same_weights() -> None:
    output = run_ranks("tests.mcore.training_worker", 2, *cases.TRAINING, timeout=900)
    assert output.count("of their movement") == len(cases.TRAINING)
