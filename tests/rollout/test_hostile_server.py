"""Seeded hostile servers: each reply is an error that names the prompt, or what was put into it."""

from __future__ import annotations

import copy
import gzip
import json
import math
import random
from dataclasses import dataclass, field
from typing import Any

import pytest

from megatron_pg.rollout import RolloutServerError
from tests.hostile import assert_both_occur, seeds

from .helpers import make_prompt
from .scripted import PARAMS, VOCAB_SIZE, generated
from .stand_in import completion

# Values of every JSON type, and those that are almost right.
ODD = (
    None, True, False, 0, 1, -1, 3.5, 1e400, math.nan, -math.inf, 2**31, 2**63, 10**30, "", "5",
    "token_id:5", "\ud800", "\x1b[31m", [], [5], [[5]], [None], {}, {"a": 1}, {"error": "no"},
)  # fmt: skip
REASONS = ("stop", "stop", "stop", "length", "abort", "error", "cancelled", None)


@dataclass
class Told:
    """What one response holds, and everything that is known to be wrong with it."""

    tokens: list[Any]
    logprobs: list[Any] | None
    reason: str | None
    faults: list[str] = field(default_factory=list)

    @property
    def is_aborted(self):
        return self.reason not in ("stop", "length") or not self.tokens


def draw_response(rng: random.Random) -> Told:
    """Values as an engine sends them; now and then one that no engine can mean."""
    count = rng.choice((0, 1, 2, 3, 4))
    tokens: list[Any] = [rng.randrange(VOCAB_SIZE) for _ in range(count)]
    logprobs: list[Any] = [-rng.random() * 9 for _ in range(count)]
    told = Told(tokens, logprobs, rng.choice(REASONS))
    if rng.random() < 0.12 and tokens:
        tokens[rng.randrange(count)] = rng.choice((VOCAB_SIZE, -1, 2**40, 5.0, True, "5", None))
        told.faults.append("token")
    if rng.random() < 0.12 and tokens:
        logprobs[rng.randrange(count)] = rng.choice((0.5, -9999.0, -math.inf, math.nan, None, "1"))
        told.faults += [] if told.is_aborted else ["logprob"]
    if rng.random() < 0.06:
        told.tokens, told.logprobs = [5] * 5, [-1.0] * 5
        told.faults = ["at most 4 were asked"]
    return told


def as_completion(told: Told, index: int, rng: random.Random) -> dict[str, Any]:
    choice = completion(told.tokens, told.reason, index=index)
    choice["logprobs"]["token_logprobs"] = told.logprobs
    if told.is_aborted and rng.random() < 0.5:
        choice["logprobs"] = rng.choice((None, {}, {"token_logprobs": None}))
    if not told.faults and all(type(token) is int for token in told.tokens) and rng.random() < 0.3:
        if choice["logprobs"] and "tokens" in choice["logprobs"]:
            choice["token_ids"] = None
        if not told.tokens:
            choice.pop("token_ids", None)
    return choice


def as_generated(told: Told, index: int, rng: random.Random) -> dict[str, Any]:
    one = generated(told.tokens, told.reason, output_ids=list(told.tokens))
    one["meta_info"]["output_token_logprobs"] = [
        [logprob, token, None] for logprob, token in zip(told.logprobs or [], told.tokens)
    ]
    if told.reason is None:
        one["meta_info"]["finish_reason"] = rng.choice((None, {"type": None}))
    if told.reason not in ("stop", "length") and rng.random() < 0.5:
        del one["meta_info"]["output_token_logprobs"]
    return one


def draw_answer(rng: random.Random, dialect: str) -> tuple[list[Told], Any]:
    """Three responses, and an answer that holds them and says nothing else that is wrong."""
    told = [draw_response(rng) for _ in range(PARAMS.num_generations)]
    if dialect == "sglang":
        return told, [as_generated(one, i, rng) for i, one in enumerate(told)]
    choices = [as_completion(one, i, rng) for i, one in enumerate(told)]
    rng.shuffle(choices)
    answer: dict[str, Any] = {"choices": choices, "model": "served", "object": "text_completion"}
    if rng.random() < 0.5:
        received = sum(len(one.tokens) for one in told)
        answer["usage"] = {"prompt_tokens": 2, "completion_tokens": received}
    return told, answer


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place of a JSON value."""
    if not isinstance(value, dict | list):
        return [path]
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return [path, *(place for key, inner in items for place in places(inner, (*path, key)))]


def mutate(answer: Any, rng: random.Random) -> tuple[Any, str]:
    """The answer with one place removed, doubled or replaced; and which."""
    answer = {"": copy.deepcopy(answer)}
    path = ("", *rng.choice(places(answer[""])))
    at: Any = answer
    for key in path[:-1]:
        at = at[key]
    kind = rng.choice(("replace", "replace", "remove", "double"))
    if kind == "double" and isinstance(at, list):
        at.insert(path[-1], copy.deepcopy(at[path[-1]]))
    elif kind == "remove" and len(path) > 1:
        del at[path[-1]]
    else:
        at[path[-1]] = rng.choice(ODD)
    return answer[""], f"{kind} {path}"


def outcome(script, reply):
    """Responses, or the message of an error of the one kind that may come."""
    script.reply = reply
    try:
        (responses,) = script.source.generate([make_prompt()], PARAMS)
    except RolloutServerError as error:
        message = str(error)
        assert message.startswith(f"{script.url}{script.path}: prompt 'p0': "), message
        assert message.isprintable() and len(message) < 900
        assert "Traceback" not in message
        return message
    return responses


def assert_is(one, told: Told) -> None:
    """The response holds exactly what the generator put in."""
    trains = not told.is_aborted
    assert one.response_ids.tolist() == told.tokens
    assert one.status == (
        {"stop": "completed", "length": "truncated"}[str(told.reason)] if trains else "aborted"
    )
    if trains:
        assert one.rollout_logprobs.tolist() == told.logprobs and one.loss_mask is None
    else:
        assert one.rollout_logprobs is None and not one.loss_mask.any()


def reads_true(one) -> bool:
    """What holds for every response that is accepted, whatever was put in."""
    tokens = one.response_ids.tolist()
    in_range = all(0 <= token < VOCAB_SIZE for token in tokens)
    is_short = len(tokens) <= PARAMS.max_response_tokens
    if one.status == "aborted":
        return in_range and is_short and not one.loss_mask.any()
    logprobs = one.rollout_logprobs.tolist()
    return (
        in_range
        and is_short
        and 0 < len(tokens) == len(logprobs)
        and all(-1000 <= logprob <= 1e-3 for logprob in logprobs)
    )


@pytest.fixture(params=["vllm", "sglang"])
def exact_server(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("seed", seeds())
def test_hostile_values(exact_server, seed):
    check_values(exact_server, seed)


def check_values(server: Any, seed: int) -> bool:
    """Whether the answer of a seed was accepted; it must be what the family says of it."""
    rng = random.Random(f"values/{server.dialect}/{seed}")
    told, answer = draw_answer(rng, server.dialect)
    got = outcome(server, (200, answer))
    faults = [(number, fault) for number, one in enumerate(told) for fault in one.faults]
    if not faults:
        assert not isinstance(got, str), got
        for one, expected in zip(got, told, strict=True):
            assert_is(one, expected)
        return True
    assert isinstance(got, str), f"accepted {faults}"
    for number, fault in faults:
        assert f"response {number} " in got and fault in got, (faults, got)
    return False


@pytest.mark.parametrize("seed", seeds())
def test_hostile_structure(exact_server, seed):
    check_structure(exact_server, seed)


def check_structure(server: Any, seed: int) -> bool:
    """Whether the answer of a seed was accepted; it must be what the family says of it."""
    rng = random.Random(f"structure/{server.dialect}/{seed}")
    told, answer = draw_answer(rng, server.dialect)
    while any(one.faults for one in told):
        told, answer = draw_answer(rng, server.dialect)
    changed, what = mutate(answer, rng)
    got = outcome(server, (200, changed))
    if isinstance(got, str):
        # As text: in Python true equals 1.
        assert json.dumps(changed) != json.dumps(answer), got
        return False
    assert len(got) == PARAMS.num_generations
    for one, expected in zip(got, told):
        assert reads_true(one), what
        # Only what is nowhere said twice can change unseen: one field of one response.
        same = one.response_ids.tolist() == expected.tokens
        assert same or one.status == "aborted" or "logprobs" in what or "token_ids" in what, what
    return True


def draw_body(rng: random.Random, answer: Any) -> tuple[bytes, dict[str, str], bool]:
    """Bytes, headers, and whether the answer is still whole in them."""
    data = json.dumps(answer).encode()
    kind = rng.choice(("cut", "flip", "append", "deep", "gzip", "cut gzip", "bom", "blank", "wrap"))
    if kind == "cut":
        return data[: rng.randrange(len(data))], {}, False
    if kind == "flip":
        place = rng.randrange(len(data))
        return data[:place] + bytes([rng.randrange(128, 256)]) + data[place + 1 :], {}, False
    if kind == "append":
        return data + rng.choice((b"}", b"\x00", b"\xff", b" x", b"{}")), {}, False
    if kind == "deep":
        depth = rng.choice((500, 5_000, 100_000))
        return b'{"choices": ' + b"[" * depth + b"]" * depth + b"}", {}, False
    if kind == "gzip":
        return gzip.compress(data), {"Content-Encoding": "gzip"}, True
    if kind == "cut gzip":
        packed = gzip.compress(data)
        # Its last bytes are an end mark and a checksum, without which the answer is whole.
        return packed[: rng.randrange(len(packed) - 20)], {"Content-Encoding": "gzip"}, False
    if kind == "bom":
        return b"\xef\xbb\xbf" + data, {}, True
    if kind == "blank":
        return b" \r\n\t" * rng.randrange(9) + data + b"\n", {"Content-Type": "text/html"}, True
    return json.dumps([answer, answer][: rng.choice((1, 2))] * 2).encode(), {}, False


@pytest.mark.parametrize("seed", seeds())
def test_hostile_bodies(vllm, seed):
    check_bodies(vllm, seed)


def check_bodies(server: Any, seed: int) -> bool:
    """Whether the answer of a seed was accepted; it must be what the family says of it."""
    rng = random.Random(f"body/{seed}")
    told = [Told([5, 6], [-0.5, -1.0], "stop") for _ in range(3)]
    body, headers, is_whole = draw_body(rng, server.good())
    status = rng.choice((200, 200, 200, 200, 200, 201, 302, 400, 401, 404, 413, 422, 429, 500, 503))
    got = outcome(server, (status, body, headers))
    if is_whole and status < 300:
        for one, expected in zip(got, told, strict=True):
            assert_is(one, expected)
        return True
    assert isinstance(got, str), "accepted what was not sent"
    assert status < 300 or f"status {status}" in got
    return False


@pytest.mark.parametrize("check", [check_values, check_structure, check_bodies])
def test_each_family_has_both_outcomes(vllm, check):
    assert_both_occur([check(vllm, seed) for seed in range(40)])
