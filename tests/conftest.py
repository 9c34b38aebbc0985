"""Settings of every test: fixed seeds, and memory that is never accidentally zero."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from tests.ranks import Pool
from tests.warm_python import commands_of

hypothesis.settings.register_profile("project", deadline=None, derandomize=True, print_blob=False)
hypothesis.settings.load_profile("project")
# Without it matrix products on a GPU are refused where algorithms must be deterministic.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--megatron-core", help="version that must be the imported one")


def pytest_configure(config: pytest.Config) -> None:
    wanted = config.getoption("--megatron-core")
    if wanted is not None:
        import megatron.core

        # One that lies in a git checkout has the checkout's commit behind a plus.
        found = megatron.core.__version__.partition("+")[0]
        if found != wanted:
            raise pytest.UsageError(f"megatron-core is {found}, not {wanted}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _uninitialized_memory_is_nan() -> Iterator[None]:
    """A value read from ``torch.empty`` before it is written shows up as NaN."""
    torch.manual_seed(0)
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


@pytest.fixture(scope="session")
def ranks() -> Iterator[Pool]:
    """Runs functions on ranks of their own."""
    pool = Pool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a ``python`` and a ``torchrun`` that have imported everything already."""
    with commands_of(tmp_path_factory.mktemp("commands")) as folder:
        yield folder
