"""What is wrong with a response, told the same way for every source."""

from __future__ import annotations

import json
import math

import pytest

from megatron_pg.data import read_rollouts, response_problems

# ids, logprobs, parts of the problems in order
CASES = {
    "right": ([3, 4], [-0.5, 0], []),
    "without logprobs": ([3, 4], None, []),
    "first and last token of the vocabulary": ([0, 49], [-1000.0, 0.0009], []),
    "empty": ([], [], []),
    "empty without logprobs": ([], None, []),
    "beyond the vocabulary": ([3, 50], [-1.0, -1.0], ["token 1 is 50"]),
    "beyond int32": ([2**40, 3], None, ["token 0 is 1099511627776"]),
    "negative": ([3, -100], None, ["token 1 is -100"]),
    "float": ([3, 4.0], None, ["token 1 is 4.0 (float), must be an integer"]),
    "bool": ([True], None, ["token 0 is True (bool)"]),
    "string": (["3"], None, ["token 0 is '3' (str)"]),
    "null": ([3, None], None, ["token 1 is None"]),
    "too many": ([3] * 5, None, ["has 5 tokens, at most 4"]),
    "positive": ([3], [0.5], ["value 0 is 0.5, a logprob is at most 0"]),
    "above rounding": ([3], [0.0011], ["value 0 is 0.0011"]),
    "placeholder": ([3, 4], [-0.1, -9999.0], ["value 1 is -9999.0, a placeholder"]),
    "just absurd": ([3], [-1000.5], ["value 0 is -1000.5"]),
    "nan": ([3], [math.nan], ["value 0 is nan, must be finite"]),
    "minus infinity": ([3], [-math.inf], ["value 0 is -inf, must be finite"]),
    "beyond floats": ([3], [-(10**400)], ["too large"]),
    "null logprob": ([3, 4], [None, -1.0], ["value 0 must be a number, got None"]),
    "too few logprobs": ([3, 4], [-1.0], ["has 1 logprobs, the response has 2 tokens"]),
    "logprobs of no tokens": ([], [-1.0], ["has 1 logprobs, the response has 0 tokens"]),
    "all at once": ([99] + [3] * 4, [9.0], ["token 0 is 99", "has 5 t", "has 1 l", "is 9.0"]),
}


@pytest.mark.parametrize("case", CASES)
def test_response_problems(case):
    ids, logprobs, parts = CASES[case]
    problems = response_problems(ids, logprobs, vocab_size=50, max_response_tokens=4)
    assert len(problems) == len(parts)
    assert all(part in problem for part, problem in zip(parts, problems))


def test_without_a_vocabulary_only_plausible_tokens():
    assert response_problems([2**31 - 1], None, vocab_size=None) == []
    (problem,) = response_problems([2**31], None, vocab_size=None)
    assert "token 0 is 2147483648" in problem


# No row asks for a number of tokens, and rows of empty responses have tests of their own.
@pytest.mark.parametrize("case", [c for c in CASES if CASES[c][0] and c != "too many"])
def test_recorded_rows_follow_the_same_rules(tmp_path, case):
    ids, logprobs, parts = CASES[case]
    row = {"prompt_ids": [1], "response_ids": ids, "rollout_logprobs": logprobs, "reward": 0}
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(row) + "\n")
    if not parts:
        assert read_rollouts(path, vocab_size=50)[0].samples[0].response_ids.tolist() == ids
        return
    with pytest.raises(ValueError, match="line 1"):
        read_rollouts(path, vocab_size=50)
