"""Servers whose answers a test scripts, one a module and dialect."""

from __future__ import annotations

import pytest

from .scripted import Scripted
from .stand_in import stand_in


def served(dialect):
    script = Scripted(dialect)
    with stand_in(script) as server:
        script.url = server.url
        yield script


@pytest.fixture(scope="module")
def vllm():
    yield from served("token_ids")


@pytest.fixture(scope="module")
def sglang():
    yield from served("sglang")


@pytest.fixture(scope="module")
def text():
    yield from served("text")


@pytest.fixture(params=["vllm", "sglang", "text"])
def any_server(request):
    return request.getfixturevalue(request.param)
