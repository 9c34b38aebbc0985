"""What an inference server can do, found out by asking."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .answers import Answer
from .base import Tokenizer
from .client import JsonClient, RolloutServerError
from .dialects import PATHS, Dialect
from .values import Prompt, SamplingParams


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

    def __str__(self) -> str:
        return (
            f"rollout server: dialect {self.dialect}, "
            f"{'with' if self.returns_logprobs else 'without'} logprobs, "
            f"{'all responses of a prompt' if self.supports_n else 'one response'} per request"
        )


def probe_server(
    request: Callable[[Dialect, Prompt, SamplingParams], Answer],
    base_url: str,
    *,
    tokenizer: Tokenizer | None,
    dialect: Dialect | None,
    allow_retokenize: bool,
    with_routes: bool = False,
) -> ServerCapabilities:
    """First dialect that serves token ids; text if that is allowed.

    Args:
        request: makes one request and reads its answer.
        base_url: of the server, for messages.
        tokenizer: gives the prompt that is asked, if there is one.
        dialect: the only one to try; None tries all.
        allow_retokenize: whether text is accepted.
        with_routes: whether responses have to come with the experts of their tokens.

    Raises:
        RolloutServerError: if the server cannot serve rollouts, or fails at a request.
    """
    ids = [0, 1] if tokenizer is None else tokenizer.encode("1 + 1 =")
    prompt = Prompt(prompt_id="probe", prompt_ids=torch.tensor(ids, dtype=torch.int64))
    params = SamplingParams(num_generations=2, max_response_tokens=1)
    exact: tuple[Dialect, ...] = ("token_ids", "sglang")
    plain: tuple[Dialect, ...] = ("text",) if allow_retokenize else ()
    found_out = []
    for wanted in (dialect,) if dialect is not None else exact + plain:
        try:
            responses = request(wanted, prompt, params).responses
        except RolloutServerError as error:
            if not error.is_refusal:
                raise _probe_failure(wanted, error, is_named=dialect is not None) from error
            found_out.append(str(error))
            continue
        # Not whether the field is there: an aborted or empty response has none in any dialect.
        if wanted != "text" and not any(raw.token_ids for raw in responses):
            found_out.append(f"{PATHS[wanted]} returns no token ids")
            continue
        if with_routes and all(raw.routes is None for raw in responses):
            found_out.append(
                f"{PATHS[wanted]} returns no routed_experts; start the server with "
                "--enable-return-routed-experts"
            )
            continue
        return ServerCapabilities(
            dialect=wanted,
            returns_logprobs=wanted != "text"
            and any(raw.logprobs is not None for raw in responses),
            supports_n=len(responses) == params.num_generations
            and not (with_routes and any(raw.routes is None for raw in responses)),
        )
    remedy = "" if allow_retokenize else "; allow_retokenize=True accepts text (lossy)"
    raise RolloutServerError(
        base_url, None, "cannot serve rollouts: " + " | ".join(found_out) + remedy
    )


def _probe_failure(
    dialect: Dialect, error: RolloutServerError, *, is_named: bool
) -> RolloutServerError:
    remedy = "; see its log" if is_named else "; see its log, or name its form by dialect="
    return RolloutServerError(
        error.url.removesuffix(PATHS[dialect]),
        error.status,
        f"failed when it was probed for dialect {dialect!r}: {error}{remedy}",
    )


def health_path_problem(health_path: str) -> str | None:
    """What keeps ``health_path`` from being a path; None if nothing does."""
    if health_path.startswith("/") and not any(char.isspace() for char in health_path):
        return None
    return f"health_path={health_path!r} must start with a slash and hold no blanks"


def first_model(client: JsonClient) -> str:
    """Name of the first model that a server lists. Raises RolloutServerError if it lists none."""
    listed = client.get("/v1/models")
    try:
        name = listed["data"][0]["id"]
    except (KeyError, IndexError, TypeError):
        name = None
    if not isinstance(name, str) or not name:
        raise client.error("/v1/models", 200, "lists no model; pass model=")
    return name
