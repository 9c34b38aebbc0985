"""The server source against canned answers: requests, dialects, malformed answers, concurrency."""

import threading
import time

import pytest

from megatron_pg.rollout import (
    OpenAIServerSource,
    ReloadCall,
    ReloadPlan,
    RetryPolicy,
    RolloutServerError,
    SamplingParams,
)

from .helpers import CharTokenizer, make_prompt
from .stand_in import completion, stand_in, vllm_like

PARAMS = SamplingParams(num_generations=3, max_response_tokens=8, seed=5)


def make_source(url, **fields):
    fields = {"retry": RetryPolicy(max_attempts=2, first_wait_seconds=0.01)} | fields
    return OpenAIServerSource(url, startup_seconds=1.0, **fields)


def completions_only(make_choices):
    """A server whose ``/v1/completions`` answers with ``make_choices(body)``."""

    def handler(path, body):
        if path != "/v1/completions":
            return vllm_like(path, body)
        choices = make_choices(body)
        return (200, {"choices": choices}) if isinstance(choices, list) else choices

    return handler


def test_exact_responses_in_order():
    with stand_in(vllm_like) as server:
        source = make_source(server.url)
        responses = source.generate([make_prompt(0), make_prompt(4)], PARAMS)
        can = source.start()
    assert (can.dialect, can.returns_logprobs, can.supports_n) == ("token_ids", True, True)
    got = [[one.response_ids.tolist() for one in of_prompt] for of_prompt in responses]
    assert got == [[[first, i, 1] for i in range(3)] for first in (100, 104)]
    one = responses[0][2]
    assert one.rollout_logprobs.tolist() == [-0.5, -1.0, -1.5]
    assert one.status == "completed"
    assert one.metadata == {"weight_version": 0, "finish_reason": "stop"}
    assert one.loss_mask is None


def test_request_sends_every_sampling_parameter():
    params = SamplingParams(
        num_generations=2, max_response_tokens=9, temperature=0.5, top_k=4, top_p=0.9,
        stop_token_ids=(3,), seed=1,
    )  # fmt: skip
    with stand_in(vllm_like) as server:
        make_source(server.url).generate([make_prompt(0), make_prompt(1)], params)
        _, first, second = server.bodies("/v1/completions")
    first, second = sorted((first, second), key=lambda body: body["prompt"])
    assert first.pop("seed") != second.pop("seed")
    assert (first.pop("prompt"), second.pop("prompt")) == ([100, 7], [101, 7])
    assert first == second
    assert first == {
        "model": "served", "n": 2, "max_tokens": 9, "temperature": 0.5, "top_p": 0.9, "top_k": 4,
        "min_p": 0.0, "repetition_penalty": 1.0, "stop_token_ids": [3], "logprobs": 1,
        "return_token_ids": True, "return_tokens_as_token_ids": True,
    }  # fmt: skip


def test_token_strings_of_older_servers():
    def make_choices(body):
        return [completion([5, 6], index=i, token_ids=None) for i in range(body["n"])]

    with stand_in(completions_only(make_choices)) as server:
        ((one, *_),) = make_source(server.url).generate([make_prompt()], PARAMS)
    assert one.response_ids.tolist() == [5, 6]
    assert one.rollout_logprobs.tolist() == [-0.5, -1.0]


@pytest.mark.parametrize(
    ("reason", "status"), [("stop", "completed"), ("length", "truncated"), ("abort", "aborted")]
)
def test_finish_reason_becomes_status(reason, status):
    def make_choices(body):
        return [completion([5], reason, index=i) for i in range(body["n"])]

    with stand_in(completions_only(make_choices)) as server:
        ((one, *_),) = make_source(server.url).generate([make_prompt()], PARAMS)
    assert one.status == status


def test_sglang_generate():
    def handler(path, body):
        if path != "/generate":
            return vllm_like(path, body) if path != "/v1/completions" else (404, {})
        assert body["return_logprob"] is True
        assert body["sampling_params"]["top_k"] == -1
        meta = {
            "finish_reason": {"type": "length", "length": 2},
            "output_token_logprobs": [[-0.1, 8, None], [-0.2, 9, None]],
        }
        answer = {"text": "ab", "output_ids": [8], "meta_info": meta}
        return 200, [answer] * body["sampling_params"]["n"]

    with stand_in(handler) as server:
        source = make_source(server.url)
        ((one, *others),) = source.generate([make_prompt()], PARAMS)
        body = server.bodies("/generate")[-1]
    assert source.start().dialect == "sglang"
    assert len(others) == 2
    assert body["input_ids"] == [100, 7]
    assert body["sampling_params"]["max_new_tokens"] == 8
    assert one.response_ids.tolist() == [8, 9]
    assert one.rollout_logprobs.tolist() == [-0.1, -0.2]
    assert one.status == "truncated"


def text_only(path, body):
    """Knows text prompts, one response a request, no logprobs."""
    if path != "/v1/completions":
        return vllm_like(path, body)
    if not isinstance(body["prompt"], str):
        return 400, {"error": "prompt must be a string"}
    assert body.keys() <= {"model", "n", "max_tokens", "seed", "temperature", "top_p", "prompt"}
    text = "" if body["prompt"].startswith("e") else f"s{body.get('seed')}"
    reason = "length" if body["prompt"].startswith("g") else "stop"
    return 200, {"choices": [{"index": 0, "text": text, "finish_reason": reason}]}


def test_text_only_server_is_refused_unless_allowed():
    with stand_in(text_only) as server:
        with pytest.raises(RolloutServerError, match="must be a string.*allow_retokenize=True"):
            make_source(server.url, tokenizer=CharTokenizer()).start()
        with pytest.raises(ValueError, match="needs a tokenizer"):
            make_source(server.url, allow_retokenize=True)
        with pytest.raises(ValueError, match="pass allow_retokenize=True"):
            make_source(server.url, dialect="text")


@pytest.mark.parametrize("status", [429, 500, 501, 503])
def test_a_server_that_fails_is_not_taken_for_text_only(status):
    def handler(path, body):
        if path == "/v1/completions" and not isinstance(body["prompt"], str):
            return status, {"error": "out of memory"}
        return text_only(path, body)

    with stand_in(handler) as server:
        allowing = {"tokenizer": CharTokenizer(), "allow_retokenize": True}
        with pytest.raises(RolloutServerError) as caught:
            make_source(server.url, **allowing).start()
        assert "failed when it was probed for dialect 'token_ids'" in str(caught.value)
        assert "out of memory" in str(caught.value) and "by dialect=" in str(caught.value)
        assert caught.value.status == status
        assert not server.bodies("/generate"), "the search ends there"
        assert make_source(server.url, dialect="text", **allowing).start().dialect == "text"


def test_text_is_tokenized_again_and_flagged():
    with stand_in(text_only) as server:
        source = make_source(server.url, tokenizer=CharTokenizer(), allow_retokenize=True)
        prompts = [make_prompt(0), make_prompt(3)]  # "d\x07" and "g\x07"
        completed, truncated = source.generate(prompts, PARAMS)
        bodies = server.bodies("/v1/completions")
        with pytest.raises(ValueError, match="no part of the plain completions API"):
            source.generate(
                prompts, SamplingParams(num_generations=1, max_response_tokens=1, top_k=3)
            )
    assert source.start().supports_n is False
    assert len({one.text for one in completed}) == 3, "every generation needs its own seed"
    assert {body["n"] for body in bodies[-6:]} == {1}
    for one in completed:
        assert one.response_ids.tolist() == [*map(ord, one.text), 1]
        assert one.status == "completed"
        assert one.rollout_logprobs is None
        assert one.metadata["retokenized"] is True
    assert truncated[0].response_ids.tolist() == [*map(ord, truncated[0].text)]


def test_concurrency_is_used_and_bounded():
    lock = threading.Lock()
    running = most = 0

    def handler(path, body):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.05)
        with lock:
            running -= 1
        return vllm_like(path, body)

    with stand_in(handler) as server:
        source = make_source(server.url, max_concurrency=3)
        responses = source.generate([make_prompt(i) for i in range(12)], PARAMS)
    assert most == 3
    assert [of_prompt[0].response_ids[0] for of_prompt in responses] == list(range(100, 112))


def test_one_lasting_failure_ends_the_batch():
    def handler(path, body):
        if path == "/v1/completions" and body["prompt"][0] == 102:
            return 400, {"error": "prompt too long"}
        return vllm_like(path, body)

    with stand_in(handler) as server:
        source = make_source(server.url, max_concurrency=1)
        with pytest.raises(RolloutServerError, match="prompt too long"):
            source.generate([make_prompt(i) for i in range(40)], PARAMS)
        assert len(server.bodies("/v1/completions")) < 10


def test_busy_server_is_survived():
    lock = threading.Lock()
    asked = set()

    def handler(path, body):
        if path == "/v1/completions":
            with lock:
                is_first = body["prompt"][0] not in asked
                asked.add(body["prompt"][0])
            if is_first:
                return 429, {"error": "busy"}
        return vllm_like(path, body)

    with stand_in(handler) as server:
        responses = make_source(server.url).generate([make_prompt(i) for i in range(8)], PARAMS)
    assert len(responses) == 8


def write_weights(folder):
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").touch()


def reloadable(path, body):
    if path in ("/collective_rpc", "/reset_prefix_cache"):
        return 200, {"success": True}
    return vllm_like(path, body)


def test_reload_and_export(tmp_path):
    exported = []

    def export(folder):
        write_weights(folder)
        exported.append(folder)

    with stand_in(reloadable) as server:
        source = make_source(server.url, reload="vllm", export_dir=tmp_path)
        for version in (1, 2):
            source.update_weights(export, version)
        ((one, *_),) = source.generate([make_prompt()], PARAMS)
        reloads = server.bodies("/collective_rpc")
        assert len(server.bodies("/reset_prefix_cache")) == 2
    assert exported == [tmp_path / "version-1", tmp_path / "version-2"]
    assert [call["kwargs"]["weights_path"] for call in reloads] == [str(f) for f in exported]
    assert [call["method"] for call in reloads] == ["reload_weights"] * 2
    assert not exported[0].exists(), "the folder that is served no more goes away"
    assert exported[1].exists()
    assert one.metadata["weight_version"] == 2


def test_own_reload_plan(tmp_path):
    plan = ReloadPlan(
        calls=(ReloadCall(path="/load", body={"v": ["{version}", 3], "at": {"p": "{model_path}"}}),)
    )
    write_weights(tmp_path)
    answers = [(200, {"success": False, "message": "shapes differ"}), (500, {"e": "boom"})]

    def handler(path, body):
        return answers.pop(0) if path == "/load" and answers else vllm_like(path, body)

    with stand_in(handler) as server:
        source = make_source(server.url, reload=plan)
        with pytest.raises(RolloutServerError, match="refused the weights in .*: shapes differ"):
            source.reload_weights(tmp_path, 7)
        with pytest.raises(RolloutServerError, match="gave up after 1 attempts.*boom"):
            source.reload_weights(tmp_path, 7)
        assert server.bodies("/load") == [{"v": ["7", 3], "at": {"p": str(tmp_path)}}] * 2
    assert source.weight_version == 0


def test_reload_refuses(tmp_path):
    source = make_source("http://localhost", reload="vllm")
    with pytest.raises(ValueError, match="needs export_dir="):
        source.update_weights(write_weights, 1)
    with pytest.raises(ValueError, match="holds no"):
        source.reload_weights(tmp_path / "nowhere", 1)
    with pytest.raises(ValueError, match="pass reload= one of"):
        make_source("http://localhost").reload_weights(tmp_path, 1)


def test_source_refuses():
    with pytest.raises(ValueError, match="reload='tgi' is none of"):
        make_source("http://localhost", reload="tgi")
    with pytest.raises(ValueError, match="max_concurrency=0"):
        make_source("http://localhost", max_concurrency=0)
    with pytest.raises(ValueError, match="dialect='chat' is none of"):
        make_source("http://localhost", dialect="chat")
    with pytest.raises(ValueError, match="base_url='localhost:8000' must start with http://"):
        make_source("localhost:8000")


def test_server_that_lists_no_model():
    def handler(path, body):
        return (200, {"data": []}) if path == "/v1/models" else vllm_like(path, body)

    with stand_in(handler) as server:
        with pytest.raises(RolloutServerError, match="lists no model; pass model="):
            make_source(server.url).start()
        assert make_source(server.url, model="mine").start().dialect == "token_ids"
