"""The forms that answers of inference servers have, read field by field.

A server may be another version, another engine or a proxy: every field is taken by its type, and
what an answer says twice has to agree. Of an aborted response only the finish reason is needed.
"""

from __future__ import annotations

import re
import reprlib
from types import NoneType
from typing import Any

from .answers import Answer, RawResponse, status_of
from .dialects import Dialect

_TOKEN_ID_PREFIX = "token_id:"
_TYPE_NAMES = {
    str: "text",
    int: "an integer",
    list: "a list",
    dict: "an object",
    NoneType: "null",
}


class MalformedAnswerError(ValueError):
    """A server's answer does not have the form of its dialect."""


def read_answer(dialect: Dialect, answer: Any) -> Answer:
    """A server's answer by its form.

    Raises:
        MalformedAnswerError: naming the field that is missing, has another type or contradicts
            another, or what the server says of its own failure.
    """
    if answer is None:
        raise MalformedAnswerError("the answer is empty")
    if dialect == "sglang":
        return _read_generate(answer if isinstance(answer, list) else [answer])
    return _read_completions(answer, with_tokens=dialect == "token_ids")


def _read_completions(answer: Any, *, with_tokens: bool) -> Answer:
    _raise_reported(answer)
    responses: dict[int, RawResponse] = {}
    prompts = []
    choices = _take("the answer", answer, "choices", list)
    # SGLang puts those of the first choice beside the choices.
    extension = _take_if("the answer", answer, "sglext", dict) or {}
    for place, choice in enumerate(choices):
        where = f"choices[{place}]"
        _raise_reported(choice)
        index = _take(where, choice, "index", int)
        if index in responses:
            raise MalformedAnswerError(f"two choices have index {index}")
        beside = extension.get("routed_experts") if index == 0 else None
        responses[index] = _read_choice(where, choice, with_tokens, beside)
        ids = _take_if(where, choice, "prompt_token_ids", list) if with_tokens else None
        if ids is not None and responses[index].status != "aborted":
            prompts.append(ids)
    if sorted(responses) != list(range(len(responses))):
        raise MalformedAnswerError(
            f"choices have the indices {reprlib.repr(sorted(responses))}, must count from 0"
        )
    usage = _take_if("the answer", answer, "usage", dict) or {}
    prompt_tokens = _take_if("usage", usage, "prompt_tokens", int)
    # A request that was aborted in the queue counts none.
    is_counted = all(raw.status != "aborted" for raw in responses.values())
    return Answer(
        responses=[responses[index] for index in sorted(responses)],
        model=_take_if("the answer", answer, "model", str),
        prompt_lens=(prompt_tokens,) if is_counted and prompt_tokens is not None else (),
        prompts=prompts,
        num_generated=_take_if("usage", usage, "completion_tokens", int),
    )


def _read_choice(where: str, choice: dict[str, Any], with_tokens: bool, routes: Any) -> RawResponse:
    reason = _take(where, choice, "finish_reason", str, NoneType)
    is_aborted = status_of(reason) == "aborted"
    text = _take_text(where, choice, is_aborted)
    if not with_tokens:
        return RawResponse(None, None, text, reason)
    token_ids = _take_if(where, choice, "token_ids", list)
    table = _take_if(where, choice, "logprobs", dict)
    routes = choice.get("routed_experts", routes)
    if table is None:
        return RawResponse(token_ids, None, text, reason, routes=routes)
    named = _ids_from_strings(_take_if(f"{where}.logprobs", table, "tokens", list))
    logprobs = _take_if(f"{where}.logprobs", table, "token_logprobs", list)
    return RawResponse(
        token_ids=named if token_ids is None else token_ids,
        logprobs=None if is_aborted else logprobs,
        text=text,
        finish_reason=reason,
        other_ids=named,
        routes=routes,
    )


def _read_generate(choices: list[Any]) -> Answer:
    responses, prompt_lens = [], []
    for number, choice in enumerate(choices):
        where = "the answer" if len(choices) == 1 else f"answer[{number}]"
        _raise_reported(choice)
        meta = _take(where, choice, "meta_info", dict)
        raw = _read_generated(where, choice, meta)
        responses.append(raw)
        prompt_tokens = _take_if(f"{where}.meta_info", meta, "prompt_tokens", int)
        if prompt_tokens is not None and raw.status != "aborted":
            prompt_lens.append(prompt_tokens)
    return Answer(responses=responses, prompt_lens=prompt_lens)


def _read_generated(where: str, choice: dict[str, Any], meta: dict[str, Any]) -> RawResponse:
    finish = _take(f"{where}.meta_info", meta, "finish_reason", dict, NoneType)
    reason = None
    if finish is not None:
        reason = _take(f"{where}.meta_info.finish_reason", finish, "type", str, NoneType)
    is_aborted = status_of(reason) == "aborted"
    text = _take_text(where, choice, is_aborted)
    output_ids = _take_if(where, choice, "output_ids", list)
    if is_aborted or not (text or output_ids or meta.get("output_token_logprobs")):
        return RawResponse(output_ids, None, text, reason)
    # The pairs hold the end token too, which output_ids may lack.
    pairs = _take(f"{where}.meta_info", meta, "output_token_logprobs", list)
    for place, pair in enumerate(pairs):
        if not isinstance(pair, list) or len(pair) < 2:
            raise MalformedAnswerError(
                f"{where}.meta_info.output_token_logprobs[{place}] is {_show(pair)}, must be a "
                "list of a logprob and a token id"
            )
    token_ids = [pair[1] for pair in pairs]
    logprobs = [pair[0] for pair in pairs]
    routes = meta.get("routed_experts")
    return RawResponse(token_ids, logprobs, text, reason, other_ids=output_ids, routes=routes)


def _take(where: str, record: Any, name: str, *kinds: type) -> Any:
    """Field of a JSON object; null counts as missing unless ``kinds`` has it."""
    if not isinstance(record, dict):
        raise MalformedAnswerError(f"{where} is {_show(record)}, must be an object")
    if name not in record:
        raise MalformedAnswerError(f"{where} has no {name!r}")
    # By type, not isinstance: true is no integer.
    if type(record[name]) not in kinds:
        names = " or ".join(_TYPE_NAMES[kind] for kind in kinds)
        raise MalformedAnswerError(f"{where}.{name} is {_show(record[name])}, must be {names}")
    return record[name]


def _take_if(where: str, record: Any, name: str, kind: type) -> Any:
    """Field of a JSON object, None if it is missing or null."""
    if isinstance(record, dict) and record.get(name) is None:
        return None
    return _take(where, record, name, kind)


def _take_text(where: str, choice: dict[str, Any], is_aborted: bool) -> str:
    take = _take_if if is_aborted else _take
    text: str = take(where, choice, "text", str) or ""
    # JSON can escape half of a surrogate pair, which no tokenizer, file or terminal takes.
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise MalformedAnswerError(
            f"{where}.text is no Unicode: half a surrogate pair at {error.start}"
        ) from error
    return text


def _raise_reported(record: Any) -> None:
    """Raise what the server itself reports as an error under a status of success."""
    if not isinstance(record, dict):
        return
    error = record.get("error")
    if error is None and record.get("object") == "error":
        error = record
    if error is not None:
        said = error.get("message") if isinstance(error, dict) else error
        said = said if isinstance(said, str) else reprlib.repr(error)
        raise MalformedAnswerError(f"the server reports an error: {said}")


def _ids_from_strings(tokens: list[Any] | None) -> list[Any] | None:
    """17 of "token_id:17", any other ending as it is; None if the server has no such names."""
    if tokens is None:
        return None
    ids: list[Any] = []
    for token in tokens:
        if not (isinstance(token, str) and token.startswith(_TOKEN_ID_PREFIX)):
            return None
        digits = token.removeprefix(_TOKEN_ID_PREFIX)
        # int() would take blanks, underscores and other scripts' digits too.
        ids.append(int(digits) if re.fullmatch("-?[0-9]{1,19}", digits) else token)
    return ids


def _show(value: Any) -> str:
    return f"{reprlib.repr(value)} ({type(value).__name__})"
