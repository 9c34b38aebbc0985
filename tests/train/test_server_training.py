"""Training from an inference server: responses over HTTP, weights back after every step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import PYTHONPATH
from tests.rollout.servers import VLLM_PYTHON, run_server, transformers_server
from tests.rollout.stand_in import Reply, stand_in, vllm_like
from tests.rollout.tiny_model import save_tiny_model
from tests.train import tiny
from tests.utils import ROOT

pytest.importorskip("transformers", reason='pip install "megatron_pg[rollout]"')
pytest.importorskip("reasoning_gym", reason='pip install "megatron_pg[rollout]"')


def train(model: Path, out: Path, ranks: int, *overrides: str) -> list[dict[str, float]]:
    config = out / "config.yaml"
    out.mkdir(parents=True)
    config.write_text(
        f"""
model: {{hf: {model}}}
optimizer: {{lr: 0.001}}
rollout: {{source: server, num_generations: 2, max_response_tokens: 6}}
run: {{out: {out}, num_steps: 2, groups_per_step: 2, eval_prompts: 2, save_interval: 0}}
"""
    )
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *launcher, "-m", "megatron_pg.train", str(config), *overrides]
    environment = os.environ | {"PYTHONPATH": PYTHONPATH, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-12000:]
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def exported_versions(out: Path) -> list[str]:
    return sorted(p.name for p in (out / "export").iterdir() if (p / "config.json").is_file())


def test_two_ranks_train_from_transformers_serve(tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    save_tiny_model(model, 0)
    with transformers_server(tmp_path) as url:
        steps = train(
            model,
            out,
            2,
            "parallel.pipeline_model_parallel_size=2",
            f"rollout.server.base_url={url}",
            f"rollout.server.model={model}",
            "rollout.server.dialect=text",
            "rollout.server.allow_retokenize=true",
            "rollout.server.reload=transformers",
        )
    assert [m["step"] for m in steps] == [1, 2]
    assert exported_versions(out) == ["version-2"], "only the newest export is kept"


def test_what_the_server_can_do_is_told_and_its_failure_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commands: Path
) -> None:
    sections = tiny.run_sections(tmp_path)
    tiny.save_tokenizer(tmp_path / "model")
    sections["rollout"] = {"source": "server", "max_response_tokens": 4, "num_generations": 2}
    key = "sk-very-secret"
    sections["rollout"]["server"] = {"reload": "vllm", "api_key": "${oc.env:ROLLOUT_KEY}"}
    monkeypatch.setenv("ROLLOUT_KEY", key)
    sections["run"] |= {"num_steps": 2, "groups_per_step": 2}
    path, out = str(tiny.write_config(tmp_path / "config.yaml", sections)), tmp_path / "out"
    refuses, sampled = False, []

    def handler(asked: str, body: Any) -> Reply:
        if asked in ("/collective_rpc", "/reset_prefix_cache"):
            return 200, {"success": True}
        if refuses and asked == "/v1/completions":
            return 400, {"error": f"no completions for {key}"}
        if asked == "/health":
            return 404, "no such path"
        status, answer = vllm_like(asked, body)
        if asked == "/v1/completions" and body["max_tokens"] > 1:
            # Aborted before the first token: all responses of the first step, then one a prompt.
            sampled.append(body["prompt"])
            for choice in answer["choices"][: 2 if len(sampled) <= 2 else 1]:
                choice |= {"token_ids": [], "text": "", "finish_reason": "abort", "logprobs": None}
        return status, answer

    with stand_in(handler) as server:
        url = f"rollout.server.base_url={server.url}"
        trained = tiny.launch([path, url], commands=commands)
        refuses = True
        failed = tiny.launch([path, url, f"run.out={tmp_path / 'other'}"], commands=commands)
    assert trained.returncode == 0, trained.stderr
    assert {h.get("Authorization") for h in server.headers} == {f"Bearer {key}"}
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [step["response_length/aborted"] for step in steps] == [1.0, 0.5]
    assert [step["actor/updates"] for step in steps] == [0, 1]
    told = "rollout server: dialect token_ids, with logprobs, all responses of a prompt per request"
    assert " ".join(trained.stdout.split()).count(told) == 1, trained.stdout
    assert failed.returncode == 2, failed.stderr
    assert failed.stderr.count("error: ") == 1 and "Traceback" not in failed.stderr
    assert f"error: {server.url}: cannot serve rollouts" in failed.stderr
    assert "no completions for [api_key]" in failed.stderr
    printed = trained.stdout + trained.stderr + failed.stdout + failed.stderr
    written = [path.read_bytes() for path in out.rglob("*") if path.is_file()]
    assert key not in printed and written and not any(key.encode() in data for data in written)


@pytest.mark.skipif(VLLM_PYTHON is None, reason="no vLLM: see tests/rollout/servers.py")
def test_two_ranks_train_from_vllm_with_its_logprobs(tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    save_tiny_model(model, 0)
    command = [VLLM_PYTHON, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(model), "--served-model-name", "tiny", "--dtype", "float32"]
    command += ["--max-model-len", "256", "--enforce-eager", "--port", "{port}"]
    command += ["--logprobs-mode", "processed_logprobs"]
    switches = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with run_server(command, tmp_path / "log", **switches, VLLM_NO_USAGE_STATS="1") as url:
        steps = train(
            model,
            out,
            2,
            "parallel.use_distributed_optimizer=true",
            f"rollout.server.base_url={url}",
            "rollout.server.model=tiny",
            "rollout.server.reload=vllm",
            "algorithm.policy.importance_mode=token_truncate",
        )
    assert [m["step"] for m in steps] == [1, 2]
    assert exported_versions(out) == ["version-2"], "only the newest export is kept"
    # The engine samples from the policy that is trained: after every refresh as well.
    assert all(m["actor/rollout_logprob_diff"] < 1e-4 for m in steps)
    assert all(abs(m["actor/importance_weight"] - 1) < 1e-3 for m in steps)
