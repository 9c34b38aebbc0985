"""What residency is for: a group that does not fit as one row; see ``memory_worker``."""

from __future__ import annotations

import pytest

from tests.utils import run_ranks

MEGABYTES = "700"


def test_sixty_four_responses_on_4096_tokens_train_where_their_row_does_not_fit() -> None:
    output = run_ranks("tests.train.memory_worker", 1, "resident", MEGABYTES, timeout=300)
    assert "trained resident" in output
    with pytest.raises(AssertionError, match="can't allocate memory"):
        run_ranks("tests.train.memory_worker", 1, "row", MEGABYTES, timeout=300)
