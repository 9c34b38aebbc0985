"""Answers that never end, break off or lead elsewhere: one deadline, and errors of one kind."""

from __future__ import annotations

import gzip
import json
import socket
import threading
import time
import traceback
from email.utils import formatdate

import pytest

from megatron_pg.rollout import OpenAIServerSource, RetryPolicy, RolloutServerError
from megatron_pg.rollout.client import JsonClient

from .helpers import make_prompt
from .scripted import PARAMS
from .stand_in import stand_in, vllm_like

HEAD = b"HTTP/1.1 200 OK\r\nConnection: close\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
BODY = b'{"a": 1}'
WHOLE = HEAD + b"Content-Length: 8\r\n\r\n" + BODY
KEY = "sk-very-secret"


def client_of(url, attempts=1, **fields):
    fields = {"timeout_seconds": 5.0} | fields
    retry = RetryPolicy(max_attempts=attempts, first_wait_seconds=0)
    return JsonClient(url, retry=retry, **fields)


def drip(answer, pieces, seconds=0.8):
    """Writes ``answer`` in pieces, each in time for a timeout that holds for one read."""

    def write(file):
        size = -(-len(answer) // pieces)
        for start in range(0, len(answer), size):
            time.sleep(seconds / pieces)
            file.write(answer[start : start + size])

    return write


SLOW = {
    "status line": WHOLE[:12] + b" " * 8 + WHOLE[12:],
    "headers": HEAD + b"X-Long: " + b"x" * 50 + b"\r\nContent-Length: 8\r\n\r\n" + BODY,
    "body": HEAD + b"Content-Length: 58\r\n\r\n" + b" " * 50 + BODY,
    "body of no length": HEAD + b"\r\n" + b" " * 50 + BODY,
    "chunks": CHUNKED + b"1\r\n \r\n" * 10 + b"8\r\n" + BODY + b"\r\n0\r\n\r\n",
    "continue": b"HTTP/1.1 100 Continue\r\n\r\n" * 3 + WHOLE,
}


@pytest.mark.parametrize("case", SLOW)
def test_one_deadline_holds_for_a_whole_answer(case):
    with (
        stand_in(lambda path, body: drip(SLOW[case], pieces=16)) as server,
        pytest.raises(RolloutServerError, match=r"no whole answer within 0\.3 s") as caught,
    ):
        client_of(server.url, timeout_seconds=0.3).get("/x")
    assert caught.value.status is None


@pytest.mark.parametrize("case", SLOW)
def test_what_drips_in_time_arrives(case):
    with stand_in(lambda path, body: drip(SLOW[case], pieces=4, seconds=0.2)) as server:
        assert client_of(server.url).get("/x") == {"a": 1}


def slow_at(slow_path):
    def handler(path, body):
        if path == slow_path:
            return drip(HEAD + b"Content-Length: 58\r\n\r\n" + b" " * 50 + BODY, pieces=16)
        return vllm_like(path, body) if path != "/collective_rpc" else (200, {})

    return handler


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/v1/completions"])
def test_the_deadline_holds_for_the_start(path):
    with (
        stand_in(slow_at(path)) as server,
        pytest.raises(RolloutServerError, match=f"{path}.*no whole answer within"),
    ):
        source_of(server.url, startup_seconds=0.25).start()


@pytest.mark.parametrize("path", ["/collective_rpc", "/reset_prefix_cache"])
def test_the_deadline_holds_for_a_reload(path, tmp_path):
    (tmp_path / "model.safetensors").touch()
    with (
        stand_in(slow_at(path)) as server,
        pytest.raises(RolloutServerError, match=f"{path}.*no whole answer within 0.3 s"),
    ):
        source_of(server.url, reload="vllm").reload_weights(tmp_path, 1)


def source_of(url, **fields):
    retry = RetryPolicy(max_attempts=1)
    return OpenAIServerSource(url, timeout_seconds=0.3, retry=retry, **fields)


# What breaks off is asked for again.
CUT = {
    "nothing": b"",
    "half a status line": b"HTTP/1.",
    "no HTTP": b"220 smtp ready\r\n",
    "half the headers": HEAD + b"Content-Le",
    "half the body": WHOLE[:-4],
    "half a chunk": CHUNKED + b'8\r\n{"a"',
    "no last chunk": CHUNKED + b"8\r\n" + BODY + b"\r\n",
    "no chunk": CHUNKED + b"xyz\r\n" + BODY + b"\r\n0\r\n\r\n",
    "half a body of no length": HEAD + b"\r\n" + BODY[:-1],
    "no UTF-8": HEAD + b'\r\n"\xff"',
    "no gzip": HEAD + b"Content-Encoding: gzip\r\nContent-Length: 8\r\n\r\n" + BODY,
    "half a gzip": HEAD + b"Content-Encoding: gzip\r\n\r\n" + gzip.compress(BODY * 99)[:30],
    "too many headers": HEAD + b"X-A: b\r\n" * 200 + b"\r\n" + BODY,
    "too long a header": HEAD + b"X-A: " + b"b" * 70_000 + b"\r\n\r\n" + BODY,
    "deep JSON": HEAD + b"\r\n" + b"[" * 100_000,
}  # fmt: skip


@pytest.mark.parametrize("case", CUT)
def test_a_broken_answer_is_asked_for_again(case):
    answers = [CUT[case], WHOLE]
    with stand_in(lambda path, body: lambda file: file.write(answers.pop(0))) as server:
        assert client_of(server.url, attempts=3).post("/x", {}) == {"a": 1}
        assert len(server.requests) == 2


@pytest.mark.parametrize("case", CUT)
def test_an_answer_that_stays_broken_is_an_error(case):
    with stand_in(lambda path, body: lambda file: file.write(CUT[case])) as server:
        with pytest.raises(RolloutServerError, match="/x: gave up after 3 attempts; last: "):
            client_of(server.url, attempts=3).post("/x", {})
        assert len(server.requests) == 3


def test_a_compressed_answer_is_read():
    data = gzip.compress(json.dumps({"a": "b" * 1000}).encode())
    with stand_in(lambda path, body: (200, data, {"Content-Encoding": "gzip"})) as server:
        assert client_of(server.url).post("/x", {}, max_bytes=1009) == {"a": "b" * 1000}
        with pytest.raises(RolloutServerError, match="a body of more than 1008 bytes"):
            client_of(server.url).post("/x", {}, max_bytes=1008)


HUGE = 32 << 20


def huge_plain(file):
    file.write(HEAD + b"\r\n")
    for _ in range(HUGE >> 16):
        file.write(b" " * (1 << 16))
    file.write(b'{"choices": []}')


def huge_gzip(file):
    data = gzip.compress(b" " * HUGE + b'{"choices": []}')
    assert len(data) < 1 << 16
    file.write(HEAD + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(data) + data)


@pytest.mark.parametrize("write", [huge_plain, huge_gzip])
def test_an_answer_is_no_longer_than_what_was_asked_for_can_need(write):
    def handler(path, body):
        is_probe = path != "/v1/completions" or body["max_tokens"] == 1
        return vllm_like(path, body) if is_probe else write

    with stand_in(handler) as server:
        source = OpenAIServerSource(server.url, retry=RetryPolicy(max_attempts=1))
        with pytest.raises(RolloutServerError, match=r"prompt 'p0': a body of more than 1\d{6} by"):
            source.generate([make_prompt()], PARAMS)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("target", ["/x", "http://elsewhere.invalid/x", ""])
def test_redirects_are_not_followed(status, target):
    with stand_in(lambda path, body: (status, "", {"Location": target})) as server:
        with pytest.raises(RolloutServerError, match=f"status {status}.*{target}'.*as base_url"):
            client_of(server.url, attempts=3).post("/x", {})
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("header", "least", "most"),
    [
        ("7", 7, 7),
        (" 7 ", 7, 7),
        ("0", 0, 0.75),
        ("99999999999", 30, 30),
        ("9" * 5000, 0, 0.75),
        (formatdate(time.time() + 3600, usegmt=True), 30, 30),
        (formatdate(time.time() - 3600, usegmt=True), 0, 0.75),
        ("Wed, 21 Oct 999999 07:28:00 GMT", 0, 0.75),
        ("soon", 0, 0.75),
        ("-5", 0, 0.75),
        ("nan", 0, 0.75),
        ("inf", 0, 0.75),
        ("", 0, 0.75),
    ],
)
def test_retry_after_in_every_form(header, least, most):
    waits, statuses = [], [503, 200]

    def handler(path, body):
        return statuses.pop(0), {}, {"Retry-After": header}

    with stand_in(handler) as server:
        client = JsonClient(
            server.url, timeout_seconds=5.0, retry=RetryPolicy(max_attempts=2), sleep=waits.append
        )
        client.get("/x")
    assert len(waits) == 1 and least <= waits[0] <= most


def test_waits_stay_finite():
    policy = RetryPolicy(max_attempts=10_000)
    assert policy.wait_seconds(9_999, None) == 30.0
    for fields in ({"first_wait_seconds": -1.0}, {"max_wait_seconds": float("inf")}):
        with pytest.raises(ValueError, match="must be finite and at least 0"):
            RetryPolicy(**fields)
    with pytest.raises(ValueError, match="max_attempts=2.5 must be an integer"):
        RetryPolicy(max_attempts=2.5)


@pytest.mark.parametrize("status", [200, 204, 301, 400, 401, 403, 404, 405, 408, 410, 429])
def test_any_health_but_a_5xx_decides_at_once(status):
    with stand_in(lambda path, body: (status, "")) as server:
        client_of(server.url).wait_until_healthy("/health", 60.0)
        assert len(server.requests) == 1


@pytest.mark.parametrize("status", [500, 501, 502, 503, 504, 599])
def test_health_waits_for_a_5xx_to_pass(status):
    statuses = [status, status, 404]
    with stand_in(lambda path, body: (statuses.pop(0), "")) as server:
        client_of(server.url, sleep=lambda seconds: None).wait_until_healthy("/up", 60.0)
        assert [path for path, _ in server.requests] == ["/up"] * 3


def test_a_source_asks_its_own_health_path():
    def handler(path, body):
        return (404, "") if path == "/health" else vllm_like(path, body)

    with stand_in(handler) as server:
        OpenAIServerSource(server.url, startup_seconds=60.0).start()
        OpenAIServerSource(server.url, health_path="/ready", startup_seconds=60.0).start()
        asked = [path for path, _ in server.requests]
    assert asked.count("/health") == asked.count("/ready") == 1
    with pytest.raises(ValueError, match="health_path='health' must start with a slash"):
        OpenAIServerSource(server.url, health_path="health")


def test_tls_to_a_plain_server_is_told_at_once():
    with stand_in(lambda path, body: (200, {})) as server:
        client = client_of(server.url.replace("http://", "https://"), attempts=5)
        for ask in (lambda: client.get("/x"), lambda: client.wait_until_healthy("/health", 60.0)):
            with pytest.raises(RolloutServerError, match="a server without TLS has.*http://"):
                ask()


def test_plain_http_to_a_tls_server_is_an_error():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            connection, _ = listener.accept()
            with connection:
                connection.recv(100)
                connection.sendall(b"\x15\x03\x01\x00\x02\x02\x46")

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(RolloutServerError, match="ConnectionError"):
            client_of(f"http://127.0.0.1:{listener.getsockname()[1]}").get("/x")
        thread.join()


def test_a_host_that_nobody_knows(monkeypatch):
    def fail(*args, **named):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(RolloutServerError, match="http://nowhere:80/x: gave up.*not known") as e:
        client_of("http://nowhere:80", attempts=2).get("/x")
    assert e.value.status is None


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("localhost:8000", "must start with http:// or https://"),
        ("ftp://h", "must start with http:// or https://"),
        ("http://", "must have the form"),
        ("http://:8000", "must have the form"),
        ("http://h:99999", "is no address"),
        ("http://h:port", "is no address"),
        ("http://[::1", "is no address"),
        ("http://h?x=1", "must have the form"),
        ("http://h#x", "must have the form"),
        ("http://h h", "must have the form"),
        (f"http://me:{KEY}@h", "must not hold a user name or password"),
    ],
)
def test_addresses_are_refused(url, complaint):
    with pytest.raises(ValueError, match=complaint) as caught:
        client_of(url)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("key", ["", f"{KEY}\n", f" {KEY}", f"{KEY}ü", f"{KEY}\x00"])
def test_keys_that_no_header_carries_are_refused_unseen(key):
    with pytest.raises(ValueError, match="api_key") as caught:
        client_of("http://h", api_key=key)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("seconds", [0, -1.0, float("inf"), float("nan")])
def test_times_are_finite(seconds):
    with pytest.raises(ValueError, match="timeout_seconds=.* must be finite and above 0"):
        client_of("http://h", timeout_seconds=seconds)
    with pytest.raises(ValueError, match="startup_seconds=.* must be finite and above 0"):
        OpenAIServerSource("http://h", startup_seconds=seconds)


ECHOES = {
    "error": (401, f"Incorrect API key provided: {KEY}"),
    "server error": (500, {"message": f"Bearer {KEY}"}),
    "redirect": (302, "", {"Location": f"http://h/?key={KEY}"}),
    "no JSON": (200, f"<p>{' ' * 200}{KEY}</p>"),
    "reported": (200, {"error": {"message": f"quota of {KEY}"}}),
    "wrong field": (200, {"choices": KEY}),
    "reload": (200, {"success": False, "message": f"{KEY} may not"}),
}


@pytest.mark.parametrize("case", ECHOES)
def test_no_error_shows_the_key(case, tmp_path):
    (tmp_path / "model.safetensors").touch()

    def handler(path, body):
        return (404, "") if path == "/health" else ECHOES[case]

    with stand_in(handler) as server:
        source = OpenAIServerSource(
            server.url, model="m", api_key=KEY, reload="sglang", retry=RetryPolicy(max_attempts=1)
        )
        ask = source.start
        if case == "reload":
            ask = lambda: source.reload_weights(tmp_path, 1)  # noqa: E731
        with pytest.raises(RolloutServerError) as caught:
            ask()
        assert server.headers[-1]["Authorization"] == f"Bearer {KEY}"
    shown = "".join(traceback.format_exception(caught.value))
    assert KEY not in shown
    assert ("it does not take this api_key" if case == "error" else "[api_key]") in shown


def test_a_netrc_file_does_not_replace_the_key(monkeypatch, tmp_path):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password else\n")
    monkeypatch.setenv("NETRC", str(netrc))
    with stand_in(lambda path, body: (200, {})) as server:
        client_of(server.url, api_key=KEY).get("/x")
        assert server.headers[0]["Authorization"] == f"Bearer {KEY}"


def test_a_failure_calls_off_what_waits():
    hung_up = threading.Event()
    waiting = threading.Semaphore(0)

    def wait(file):
        """Answers late; by then the client should be gone."""
        waiting.release()
        connection = file._sock
        connection.settimeout(3)
        try:
            assert connection.recv(1) == b""
            hung_up.set()
        except TimeoutError:
            file.write(WHOLE)

    def handler(path, body):
        if path != "/v1/completions" or body["max_tokens"] == 1:
            return vllm_like(path, body)
        if body["prompt"][0] != 103:
            return wait
        for _ in range(3):
            assert waiting.acquire(timeout=3)
        return 400, "prompt too long"

    with stand_in(handler) as server:
        source = OpenAIServerSource(server.url, max_concurrency=4)
        with pytest.raises(RolloutServerError, match="prompt 'p3': status 400: prompt too long"):
            source.generate([make_prompt(i) for i in range(9)], PARAMS)
        assert hung_up.wait(3), "the connections of the others are closed"
        asked = [b["prompt"][0] for b in server.bodies("/v1/completions") if b["max_tokens"] > 1]
    assert sorted(asked) == [100, 101, 102, 103], "nothing new is asked, nothing is asked again"


def test_the_first_failure_is_the_one_that_is_told():
    def handler(path, body):
        if path == "/v1/completions" and body["prompt"][0] in (101, 102):
            return 400, f"no {body['prompt'][0]}"
        return vllm_like(path, body)

    with stand_in(handler) as server:
        source = OpenAIServerSource(server.url, max_concurrency=1)
        with pytest.raises(RolloutServerError, match="prompt 'p1': status 400: no 101"):
            source.generate([make_prompt(i) for i in range(4)], PARAMS)
