"""The Triton kernels of the vocabulary head against dense fp64.

Kernels run on the GPU and, on CPU tensors, in Triton's interpreter.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from megatron_pg.loss import head_bytes, vocab_parallel_logprobs
from megatron_pg.loss import logprobs as head
from megatron_pg.loss.head_memory import default_chunk_tokens as chunk_tokens
from megatron_pg.loss.kernels import logits_plain
from tests.loss.parallel_logprobs import triton_pairs
from tests.loss.traffic import Launches, Traffic
from tests.loss.triton_kernels import kernels_on, load_kernels
from tests.utils import assert_close, assert_close_to_control

triton = pytest.importorskip(
    "triton", reason="needs triton, which the Python 3.12 lane has: LANES=312 bash tests/run.sh"
)

pytestmark = pytest.mark.triton

# Columns of a tile in bf16; fp32 and fp64 tiles divide it.
TILE = 2048
ACCUMULATE = {torch.float64: torch.float64}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu])])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def kernels(device: str) -> Iterator[ModuleType]:
    with kernels_on(device) as module:
        yield module


def make_rows(num_columns: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Rows with ordinary, equal, huge and peaked logits, targets of this shard and of others."""
    generator = torch.Generator().manual_seed(num_columns)
    logits = 3 * torch.randn(6, num_columns, generator=generator, dtype=torch.float64)
    logits[1] = 2.5
    logits[2] = logits[2].sign() * 1e4
    logits[3, num_columns // 2] += 40
    logits[4, -1] = 9.0
    targets = [0, num_columns - 1, num_columns // 3, num_columns // 2, -1, num_columns]
    temperature = torch.tensor([1.0, 0.3, 1.7, 0.6, 2.0, 0.9], dtype=torch.float64)
    grads = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    accumulate = torch.promote_types(dtype, torch.float32)
    return {
        "logits": logits.to(dtype).to(device),
        "targets": torch.tensor(targets, device=device),
        "temperature": temperature.to(accumulate).to(device),
        "grad_logprobs": grads[0].to(accumulate).to(device),
        "grad_entropy": grads[1].to(accumulate).to(device),
    }


def truth(rows: dict[str, Tensor], with_entropy: bool) -> dict[str, Tensor | None]:
    """Statistics and gradient in fp64, of the logits as they are rounded."""
    case = {name: x if name == "targets" else x.double() for name, x in rows.items()}
    logits = case["logits"].clone().requires_grad_()
    x = logits / case["temperature"][:, None]
    maxima = case["logits"].amax(1)
    distance = (case["logits"] - maxima[:, None]) / case["temperature"][:, None]
    exp = distance.exp()
    logp = torch.log_softmax(x, 1)
    is_owned = (case["targets"] >= 0) & (case["targets"] < x.shape[1])
    column = torch.where(is_owned, case["targets"], 0)[:, None]
    entropy = -(logp.exp() * logp).sum(1)
    at_target = torch.where(is_owned, x.gather(1, column).squeeze(1), 0.0)
    # The logit of a target that another rank owns is there: only the sum of exponentials is ours.
    total = (at_target - torch.logsumexp(x, 1)) @ case["grad_logprobs"]
    if with_entropy:
        total = total + entropy @ case["grad_entropy"]
    (grad,) = torch.autograd.grad(total, logits)
    weighted = (distance * exp).sum(1)
    return {
        "maxima": maxima,
        "sums": exp.sum(1).detach(),
        "weighted": weighted if with_entropy else None,
        "at_target": (at_target * case["temperature"]).detach(),
        "entropy": entropy.detach(),
        "grad": grad,
    }


def in_place(kernels: ModuleType, logits: Tensor) -> Tensor:
    """The same logits where ``product`` would have left them, NaN in the room between rows."""
    if kernels is logits_plain:
        return logits.clone()
    weight = torch.ones(logits.shape[1], 1, dtype=logits.dtype, device=logits.device)
    placed = kernels.product(torch.ones_like(logits[:, :1]), weight, slice(0, len(weight)))
    whole = placed.as_strided((len(logits), placed.stride(0)), placed.stride())
    whole.fill_(float("nan"))
    placed.copy_(logits)
    assert whole.isnan().any() == (logits.shape[1] % 16 != 0)
    return placed


def run(kernels: ModuleType, rows: dict[str, Tensor], with_entropy: bool) -> dict[str, Tensor]:
    logits = in_place(kernels, rows["logits"])
    found = kernels.statistics(logits, rows["temperature"], rows["targets"], with_entropy)
    maxima, sums, weighted, at_target = found
    if kernels is not logits_plain:
        left, given = logits.nan_to_num(1.5), rows["logits"].nan_to_num(1.5)
        assert torch.equal(left, given), "statistics leave the logits"
    log_sums = sums.log()
    entropy = None if weighted is None else log_sums - weighted / sums
    logits = in_place(kernels, rows["logits"])
    grad = kernels.gradient(
        logits,
        rows["temperature"],
        rows["targets"],
        maxima,
        log_sums,
        rows["grad_logprobs"],
        entropy,
        rows["grad_entropy"] if with_entropy else None,
    )
    if kernels is not logits_plain:
        assert grad.data_ptr() == logits.data_ptr() and grad.stride() == logits.stride()
        assert grad.shape[1] % 16 == 0 and not grad[:, logits.shape[1] :].any()
        grad = grad[:, : logits.shape[1]]
    named = dict(maxima=maxima, sums=sums, weighted=weighted, at_target=at_target)
    return named | {"entropy": entropy, "grad": grad}


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("num_columns", [1, 37, TILE, 2 * TILE + 19])
def test_kernels(kernels, device, num_columns, dtype, with_entropy) -> None:
    rows = make_rows(num_columns, dtype, device)
    got, want = run(kernels, rows, with_entropy), truth(rows, with_entropy)
    control = run(logits_plain, rows, with_entropy)
    for name in ("maxima", "sums", "weighted", "at_target", "entropy", "grad"):
        if name in ("weighted", "entropy") and not with_entropy:
            assert got[name] is None
            continue
        # A GPU rounds a gradient to the nearest bf16, the interpreter towards zero.
        bound = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-6}[dtype]
        if name == "grad" and dtype == torch.bfloat16:
            bound = 2**-8 if device == "cuda" else 2**-7
        assert got[name].dtype == (dtype if name == "grad" else control[name].dtype)
        # Every row by itself: their sizes differ by orders of magnitude.
        for ours, plain, theirs in zip(got[name], control[name], want[name]):
            scale = max(theirs.abs().max().item(), 0.1 if name == "grad" else 1.0)
            yardstick = (plain.double() - theirs).abs().max().item() / scale
            assert_close(name, ours, theirs, max(bound, 4 * yardstick), least_scale=scale)
    assert num_columns == 1 or (want["grad"].abs().amax(1) > 1e-3).sum() > 3


@pytest.mark.parametrize("num_columns", [37, 2 * TILE + 19])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_logit_that_is_no_number_leaves_none_in_its_row(
    kernels, device, num_columns, value
) -> None:
    """As in ``log_softmax``, wherever it stands; other rows are as they were."""
    rows = make_rows(num_columns, torch.float32, device)
    before = run(kernels, rows, True)
    for column in (1, num_columns - 2):
        logits = rows["logits"].clone()
        logits[0, column] = value
        assert rows["targets"][0] != column
        got = run(kernels, rows | {"logits": logits}, True)
        for name in ("sums", "entropy", "grad"):
            assert got[name][0].isnan().any(), name
            assert torch.equal(got[name][1:], before[name][1:])
        assert torch.log_softmax(logits[0].double(), 0).isnan().all()


def test_a_case_tells_targets_of_others_from_ours() -> None:
    rows = make_rows(37, torch.float64, "cpu")
    want = truth(rows, True)
    assert want["grad"].sum(1)[:4].abs().max() < 1e-9
    assert torch.allclose(
        want["grad"].sum(1)[4:], -(rows["grad_logprobs"] / rows["temperature"])[4:]
    )


def dense(rows: Tensor, weight: Tensor, targets: Tensor, temperature: Tensor) -> list[Tensor]:
    logp = torch.log_softmax(rows @ weight.t() / temperature[:, None], -1)
    return [logp[torch.arange(len(rows)), targets], -(logp.exp() * logp).sum(-1)]


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in tensors]


@pytest.fixture
def with_triton(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "logits_kernels", lambda device: kernels)


@pytest.mark.parametrize("has_padding", [True, False])
@pytest.mark.parametrize("num_rows", [0, 1, 13])
@pytest.mark.parametrize("chunk_tokens", [3, 64])
def test_head_equals_log_softmax(with_triton, device, num_rows, chunk_tokens, has_padding) -> None:
    generator = torch.Generator().manual_seed(5)
    vocab, padded, hidden = 301, 336 if has_padding else 301, 8
    filled = vocab + 15
    rows, weight = (
        torch.randn(n, hidden, generator=generator, dtype=torch.float64).to(device)
        for n in (num_rows, padded)
    )
    # What fills the last vectors takes part in products, the rest of the padding in nothing.
    weight[vocab:filled], weight[filled:] = 1e4, float("nan")
    targets = torch.randint(0, vocab, (num_rows,), generator=generator)
    temperature = 0.5 + torch.rand(num_rows, generator=generator, dtype=torch.float64)
    cotangents = torch.randn(2, num_rows, generator=generator, dtype=torch.float64).to(device)
    ours, theirs = leaves(rows, weight), leaves(rows, weight[:vocab])
    got = vocab_parallel_logprobs(
        *ours, targets, temperature=temperature, vocab_size=vocab, with_entropy=True,
        chunk_tokens=chunk_tokens,
    )  # fmt: skip
    want = dense(*theirs, targets, temperature.to(device))
    for outputs in (got, want):
        sum((x * c).sum() for x, c in zip(outputs, cotangents)).backward()
    for name, g, w in zip(("logprobs", "entropy"), got, want):
        assert_close(name, g, w, 1e-12)
    assert_close("drows", ours[0].grad, theirs[0].grad, 1e-12)
    if num_rows == 0:
        assert ours[1].grad is None
        return
    assert_close("dweight", ours[1].grad[:vocab], theirs[1].grad, 1e-12)
    assert not ours[1].grad[vocab:].any()


def test_products_fill_vectors_where_the_weight_goes_on(kernels, device) -> None:
    rows, weight = torch.randn(3, 8, device=device), torch.randn(40, 8, device=device)
    for columns, num_filled in ((slice(0, 21), 32), (slice(16, 37), 24), (slice(0, 32), 32)):
        logits = kernels.product(rows, weight, columns)
        filled = logits.as_strided((3, num_filled), logits.stride())
        want = rows @ weight[columns.start : columns.start + num_filled].t()
        assert_close("logits", filled, want, 1e-6)
        assert logits.shape[1] == columns.stop - columns.start


@pytest.mark.parametrize("with_entropy", [False, True])
def test_head_in_bf16_against_control(with_triton, device, with_entropy) -> None:
    generator = torch.Generator().manual_seed(11)
    rows = torch.randn(30, 64, generator=generator).bfloat16().to(device)
    weight = (torch.randn(701, 64, generator=generator) / 4).bfloat16().to(device)
    targets = torch.randint(0, len(weight), (len(rows),), generator=generator)
    grads = torch.randn(2, len(rows), generator=generator, dtype=torch.float64).to(device)
    found = []
    for kind in ("ours", "control", "truth"):
        inputs = leaves(*((rows, weight) if kind != "truth" else (rows.double(), weight.double())))
        with pytest.MonkeyPatch.context() as patch:
            if kind != "ours":
                patch.setattr(head, "logits_kernels", lambda device: logits_plain)
            out = vocab_parallel_logprobs(
                *inputs, targets, temperature=0.9, chunk_tokens=16, with_entropy=with_entropy
            )[: 1 + with_entropy]
            sum((x * g).sum() for x, g in zip(out, grads)).backward()
        found.append([*out, *(x.grad for x in inputs)])
    names = [*("logprobs", "entropy")[: 1 + with_entropy], "drows", "dweight"]
    for name, ours, control, exact in zip(names, *found):
        assert_close_to_control(name, ours, control, exact)


def test_tensor_parallel_ranks(ranks) -> None:
    for found in ranks.run(2, triton_pairs, "unbalanced", 3, True, True):
        assert len(found) == 4
        for name, (ours, theirs) in found.items():
            assert_close(name, ours, theirs, 1e-10)


def compile_kernel(module: ModuleType, name: str, dtype: str, with_entropy: bool):
    """What a launch compiles for an H100, which need not be there."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(module, name)
    itemsize, wide = {"bf16": (2, "*fp32"), "fp32": (4, "*fp32"), "fp64": (8, "*fp64")}[dtype]
    vector = module._VECTOR_BYTES // itemsize
    lanes = 32 * module._NUM_WARPS * module._LOADS
    lowest = torch.finfo(torch.float64 if dtype == "fp64" else torch.float32).min
    constants = {"LOWEST": lowest, "LANES": lanes, "VECTOR": vector, "BLOCK": lanes * vector}
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    if not with_entropy:
        optional = ("weighted_ptr", "entropy_ptr", "grad_entropy_ptr")
        constants |= {key: None for key in optional if key in kernel.arg_names}
    signature = {key: wide if key.endswith("_ptr") else "i32" for key in kernel.arg_names}
    signature |= {"logits_ptr": f"*{dtype}", "targets_ptr": "*i64"}
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = ("logits_ptr", "padded_columns", "row_stride")
    attributes = {
        (place,): [["tt.divisibility", 16]]
        for place, key in enumerate(kernel.arg_names)
        if key in aligned
    }
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": module._NUM_WARPS}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp64"])
@pytest.mark.parametrize("name", ["_statistics_kernel", "_gradient_kernel"])
def test_kernels_compile_for_sm_90(tmp_path, monkeypatch, name, dtype, with_entropy) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    asm = compile_kernel(load_kernels("cuda"), name, dtype, with_entropy)
    ptx = asm["ptx"]
    assert ".target sm_90" in ptx
    wide = r"v4\.b32|v2\.b64"
    # Every logit is read, and every gradient written, 16 bytes at a time; statistics of a whole
    # tile and of the last one are two loops.
    is_gradient, num_loads = name == "_gradient_kernel", load_kernels("cuda")._LOADS
    loads = len(re.findall(rf"ld\.global\.({wide})", ptx))
    assert loads == num_loads * (1 if is_gradient else 2)
    assert len(re.findall(rf"st\.global\.({wide})", ptx)) == num_loads * is_gradient
    # Exponents that are no numbers stay so, which the interpreter does not tell apart.
    assert is_gradient or "arith.maximumf" in asm["ttir"]
    # Rows times columns may exceed 2**31.
    assert re.search(r"tt.addptr %logits_ptr\w*, %\w+ : !tt.ptr<\w+>, i64", asm["ttir"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if tool.exists():
        (tmp_path / "kernel.cubin").write_bytes(asm["cubin"])
        done = subprocess.run(
            [tool, "-res-usage", tmp_path / "kernel.cubin"], capture_output=True, text=True
        )
        registers, stack, local = map(
            int, re.search(r"REG:(\d+) STACK:(\d+).*LOCAL:(\d+)", done.stdout).groups()
        )
        assert registers <= 64 and stack == local == 0, done.stdout


@pytest.mark.parametrize("into", ["autograd", "buffer"])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_passes_and_memory_of_a_large_head(monkeypatch, with_entropy, into) -> None:
    """Of Qwen3-8B's head: 4,096 predictions on one rank. Meta tensors have sizes, but no values."""
    num_rows, vocab, hidden = 4096, 151_936, 4096
    kernels, traffic = load_kernels("cuda"), Traffic()
    monkeypatch.setattr(kernels, "_statistics_kernel", Launches(traffic, 1))
    monkeypatch.setattr(kernels, "_gradient_kernel", Launches(traffic, 2))
    product = kernels.product

    def marked(*args: Tensor) -> Tensor:
        before = traffic.passes
        logits = product(*args)
        assert traffic.passes == before
        traffic.logits.add(logits.untyped_storage()._cdata)
        traffic.passes += 1
        return logits

    monkeypatch.setattr(kernels, "product", marked)
    monkeypatch.setattr(head, "logits_kernels", lambda device: kernels)
    monkeypatch.setattr(
        head, "default_chunk_tokens", lambda *args: chunk_tokens(*args[:2], torch.device("cuda"))
    )
    options = dict(device="meta", dtype=torch.bfloat16, requires_grad=True)
    rows, weight = torch.empty(num_rows, hidden, **options), torch.empty(vocab, hidden, **options)
    buffer = torch.empty(vocab, hidden, device="meta") if into == "buffer" else None
    with traffic:
        out = vocab_parallel_logprobs(
            rows,
            weight,
            torch.zeros(num_rows, dtype=torch.int64),
            with_entropy=with_entropy,
            weight_grad=buffer,
        )
        sum(x.sum() for x in out if x is not None).backward()
    # The forward writes them and reads them; the backward writes them again, reads them, writes
    # their gradient over them and reads that for two products.
    assert traffic.passes == 7
    logits_bytes = num_rows * vocab * 2
    assert traffic.peak_bytes > logits_bytes
    assert traffic.peak_bytes < (3.0e9 if into == "autograd" else 1.5e9)
    assert (weight.grad is None) == (into == "buffer")
    told = head_bytes(
        *(num_rows, hidden, vocab), dtype=torch.bfloat16, device=torch.device("cuda"),
        has_weight_grad=into == "buffer",
    )  # fmt: skip
    assert told <= traffic.peak_bytes < 1.001 * told
