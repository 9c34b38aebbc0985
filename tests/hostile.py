"""Seeded hostile inputs: every family of them is one test, parametrized by its seeds.

A family is a function ``seed -> input`` that depends on the seed alone. An input is either refused
by an error that names file, place and remedy, or accepted and then right; anything else (a
traceback from somewhere else, a silently wrong value, a hang) fails the item of that seed.

    @pytest.mark.parametrize("seed", seeds())
    def test_hostile_rows(seed, tmp_path): ...
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

# In CI; HOSTILE_INPUTS=2000 for a longer search.
NUM_INPUTS = int(os.environ.get("HOSTILE_INPUTS", "200"))


def seeds(cost: int = 1) -> range:
    """Seeds of a family, fewer where one input takes ``cost`` times as long as a parse."""
    return range(max(NUM_INPUTS // cost, 10))


@contextmanager
def refused(*names: object) -> Iterator[None]:
    """The block raises a user's error that holds each of ``names`` (file, row, field, remedy)."""
    with pytest.raises((ValueError, NotImplementedError)) as caught:
        yield
    message = str(caught.value)
    missing = [str(name) for name in names if str(name) not in message]
    assert not missing, f"the refusal does not name {missing}: {message}"


def assert_both_occur(outcomes: Sequence[bool]) -> None:
    """Among a family's inputs some are accepted (True) and some refused (False)."""
    assert any(outcomes), "no input of this family is accepted: it shows nothing about values"
    assert not all(outcomes), "no input of this family is refused: it is not hostile"
