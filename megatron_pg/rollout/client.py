"""A JSON-over-HTTP client that survives a busy server and says what failed when it gives up."""

from __future__ import annotations

import json
import math
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from .retry import TRANSIENT_STATUSES, RetryPolicy, retry_after_seconds

_EXCERPT_CHARS = 300
_MESSAGE_CHARS = 600
# Of answers that hold no responses: lists of models, what a reload says.
_MAX_BODY_BYTES = 1 << 24
_CALLED_OFF = "called off, since another request failed"


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
        return (
            self.status is not None and self.status < 500 and self.status not in TRANSIENT_STATUSES
        )


class _PassingError(RolloutServerError):
    """A failure that may not happen again; ``wait_seconds`` is what the server asked for."""

    wait_seconds: float | None = None


def base_url_problem(base_url: str) -> str | None:
    """What keeps ``base_url`` from being a server's address; None if nothing does."""
    if not base_url.startswith(("http://", "https://")):
        return f"base_url={base_url!r} must start with http:// or https://"
    try:
        parts = urlsplit(base_url)
        has_host = bool(parts.hostname) and parts.port != 0
    except ValueError as error:
        return f"base_url={base_url!r} is no address: {error}"
    if "@" in parts.netloc:
        # Not shown: it stands in the file where it was written, and nowhere else.
        return "base_url must not hold a user name or password; give the server's key as api_key"
    if not has_host or parts.query or parts.fragment or any(c.isspace() for c in base_url):
        return f"base_url={base_url!r} must have the form http://host:port, a path may follow"
    return None


def api_key_problem(api_key: str | None) -> str | None:
    """What keeps ``api_key`` from being sent; None if nothing does. Does not show the key."""
    if api_key is None:
        return None
    if not api_key:
        return "api_key is empty; give the server's key, or null if it wants none"
    if api_key.isascii() and api_key.isprintable() and " " not in api_key:
        return None
    return "api_key holds a blank, a line's end or another character that no HTTP header can carry"


class JsonClient:
    """Calls one server from several threads.

    Args:
        base_url: address of the server, with or without ``/v1``.
        timeout_seconds: for one try: connecting, sending and the whole answer together.
        retry: policy for transient failures: 408, 425, 429, most 5xx, no connection, an answer that
            is not complete in time, is cut or is no JSON.
        api_key: bearer token, or None; no error or message shows it.
        max_connections: connections kept open.
        sleep: waits between tries; replaced in tests. None waits as long as nobody calls the
            request off.

    Raises:
        ImportError: if requests is not installed.
        ValueError: on a ``base_url`` that is no address, an ``api_key`` that no header can carry,
            or a ``timeout_seconds`` that is not finite and above 0.
    """

    def __init__(
        self,
        base_url: str,
        *,
        timeout_seconds: float,
        retry: RetryPolicy,
        api_key: str | None = None,
        max_connections: int = 10,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        try:
            import requests
            from urllib3.exceptions import HTTPError

            from .transport import BodyTooLargeError, Transport
        except ImportError as error:
            raise ImportError(
                'rollout servers need requests: pip install "megatron_pg[rollout]"'
            ) from error
        if problem := base_url_problem(base_url) or api_key_problem(api_key):
            raise ValueError(problem)
        if not 0 < timeout_seconds < math.inf:
            raise ValueError(f"timeout_seconds={timeout_seconds} must be finite and above 0")
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        self.timeout_seconds = timeout_seconds
        self.retry = retry
        self._api_key = api_key
        self._sleep = sleep
        self._failures: Any = (requests.RequestException, HTTPError)
        self._too_large: Any = BodyTooLargeError
        authorization = None if api_key is None else f"Bearer {api_key}"
        self._transport = Transport(max_connections, authorization)

    def get(self, path: str, *, retry: RetryPolicy | None = None) -> Any:
        """Decoded JSON body of a GET. Raises: as ``post``."""
        return self._call("GET", path, None, retry or self.retry)

    def post(
        self,
        path: str,
        body: Any,
        *,
        retry: RetryPolicy | None = None,
        max_bytes: int = _MAX_BODY_BYTES,
        stop: threading.Event | None = None,
    ) -> Any:
        """Decoded JSON body of a POST, None if the body is empty.

        Args:
            path: appended to ``base_url``, with leading slash.
            body: JSON-serializable.
            retry: instead of the client's own policy.
            max_bytes: longest answer, decompressed.
            stop: set by another thread to call the request off.

        Raises:
            RolloutServerError: after the last try, and at once on an error that trying again cannot
                mend.
        """
        return self._call("POST", path, body, retry or self.retry, max_bytes, stop)

    def wait_until_healthy(self, path: str, timeout_seconds: float) -> None:
        """Wait while a GET of ``path`` fails with a 5xx or gets no connection.

        Any other answer comes from a server that is up: a 404 has no such path.

        Raises:
            RolloutServerError: if that lasts ``timeout_seconds``, or TLS fails.
        """
        end = time.monotonic() + timeout_seconds
        stop = threading.Event()
        while True:
            left = max(end - time.monotonic(), 0.05)
            try:
                seconds = min(self.timeout_seconds, left)
                self._try("GET", path, None, seconds, _MAX_BODY_BYTES, stop)
                return
            except RolloutServerError as error:
                if error.status is not None and error.status < 500:
                    return
                if error.status is None and not isinstance(error, _PassingError):
                    raise
                if time.monotonic() >= end:
                    message = f"not healthy after {timeout_seconds} s; {error}"
                    raise RolloutServerError(error.url, error.status, message) from error
            self._wait(min(1.0, max(0.05, timeout_seconds / 20)), stop)

    def error(self, path: str, status: int | None, message: str) -> RolloutServerError:
        """An error of this server, fit to be printed, without the key that servers may repeat."""
        return RolloutServerError(self.base_url + path, status, self._printable(message))

    def _call(
        self,
        method: str,
        path: str,
        body: Any,
        retry: RetryPolicy,
        max_bytes: int = _MAX_BODY_BYTES,
        stop: threading.Event | None = None,
    ) -> Any:
        stop = stop or threading.Event()
        for attempt in range(retry.max_attempts):
            try:
                content = self._try(method, path, body, self.timeout_seconds, max_bytes, stop)
                return self._decode(path, content)
            except _PassingError as error:
                last = error
            if attempt + 1 < retry.max_attempts:
                self._wait(retry.wait_seconds(attempt, last.wait_seconds), stop)
        message = f"gave up after {retry.max_attempts} attempts; last: {last.args[2]}"
        raise RolloutServerError(last.url, last.status, message) from last

    def _try(
        self,
        method: str,
        path: str,
        body: Any,
        seconds: float,
        max_bytes: int,
        stop: threading.Event,
    ) -> bytes:
        """Body of a successful answer to a single try."""
        url = self.base_url + path
        if stop.is_set():
            raise self.error(path, None, _CALLED_OFF)
        try:
            status, headers, content = self._transport.send(
                method, url, body, seconds=seconds, max_bytes=max_bytes, stop=stop
            )
        except self._too_large as error:
            raise self.error(path, 200, f"{error}, more than was asked for can need") from error
        except self._failures as error:
            if stop.is_set():
                raise self.error(path, None, _CALLED_OFF) from error
            raise self._failure(path, error, seconds) from error
        if 200 <= status < 300:
            return content
        text = content.decode("utf-8", "replace")
        message = self._printable(f"status {status}{self._remedy(status, headers)}: {text}")
        if status not in TRANSIENT_STATUSES:
            raise RolloutServerError(url, status, message)
        passing = _PassingError(url, status, message)
        passing.wait_seconds = retry_after_seconds(headers.get("Retry-After"))
        raise passing

    def _failure(self, path: str, error: Exception, seconds: float) -> RolloutServerError:
        """The error of a try without a whole answer; connections may come back, mistakes stay."""
        causes = list(_causes(error))
        message = f"{type(error).__name__}: {error}"
        if any(isinstance(cause, TimeoutError) for cause in causes):
            message = f"no whole answer within {seconds:g} s; {message}"
        passes = not isinstance(error, ValueError)
        if any(isinstance(cause, ssl.SSLError) for cause in causes):
            passes = any(isinstance(cause, ssl.SSLEOFError | TimeoutError) for cause in causes)
            message += "" if passes else "; a server without TLS has a base_url with http://"
        kind = _PassingError if passes else RolloutServerError
        return kind(self.base_url + path, None, self._printable(message))

    def _decode(self, path: str, content: bytes) -> Any:
        if not content:
            return None
        try:
            return json.loads(content.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            excerpt = self._printable(content[: 10 * _EXCERPT_CHARS].decode("utf-8", "replace"))
            message = f"status 200 with a body that is no JSON: {excerpt[:_EXCERPT_CHARS]!r}"
            raise _PassingError(
                self.base_url + path, 200, f"{message} ({type(error).__name__})"
            ) from error

    def _wait(self, seconds: float, stop: threading.Event) -> None:
        if self._sleep is None:
            stop.wait(seconds)
        else:
            self._sleep(seconds)

    def _remedy(self, status: int, headers: Mapping[str, str]) -> str:
        if status in (401, 403):
            return " (set api_key)" if self._api_key is None else " (it does not take this api_key)"
        if status == 413:
            return " (the server, or a proxy before it, must take longer requests)"
        if 300 <= status < 400:
            return f" (leads to {headers.get('Location')!r}: give the address behind as base_url)"
        return ""

    def _printable(self, text: str) -> str:
        """One line without control characters and without the key."""
        if self._api_key is not None:
            text = text.replace(self._api_key, "[api_key]")
        text = "".join(c if c.isprintable() else " " for c in text[: 10 * _MESSAGE_CHARS])
        return " ".join(text.split())[:_MESSAGE_CHARS]


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it was raised from, down to the socket's own."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
