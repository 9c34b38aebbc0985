"""verl's own engine and rows, into the transparent model: nothing of verl's is replaced."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

pytest.importorskip("verl", reason="verl is installed in its own lane")

from verl.models.mcore import model_forward_fused  # noqa: E402

from tests.adapters.verl.harness import QWEN3_NEXT, Difference, VerlCase, compare  # noqa: E402
from tests.ranks import Pool  # noqa: E402

pytestmark = pytest.mark.verl

OURS = VerlCase(transparent=True, batch="turns", data=dict(max_token_len_per_gpu=150))
CASES = {
    "cp2": replace(OURS, cp=2),
    "cp2_tp2_sp": replace(OURS, cp=2, tp=2, sp=True),
    "cp2_fused": replace(OURS, cp=2, fused=True),
    "next": replace(QWEN3_NEXT, transparent=True, data=OURS.data),
    "next_cp2": replace(QWEN3_NEXT, transparent=True, data=OURS.data, cp=2),
}


def torch_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float, reduction: str, group: Any
) -> tuple[Tensor, Tensor]:
    """What verl's kernel computes, on one tensor-parallel rank."""
    assert group.size() == 1 and reduction == "none"
    logprobs = (hidden.squeeze(1) @ weight.t() / temperature).log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, labels.reshape(-1, 1))[:, 0], entropy


def compared(case: VerlCase) -> Difference:
    """Runs on a rank, which has no other case."""
    model_forward_fused.linear_cross_entropy = torch_cross_entropy
    return compare(case)


@pytest.mark.parametrize("name", CASES)
def test_unchanged_verl_shares_tokens_of_its_rows(ranks: Pool, name: str) -> None:
    case = CASES[name]
    for own in ranks.run(case.world_size, compared, case):
        assert own.smallest > 1e-6, "every gradient was compared with something"
        assert not {n: e for n, e in own.gradients.items() if not e <= 1e-5}
        assert own.losses is not None
        stock, ours = own.losses
        assert ours == pytest.approx(stock, abs=1e-6, rel=1e-6) and abs(stock) > 1e-3
        assert own.values["log_probs"] <= 1e-5 and own.values["entropy"] <= 1e-5
        assert own.metrics["logical"] > 1.3 * own.metrics["unique"]
