"""HTTP sessions whose requests have one deadline each, and can be called off while they wait.

A socket's timeout holds for one read, so a server that sends a byte now and then is never late.
Here the time that is left after sending a request holds for all reads of its answer together.
"""

from __future__ import annotations

import http.client
import io
import socket
import threading
import time
from functools import partial
from typing import Any

import requests
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool, Timeout
from urllib3.exceptions import HTTPError

# How soon a read notices that its request was called off.
_LOOK_SECONDS = 0.1
_CHUNK_BYTES = 1 << 16
_ERROR_BYTES = 1 << 12


class BodyTooLargeError(Exception):
    """A body that is larger than what was asked for can need."""


class Transport:
    """Sends requests from several threads and reads their answers whole.

    Args:
        max_connections: connections kept open to one server.
        authorization: value of that header, or None.
    """

    def __init__(self, max_connections: int, authorization: str | None) -> None:
        self._current = _Current()
        self._session = requests.Session()
        if authorization is not None:
            # As an auth, not as a header: requests lets a netrc file replace the header.
            self._session.auth = partial(_authorize, authorization)
        adapter = _Adapter(self._current, pool_maxsize=max_connections)
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, adapter)

    def send(
        self,
        method: str,
        url: str,
        body: Any,
        *,
        seconds: float,
        max_bytes: int,
        stop: threading.Event,
    ) -> tuple[int, Any, bytes]:
        """Status, headers and decoded body of an answer; redirects are not followed.

        Args:
            method: of HTTP.
            url: address.
            body: JSON-serializable, or None.
            seconds: for connecting, sending and the whole answer together.
            max_bytes: longest body, decompressed; of an error's body only the start is read.
            stop: when set, the request ends.

        Raises:
            BodyTooLargeError: if a successful answer has a longer body.
            requests.RequestException, urllib3.exceptions.HTTPError: if no whole answer arrives.
        """
        self._current.stop = stop
        with self._session.request(
            method,
            url,
            json=body,
            timeout=Timeout(total=seconds),  # type: ignore[arg-type]
            stream=True,
            allow_redirects=False,
        ) as answer:
            is_success = 200 <= answer.status_code < 300
            content = _read(answer, max_bytes) if is_success else _read_start(answer)
            return answer.status_code, answer.headers, content


def _read(answer: requests.Response, max_bytes: int) -> bytes:
    content = bytearray()
    for chunk in answer.iter_content(_CHUNK_BYTES):
        content += chunk
        if len(content) > max_bytes:
            raise BodyTooLargeError(f"a body of more than {max_bytes} bytes")
    return bytes(content)


def _read_start(answer: requests.Response) -> bytes:
    """The start of an error's body, as far as it arrives: the status says enough without."""
    try:
        return next(answer.iter_content(_ERROR_BYTES), b"")
    except (requests.RequestException, HTTPError):
        return b""


class _Current(threading.local):
    """What ends the request that this thread makes: connections learn of it in no other way."""

    def __init__(self) -> None:
        self.stop = threading.Event()


class _Adapter(requests.adapters.HTTPAdapter):
    """Opens connections whose answers are read under a deadline, proxies' ones included."""

    def __init__(self, current: _Current, **settings: Any) -> None:
        self._pool_classes = {
            "http": partial(_make_pool, HTTPConnectionPool, current),
            "https": partial(_make_pool, HTTPSConnectionPool, current),
        }
        super().__init__(**settings)

    def init_poolmanager(self, *args: Any, **settings: Any) -> None:
        super().init_poolmanager(*args, **settings)  # type: ignore[no-untyped-call]
        self.poolmanager.pool_classes_by_scheme = self._pool_classes

    def proxy_manager_for(self, proxy: Any, **settings: Any) -> Any:
        manager = super().proxy_manager_for(proxy, **settings)  # type: ignore[no-untyped-call]
        manager.pool_classes_by_scheme = self._pool_classes
        return manager


def _make_pool(pool_class: Any, current: _Current, *args: Any, **settings: Any) -> Any:
    pool = pool_class(*args, **settings)
    pool.ConnectionCls = partial(_make_connection, pool.ConnectionCls, current)
    return pool


def _make_connection(connection_class: Any, current: _Current, **settings: Any) -> Any:
    connection = connection_class(**settings)
    connection.response_class = partial(_Answer, current)
    return connection


class _Answer(http.client.HTTPResponse):
    """An answer that is read by a ``_Reader``."""

    def __init__(self, current: _Current, sock: socket.socket, *args: Any, **named: Any) -> None:
        super().__init__(sock, *args, **named)
        self._reader = _Reader(sock, self.fp, current.stop)
        self.fp = io.BufferedReader(self._reader)

    def begin(self, *args: Any, **named: Any) -> None:
        super().begin(*args, **named)
        # The base class takes headers that break off for all there are.
        if self._reader.is_at_end:
            raise ConnectionResetError("the connection was cut inside the headers")


class _Reader(io.RawIOBase):
    """Reads a socket until its timeout, counted from now over all reads, or until ``stop``."""

    def __init__(self, sock: socket.socket, stream: Any, stop: threading.Event) -> None:
        seconds = sock.gettimeout()
        assert seconds is not None, "every request has a timeout"
        self._end = time.monotonic() + seconds
        self._sock = sock
        # Keeps the socket open until this reader is closed.
        self._stream = stream
        self._stop = stop
        self.is_at_end = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._stop.is_set():
            left = self._end - time.monotonic()
            if left <= 0:
                raise TimeoutError("the answer is not complete in time")
            self._sock.settimeout(min(left, _LOOK_SECONDS))
            try:
                num_bytes = self._sock.recv_into(buffer)
            except TimeoutError:
                continue
            self.is_at_end = not num_bytes
            return num_bytes
        raise ConnectionAbortedError("the request was called off")

    def close(self) -> None:
        self._stream.close()
        super().close()


def _authorize(authorization: str, request: Any) -> Any:
    request.headers["Authorization"] = authorization
    return request
