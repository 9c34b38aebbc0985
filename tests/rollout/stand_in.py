"""An inference server made of canned answers, in this process."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, BinaryIO

Reply = tuple[int, Any] | tuple[int, Any, dict[str, str]] | Callable[[BinaryIO], None]
Handler = Callable[[str, Any], Reply]


@dataclass
class StandIn:
    """Address of the server and what it was asked."""

    url: str
    requests: list[tuple[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)

    def bodies(self, path: str) -> list[Any]:
        return [body for asked, body in self.requests if asked == path]


@contextmanager
def stand_in(handler: Handler) -> Iterator[StandIn]:
    """Serve ``handler(path, body) -> (status, JSON or raw str or bytes[, headers])``.

    A handler may return a function instead, which writes the whole answer, bytes of HTTP, by
    itself; the connection is closed after it.
    """
    server_state = StandIn("")

    class _Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            server_state.requests.append((self.path, body))
            server_state.headers.append(dict(self.headers))
            reply = handler(self.path, body)
            if callable(reply):
                self.close_connection = True
                return reply(self.wfile)
            status, answer, *rest = reply
            data = answer if isinstance(answer, str | bytes) else json.dumps(answer)
            data = data.encode() if isinstance(data, str) else data
            self.send_response(status)
            for name, value in (rest[0] if rest else {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = _serve

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class _Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that timed out has hung up: no news."""

    server = _Server(("127.0.0.1", 0), _Handler)
    server_state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server_state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def completion(
    tokens: list[int], finish_reason: str = "stop", index: int = 0, **changes: Any
) -> dict[str, Any]:
    """One choice as vLLM sends it."""
    choice = {
        "index": index,
        "text": " ".join(map(str, tokens)),
        "finish_reason": finish_reason,
        "token_ids": tokens,
        "logprobs": {
            "tokens": [f"token_id:{token}" for token in tokens],
            "token_logprobs": [-0.5 * (i + 1) for i in range(len(tokens))],
        },
    }
    return choice | changes


def vllm_like(path: str, body: Any) -> Reply:
    """Answers every request; response i of a prompt is [first prompt token, i, 1]."""
    if path == "/health":
        return 200, ""
    if path == "/v1/models":
        return 200, {"data": [{"id": "served"}]}
    if path != "/v1/completions":
        return 404, {"error": "no such path"}
    choices = [completion([body["prompt"][0], i, 1], index=i) for i in range(body["n"])]
    return 200, {"choices": choices[::-1]}
