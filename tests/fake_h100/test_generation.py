"""What sampling does on a CUDA device: one wait for every token, which is what it is for."""

from __future__ import annotations

import pytest

pytest.importorskip("megatron.core")

from tests.fake_h100.generation import sample  # noqa: E402
from tests.fake_h100.steps import LINEAR, NEMOTRON, Case  # noqa: E402
from tests.ranks import Pool  # noqa: E402

pytestmark = pytest.mark.megatron

# Layers with a window, with linear attention beside attention, and with Mamba-2.
CASES = {
    "window": Case(model=dict(window_size=[16, 0], window_attn_skip_freq=[1, 0])),
    "linear": Case(package="fla", model=LINEAR),
    "mamba": Case(package="mamba_ssm", hf=NEMOTRON),
}
# Of a step: tokens, positions, rows whose logits are read, and random numbers; where one stopped,
# which row takes its place, and where all are then, for linear attention too.
COPIES = 4 + 3


@pytest.mark.parametrize("name", CASES)
def test_the_host_waits_for_tokens_alone(device_ranks: Pool, name: str) -> None:
    (found,) = device_ranks.run(1, sample, CASES[name], timeout=300)
    for longest, (record, lens) in found.items():
        # Eight rows, of which one stops at each step while there are more than three.
        num_stopped = min(5, longest)
        assert sorted(lens) == [*range(1, num_stopped + 1), *[longest] * (8 - num_stopped)]
        waits = [(s.what, s.place.partition(":")[0]) for s in record.syncs]
        sampled = "aten._to_copy.default", "megatron_pg/mcore/generation/stages.py"
        assert waits == [sampled] * longest
        assert record.pageable == [] and not any(c.waits for c in record.copies if c.is_to_device)
    few, many = (sum(c.is_to_device for c in found[n][0].copies) for n in (4, 7))
    assert 3 * 4 <= many - few <= 3 * COPIES
