"""The host never waits for the device between a microbatch's tokens and its gradients.

Meta tensors stand for the device: they hold no values, so whatever would fetch one fails, and every
operator passes a dispatcher where copies that would be waited for can be seen. Copies of ordinary
memory are waited for whatever they are told, so each must come from a buffer that is pinned where
memory can be.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_pg import PrefixTree, pack_trees, prefix_grouped_attention
from megatron_pg.attention import ATTENTION_BACKENDS
from megatron_pg.attention.kernel_passes import KernelPass, KernelPasses
from megatron_pg.data import Group, Microbatch, Sample, pack_groups
from megatron_pg.grpo import microbatch_loss
from megatron_pg.grpo.replicas import Ranks
from megatron_pg.grpo.staging import stage_row
from megatron_pg.loss import (
    POLICY_LOSSES,
    PolicyLossConfig,
    gather_predictors,
    vocab_parallel_logprobs,
)
from megatron_pg.mcore import PrefixGroupedSeqParams
from megatron_pg.tree import staging, to_device

DEVICE = torch.device("meta")


class CopiesToDevice:
    """Counts copies from host to device within it, and names calls that the host would wait in.

    ``num_pageable`` are those of memory that is not pinned.
    """

    def __init__(self) -> None:
        self.num_copies = self.num_pageable = 0
        self.waits: list[str] = []
        self.pinned: set[int] = set()
        self._modes = ExitStack()

    def __enter__(self) -> CopiesToDevice:
        buffers = self._modes.enter_context(pytest.MonkeyPatch.context())
        make_buffer = staging._host_buffer

        def pinned(num_bytes: int, device: torch.device) -> Tensor:
            buffer = make_buffer(num_bytes, device)
            assert buffer.is_pinned() == (device.type == "cuda")
            self.pinned.add(buffer.data_ptr())
            return buffer

        buffers.setattr(staging, "_host_buffer", pinned)
        self._modes.enter_context(_Calls(self))
        self._modes.enter_context(_Operators(self))
        return self

    def __exit__(self, *error: Any) -> None:
        self._modes.close()


class _Operators(TorchDispatchMode):
    def __init__(self, watch: CopiesToDevice) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        inputs, outputs = tensors((args, kwargs)), tensors(out)
        # A number of the host travels as argument of a kernel.
        from_host = any(x.device.type == "cpu" and x.dim() for x in inputs)
        if from_host and any(x.device == DEVICE for x in inputs + outputs):
            self.watch.num_copies += 1
            of_host = [x for x in inputs if x.device.type == "cpu" and x.dim()]
            if any(x.data_ptr() not in self.watch.pinned for x in of_host):
                self.watch.num_pageable += 1
            if not kwargs.get("non_blocking"):
                self.watch.waits.append(str(func))
        return out


class _Calls(TorchFunctionMode):
    """Tensors made of Python numbers: copied below the dispatcher, and waited for."""

    def __init__(self, watch: CopiesToDevice) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.tensor, Tensor.new_tensor) and out.device == DEVICE:
            self.watch.waits.append(func.__name__)
        return out


def tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def on_device(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=dtype).requires_grad_()


def test_the_watch_sees_what_waits():
    ids = torch.arange(3)
    for waits in (
        lambda: ids.to(DEVICE),
        lambda: torch.zeros(4, device=DEVICE).new_tensor(3),
        lambda: torch.tensor([3, 4], device=DEVICE),
        lambda: torch.zeros(4, device=DEVICE)[ids],
    ):
        with CopiesToDevice() as watch:
            waits()
        assert watch.waits
    with CopiesToDevice() as watch:
        ids.to(DEVICE, non_blocking=True)
        torch.zeros(4, device=DEVICE).new_full((), 3)
    assert (watch.num_copies, watch.num_pageable, watch.waits) == (1, 1, [])
    with CopiesToDevice() as watch:
        to_device([ids, ids.float()], DEVICE)
    assert (watch.num_copies, watch.num_pageable, watch.waits) == (1, 0, [])
    for fetch in (float, bool, Tensor.tolist, torch.nonzero, torch.unique):
        with pytest.raises((RuntimeError, NotImplementedError)):
            fetch(torch.zeros((), device=DEVICE))


@pytest.mark.parametrize("padded", [False, True])
def test_attention(padded):
    conversation = PrefixTree.from_sequences([[1, 2, 3, 4, 5], [1, 2, 3, 6], [1, 7, 8], [1, 7, 9]])
    trees = [PrefixTree.from_group(9, [4, 4, 5]), conversation]
    layout = pack_trees(trees, 64 if padded else 1)
    with CopiesToDevice() as first_pass:
        params = PrefixGroupedSeqParams.from_layout(layout, DEVICE)
        rotary = params.gather_rotary(torch.zeros(params.max_seqlen_q, 1, 1, 64, device=DEVICE))
        passes = run_layer(params)
        mask = params.row_mask
    with CopiesToDevice() as next_layer:
        run_layer(params)
    with CopiesToDevice() as next_pass:
        params = PrefixGroupedSeqParams.from_layout(layout, DEVICE)
        run_layer(params)
        assert params.row_mask is mask
    assert first_pass.waits == next_layer.waits == next_pass.waits == []
    assert first_pass.num_pageable == 0
    assert first_pass.num_copies > len(passes)
    assert next_layer.num_copies == next_pass.num_copies == 0
    assert rotary.shape == (layout.total_tokens, 1, 1, 64)
    assert len(passes) > 2 and any(p.q_rows is not None for p in passes)


def run_layer(params: PrefixGroupedSeqParams) -> Sequence[KernelPass]:
    """One layer forward and backward as on CUDA; the passes that it ran."""
    flash, layout = ATTENTION_BACKENDS["flash"], params.layout
    q, k, v = (
        on_device(layout.total_tokens, heads, 64, dtype=torch.bfloat16) for heads in (8, 2, 2)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(flash), "refusal", lambda self, inputs: None)
        out = prefix_grouped_attention(q, k, v, layout, backend=flash)
    out.backward(torch.ones_like(out))
    assert all(x.grad.shape == x.shape for x in (q, k, v))
    (prepared,) = (x for x in vars(layout)["_derived"].values() if isinstance(x, KernelPasses))
    return prepared.passes


@pytest.mark.parametrize("policy_loss", sorted(POLICY_LOSSES))
@pytest.mark.parametrize("importance_mode", ["token_truncate", "sequence_mask", "geometric_mask"])
def test_logprobs_and_loss(policy_loss, importance_mode):
    batch = a_microbatch()
    hidden, weight = on_device(batch.layout.total_tokens, 1, 16), on_device(32, 16)
    policy = PolicyLossConfig(
        policy_loss=policy_loss,
        kl_loss_coef=0.1,
        kl_loss_type="k3+",
        use_unbiased_kl=True,
        entropy_coeff=0.01,
        importance_mode=importance_mode,
    )
    with CopiesToDevice() as watch:
        staged = stage_row(batch, LastStage(), RANKS)
        predictions = staged.predictions
        rows = gather_predictors(hidden, predictions.plan)
        output = vocab_parallel_logprobs(
            rows,
            weight,
            batch.target_tokens,
            temperature=0.7,
            chunk_tokens=4,
            with_entropy=True,
            device_targets=predictions.device_targets,
        )
        loss, sums = microbatch_loss(output, staged.row, policy)
        loss.backward()
    assert (watch.num_copies, watch.num_pageable, watch.waits) == (1, 0, [])
    assert hidden.grad is not None and weight.grad is not None
    assert {"importance_weight", "kl", "entropy", "num_tokens"} <= set(sums)
    arrays = staged.row.tokens, staged.row.weights, predictions.device_targets
    assert {array.device for array in arrays} == {DEVICE}
    repeats = torch.bincount(batch.predictor_ids).max()
    assert repeats > 1 and len(batch.prediction_ids) > len(batch.predictor_ids)


class LastStage(torch.nn.Module):
    """What a row is staged for."""

    post_process = True
    config = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=1)


RANKS = Ranks(
    device=DEVICE,
    rank=0,
    world_size=1,
    dp_rank=0,
    dp_size=1,
    is_last_stage=True,
    tp_rank=0,
    leads_replica=True,
)


def a_microbatch() -> Microbatch:
    """One row of two groups in which responses share a token that is trained."""
    groups = []
    for number in range(2):
        samples = []
        for response in ([7, 8, 9], [7, 8, 5, 6], [4]):
            logprobs = -torch.ones(len(response), dtype=torch.float64)
            samples.append(
                Sample(
                    prompt_ids=torch.tensor([1, 2, 3 + number]),
                    response_ids=torch.tensor(response),
                    reward=1.0,
                    loss_mask=torch.ones(len(response), dtype=torch.bool),
                    old_logprobs=logprobs,
                    ref_logprobs=logprobs,
                    rollout_logprobs=logprobs,
                )
            )
        groups.append(Group(str(number), tuple(samples)))
    (batch,) = pack_groups(groups, 64, advantages=torch.linspace(-1, 1, 6), min_shared=1)
    return batch
