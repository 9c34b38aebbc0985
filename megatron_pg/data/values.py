"""What the values of a response may be, whichever source they come from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

# Rounding in the rollout engine may leave a logprob of a sure token slightly above 0.
LOGPROB_SLACK = 1e-3
# A token this unlikely (1e-434) is never sampled, and the softmax of fp32 logits has no number for
# it (the smallest is about exp(-103)). Engines write placeholders below: vLLM -9999.
LEAST_LOGPROB = -1000.0
# Ids beyond this fit into no tokenizer and, worse, not into int32 kernels.
MAX_TOKEN_ID = 2**31 - 1
# Deeper values end in the interpreter's RecursionError sooner or later, by the depth of the stack
# and by a limit that libraries change (PyTorch's compiler does).
MAX_NESTING = 64
TOO_DEEP = f"is nested too deeply, at most {MAX_NESTING} levels are read"
_NESTED = (dict, list, tuple)
_SCALARS = frozenset({int, float, bool, str, type(None)})


def response_problems(
    response_ids: Sequence[Any],
    logprobs: Sequence[Any] | None,
    *,
    vocab_size: int | None,
    max_response_tokens: int | None = None,
) -> list[str]:
    """What keeps a response from being trained, empty when nothing does; the caller adds the place.

    A response without tokens has no problem: it trains nothing. Recorded rows and the replies of
    servers are held to the same rules.

    Args:
        response_ids: integers in [0, ``vocab_size``).
        logprobs: one finite number in [-1000, 0] per token (rounding above 0 is let pass, a
            placeholder for an unknown logprob is not), or None.
        vocab_size: None checks only that the tokens are plausible.
        max_response_tokens: most tokens that were asked for; None asks for no number.
    """
    problems = []
    if wrong := token_problem(response_ids, vocab_size):
        problems.append(wrong)
    if max_response_tokens is not None and len(response_ids) > max_response_tokens:
        problems.append(f"has {len(response_ids)} tokens, at most {max_response_tokens} were asked")
    if logprobs is None:
        return problems
    if len(logprobs) != len(response_ids):
        count = len(response_ids)
        problems.append(f"has {len(logprobs)} logprobs, the response has {count} tokens")
    if wrong := logprob_problem(logprobs):
        problems.append(f"logprob {wrong}")
    return problems


def token_problem(ids: Sequence[Any], vocab_size: int | None) -> str | None:
    """What is wrong with the first wrong token id; None when nothing is."""
    if not len(ids):
        return None
    if not set(map(type, ids)) <= {int}:
        where = next(i for i, token in enumerate(ids) if type(token) is not int)
        return f"token {where} is {show(ids[where])}, must be an integer"
    limit = MAX_TOKEN_ID + 1 if vocab_size is None else vocab_size
    if min(ids) >= 0 and max(ids) < limit:
        return None
    where = next(i for i, token in enumerate(ids) if not 0 <= token < limit)
    named = "" if vocab_size is None else f", vocab_size is {vocab_size}"
    return f"token {where} is {shorten(ids[where])}, must lie in [0, vocab_size){named}"


def logprob_problem(logprobs: Sequence[Any]) -> str | None:
    """What is wrong with the first wrong logprob; None when nothing is."""
    if wrong := numbers_problem(logprobs):
        return wrong
    if not len(logprobs) or LEAST_LOGPROB <= min(logprobs) <= max(logprobs) <= LOGPROB_SLACK:
        return None
    where = next(i for i, x in enumerate(logprobs) if not LEAST_LOGPROB <= x <= LOGPROB_SLACK)
    if logprobs[where] > 0:
        return f"value {where} is {shorten(logprobs[where])}, a logprob is at most 0"
    return (
        f"value {where} is {shorten(logprobs[where])}, a placeholder: no token is sampled with a "
        f"logprob below {LEAST_LOGPROB:g}; leave the logprobs out"
    )


def numbers_problem(values: Sequence[Any]) -> str | None:
    """What is wrong with the first value that is no finite number; None when all are."""
    # The usual case without a Python call per value.
    if set(map(type, values)) == {float} and all(map(math.isfinite, values)):
        return None
    for i, number in enumerate(values):
        if wrong := number_problem(number):
            return f"value {i} {wrong}"
    return None


def reward_problem(value: Any) -> str | None:
    """What keeps a value from being a reward, a finite number or a boolean; None when nothing."""
    return None if type(value) is bool else number_problem(value)


def weight_problem(value: Any) -> str | None:
    """What keeps a value from being a weight, a finite number above 0; None when nothing does."""
    if wrong := number_problem(value):
        return wrong
    return None if value > 0 else f"is {shorten(value)}, must be above 0; mask what is not trained"


def number_problem(value: Any) -> str | None:
    """What keeps a value from being a finite number; None when nothing does."""
    if type(value) not in (int, float):
        return f"must be a number, got {show(value)}"
    try:
        return None if math.isfinite(value) else f"is {value}, must be finite"
    except OverflowError:
        return "is too large for a floating-point number"


def nesting_problem(value: Any) -> str | None:
    """What is wrong with lists and dicts in each other more than ``MAX_NESTING`` deep.

    Walks no container twice on one level: pickles may hold one list at many places, or in itself.
    """
    level = [value] if isinstance(value, _NESTED) else []
    for _ in range(MAX_NESTING):
        held: dict[int, Any] = {}
        for outer in level:
            values = outer.values() if isinstance(outer, dict) else outer
            if not _SCALARS.issuperset(map(type, values)):
                held |= {id(inner): inner for inner in values if isinstance(inner, _NESTED)}
        if not held:
            return None
        level = list(held.values())
    return TOO_DEEP


def show(value: Any) -> str:
    """A value and its type, shortened for a message."""
    return f"{shorten(value)} ({type(value).__name__})"


def shorten(value: Any) -> str:
    """A value in at most 40 letters."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply; an integer of thousands of digits
        return "a value too large to be shown"
    return text if len(text) <= 40 else text[:37] + "..."
