"""A run that was stopped, made once, and copies of its checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# Other tests here need none of what it imports.
if TYPE_CHECKING:
    from megatron_pg.train import TrainConfig
    from tests.train.saved_run import SavedRun


@pytest.fixture(scope="session")
def stopped_run(tmp_path_factory: pytest.TempPathFactory, commands: Path) -> TrainConfig:
    from tests.train.saved_run import train_and_save

    return train_and_save(tmp_path_factory.mktemp("run"), commands)


@pytest.fixture(scope="module")
def run(stopped_run: TrainConfig) -> Iterator[SavedRun]:
    from tests.train.saved_run import saved_run

    with saved_run(stopped_run) as saved:
        yield saved


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where copies go; two thousand of them would fill a small disk."""
    yield tmp_path / "checkpoints"
    shutil.rmtree(tmp_path)
