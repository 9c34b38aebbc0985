"""On one rank: gather_predictors and vocab_parallel_logprobs against one dense process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_pg.loss import gather_predictors, logprobs, vocab_parallel_logprobs
from tests.loss.triton_kernels import kernels_on
from tests.ranks import process_group

T, H, V_LOCAL = 24, 10, 8
PREDICTORS = {
    # Unordered, repeated, and unbalanced: the first rank owns most predictors, the last none.
    "unbalanced": torch.tensor([4, 4, 4, 0, 9, 2, 3, 1, 5, 5, 11, 4]),
    "spread": torch.arange(T - 1, -1, -1),
    "empty": torch.empty(0, dtype=torch.int64),
}


def pairs(
    predictors: str, num_padded: int, sequence_parallel: bool, with_entropy: bool
) -> dict[str, tuple[Tensor, Tensor]]:
    """Ours and the dense process's values and gradients, by name; of a padded vocabulary."""
    with process_group():
        vocab_size = V_LOCAL * dist.get_world_size() - num_padded
        return _pairs(PREDICTORS[predictors], vocab_size, sequence_parallel, with_entropy)


def triton_pairs(*args: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """As ``pairs``, by the Triton kernels in their interpreter."""
    with kernels_on("cpu") as kernels, pytest.MonkeyPatch.context() as patch:
        patch.setattr(logprobs, "logits_kernels", lambda device: kernels)
        return pairs(*args)


def _pairs(
    predictor_ids: Tensor, vocab_size: int, sequence_parallel: bool, with_entropy: bool
) -> dict[str, tuple[Tensor, Tensor]]:
    group = dist.group.WORLD
    rank, tp_size = dist.get_rank(group), dist.get_world_size(group)
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(T, 1, H, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(V_LOCAL * tp_size, H, generator=generator, dtype=torch.float64)
    weight = weight.requires_grad_()
    num = len(predictor_ids)
    targets = torch.randint(0, vocab_size, (num,), generator=generator)
    temperature = 0.5 + torch.rand(num, generator=generator, dtype=torch.float64)
    cotangents = torch.randn(2, num, generator=generator, dtype=torch.float64)

    logits = hidden[:, 0][predictor_ids] @ weight[:vocab_size].t() / temperature[:, None]
    logp = torch.log_softmax(logits, -1)
    want = logp[torch.arange(num), targets], -(logp.exp() * logp).sum(-1)
    total = (want[0] * cotangents[0]).sum() + with_entropy * (want[1] * cotangents[1]).sum()
    dhidden, dweight = torch.autograd.grad(total, [hidden, weight])

    tokens = slice(rank * T // tp_size, (rank + 1) * T // tp_size)
    columns = slice(rank * V_LOCAL, (rank + 1) * V_LOCAL)
    my_hidden = (hidden[tokens] if sequence_parallel else hidden).detach().requires_grad_()
    my_weight = weight[columns].detach().requires_grad_()
    rows = gather_predictors(
        my_hidden, predictor_ids, tp_group=group, sequence_parallel=sequence_parallel
    )
    assert torch.equal(rows, hidden[:, 0][predictor_ids])
    predicted, entropy = vocab_parallel_logprobs(
        rows,
        my_weight,
        targets,
        tp_group=group,
        temperature=temperature,
        vocab_size=vocab_size,
        chunk_tokens=5,
        with_entropy=with_entropy,
    )
    found = {"logprobs": (predicted, want[0])}
    total = (predicted * cotangents[0]).sum()
    if with_entropy:
        found["entropy"] = (entropy, want[1])
        total = total + (entropy * cotangents[1]).sum()
    total.backward()
    found["dweight"] = (my_weight.grad, dweight[columns])
    found["dhidden"] = (my_hidden.grad, dhidden[tokens] if sequence_parallel else dhidden)
    if num:
        assert dhidden.abs().max() > 0.1
        assert len(predictor_ids.unique()) < num or num == T
    else:
        assert my_weight.grad is None
        del found["dweight"]
    return {name: (ours.detach(), theirs.detach()) for name, (ours, theirs) in found.items()}
