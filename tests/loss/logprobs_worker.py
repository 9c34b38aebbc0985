"""One gloo rank: gather_predictors and vocab_parallel_logprobs against one dense process."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_pg.loss import gather_predictors, vocab_parallel_logprobs
from tests.utils import assert_close

T, H, V_LOCAL = 24, 10, 8


def check(
    predictor_ids: Tensor,
    vocab_size: int,
    group: dist.ProcessGroup,
    sequence_parallel: bool,
    with_entropy: bool,
) -> None:
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
    logprobs, entropy = vocab_parallel_logprobs(
        rows,
        my_weight,
        targets,
        tp_group=group,
        temperature=temperature,
        vocab_size=vocab_size,
        chunk_tokens=5,
        with_entropy=with_entropy,
    )
    assert_close("logprobs", logprobs, want[0], 1e-10)
    total = (logprobs * cotangents[0]).sum()
    if with_entropy:
        assert_close("entropy", entropy, want[1], 1e-10)
        total = total + (entropy * cotangents[1]).sum()
    total.backward()
    assert_close("dweight", my_weight.grad, dweight[columns], 1e-10)
    assert_close(
        "dhidden", my_hidden.grad, dhidden[tokens] if sequence_parallel else dhidden, 1e-10
    )
    if num:
        assert dhidden.abs().max() > 0.1
        assert len(predictor_ids.unique()) < num or num == T


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    group, tp_size = dist.group.WORLD, int(os.environ["WORLD_SIZE"])
    # Unordered, repeated, and unbalanced: the first rank owns most predictors, the last none.
    unbalanced = torch.tensor([4, 4, 4, 0, 9, 2, 3, 1, 5, 5, 11, 4])
    spread = torch.arange(T - 1, -1, -1)
    empty = torch.empty(0, dtype=torch.int64)
    # Padding that fills the whole last shard and part of the one before.
    padded_vocab = V_LOCAL * (tp_size - 1) - 3
    cases = 0
    for sequence_parallel in (False, True):
        check(unbalanced, padded_vocab, group, sequence_parallel, True)
        check(unbalanced, V_LOCAL * tp_size, group, sequence_parallel, False)
        check(spread, V_LOCAL * tp_size - 3, group, sequence_parallel, True)
        check(empty, V_LOCAL * tp_size, group, sequence_parallel, True)
        cases += 4
    last_owned = (unbalanced // (T // tp_size) == tp_size - 1).sum()
    assert last_owned == 0
    print(f"checked {cases} cases", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
