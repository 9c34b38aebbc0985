"""A JSON-over-HTTP client that survives a busy server and says what failed when it gives up."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# Statuses of a server that is overloaded or restarting; any other error will not pass by itself.
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
_EXCERPT_CHARS = 300


class RolloutServerError(RuntimeError):
    """A request to an inference server failed for good.

    Attributes:
        url: what was called.
        status: last HTTP status, or None if no answer arrived.
    """

    def __init__(self, url: str, status: int | None, message: str) -> None:
        # All three, so that a pickled error comes out on other ranks.
        super().__init__(url, status, message)
        self.url = url
        self.status = status

    def __str__(self) -> str:
        return f"{self.args[0]}: {self.args[2]}"

    @property
    def is_refusal(self) -> bool:
        """Whether a working server does not do what was asked, rather than failed at it."""
        return self.status is not None and self.status < 500 and self.status not in _TRANSIENT


def base_url_problem(base_url: str) -> str | None:
    """What keeps ``base_url`` from being a server's address; None if nothing does."""
    if base_url.startswith(("http://", "https://")):
        return None
    return f"base_url={base_url!r} must start with http:// or https://"


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """When to try again after a transient failure: exponential backoff with jitter.

    Attributes:
        max_attempts: tries in all, at least 1.
        first_wait_seconds: mean wait before the second try; doubles with every further one.
        max_wait_seconds: longest wait, also of a wait that the server asks for.

    Raises:
        ValueError: if ``max_attempts < 1``.
    """

    max_attempts: int = 6
    first_wait_seconds: float = 0.5
    max_wait_seconds: float = 30.0

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts={self.max_attempts} must be at least 1")

    def wait_seconds(self, attempt: int, asked_seconds: float | None) -> float:
        """Wait after failed try number ``attempt`` (from 0), longer if the server asked for it."""
        # Jitter: clients that failed together must not come back together.
        wait = self.first_wait_seconds * 2.0**attempt * random.uniform(0.5, 1.5)
        return min(max(wait, asked_seconds or 0.0), self.max_wait_seconds)


class JsonClient:
    """Calls one server from several threads.

    Args:
        base_url: address of the server, with or without ``/v1``.
        timeout_seconds: longest wait for an answer.
        retry: policy for transient failures (429, 5xx, no connection, no answer in time).
        api_key: bearer token, or None.
        max_connections: connections kept open.
        sleep: waits; replaced in tests.

    Raises:
        ImportError: if requests is not installed.
        ValueError: on a ``base_url`` without http:// or https://.
    """

    def __init__(
        self,
        base_url: str,
        *,
        timeout_seconds: float,
        retry: RetryPolicy,
        api_key: str | None = None,
        max_connections: int = 10,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        try:
            import requests
        except ImportError as error:
            raise ImportError(
                'rollout servers need requests: pip install "megatron_pg[rollout]"'
            ) from error
        if problem := base_url_problem(base_url):
            raise ValueError(problem)
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        self.timeout_seconds = timeout_seconds
        self.retry = retry
        self._sleep = sleep
        self._failures: Any = (requests.ConnectionError, requests.Timeout)
        self._session = requests.Session()
        adapter = requests.adapters.HTTPAdapter(pool_maxsize=max_connections)
        self._session.mount(self.base_url, adapter)
        if api_key is not None:
            self._session.headers["Authorization"] = f"Bearer {api_key}"

    def get(self, path: str, *, retry: RetryPolicy | None = None) -> Any:
        """Decoded JSON body of a GET. Raises: as ``post``."""
        return self._call("GET", path, None, retry or self.retry)

    def post(self, path: str, body: Any, *, retry: RetryPolicy | None = None) -> Any:
        """Decoded JSON body of a POST, None if the body is empty.

        Args:
            path: appended to ``base_url``, with leading slash.
            body: JSON-serializable.
            retry: instead of the client's own policy.

        Raises:
            RolloutServerError: after the last try, at once on an error that trying again cannot
                mend, and on a body that is no JSON.
        """
        return self._call("POST", path, body, retry or self.retry)

    def wait_until_healthy(self, path: str, timeout_seconds: float) -> None:
        """Wait until a GET of ``path`` succeeds.

        Raises:
            RolloutServerError: if it does not within ``timeout_seconds``.
        """
        end = time.monotonic() + timeout_seconds
        once = RetryPolicy(max_attempts=1)
        while True:
            try:
                self._answer("GET", path, None, once)
                return
            except RolloutServerError as error:
                if time.monotonic() >= end:
                    raise RolloutServerError(
                        error.url, error.status, f"not healthy after {timeout_seconds} s; {error}"
                    ) from error
            self._sleep(min(1.0, max(0.05, timeout_seconds / 20)))

    def _call(self, method: str, path: str, body: Any, retry: RetryPolicy) -> Any:
        answer = self._answer(method, path, body, retry)
        if not answer.content:
            return None
        try:
            return answer.json()
        except ValueError as error:
            raise RolloutServerError(
                self.base_url + path,
                answer.status_code,
                f"status {answer.status_code} with a body that is no JSON: "
                f"{answer.text[:_EXCERPT_CHARS]!r}",
            ) from error

    def _answer(self, method: str, path: str, body: Any, retry: RetryPolicy) -> Any:
        """First successful answer; raises after the last try."""
        url = self.base_url + path
        for attempt in range(retry.max_attempts):
            status, asked_seconds = None, None
            try:
                answer = self._session.request(method, url, json=body, timeout=self.timeout_seconds)
            except self._failures as error:
                failure = f"{type(error).__name__}: {error}"
            else:
                if answer.ok:
                    return answer
                status = answer.status_code
                failure = f"status {status}: {answer.text[:_EXCERPT_CHARS]}"
                if status not in _TRANSIENT:
                    raise RolloutServerError(url, status, failure)
                asked_seconds = _retry_after_seconds(answer.headers.get("Retry-After"))
            if attempt + 1 < retry.max_attempts:
                self._sleep(retry.wait_seconds(attempt, asked_seconds))
        raise RolloutServerError(
            url, status, f"gave up after {retry.max_attempts} attempts; last: {failure}"
        )


def _retry_after_seconds(header: str | None) -> float | None:
    try:
        return float(header) if header is not None else None
    except ValueError:  # The other form of the header is a date; the backoff does instead.
        return None
