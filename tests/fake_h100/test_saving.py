"""A checkpoint that is written beside the next steps takes its tensors in one go."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("megatron.core")

from tests.fake_h100.saving import NUM_TENSORS, save  # noqa: E402
from tests.ranks import Pool  # noqa: E402

pytestmark = pytest.mark.megatron


def test_the_host_waits_once_for_all_tensors(device_ranks: Pool, tmp_path: Path) -> None:
    """PyTorch pins what a copy goes to that the host does not wait for."""
    (found,) = device_ranks.run(1, save, tmp_path, timeout=300)
    for begun, ended, files in found:
        assert [copy.num_bytes for copy in begun.copies] == [64 * 32 * 4] * NUM_TENSORS
        assert not any(copy.is_to_device or copy.waits for copy in begun.copies)
        assert [sync.what for sync in begun.syncs] == ["torch.cuda.synchronize"]
        # Megatron's number of ranks that failed, there and back.
        assert sum(copy.num_bytes for copy in ended.copies) == 8
        assert files == [".metadata", "__0_0.distcp", "metadata.json"]
