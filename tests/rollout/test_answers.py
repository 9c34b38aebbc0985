"""What servers answer: refused with the prompt named, or exactly what they sent."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from megatron_pg.rollout import (
    OpenAIServerSource,
    Prompt,
    RolloutServerError,
    SamplingParams,
)
from megatron_pg.rollout.answer_forms import read_answer
from megatron_pg.rollout.answers import answer_problems

from .helpers import make_prompt
from .scripted import PARAMS, generated
from .stand_in import completion


def sample(script, answer, status=200):
    script.reply = (status, answer)
    (of_prompt,) = script.source.generate([make_prompt()], PARAMS)
    return of_prompt


def refusal(script, answer, status=200):
    with pytest.raises(RolloutServerError) as caught:
        sample(script, answer, status)
    assert "prompt 'p0': " in str(caught.value)
    assert caught.value.url == script.url + script.path
    return str(caught.value)


def test_a_good_answer_is_taken_as_it_is(any_server):
    responses = sample(any_server, any_server.good())
    if any_server.dialect == "text":
        assert [one.response_ids.tolist() for one in responses] == [[97, 98, 1]] * 3
        return
    assert [one.response_ids.tolist() for one in responses] == [[5, 6]] * 3
    assert [one.rollout_logprobs.tolist() for one in responses] == [[-0.5, -1.0]] * 3
    assert {one.status for one in responses} == {"completed"}


def choices(**changes):
    """Changes the second of three choices."""

    def change(answer):
        answer["choices"][1] |= changes

    return change


def logprobs(**changes):
    def change(answer):
        answer["choices"][1]["logprobs"] |= changes

    return change


def at_top(**changes):
    return lambda answer: answer.update(changes)


# name -> what is changed in a good answer, and what the refusal says
COMPLETIONS = {
    "beyond the vocabulary": (choices(**completion([5, 50], index=1)), "token 1 is 50, must lie"),
    "negative token": (choices(**completion([5, -1], index=1)), "token 1 is -1"),
    "float token": (choices(token_ids=[5, 6.0]), "token 1 is 6.0 (float), must be an integer"),
    "bool token": (choices(token_ids=[5, True]), "token 1 is True (bool)"),
    "text token": (choices(token_ids=["5", "6"]), "token 0 is '5' (str)"),
    "null token": (choices(token_ids=[5, None]), "token 1 is None"),
    "nested token": (choices(token_ids=[[5], [6]]), "token 0 is [5] (list)"),
    "token names for ids": (choices(token_ids=["token_id:5", "token_id:6"]), "token 0 is 'tok"),
    "tokens are text": (choices(token_ids="56"), "choices[1].token_ids is '56' (str), must be a"),
    "tokens are an object": (choices(token_ids={"0": 5}), "choices[1].token_ids is {'0': 5}"),
    "more tokens than asked": (choices(**completion([5] * 5, index=1)), "has 5 tokens, at most 4"),
    "positive logprob": (logprobs(token_logprobs=[-0.1, 0.5]), "value 1 is 0.5, a logprob is at"),
    "placeholder": (logprobs(token_logprobs=[-0.1, -9999.0]), "value 1 is -9999.0, a placeholder"),
    "infinite logprob": (logprobs(token_logprobs=[-0.1, -math.inf]), "value 1 is -inf"),
    "nan logprob": (logprobs(token_logprobs=[math.nan, -0.1]), "value 0 is nan"),
    "null logprob": (logprobs(token_logprobs=[-0.1, None]), "logprob value 1 must be a number"),
    "text logprob": (logprobs(token_logprobs=["-0.1", -0.1]), "logprob value 0 must be a number"),
    "fewer logprobs": (logprobs(token_logprobs=[-0.1]), "has 1 logprobs, the response has"),
    "more logprobs": (logprobs(token_logprobs=[-0.1] * 3), "has 3 logprobs, the response has 2"),
    "logprobs are null": (logprobs(token_logprobs=None), "1 comes without logprobs"),
    "logprobs are an object": (logprobs(token_logprobs={"0": -0.1}), "token_logprobs is {'0'"),
    "logprobs are a number": (choices(logprobs=-0.5), "choices[1].logprobs is -0.5 (float), must"),
    "logprobs are left out": (choices(logprobs=None), "response 1 comes without logprobs"),
    "no tokens": (choices(token_ids=None, logprobs=None), "response 1 comes without token ids"),
    "text without tokens": (choices(token_ids=[], logprobs=None), "response 1 comes without token"),
    "two names of tokens": (
        logprobs(tokens=["token_id:5", "token_id:7"]),
        "response 1 has two fields that name different tokens",
    ),
    "odd token name": (logprobs(tokens=["token_id:5", "token_id:+6"]), "name different tokens"),
    "odd token names only": (
        lambda a: (logprobs(tokens=["token_id:5", "token_id:6_0"])(a), choices(token_ids=None)(a)),
        "token 1 is 'token_id:6_0' (str), must be an integer",
    ),
    "token names are numbers": (
        lambda a: (logprobs(tokens=[5, 6])(a), choices(token_ids=None)(a)),
        "comes without token ids",
    ),
    "one choice less": (lambda a: a["choices"].pop(), "2 responses instead of 3"),
    "one choice more": (
        lambda a: a["choices"].append(completion([5, 6], index=3)),
        "4 responses instead of 3",
    ),
    "no choices": (at_top(choices=[]), "0 responses instead of 3"),
    "choices are null": (at_top(choices=None), "the answer.choices is None (NoneType), must be a"),
    "choices are an object": (at_top(choices={"0": {}}), "the answer.choices is {'0'"),
    "a choice is text": (lambda a: a["choices"].append("x"), "choices[3] is 'x' (str), must be an"),
    "an index twice": (choices(index=0), "two choices have index 0"),
    "an index beyond": (choices(index=7), "choices have the indices [0, 2, 7], must count from 0"),
    "a negative index": (choices(index=-1), "indices [-1, 0, 2]"),
    "an index of text": (choices(index="1"), "choices[1].index is '1' (str), must be an integer"),
    "a bool index": (choices(index=True), "choices[1].index is True (bool), must be an integer"),
    "no index": (lambda a: a["choices"][1].pop("index"), "choices[1] has no 'index'"),
    "no finish reason": (lambda a: a["choices"][1].pop("finish_reason"), "has no 'finish_reason'"),
    "a finish reason in numbers": (choices(finish_reason=1), "must be text or null"),
    "no text": (lambda a: a["choices"][1].pop("text"), "choices[1] has no 'text'"),
    "text is null": (choices(text=None), "choices[1].text is None (NoneType), must be text"),
    "text is a list": (choices(text=["a"]), "choices[1].text is ['a'] (list), must be text"),
    "half a surrogate pair": (choices(text="ok \ud83d"), "half a surrogate pair at 3"),
    "prompt was cut": (at_top(usage={"prompt_tokens": 1}), "counts 1 prompt tokens where 2 were"),
    "prompt grew": (at_top(usage={"prompt_tokens": 3}), "counts 3 prompt tokens where 2 were sent"),
    "another prompt": (choices(prompt_token_ids=[100, 8]), "prompt_token_ids are not the tokens"),
    "prompt is echoed": (at_top(usage={"completion_tokens": 4}), "6 token ids came where the"),
    "usage is text": (at_top(usage="none"), "the answer.usage is 'none' (str), must be an object"),
    "usage counts in text": (at_top(usage={"prompt_tokens": "2"}), "usage.prompt_tokens is '2'"),
    "another model": (at_top(model="other"), "model 'other' answered, 'served' did before"),
    "model is a number": (at_top(model=3), "the answer.model is 3 (int), must be text"),
    "an error": (at_top(error={"message": "CUDA out of memory"}), "reports an error: CUDA out of"),
    "an error in a choice": (choices(error="worker died"), "reports an error: worker died"),
}  # fmt: skip


@pytest.mark.parametrize("case", COMPLETIONS)
def test_completions_are_refused(vllm, case):
    change, complaint = COMPLETIONS[case]
    answer = vllm.good()
    change(answer)
    assert complaint in refusal(vllm, answer)


def generate(**changes):
    def change(answer):
        answer[1] |= changes

    return change


def meta(**changes):
    def change(answer):
        answer[1]["meta_info"] |= changes

    return change


def pairs(*values):
    return meta(output_token_logprobs=list(values))


GENERATE = {
    "beyond the vocabulary": (generate(**generated([5, 50])), "token 1 is 50"),
    "float token": (pairs([-0.5, 5, None], [-0.5, 6.5, None]), "token 1 is 6.5 (float)"),
    "more tokens than asked": (generate(**generated([5] * 5)), "has 5 tokens, at most 4"),
    "positive logprob": (pairs([-0.5, 5, None], [1.0, 6, None]), "value 1 is 1.0"),
    "null logprob": (pairs([-0.5, 5, None], [None, 6, None]), "logprob value 1 must be a number"),
    "a pair of one": (pairs([-0.5, 5, None], [-0.5]), "output_token_logprobs[1] is [-0.5] (list)"),
    "a pair that is a number": (pairs(-0.5, -0.6), "output_token_logprobs[0] is -0.5 (float)"),
    "pairs are null": (meta(output_token_logprobs=None), "output_token_logprobs is None"),
    "no pairs": (lambda a: a[1]["meta_info"].pop("output_token_logprobs"), "has no 'output_token"),
    "text without tokens": (pairs(), "response 1 comes without token ids"),
    "two names of tokens": (generate(output_ids=[9]), "two fields that name different tokens"),
    "no finish reason": (lambda a: a[1]["meta_info"].pop("finish_reason"), "no 'finish_reason'"),
    "a finish reason of text": (meta(finish_reason="stop"), "finish_reason is 'stop' (str)"),
    "a finish reason without type": (meta(finish_reason={"length": 3}), "has no 'type'"),
    "an empty finish reason": (meta(finish_reason={}), "finish_reason has no 'type'"),
    "no meta_info": (lambda a: a[1].pop("meta_info"), "answer[1] has no 'meta_info'"),
    "text is missing": (lambda a: a[1].pop("text"), "answer[1] has no 'text'"),
    "one response less": (lambda a: a.pop(), "2 responses instead of 3"),
    "prompt was cut": (meta(prompt_tokens=1), "counts 1 prompt tokens where 2 were sent"),
    "a response is null": (lambda a: a.append(None), "answer[3] is None"),
    "an error in a response": (generate(error={"message": "queue full"}), "an error: queue full"),
}  # fmt: skip


@pytest.mark.parametrize("case", GENERATE)
def test_generate_is_refused(sglang, case):
    change, complaint = GENERATE[case]
    answer = sglang.good()
    change(answer)
    assert complaint in refusal(sglang, answer)


TEXT = {
    "more tokens than asked": (at_top(usage={"completion_tokens": 13}), "13 tokens were generated"),
    "text is null": (choices(text=None), "choices[1].text is None"),
    "half a surrogate pair": (choices(text="\udc00"), "half a surrogate pair at 0"),
    "one choice less": (lambda a: a["choices"].pop(), "2 responses instead of 3"),
    "an index twice": (choices(index=2), "two choices have index 2"),
}


@pytest.mark.parametrize("case", TEXT)
def test_text_is_refused(text, case):
    change, complaint = TEXT[case]
    answer = text.good()
    change(answer)
    assert complaint in refusal(text, answer)


BODIES = {
    "empty": (200, b"", "the answer is empty"),
    "no content": (204, b"", "the answer is empty"),
    "null": (200, "null", "the answer is empty"),
    "html": (200, "<html><body>Bad gateway</body></html>", "no JSON: '<html><body>Bad gateway"),
    "half a JSON": (200, '{"choices": [{"index": 0, "te', "no JSON"),
    "no UTF-8": (200, b'{"choices": "\xff\xfe"}', "no JSON"),
    "nested deeply": (200, "[" * 100_000 + "]" * 100_000, "no JSON: '[[["),
    "a number of many digits": (200, '{"choices": ' + "9" * 5000 + "}", "no JSON"),
    "a list": (200, "[1, 2]", "must be an object"),
    "text": (200, '"overloaded"', "is 'overloaded' (str), must be an object"),
    "a number": (200, "7", "is 7 (int), must be an object"),
    "an error object": (200, '{"object": "error", "message": "CUDA out of memory", "code": 500}',
                        "reports an error: CUDA out of memory"),
    "an error of text": (200, '{"error": "no worker"}', "reports an error: no worker"),
    "an error of numbers": (200, '{"error": {"code": 5}}', "reports an error: {'code': 5}"),
    "another API": (200, '{"detail": "no choices here"}', "the answer has no "),
    "bad request": (400, '{"message": "context length is 16"}', "status 400: {\"message\": \"con"),
    "unauthorized": (401, "who are you", "status 401 (set api_key): who are you"),
    "forbidden": (403, "", "status 403 (set api_key)"),
    "no model": (404, "no model `x`.", "status 404: no model `x`."),
    "too large": (413, "", "status 413 (the server, or a proxy before it, must"),
    "unprocessable": (422, "what", "status 422: what"),
    "busy": (429, "later", "gave up after 2 attempts; last: status 429: later"),
    "broken": (500, "boom\x1b[31m\nred\x00", "last: status 500: boom [31m red"),
    "loading": (503, "loading", "gave up after 2 attempts; last: status 503: loading"),
    "of no known status": (599, "what", "status 599: what"),
}  # fmt: skip


@pytest.mark.parametrize("case", BODIES)
def test_bodies_are_refused(any_server, case):
    status, body, complaint = BODIES[case]
    message = refusal(any_server, body, status)
    assert complaint in message
    assert message.isprintable() and len(message) < 900


# name -> fields of one choice that came to nothing
ABORTED_CHOICES = {
    "vllm": completion([], "abort"),
    "without logprobs": completion([], "abort", logprobs=None),
    "without tokens": completion([], "abort", token_ids=None, logprobs=None),
    "text is null": completion([], "abort", text=None, token_ids=None, logprobs=None),
    "null": completion([], None),
    "error": completion([], "error", logprobs={}),
    "unknown": completion([], "cancelled"),
    "cut at once": completion([], "length"),
    "ended at once": completion([], "stop"),
    "with tokens": completion([5, 6], "abort"),
    "with tokens, logprobs null": completion([5, 6], "abort", logprobs={"token_logprobs": [None]}),
    "only its reason": {"index": 0, "finish_reason": "abort"},
}


def assert_second_is_aborted(responses, tokens):
    first, one, last = responses
    assert (one.status, one.response_ids.tolist()) == ("aborted", tokens)
    assert one.loss_mask.tolist() == [False] * len(tokens)
    assert one.rollout_logprobs is None
    for other in (first, last):
        assert (other.status, other.response_ids.tolist()) == ("completed", [5, 6])
        assert other.rollout_logprobs.tolist() == [-0.5, -1.0] and other.loss_mask is None


@pytest.mark.parametrize("case", ABORTED_CHOICES)
def test_an_aborted_completion_trains_nothing_and_its_group_goes_on(vllm, case):
    answer = vllm.good()
    answer["choices"][1] = copy.deepcopy(ABORTED_CHOICES[case]) | {"index": 1}
    responses = sample(vllm, answer)
    assert_second_is_aborted(responses, [5, 6] if "with tokens" in case else [])
    assert responses[1].metadata["finish_reason"] == ABORTED_CHOICES[case]["finish_reason"]


ABORTED_GENERATE = {
    "in the queue": {"text": "", "output_ids": [], "meta_info": {
        "finish_reason": {"type": "abort", "message": "Abort in waiting queue"},
        "prompt_tokens": 0, "completion_tokens": 0}},
    "without output_ids": {"text": "", "meta_info": {"finish_reason": {"type": "abort"}}},
    "without text": {"meta_info": {"finish_reason": {"type": "abort"}}},
    "null": {"text": "", "output_ids": [], "meta_info": {"finish_reason": None}},
    "of null": {"text": "", "meta_info": {"finish_reason": {"type": None}}},
    "empty": generated([], "abort"),
    "cut at once": generated([], "length"),
    "cut at once, without pairs": {
        "text": "", "output_ids": [], "meta_info": {"finish_reason": {"type": "length"}}},
    "ended at once": generated([], "stop"),
    "with tokens": generated([5, 6], "abort", output_ids=[5, 6]),
}  # fmt: skip


@pytest.mark.parametrize("case", ABORTED_GENERATE)
def test_an_aborted_generation_trains_nothing_and_its_group_goes_on(sglang, case):
    answer = sglang.good()
    answer[1] = ABORTED_GENERATE[case]
    assert_second_is_aborted(sample(sglang, answer), [5, 6] if case == "with tokens" else [])


def test_an_aborted_response_still_has_tokens_of_the_vocabulary(vllm):
    answer = vllm.good()
    answer["choices"][1] = completion([5, 99], "abort", index=1)
    assert "response 1 token 1 is 99" in refusal(vllm, answer)


@pytest.mark.parametrize(
    ("words", "reason", "tokens"), [("", "stop", []), ("", "length", []), ("ab", "abort", [97, 98])]
)
def test_aborted_and_empty_text_trains_nothing(text, words, reason, tokens):
    answer = text.good()
    answer["choices"][1] |= {"text": words, "finish_reason": reason}
    first, one, _ = sample(text, answer)
    assert (one.status, one.response_ids.tolist()) == ("aborted", tokens)
    assert one.loss_mask.tolist() == [False] * len(tokens)
    assert first.response_ids.tolist() == [97, 98, 1]


def test_a_group_of_which_everything_is_aborted(vllm):
    answer = vllm.good()
    answer["choices"] = [completion([], "abort", index=i) for i in range(3)]
    answer["usage"] = {"prompt_tokens": 2, "completion_tokens": 0}
    assert {one.status for one in sample(vllm, answer)} == {"aborted"}


def test_every_problem_of_an_answer_is_told(vllm):
    answer = vllm.good()
    choices(**completion([5, 99], index=1))(answer)
    logprobs(token_logprobs=[-0.1, 3.0])(answer)
    message = refusal(vllm, answer)
    assert "token 1 is 99" in message and "value 1 is 3.0" in message


def test_without_a_vocabulary_tokens_are_plausible(vllm):
    answer = vllm.good()
    choices(**completion([5, 2**31 - 1], index=1))(answer)
    vllm.reply = (200, answer)
    free = OpenAIServerSource(vllm.url, vocab_size=None)
    assert free.generate([make_prompt()], PARAMS)[0][1].response_ids.tolist() == [5, 2**31 - 1]
    choices(**completion([5, 2**31], index=1))(answer)
    with pytest.raises(RolloutServerError, match="prompt 'p0'.*token 1 is 2147483648"):
        free.generate([make_prompt()], PARAMS)


@pytest.mark.parametrize("num_aborted", [1, 2])
def test_aborted_choices_are_counted_as_the_server_likes(num_aborted: int) -> None:
    """A request that is aborted in the queue has no prompt tokens, for some servers."""
    prompt = Prompt(prompt_id="p", prompt_ids=torch.tensor([1, 2, 3]))
    params = SamplingParams(num_generations=2, max_response_tokens=4)
    whole = dict(text="a", token_ids=[5, 6], finish_reason="stop", prompt_token_ids=[1, 2, 3])
    aborted = dict(text="", token_ids=[7], finish_reason="abort", prompt_token_ids=[])
    choices = [dict(aborted, index=0), dict(aborted if num_aborted == 2 else whole, index=1)]
    usage = dict(prompt_tokens=0, completion_tokens=2 * (2 - num_aborted))
    answer = read_answer("token_ids", dict(choices=choices, usage=usage))
    assert [raw.trains for raw in answer.responses] == [False, num_aborted == 1]
    found = answer_problems("token_ids", answer, prompt, params, vocab_size=9, with_logprobs=False)
    assert found == []
