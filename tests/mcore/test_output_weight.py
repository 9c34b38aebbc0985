"""The head's gradient in Megatron's buffer equals the one that autograd finds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from torch import Tensor

from megatron_pg.mcore import Predictions, PrefixGroupedSeqParams
from megatron_pg.mcore import model as model_module
from tests.mcore import harness
from tests.mcore.harness import Case

pytestmark = pytest.mark.megatron


@pytest.fixture
def no_dense_gradients(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Whether each call of the head adds to a buffer."""
    seen: list[bool] = []
    original = model_module.vocab_parallel_logprobs

    def noted(*arguments: Any, **options: Any) -> Any:
        seen.append(options["weight_grad"] is not None)
        return original(*arguments, **options)

    monkeypatch.setattr(model_module, "vocab_parallel_logprobs", noted)
    yield seen


def without_predictions(batch: dict[str, Any]) -> dict[str, Any]:
    """The same row as a prefix row is: its tokens are encoded, and predict nothing."""
    none = torch.empty(0, dtype=torch.int64)
    predictions = Predictions(predictor_ids=none, target_tokens=none)
    params = PrefixGroupedSeqParams.from_layout(
        batch["params"].layout, "cpu", predictions=predictions
    )
    return batch | {"params": params, "weights": torch.zeros(0)}


def backward(model: Any, step: Any, batch: Any) -> None:
    output, loss = step(iter([batch]), model)
    loss(output)[0].backward()


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "body_frozen"])
@pytest.mark.parametrize("tied", [False, True], ids=["own", "tied"])
@pytest.mark.parametrize("reduces", ["after", "beside", "beside_fused"])
def test_gradients_of_a_window(
    one_rank: None, no_dense_gradients: list[bool], reduces: str, tied: bool, frozen: bool
) -> None:
    """Rows of both kinds and, of the stock path, a written-out one; the last predicts nothing."""
    case, rows = Case(tied=tied), harness.make_rows(3, 1)
    packed = harness.packed_microbatches(case, [rows, harness.make_rows(4, 1)])
    batches = [(harness.packed_step, batch) for batch in packed]
    if reduces != "beside_fused":
        # Where fusion is on, Megatron's own layer adds to main_grad too, by a kernel for CUDA.
        written_out = harness.written_out_microbatches(case, [rows])[0]
        batches.insert(1, (harness.written_out_step, written_out))
    if not frozen:
        batches.append((harness.packed_step, without_predictions(packed[0])))
    config = harness.make_config(case)
    (ours,), (plain,) = (harness.build(case, config, packed=True) for _ in range(2))
    plain.load_state_dict(ours.state_dict())
    for model in (ours, plain):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not frozen or "output_layer" in name or tied)
    for step, batch in batches:
        backward(plain, step, batch)
    assert no_dense_gradients and not any(no_dense_gradients)
    no_dense_gradients.clear()

    beside = reduces != "after"
    wrapped = DistributedDataParallel(
        config, DistributedDataParallelConfig(overlap_grad_reduce=beside), ours
    )
    config.no_sync_func = wrapped.no_sync if beside else None
    config.gradient_accumulation_fusion = reduces == "beside_fused"
    wrapped.zero_grad_buffer()
    for number, (step, batch) in enumerate(batches):
        is_last = number == len(batches) - 1
        with nullcontext() if is_last or not beside else wrapped.no_sync():
            backward(wrapped, step, batch)
    wrapped.finish_grad_sync()
    assert no_dense_gradients and all(no_dense_gradients)
    if not tied:
        # Zeros need not be added where Megatron's layers say so too.
        assert ours.output_layer.weight.grad_added_to_main_grad == (reduces == "beside_fused")
    compared = 0
    for (name, got), want in zip(ours.named_parameters(), plain.parameters()):
        if want.requires_grad:
            assert got.grad is None
            assert_close(name, got.main_grad, want.grad)
            compared += 1
    assert compared >= (1 if frozen else 10)


def assert_close(name: str, got: Tensor, want: Tensor) -> None:
    assert want.abs().max() > 1e-3, name
    assert (got - want).abs().max() <= 1e-12 * want.abs().max(), name
