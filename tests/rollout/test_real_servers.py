"""The server source against real servers on this machine, without a hub.

``transformers serve`` comes with the project's test requirements. vLLM runs where one is
installed: in this environment, or in the one whose Python ``MEGATRON_PG_VLLM_PYTHON`` names.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from megatron_pg.rollout import (
    OpenAIServerSource,
    Prompt,
    ReasoningGymTask,
    RolloutServerError,
    SampledRollouts,
    SamplingParams,
)

from .servers import STARTUP_SECONDS, VLLM_PYTHON, run_server, transformers_server
from .tiny_model import save_tiny_model

transformers = pytest.importorskip("transformers", reason='pip install "megatron_pg[rollout]"')


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    """Two folders with different weights."""
    folders = [tmp_path_factory.mktemp("models") / name for name in ("first", "second")]
    for seed, folder in enumerate(folders):
        save_tiny_model(folder, seed)
    return folders


@pytest.fixture(scope="module")
def tokenizer(models):
    return transformers.AutoTokenizer.from_pretrained(models[0])


@pytest.fixture(scope="module")
def transformers_url(tmp_path_factory):
    with transformers_server(tmp_path_factory.mktemp("transformers")) as url:
        yield url


@pytest.fixture(scope="module")
def vllm_url(models, tmp_path_factory):
    if VLLM_PYTHON is None:
        pytest.skip("no vLLM: install it, or set MEGATRON_PG_VLLM_PYTHON to a Python that has it")
    command = [VLLM_PYTHON, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(models[0]), "--served-model-name", "tiny", "--dtype", "float32"]
    command += ["--max-model-len", "256", "--enforce-eager", "--port", "{port}"]
    command += ["--logprobs-mode", "processed_logprobs"]
    log = tmp_path_factory.mktemp("vllm") / "log"
    switches = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with run_server(command, log, **switches, VLLM_NO_USAGE_STATS="1") as url:
        yield url


def make_prompts(tokenizer, count: int) -> list[Prompt]:
    texts = [f"{i} + {i + 1} =" for i in range(count)]
    return [
        Prompt(prompt_id=text, prompt_ids=torch.tensor(tokenizer.encode(text))) for text in texts
    ]


@torch.no_grad()
def true_logprobs(folder: Path, prompt_ids, response_ids, temperature: float = 1.0):
    """What the model in ``folder`` gives the response's tokens."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.cat([prompt_ids, response_ids])
    logits = model(tokens[None]).logits[0, len(prompt_ids) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, response_ids[:, None])[:, 0].double()


def assert_sampled_from(folder: Path, prompts, responses, temperature: float = 1.0) -> None:
    num_tokens = 0
    for prompt, of_prompt in zip(prompts, responses):
        for one in of_prompt:
            truth = true_logprobs(folder, prompt.prompt_ids, one.response_ids, temperature)
            torch.testing.assert_close(one.rollout_logprobs, truth, atol=1e-4, rtol=0)
            num_tokens += len(truth)
    assert num_tokens >= 10


def exporter(folder: Path):
    """Stands for a trainer: the policy of the next version lies in ``folder``."""
    return lambda target: shutil.copytree(folder, target)


def test_vllm_tokens_and_logprobs_are_the_models(vllm_url, models, tokenizer):
    source = OpenAIServerSource(vllm_url, startup_seconds=STARTUP_SECONDS)
    params = SamplingParams(num_generations=3, max_response_tokens=6, temperature=0.7, seed=1)
    prompts = make_prompts(tokenizer, 4)
    responses = source.generate(prompts, params)
    can = source.start()
    assert (can.dialect, can.returns_logprobs, can.supports_n) == ("token_ids", True, True)
    assert len({tuple(one.response_ids.tolist()) for group in responses for one in group}) > 4
    assert_sampled_from(models[0], prompts, responses, temperature=0.7)
    again = source.generate(prompts, params)
    assert all(
        torch.equal(a.response_ids, b.response_ids)
        for first, second in zip(responses, again)
        for a, b in zip(first, second)
    )


def test_vllm_stop_tokens_and_truncation(vllm_url, tokenizer):
    source = OpenAIServerSource(vllm_url, startup_seconds=STARTUP_SECONDS)
    prompts = make_prompts(tokenizer, 1)
    greedy = {"num_generations": 1, "max_response_tokens": 4, "temperature": 0.0}
    ((truncated,),) = source.generate(prompts, SamplingParams(**greedy))
    assert truncated.status == "truncated"
    assert len(truncated.response_ids) == 4
    stop = int(truncated.response_ids[0])
    ((stopped,),) = source.generate(prompts, SamplingParams(**greedy, stop_token_ids=(stop,)))
    assert stopped.status == "completed"
    assert stopped.response_ids.tolist() == [stop]
    assert len(stopped.rollout_logprobs) == 1


def test_vllm_refuses_a_prompt_that_is_too_long(vllm_url):
    source = OpenAIServerSource(vllm_url, startup_seconds=STARTUP_SECONDS)
    prompt = Prompt(prompt_id="long", prompt_ids=torch.full((300,), 5))
    with pytest.raises(RolloutServerError, match="status 400"):
        source.generate([prompt], SamplingParams(num_generations=1, max_response_tokens=4))


def test_vllm_serves_new_weights(vllm_url, models, tokenizer, tmp_path):
    source = OpenAIServerSource(
        vllm_url, reload="vllm", export_dir=tmp_path, startup_seconds=STARTUP_SECONDS
    )
    params = SamplingParams(num_generations=2, max_response_tokens=6)
    prompts = make_prompts(tokenizer, 2)
    for version, folder in ((1, models[1]), (2, models[0])):
        source.update_weights(exporter(folder), version)
        responses = source.generate(prompts, params)
        assert_sampled_from(folder, prompts, responses)
        assert responses[0][0].metadata["weight_version"] == version
    with pytest.raises(ValueError, match="holds no"):
        source.reload_weights(tmp_path / "nowhere", 3)
    assert_sampled_from(models[0], prompts, source.generate(prompts, params))


def test_vllm_feeds_a_task(vllm_url, tokenizer):
    pytest.importorskip("reasoning_gym", reason='pip install "megatron_pg[rollout]"')
    source = OpenAIServerSource(vllm_url, startup_seconds=STARTUP_SECONDS)
    task = ReasoningGymTask(tokenizer=tokenizer)
    params = SamplingParams(num_generations=4, max_response_tokens=8, seed=0)
    groups = SampledRollouts(task, source, task, params).next_groups(3)
    assert [len(group.samples) for group in groups] == [4, 4, 4]
    for group in groups:
        for sample in group.samples:
            assert sample.reward in (0.0, 1.0)
            assert sample.rollout_logprobs.shape == sample.response_ids.shape


def text_source(url, tokenizer, model: Path, **fields) -> OpenAIServerSource:
    return OpenAIServerSource(
        url,
        model=str(model),
        tokenizer=tokenizer,
        allow_retokenize=True,
        max_concurrency=2,
        **fields,
    )


def test_transformers_serve_is_refused_by_default(transformers_url, models):
    source = OpenAIServerSource(transformers_url, model=str(models[0]))
    with pytest.raises(RolloutServerError, match="cannot serve rollouts.*allow_retokenize=True"):
        source.start()


def test_transformers_serve_text_is_flagged(transformers_url, models, tokenizer):
    source = text_source(transformers_url, tokenizer, models[0])
    can = source.start()
    assert (can.dialect, can.returns_logprobs, can.supports_n) == ("text", False, False)
    params = SamplingParams(num_generations=3, max_response_tokens=6, seed=2)
    responses = source.generate(make_prompts(tokenizer, 2), params)
    assert [len(group) for group in responses] == [3, 3]
    for one in (one for group in responses for one in group):
        assert one.metadata["retokenized"] is True
        assert one.rollout_logprobs is None
        assert one.status in ("completed", "truncated")


@torch.no_grad()
def test_transformers_serve_serves_new_weights(transformers_url, models, tokenizer, tmp_path):
    source = text_source(
        transformers_url, tokenizer, models[0], reload="transformers", export_dir=tmp_path
    )
    (prompt,) = make_prompts(tokenizer, 1)
    params = SamplingParams(num_generations=1, max_response_tokens=6, temperature=0.0)
    texts = []
    for version in range(2):
        if version:
            source.update_weights(exporter(models[version]), version)
        ((one,),) = source.generate([prompt], params)
        model = transformers.AutoModelForCausalLM.from_pretrained(models[version])
        tokens = model.generate(prompt.prompt_ids[None], max_new_tokens=6, do_sample=False)
        response = tokens[0, len(prompt.prompt_ids) :]
        assert one.text == tokenizer.decode(response, skip_special_tokens=True)
        assert one.metadata["weight_version"] == version
        texts.append(one.text)
    assert texts[0] != texts[1]
