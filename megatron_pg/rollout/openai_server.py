"""Responses from an OpenAI-compatible inference server over HTTP."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .base import Prompt, Response, SamplingParams, Tokenizer, WeightExporter
from .client import JsonClient, RetryPolicy, RolloutServerError
from .dialects import (
    PATHS,
    Dialect,
    MalformedAnswerError,
    RawResponse,
    make_request,
    make_response,
    read_answer,
)
from .reload import RELOAD_PLANS, ReloadPlan


@dataclass(frozen=True, kw_only=True)
class ServerCapabilities:
    """What a probe found out about a server.

    Attributes:
        dialect: form of requests and answers; see ``dialects``.
        returns_logprobs: whether responses carry the engine's logprobs.
        supports_n: whether one request can ask for several responses.
    """

    dialect: Dialect
    returns_logprobs: bool
    supports_n: bool


class OpenAIServerSource:
    """A ``RolloutSource`` over HTTP: vLLM, SGLang, llama-cpp-python, transformers serve, ...

    The first use waits for the server and probes what it can do: token ids through
    ``/v1/completions``, else through SGLang's ``/generate``, else text only. Text has to be
    tokenized again, which can differ from what was sampled, so it is refused unless
    ``allow_retokenize``; such responses have ``metadata["retokenized"]`` and no logprobs. A form
    counts as unknown to the server only when the server refuses it: one that fails at it (5xx) ends
    the search, and ``dialect`` has to name its form (llama-cpp-python: ``text``).

    ``rollout_logprobs`` are the server's. They are of the distribution sampled from only at
    temperature 1 without top_k and top_p, or if the server is told so (vLLM:
    ``--logprobs-mode processed_logprobs``).

    Args:
        base_url: address, with or without ``/v1``.
        model: served name; None takes the first one that ``/v1/models`` lists.
        tokenizer: needed for text-only servers.
        dialect: skip the probe's search and insist on one form; None searches.
        allow_retokenize: accept a server that returns text only.
        max_concurrency: requests under way at once.
        timeout_seconds: longest wait for one answer.
        retry: policy for transient failures.
        api_key: bearer token, or None.
        reload: name in ``RELOAD_PLANS`` or a plan of your own; None cannot take new weights.
        export_dir: folder that the server can read too, for exported weights.
        health_path: answered with 200 when the server is ready.
        startup_seconds: longest wait for that, at the start and after a reload.

    Raises:
        ValueError: on a ``base_url`` without http:// or https://, an unknown ``reload`` or
            ``dialect``, ``max_concurrency < 1``, ``dialect="text"`` without ``allow_retokenize``,
            or ``allow_retokenize`` without tokenizer.
        ImportError: if requests is not installed.
    """

    def __init__(
        self,
        base_url: str,
        *,
        model: str | None = None,
        tokenizer: Tokenizer | None = None,
        dialect: Dialect | None = None,
        allow_retokenize: bool = False,
        max_concurrency: int = 32,
        timeout_seconds: float = 600.0,
        retry: RetryPolicy | None = None,
        api_key: str | None = None,
        reload: str | ReloadPlan | None = None,
        export_dir: str | Path | None = None,
        health_path: str = "/health",
        startup_seconds: float = 600.0,
    ) -> None:
        if isinstance(reload, str) and reload not in RELOAD_PLANS:
            raise ValueError(
                f"reload={reload!r} is none of {list(RELOAD_PLANS)}; pass a ReloadPlan"
            )
        if max_concurrency < 1:
            raise ValueError(f"max_concurrency={max_concurrency} must be at least 1")
        if dialect is not None and dialect not in PATHS:
            raise ValueError(f"dialect={dialect!r} is none of {list(PATHS)}")
        if dialect == "text" and not allow_retokenize:
            raise ValueError("dialect='text' tokenizes responses again; pass allow_retokenize=True")
        if allow_retokenize and tokenizer is None:
            raise ValueError("allow_retokenize=True needs a tokenizer")
        self.tokenizer = tokenizer
        self.allow_retokenize = allow_retokenize
        self.max_concurrency = max_concurrency
        self.reload = RELOAD_PLANS[reload] if isinstance(reload, str) else reload
        self.export_dir = None if export_dir is None else Path(export_dir)
        self.health_path = health_path
        self.startup_seconds = startup_seconds
        self.weight_version = 0
        self._dialect = dialect
        self._model = model
        self._exported: Path | None = None
        self._capabilities: ServerCapabilities | None = None
        self._client = JsonClient(
            base_url,
            timeout_seconds=timeout_seconds,
            retry=retry or RetryPolicy(),
            api_key=api_key,
            max_connections=max_concurrency,
        )

    def start(self) -> ServerCapabilities:
        """Wait for the server and probe it, unless done before; ``generate`` does so by itself.

        Raises:
            RolloutServerError: if the server does not come up, or cannot serve what was asked for.
        """
        if self._capabilities is None:
            self._client.wait_until_healthy(self.health_path, self.startup_seconds)
            if self._model is None:
                self._model = self._first_model()
            self._capabilities = self._probe()
        return self._capabilities

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams
    ) -> list[tuple[Response, ...]]:
        """``params.num_generations`` responses of every prompt, in the prompts' order.

        Raises:
            RolloutServerError: as soon as one request fails for good; names the prompt.
            ValueError: if ``params`` has what the server's dialect cannot express.
        """
        can = self.start()
        num_requests = 1 if can.supports_n else params.num_generations
        per_request = replace(params, num_generations=params.num_generations // num_requests)
        jobs = list(itertools.product(prompts, range(num_requests)))

        def run(job: tuple[Prompt, int]) -> list[Response]:
            return self._sample(can.dialect, job[0], per_request, job[1])

        with ThreadPoolExecutor(max_workers=self.max_concurrency) as pool:
            answers = list(pool.map(run, jobs))
        return [
            tuple(itertools.chain.from_iterable(answers[first : first + num_requests]))
            for first in range(0, len(answers), num_requests)
        ]

    def update_weights(self, export: WeightExporter, version: int) -> None:
        """Export the policy into a new folder of ``export_dir`` and have the server load it.

        Raises:
            ValueError: if the source has no ``export_dir`` or ``reload``.
            RolloutServerError: if the server refuses, or does not come back.
        """
        if self.export_dir is None:
            raise ValueError("update_weights needs export_dir=, a folder the server can read too")
        folder = self.export_dir.resolve() / f"version-{version}"
        export(folder)
        self.reload_weights(folder, version)
        # Only now: until the reload the server may still have the earlier files open.
        if self._exported is not None and self._exported != folder:
            shutil.rmtree(self._exported, ignore_errors=True)
        self._exported = folder

    def reload_weights(self, folder: Path, version: int) -> None:
        """Have the server load a Hugging Face folder that is already written.

        For distributed runs, where all ranks export together and one of them calls this.

        Raises:
            ValueError: if the source has no ``reload``, or the folder no weights.
            RolloutServerError: if the server refuses, or does not come back.
        """
        if self.reload is None:
            raise ValueError(
                f"this server cannot take new weights; pass reload= one of {list(RELOAD_PLANS)} "
                "or a ReloadPlan"
            )
        # A reload that fails half-way leaves vLLM without weights; only a restart mends that.
        if not any(folder.glob("*.safetensors")):
            raise ValueError(f"{folder} holds no *.safetensors: the export wrote no weights there")
        self.reload.run(self._client, folder, version)
        self._client.wait_until_healthy(self.health_path, self.startup_seconds)
        if self.reload.is_model_path:
            self._model = str(folder)
        self.weight_version = version

    def _sample(
        self, dialect: Dialect, prompt: Prompt, params: SamplingParams, first_generation: int
    ) -> list[Response]:
        raw = self._request(dialect, prompt, params, first_generation)
        if len(raw) != params.num_generations:
            raise self._malformed(
                dialect,
                f"prompt {prompt.prompt_id!r}: {len(raw)} responses instead of "
                f"{params.num_generations}",
            )
        if dialect != "text" and any(one.token_ids is None for one in raw):
            raise self._malformed(
                dialect, f"prompt {prompt.prompt_id!r}: response without token ids"
            )
        end = params.stop_token_ids[0] if params.stop_token_ids else None
        if self.tokenizer is not None and self.tokenizer.eos_token_id is not None:
            end = self.tokenizer.eos_token_id
        return [make_response(one, end, self.tokenizer, self.weight_version) for one in raw]

    def _request(
        self,
        dialect: Dialect,
        prompt: Prompt,
        params: SamplingParams,
        first_generation: int = 0,
    ) -> list[RawResponse]:
        body = make_request(
            dialect,
            prompt,
            params,
            model=self._model or "",
            tokenizer=self.tokenizer,
            first_generation=first_generation,
        )
        answer = self._client.post(PATHS[dialect], body)
        try:
            return read_answer(dialect, answer)
        except MalformedAnswerError as error:
            raise self._malformed(dialect, f"prompt {prompt.prompt_id!r}: {error}") from error

    def _malformed(self, dialect: Dialect, message: str) -> RolloutServerError:
        return RolloutServerError(self._client.base_url + PATHS[dialect], 200, message)

    def _first_model(self) -> str:
        listed: Any = self._client.get("/v1/models")
        try:
            return str(listed["data"][0]["id"])
        except (KeyError, IndexError, TypeError) as error:
            raise RolloutServerError(
                self._client.base_url + "/v1/models", 200, "lists no model; pass model="
            ) from error

    def _probe(self) -> ServerCapabilities:
        """First dialect that serves token ids; text if that is allowed."""
        ids = [0, 1] if self.tokenizer is None else self.tokenizer.encode("1 + 1 =")
        prompt = Prompt(prompt_id="probe", prompt_ids=torch.tensor(ids, dtype=torch.int64))
        params = SamplingParams(num_generations=2, max_response_tokens=1)
        exact: tuple[Dialect, ...] = ("token_ids", "sglang")
        plain: tuple[Dialect, ...] = ("text",) if self.allow_retokenize else ()
        wanted = (self._dialect,) if self._dialect is not None else exact + plain
        found_out = []
        for dialect in wanted:
            try:
                raw = self._request(dialect, prompt, params)
            except RolloutServerError as error:
                if not error.is_refusal:
                    raise self._probe_failure(dialect, error) from error
                found_out.append(str(error))
                continue
            if dialect != "text" and (not raw or raw[0].token_ids is None):
                found_out.append(f"{PATHS[dialect]} returns no token ids")
                continue
            return ServerCapabilities(
                dialect=dialect,
                returns_logprobs=dialect != "text" and raw[0].logprobs is not None,
                supports_n=len(raw) == 2,
            )
        remedy = "" if self.allow_retokenize else "; allow_retokenize=True accepts text (lossy)"
        raise RolloutServerError(
            self._client.base_url, None, "cannot serve rollouts: " + " | ".join(found_out) + remedy
        )

    def _probe_failure(self, dialect: Dialect, error: RolloutServerError) -> RolloutServerError:
        remedy = "; see its log" if self._dialect else "; see its log, or name its form by dialect="
        return RolloutServerError(
            self._client.base_url,
            error.status,
            f"failed when it was probed for dialect {dialect!r}: {error}{remedy}",
        )
