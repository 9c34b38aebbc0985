"""A process group of one rank, and Megatron-Core on the CPU, for tests in this process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("megatron.core")

from megatron.core import parallel_state  # noqa: E402

from megatron_pg.mcore import cpu  # noqa: E402
from tests.mcore import harness  # noqa: E402


@pytest.fixture(scope="package")
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


@pytest.fixture
def one_rank(process_group: None) -> Iterator[None]:
    if torch.cuda.is_available():
        pytest.skip("the CPU stand-ins are for machines without CUDA")
    with cpu.emulate_cuda():
        harness.initialize(harness.Case())
        yield
