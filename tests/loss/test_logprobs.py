from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_pg.loss import head_bytes, vocab_parallel_logprobs
from megatron_pg.loss.head_memory import default_chunk_tokens
from megatron_pg.loss.kernels import logits_plain
from megatron_pg.loss.logprobs import _Shard
from tests.loss.parallel_logprobs import PREDICTORS, V_LOCAL, T, pairs
from tests.loss.traffic import Traffic
from tests.utils import assert_close, assert_close_to_control

E, H, V = 37, 12, 29


def make_case(dtype: torch.dtype = torch.float64, scale: float = 1.0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(E, H, generator=generator, dtype=torch.float64) * scale
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, V - 4, (E,), generator=generator)
    targets[5:9] = targets[4]
    rows[6] = rows[5]
    grads = torch.randn(2, E, generator=generator, dtype=torch.float64)
    return rows.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets, grads


def dense(
    rows: Tensor, weight: Tensor, targets: Tensor, temperature: float | Tensor, vocab_size: int
) -> tuple[Tensor, Tensor]:
    logits = (rows @ weight.t())[:, :vocab_size].to(torch.promote_types(rows.dtype, torch.float32))
    divisor = temperature[:, None] if isinstance(temperature, Tensor) else temperature
    logp = torch.log_softmax(logits / divisor, dim=-1)
    return logp[torch.arange(len(rows)), targets], -(logp.exp() * logp).sum(-1)


def backward(outputs: tuple[Tensor | None, ...], grads: Tensor, inputs: list[Tensor]) -> list:
    pairs = [(out, grad) for out, grad in zip(outputs, grads) if out is not None]
    total = sum((out * grad.to(out.dtype)).sum() for out, grad in pairs)
    return list(torch.autograd.grad(total, inputs))


@pytest.mark.parametrize("chunk_tokens", [1, 5, 37, 1000])
@pytest.mark.parametrize("vocab_size", [None, V - 4])
@pytest.mark.parametrize("temperature", [1.0, 0.7, "per_row"])
def test_equals_log_softmax_fp64(chunk_tokens, vocab_size, temperature):
    rows, weight, targets, grads = make_case()
    if temperature == "per_row":
        temperature = torch.linspace(0.3, 2.0, E, dtype=torch.float64)
    got = vocab_parallel_logprobs(
        rows,
        weight,
        targets,
        temperature=temperature,
        vocab_size=vocab_size,
        chunk_tokens=chunk_tokens,
        with_entropy=True,
    )
    want = dense(rows, weight, targets, temperature, vocab_size or V)
    for name, g, w in zip(("logprobs", "entropy"), got, want):
        assert_close(name, g, w, 1e-12)
    got_grads = backward(got, grads, [rows, weight])
    for name, g, w in zip(("drows", "dweight"), got_grads, backward(want, grads, [rows, weight])):
        assert w.abs().max() > 0.1
        assert_close(name, g, w, 1e-12)
    if vocab_size is not None:
        assert torch.equal(got_grads[1][vocab_size:], torch.zeros(V - vocab_size, H).double())


def test_gradcheck_with_entropy():
    rows, weight, targets, _ = make_case()
    rows, weight = rows[:5].detach().requires_grad_(), weight.detach().requires_grad_()

    def both(r, w):
        return vocab_parallel_logprobs(
            r, w, targets[:5], temperature=0.8, chunk_tokens=2, with_entropy=True
        )

    assert torch.autograd.gradcheck(both, (rows, weight))


@pytest.mark.parametrize("output", [0, 1])
def test_gradient_of_one_output_alone(output):
    rows, weight, targets, grads = make_case()
    got = vocab_parallel_logprobs(rows, weight, targets, chunk_tokens=8, with_entropy=True)
    want = dense(rows, weight, targets, 1.0, V)
    for out in (got, want):
        assert out[output].requires_grad
    for g, w in zip(
        torch.autograd.grad((got[output] * grads[0]).sum(), [rows, weight]),
        torch.autograd.grad((want[output] * grads[0]).sum(), [rows, weight]),
    ):
        assert_close("grad", g, w, 1e-12)


def test_without_entropy_and_frozen_inputs():
    rows, weight, targets, grads = make_case()
    logprobs, entropy = vocab_parallel_logprobs(rows, weight.detach(), targets)
    assert entropy is None
    (drows,) = backward((logprobs,), grads, [rows])
    want = backward(dense(rows, weight, targets, 1.0, V)[:1], grads, [rows, weight])
    assert_close("drows", drows, want[0], 1e-12)
    logprobs, _ = vocab_parallel_logprobs(rows.detach(), weight, targets)
    (dweight,) = backward((logprobs,), grads, [weight])
    assert_close("dweight", dweight, want[1], 1e-12)
    with torch.no_grad():
        logprobs, _ = vocab_parallel_logprobs(rows, weight, targets)
    assert not logprobs.requires_grad


@pytest.mark.parametrize("in_backward", [False, True])
def test_autocast_changes_nothing(in_backward):
    rows, weight, targets, grads = make_case(torch.float32)
    want = vocab_parallel_logprobs(rows, weight, targets, with_entropy=True)
    want = *want, *backward(want, grads, [rows, weight])
    with torch.autocast("cpu", torch.bfloat16):
        got = vocab_parallel_logprobs(rows, weight, targets, with_entropy=True)
        assert (rows @ weight.t()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16, enabled=in_backward):
        got = *got, *backward(got, grads, [rows, weight])
    assert all(map(torch.equal, got, want))


def test_large_logits_stay_finite():
    rows, weight, targets, grads = make_case(scale=1e4)
    got = vocab_parallel_logprobs(rows, weight, targets, with_entropy=True, chunk_tokens=7)
    want = dense(rows, weight, targets, 1.0, V)
    assert want[0].min() < -1e4
    assert_close("logprobs", got[0], want[0], 1e-12)
    for grad in backward(got, grads, [rows, weight]):
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_low_precision_error_against_control(dtype, with_entropy):
    generator = torch.Generator().manual_seed(11)
    rows = torch.randn(300, 64, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(500, 64, generator=generator) / 4).to(dtype).requires_grad_()
    targets = torch.randint(0, 500, (300,), generator=generator)
    grads = torch.randn(2, 300, generator=generator, dtype=torch.float64)
    exact = [x.detach().double().requires_grad_() for x in (rows, weight)]
    num = 2 if with_entropy else 1
    truth = dense(*exact, targets, 0.9, 500)[:num]
    control = dense(rows, weight, targets, 0.9, 500)[:num]
    got = vocab_parallel_logprobs(
        rows, weight, targets, temperature=0.9, chunk_tokens=64, with_entropy=with_entropy
    )[:num]
    assert all(out.dtype == torch.float32 for out in got)
    results = [
        [*out, *backward(out, grads, inputs)]
        for out, inputs in ((got, [rows, weight]), (control, [rows, weight]), (truth, exact))
    ]
    names = [*("logprobs", "entropy")[:num], "drows", "dweight"]
    for name, g, c, t in zip(names, *results):
        assert_close_to_control(name, g, c, t)
    assert results[0][-1].dtype == dtype


def test_weight_gradient_is_summed_in_fp32_over_chunks():
    # Equal rows: a bf16 running sum of 512 equal terms would stall at 256 times the first term.
    rows = torch.ones(512, 4, dtype=torch.bfloat16)
    weight = torch.zeros(8, 4, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(512, dtype=torch.int64)
    logprobs, _ = vocab_parallel_logprobs(rows, weight, targets, chunk_tokens=1)
    logprobs.sum().backward()
    assert torch.equal(weight.grad[0], torch.full((4,), 512 * 7 / 8, dtype=torch.bfloat16))


def test_empty():
    rows, weight, _, _ = make_case()
    none = torch.empty(0, dtype=torch.int64)
    logprobs, entropy = vocab_parallel_logprobs(rows[:0], weight, none, with_entropy=True)
    assert logprobs.shape == entropy.shape == (0,)
    (logprobs.sum() + entropy.sum()).backward()
    assert torch.equal(rows.grad, torch.zeros_like(rows))
    assert weight.grad is None


PRODUCTS = torch.ops.aten.mm.default, torch.ops.aten.mm.out, torch.ops.aten.addmm_.default


class LargestTensor(TorchDispatchMode):
    """Records the largest tensor that any operation returns and counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.numel, self.products = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        self.products += func in PRODUCTS
        return out


def test_logits_exist_for_one_chunk_only():
    num_rows, hidden, vocab, chunk = 96, 4, 64, 8
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(num_rows, hidden, generator=generator).requires_grad_()
    weight = torch.randn(vocab, hidden, generator=generator).requires_grad_()
    targets = torch.randint(0, vocab, (num_rows,), generator=generator)
    with LargestTensor() as chunked:
        out = vocab_parallel_logprobs(rows, weight, targets, chunk_tokens=chunk, with_entropy=True)
        (out[0].sum() + out[1].sum()).backward()
    with LargestTensor() as whole:
        dense(rows, weight, targets, 1.0, vocab)[0].sum().backward()
    assert chunked.numel == chunk * vocab
    assert whole.numel == num_rows * vocab
    # One product a chunk in the forward; the logits again and two gradients in the backward.
    num_blocks = math.ceil(vocab / (chunk * vocab // num_rows))
    assert chunked.products == num_rows // chunk + 3 * num_blocks


@pytest.mark.parametrize(
    ("num_columns", "dtype", "device", "want"),
    [
        (151_936, torch.bfloat16, "cuda", 4096),
        (151_936, torch.float32, "cuda", 2208),
        (262_144, torch.bfloat16, "cuda", 2560),
        (0, torch.bfloat16, "cuda", 4096),
        (1 << 40, torch.bfloat16, "cuda", 1),
        (151_936, torch.bfloat16, "cpu", 1024),
    ],
)
def test_default_chunk_tokens(num_columns, dtype, device, want):
    assert default_chunk_tokens(num_columns, dtype, torch.device(device)) == want


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_tokens", [16, 300])
@pytest.mark.parametrize("into", ["autograd", "buffer"])
def test_head_bytes_are_those_of_a_backward(dtype, chunk_tokens, into):
    num_rows, hidden, vocab = 128, 32, 2048
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(num_rows, hidden, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocab, hidden, generator=generator).to(dtype).requires_grad_()
    buffer = torch.zeros(vocab, hidden) if into == "buffer" else None
    targets = torch.randint(0, vocab, (num_rows,), generator=generator)
    with Traffic() as traffic:
        out = vocab_parallel_logprobs(
            rows, weight, targets, chunk_tokens=chunk_tokens, with_entropy=True, weight_grad=buffer
        )
        (out[0].sum() + out[1].sum()).backward()
    told = head_bytes(
        *(num_rows, hidden, vocab), dtype=dtype, device=torch.device("cpu"),
        chunk_tokens=chunk_tokens, has_weight_grad=into == "buffer",
    )  # fmt: skip
    # On the CPU a bf16 product is made before it is added to an fp32 buffer.
    more = dtype.itemsize * vocab * hidden if into == "buffer" else 0
    assert 0.8 * told < traffic.peak_bytes < 1.1 * told + more


@pytest.mark.parametrize("num_columns", [1, 29, 1000])
@pytest.mark.parametrize("num_rows", [1, 7, 300])
@pytest.mark.parametrize("chunk_tokens", [1, 3, 4000])
def test_blocks_of_columns_hold_no_more_than_a_chunk(num_columns, num_rows, chunk_tokens):
    shard = _Shard(
        num_columns=num_columns,
        targets=torch.zeros(num_rows, dtype=torch.int64),
        temperature=torch.ones(num_rows),
        chunk_tokens=chunk_tokens,
        weight_grad=None,
        group=None,
        kernels=logits_plain,
    )
    blocks = list(shard.column_blocks())
    widths = [block.stop - block.start for block in blocks]
    assert [i for block in blocks for i in range(block.start, block.stop)] == [*range(num_columns)]
    assert max(widths) == 1 or max(widths) * num_rows <= chunk_tokens * num_columns
    if max(widths) >= 128 and len(widths) > 1:
        assert all(width % 128 == 0 for width in widths[:-1])


def test_weight_grad_takes_the_gradient():
    rows, weight, targets, grads = make_case()
    start = torch.randn(V, H, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    buffer = start.clone()
    (logprobs, _) = vocab_parallel_logprobs(
        rows, weight, targets, chunk_tokens=5, vocab_size=V - 4, weight_grad=buffer
    )
    (logprobs * grads[0]).sum().backward()
    want = backward(dense(rows, weight, targets, 1.0, V - 4)[:1], grads, [rows, weight])
    assert weight.grad is None
    assert_close("dweight", buffer - start, want[1], 1e-12)
    assert torch.equal(buffer[V - 4 :], start[V - 4 :])
    assert_close("drows", rows.grad, want[0], 1e-12)


def test_weight_grad_in_fp32_of_bf16_products():
    # 300 more would be lost in a bf16 buffer of 1e5; the products are summed in fp32 over blocks.
    rows = torch.ones(512, 4, dtype=torch.bfloat16)
    weight = torch.zeros(8, 4, dtype=torch.bfloat16, requires_grad=True)
    buffer = torch.full((8, 4), 1e5)
    targets = torch.zeros(512, dtype=torch.int64)
    logprobs, _ = vocab_parallel_logprobs(
        rows, weight, targets, chunk_tokens=64, weight_grad=buffer
    )
    logprobs.sum().backward()
    assert torch.equal(buffer[0], torch.full((4,), 1e5 + 512 * 7 / 8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_grad": torch.zeros(V, H + 1)}, r"weight_grad \(29, 13\) must be shaped"),
        ({"rows": torch.zeros(E, H + 1).double()}, r"\[E, H\] and \[V, H\]"),
        ({"rows": torch.zeros(E, 1, H).double()}, r"\[E, H\] and \[V, H\]"),
        ({"rows": torch.zeros(E, H)}, "one floating dtype"),
        ({"chunk_tokens": 0}, "chunk_tokens=0"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"vocab_size": V + 1}, f"vocab_size={V + 1}"),
        ({"vocab_size": 5}, r"target_tokens must lie in \[0, 5\)"),
        ({"target_tokens": torch.full((E,), V)}, "target_tokens must lie"),
        ({"target_tokens": torch.full((E,), -1)}, "target_tokens must lie"),
        ({"target_tokens": torch.zeros(E)}, "int64"),
        ({"target_tokens": torch.zeros(E, dtype=torch.int64, device="meta")}, "on the CPU"),
        ({"target_tokens": torch.zeros(E - 1, dtype=torch.int64)}, f"{E - 1} target_tokens"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"temperature": torch.ones(E - 1)}, "CPU tensor of shape"),
        ({"temperature": torch.ones(E, device="meta")}, "CPU tensor of shape"),
        ({"temperature": -torch.ones(E)}, "every temperature"),
    ],
)
def test_refusals(change, message):
    rows, weight, targets, _ = make_case()
    arguments = {"rows": rows, "weight": weight, "target_tokens": targets} | change
    with pytest.raises(ValueError, match=message):
        vocab_parallel_logprobs(**arguments)


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["plain", "sp"])
@pytest.mark.parametrize("tp_size", [2, 4], ids="tp{}".format)
@pytest.mark.parametrize(
    ("predictors", "padding", "with_entropy"),
    [
        # Padding that fills the whole last shard and part of the one before.
        ("unbalanced", V_LOCAL + 3, True),
        ("unbalanced", 0, False),
        ("spread", 3, True),
        ("empty", 0, True),
    ],
)
def test_tensor_parallel_ranks(
    ranks, predictors, padding, with_entropy, tp_size, sequence_parallel
):
    owners = PREDICTORS[predictors] // (T // tp_size)
    assert predictors != "unbalanced" or not (owners == tp_size - 1).any()
    settings = (predictors, padding, sequence_parallel, with_entropy)
    for found in ranks.run(tp_size, pairs, *settings):
        assert len(found) == 2 + with_entropy + (predictors != "empty")
        for name, (ours, theirs) in found.items():
            assert_close(name, ours, theirs, 1e-10)
