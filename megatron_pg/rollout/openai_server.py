"""Responses from an OpenAI-compatible inference server over HTTP."""

from __future__ import annotations

import itertools
import math
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..data import RouteShape
from .answer_forms import MalformedAnswerError, read_answer
from .answers import Answer, answer_problems, make_response
from .base import RolloutSource, Tokenizer, WeightExporter
from .client import JsonClient, RolloutServerError
from .dialects import PATHS, Dialect, make_request, most_answer_bytes
from .probe import ServerCapabilities, first_model, health_path_problem, probe_server
from .reload import RELOAD_PLANS, ReloadPlan, remove_others
from .retry import RetryPolicy
from .run_all import run_all
from .values import Prompt, Response, SamplingParams


class OpenAIServerSource(RolloutSource):
    """A ``RolloutSource`` over HTTP: vLLM, SGLang, llama-cpp-python, transformers serve, ...

    The first use waits for the server and probes what it can do: token ids through
    ``/v1/completions``, else through SGLang's ``/generate``, else text only. Text has to be
    tokenized again, which can differ from what was sampled, so it is refused unless
    ``allow_retokenize``; such responses have ``metadata["retokenized"]`` and no logprobs. A form
    counts as unknown to the server only when the server refuses it: one that fails at it (5xx) ends
    the search, and ``dialect`` has to name its form (llama-cpp-python: ``text``).

    What a server sends is refused unless it is what was asked for: as many responses, token ids
    inside the vocabulary, logprobs that a sampled token can have, the prompt that was sent, one
    model's name throughout. An aborted or empty response is none of that and ends nothing: it comes
    with status "aborted" and trains nothing.

    ``rollout_logprobs`` are the server's. They are of the distribution sampled from only at
    temperature 1 without top_k and top_p, or if the server is told so (vLLM:
    ``--logprobs-mode processed_logprobs``).

    Args:
        base_url: address, with or without ``/v1``.
        model: served name; None takes the first one that ``/v1/models`` lists.
        tokenizer: needed for text-only servers.
        vocab_size: of the model in training: token ids must lie below; None checks only that they
            are plausible.
        dialect: skip the probe's search and insist on one form; None searches.
        allow_retokenize: accept a server that returns text only.
        max_concurrency: requests under way at once.
        timeout_seconds: for one try of a request: connecting, sending and the whole answer
            together; a reload is one request.
        retry: policy for transient failures.
        api_key: bearer token, or None; no error or message shows it.
        reload: name in ``RELOAD_PLANS`` or a plan of your own; None cannot take new weights.
        export_dir: folder that the server can read too, for exported weights.
        routes: ask for the experts of every token, which have to be like this; None does not.
        health_path: answered with a 5xx while the server is not ready; a server that does not know
            it counts as ready.
        startup_seconds: longest wait for that, at the start and after a reload.
        on_first: runs an action where one process is to talk to the server, and returns its result
            on every rank that calls; by default this is the only one.

    Raises:
        ValueError: on a ``base_url`` that is no address, an ``api_key`` that no header can carry, a
            time that is not finite and above 0, an unknown ``reload`` or ``dialect``,
            ``max_concurrency < 1``, a ``health_path`` without leading slash, ``dialect="text"``
            without ``allow_retokenize``, or ``allow_retokenize`` without tokenizer.
        ImportError: if requests is not installed.
    """

    def __init__(
        self,
        base_url: str,
        *,
        model: str | None = None,
        tokenizer: Tokenizer | None = None,
        vocab_size: int | None = None,
        dialect: Dialect | None = None,
        allow_retokenize: bool = False,
        max_concurrency: int = 32,
        timeout_seconds: float = 600.0,
        retry: RetryPolicy | None = None,
        api_key: str | None = None,
        reload: str | ReloadPlan | None = None,
        export_dir: str | Path | None = None,
        routes: RouteShape | None = None,
        health_path: str = "/health",
        startup_seconds: float = 600.0,
        on_first: Callable[[Callable[[], Any]], Any] = lambda action: action(),
    ) -> None:
        if isinstance(reload, str) and reload not in RELOAD_PLANS:
            raise ValueError(
                f"reload={reload!r} is none of {list(RELOAD_PLANS)}; pass a ReloadPlan"
            )
        if max_concurrency < 1:
            raise ValueError(f"max_concurrency={max_concurrency} must be at least 1")
        if problem := health_path_problem(health_path):
            raise ValueError(problem)
        if not 0 < startup_seconds < math.inf:
            raise ValueError(f"startup_seconds={startup_seconds} must be finite and above 0")
        if dialect is not None and dialect not in PATHS:
            raise ValueError(f"dialect={dialect!r} is none of {list(PATHS)}")
        if dialect == "text" and not allow_retokenize:
            raise ValueError("dialect='text' tokenizes responses again; pass allow_retokenize=True")
        if allow_retokenize and tokenizer is None:
            raise ValueError("allow_retokenize=True needs a tokenizer")
        if routes is not None and allow_retokenize:
            raise ValueError("routes belong to the exact tokens; pass allow_retokenize=False")
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.allow_retokenize = allow_retokenize
        self.max_concurrency = max_concurrency
        self.reload = RELOAD_PLANS[reload] if isinstance(reload, str) else reload
        self.export_dir = None if export_dir is None else Path(export_dir)
        self.routes = routes
        self.health_path = health_path
        self.startup_seconds = startup_seconds
        self.weight_version = 0
        self._on_first = on_first
        self._stop = threading.Event()
        self._dialect = dialect
        self._model = model
        # What the server calls the model; by one name as long as nothing is loaded by name.
        self._reported_model: str | None = None
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
        can: ServerCapabilities = self._on_first(self._probe)
        return can

    def _probe(self) -> ServerCapabilities:
        if self._capabilities is None:
            self._client.wait_until_healthy(self.health_path, self.startup_seconds)
            if self._model is None:
                self._model = first_model(self._client)
            self._capabilities = probe_server(
                self._request,
                self._client.base_url,
                tokenizer=self.tokenizer,
                dialect=self._dialect,
                allow_retokenize=self.allow_retokenize,
                with_routes=self.routes is not None,
            )
        return self._capabilities

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams
    ) -> list[tuple[Response, ...]]:
        """``params.num_generations`` responses of every prompt, in the prompts' order.

        Raises:
            RolloutServerError: as soon as one request fails for good; names the prompt.
            ValueError: if ``params`` has what the server's dialect cannot express.
        """
        can = self._probe()
        num_requests = 1 if can.supports_n else params.num_generations
        per_request = replace(params, num_generations=params.num_generations // num_requests)
        jobs = list(itertools.product(prompts, range(num_requests)))

        def sample(job: tuple[Prompt, int], stop: threading.Event) -> list[Response]:
            prompt, first_generation = job
            try:
                return self._sample(can, prompt, per_request, first_generation, stop)
            except RolloutServerError as error:
                message = f"prompt {prompt.prompt_id!r}: {error.args[2]}"
                raise RolloutServerError(error.url, error.status, message) from error

        self._stop = threading.Event()
        answers = run_all(sample, jobs, self.max_concurrency, self._stop)
        return [
            tuple(itertools.chain.from_iterable(answers[first : first + num_requests]))
            for first in range(0, len(answers), num_requests)
        ]

    def cancel(self) -> None:
        """See ``RolloutSource.cancel``: every request under way is called off."""
        self._stop.set()

    def update_weights(self, export: WeightExporter, version: int) -> None:
        """Export the policy into a new folder of ``export_dir`` and have the server load it.

        The folders of other versions are removed once the server has it.

        Raises:
            ValueError: if the source has no ``export_dir`` or ``reload``.
            RolloutServerError: if the server refuses, or does not come back.
        """
        if self.export_dir is None:
            raise ValueError("update_weights needs export_dir=, a folder the server can read too")
        folder = self.export_dir.resolve() / f"version-{version}"
        # What an interrupted run left there; an export refuses to overwrite.
        self._on_first(lambda: shutil.rmtree(folder, ignore_errors=True))
        export(folder)
        self._on_first(lambda: self.reload_weights(folder, version))
        # Only now: until the reload the server may still have the earlier files open.
        self._on_first(lambda: remove_others(folder))

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
            self._reported_model = None
        self.weight_version = version

    def _sample(
        self,
        can: ServerCapabilities,
        prompt: Prompt,
        params: SamplingParams,
        first_generation: int,
        stop: threading.Event,
    ) -> list[Response]:
        answer = self._request(can.dialect, prompt, params, first_generation, stop)
        problems = answer_problems(
            can.dialect,
            answer,
            prompt,
            params,
            vocab_size=self.vocab_size,
            with_logprobs=can.returns_logprobs,
            routes=self.routes,
        )
        if problems:
            raise self._malformed(can.dialect, "; ".join(problems))
        own = self.tokenizer, self.weight_version, self.routes
        return [make_response(raw, prompt, *own) for raw in answer.responses]

    def _request(
        self,
        dialect: Dialect,
        prompt: Prompt,
        params: SamplingParams,
        first_generation: int = 0,
        stop: threading.Event | None = None,
    ) -> Answer:
        body = make_request(
            dialect,
            prompt,
            params,
            model=self._model or "",
            tokenizer=self.tokenizer,
            first_generation=first_generation,
            with_routes=self.routes is not None,
        )
        limit = most_answer_bytes(prompt, params, self.routes)
        answer = self._client.post(PATHS[dialect], body, max_bytes=limit, stop=stop)
        try:
            read = read_answer(dialect, answer)
        except MalformedAnswerError as error:
            # From None: the error's own words may hold a key that the server repeats.
            raise self._malformed(dialect, str(error)) from None
        self._reported_model = self._reported_model or read.model
        if read.model not in (None, self._reported_model):
            raise self._malformed(
                dialect, f"model {read.model!r} answered, {self._reported_model!r} did before"
            )
        return read

    def _malformed(self, dialect: Dialect, message: str) -> RolloutServerError:
        return self._client.error(PATHS[dialect], 200, f"the answer cannot be used: {message}")
