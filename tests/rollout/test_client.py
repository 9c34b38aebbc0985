"""Retries, backoff, timeouts and final errors of the HTTP client."""

import pickle
import sys
import time

import pytest

from megatron_pg.rollout import RetryPolicy, RolloutServerError
from megatron_pg.rollout.client import JsonClient

from .stand_in import stand_in


class Waits(list):
    """A sleep that only takes notes."""

    def __call__(self, seconds):
        self.append(seconds)


def make_client(url, waits=None, **fields):
    fields = {"timeout_seconds": 5.0, "retry": RetryPolicy(max_attempts=4)} | fields
    return JsonClient(url, sleep=Waits() if waits is None else waits, **fields)


def failing(statuses, headers=None):
    """Answers with these statuses in turn, then with 200."""
    left = list(statuses)

    def handler(path, body):
        status = left.pop(0) if left else 200
        return status, {"status": status}, headers or {}

    return handler


@pytest.mark.parametrize("statuses", [[429], [500, 503], [502, 504, 408]])
def test_transient_failures_are_retried_with_growing_waits(statuses):
    waits = Waits()
    with stand_in(failing(statuses)) as server:
        assert make_client(server.url, waits).post("/x", {"a": 1}) == {"status": 200}
        assert server.bodies("/x") == [{"a": 1}] * (len(statuses) + 1)
    assert len(waits) == len(statuses)
    for attempt, wait in enumerate(waits):
        assert 0.5 * 0.5 * 2**attempt <= wait <= 1.5 * 0.5 * 2**attempt


def test_waits_have_jitter_and_a_ceiling():
    policy = RetryPolicy(first_wait_seconds=1.0, max_wait_seconds=10.0)
    waits = {policy.wait_seconds(2, None) for _ in range(20)}
    assert len(waits) > 10
    assert 2.0 <= min(waits) < max(waits) <= 6.0
    assert policy.wait_seconds(20, None) == 10.0
    with pytest.raises(ValueError, match="max_attempts=0"):
        RetryPolicy(max_attempts=0)


@pytest.mark.parametrize(("header", "least"), [("7", 7.0), ("Wed, 21 Oct 2026 07:28:00 GMT", 0.0)])
def test_retry_after_is_heard(header, least):
    waits = Waits()
    with stand_in(failing([429], {"Retry-After": header})) as server:
        make_client(server.url, waits).get("/x")
    assert waits[0] >= least
    assert waits[0] == 7.0 or least == 0.0


def test_giving_up_names_url_status_attempts_and_body():
    with stand_in(failing([503] * 9)) as server:
        with pytest.raises(RolloutServerError, match="gave up after 4 attempts") as caught:
            make_client(server.url).post("/x", {})
        assert len(server.requests) == 4
    assert caught.value.url == server.url + "/x"
    assert caught.value.status == 503 and not caught.value.is_refusal
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.url, again.status, str(again)) == (server.url + "/x", 503, str(caught.value))
    assert server.url in str(caught.value)
    assert "status 503" in str(caught.value)


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_lasting_errors_are_not_retried(status):
    with stand_in(failing([status] * 9)) as server:
        with pytest.raises(RolloutServerError, match=f"status {status}") as caught:
            make_client(server.url).post("/x", {})
        assert len(server.requests) == 1
    assert caught.value.status == status and caught.value.is_refusal


def test_no_connection_is_retried_then_named():
    with stand_in(failing([])) as server:
        url = server.url
    waits = Waits()
    with pytest.raises(RolloutServerError, match="ConnectionError") as caught:
        make_client(url, waits).get("/x")
    assert caught.value.status is None
    assert len(waits) == 3


def test_slow_answer_times_out_and_is_retried():
    slow = [True]

    def handler(path, body):
        if slow:
            slow.pop()
            time.sleep(0.6)
        return 200, {"fast": True}

    waits = Waits()
    with stand_in(handler) as server:
        assert make_client(server.url, waits, timeout_seconds=0.2).get("/x") == {"fast": True}
    assert len(waits) == 1


def test_body_that_is_no_json():
    with (
        stand_in(lambda path, body: (200, "<html>proxy</html>")) as server,
        pytest.raises(RolloutServerError, match="no JSON: '<html>proxy"),
    ):
        make_client(server.url).get("/x")
    with stand_in(lambda path, body: (200, "")) as server:
        assert make_client(server.url).post("/x", {}) is None


def test_health_wait():
    with stand_in(failing([503, 503, 503])) as server:
        make_client(server.url).wait_until_healthy("/health", timeout_seconds=5.0)
        assert len(server.requests) == 4
    with (
        stand_in(lambda path, body: (503, "loading")) as server,
        pytest.raises(RolloutServerError, match="not healthy after 0.1 s.*status 503: loading"),
    ):
        client = make_client(server.url, time.sleep)
        client.wait_until_healthy("/health", timeout_seconds=0.1)


def test_api_key_and_addresses():
    with stand_in(failing([])) as server:
        make_client(server.url + "/v1/", api_key="secret").get("/v1/models")
        assert server.requests[0][0] == "/v1/models"
        assert server.headers[0]["Authorization"] == "Bearer secret"
    with pytest.raises(ValueError, match="must start with http"):
        make_client("localhost:8000")


def test_missing_requests_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "requests", None)
    with pytest.raises(ImportError, match=r"megatron_pg\[rollout\]"):
        make_client("http://localhost")
