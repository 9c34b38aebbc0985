"""Recorded rollouts as they should not be, in every format; see ``tests.hostile``.

A generator writes samples that it knows, in forms that must not matter, and into half of the inputs
one fault. What is read must be those samples in those groups, or the fault must be named.
"""

from __future__ import annotations

import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_pg.data import read_rollouts
from tests.data.hostile_dumps import slime_input, text_input
from tests.data.hostile_rows import jsonl_input, parquet_input
from tests.data.hostile_samples import VOCAB, settle
from tests.hostile import assert_both_occur, refused, seeds


@pytest.mark.parametrize("seed", seeds())
def test_jsonl(seed: int, tmp_path: Path) -> None:
    made, files = jsonl_input(seed, tmp_path)
    settle(made, files, vocab_size=VOCAB)


@pytest.mark.parametrize("seed", seeds())
def test_parquet(seed: int, tmp_path: Path) -> None:
    made, files = parquet_input(seed, tmp_path)
    settle(made, files, vocab_size=VOCAB)


@pytest.mark.parametrize("seed", seeds())
def test_slime(seed: int, tmp_path: Path) -> None:
    made, files = slime_input(seed, tmp_path)
    settle(made, files, vocab_size=VOCAB)


@pytest.mark.parametrize("seed", seeds())
def test_text(seed: int, tmp_path: Path) -> None:
    made, files, tokenizer = text_input(seed, tmp_path)
    settle(made, files, tokenizer=tokenizer, vocab_size=VOCAB)


@pytest.mark.parametrize("make", [jsonl_input, parquet_input, slime_input, text_input])
def test_families_hold_good_and_bad_inputs(make: Callable[..., Any], tmp_path: Path) -> None:
    made = [make(seed, tmp_path)[0] for seed in range(40)]
    assert_both_occur([one.fault is None for one in made])
    samples = [s for one in made if one.fault is None for of_file in one.samples for s in of_file]
    assert {s.status for s in samples} == {"completed", "aborted"}
    assert {bool(s.response) for s in samples} == {True, False}
    assert any(len(one.samples) > 1 for one in made if one.fault is None)


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, how: int, marker: Path) -> None:
        self.how, self.marker = how, str(marker)

    def __reduce__(self) -> Any:
        ways = [
            (os.system, (f"touch {self.marker}",)),
            (open, (self.marker, "w")),
            (eval, (f"open({self.marker!r}, 'w')",)),
            (exec, (f"open({self.marker!r}, 'w')",)),
            (os.mkdir, (self.marker,)),
        ]
        return ways[self.how % len(ways)]


def hide(rng: random.Random, payload: Payload, samples: list[dict[str, Any]]) -> Any:
    """A slime file with the payload somewhere in it."""
    content: dict[Any, Any] = {"rollout_id": 0, "samples": samples}
    sample = rng.choice(samples)
    place = rng.choice(["root", "list", "value", "metadata", "key", "rollout_id", "array"])
    if place == "root":
        return payload
    if place == "list":
        samples.insert(rng.randrange(len(samples) + 1), payload)  # type: ignore[arg-type]
    elif place == "metadata":
        sample["metadata"] = {"a": [{"b": (payload,)}]}
    elif place == "key":
        content[payload] = 1
    elif place == "rollout_id":
        content["rollout_id"] = payload
    elif place == "array":
        sample["tokens"] = np.array([*sample["tokens"], payload], dtype=object)
    else:
        sample["note"] = payload
    return content


@pytest.mark.parametrize("seed", seeds())
def test_a_poisoned_pickle_never_executes(seed: int, tmp_path: Path) -> None:
    rng, marker = random.Random(seed), tmp_path / "executed"
    row = {"tokens": [1, 2], "response_length": 1, "reward": 1.0, "status": "completed"}
    content = hide(rng, Payload(seed, marker), [dict(row) for _ in range(rng.randint(1, 3))])
    file = tmp_path / "0.pt"
    how = rng.choice(["zip", "legacy", "pickle"])
    if how == "pickle":
        file.write_bytes(pickle.dumps(content, protocol=rng.randint(2, 5)))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=how == "zip")
    with refused(file, "can run code"):
        read_rollouts(file)
    assert not marker.exists()
