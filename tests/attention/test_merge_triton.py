"""The Triton merge against the plain one and against dense attention over both key sets.

Kernels run on the GPU and, on CPU tensors, in Triton's interpreter.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_pg import PrefixTree, pack_trees, prefix_grouped_attention
from megatron_pg.attention import (
    ATTENTION_BACKENDS,
    AttentionKind,
    kernel_passes,
    make_attention_plan,
    merge,
)
from megatron_pg.attention.kernels import PassGrads, PassOut, merge_plain
from megatron_pg.attention.sink import add_sink
from tests.utils import assert_close, assert_close_to_control

triton = pytest.importorskip(
    "triton", reason="needs triton, which the Python 3.12 lane has: LANES=312 bash tests/run.sh"
)

pytestmark = pytest.mark.triton

F64, BF16 = torch.float64, torch.bfloat16
LSE_DTYPES = dict.fromkeys((torch.float32, BF16, torch.float16), torch.float32) | {F64: F64}
DTYPES = tuple(LSE_DTYPES)


def load_kernels(device: str) -> ModuleType:
    """A copy of the module for the device: Triton decides when it decorates the kernels."""
    spec = importlib.util.find_spec("megatron_pg.attention.kernels.merge_triton")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1" if device == "cpu" else "0")
        spec.loader.exec_module(module)
    kind = type(module._merge_kernel).__name__
    assert kind == ("InterpretedFunction" if device == "cpu" else "JITFunction")
    return module


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu])])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def rounding(monkeypatch) -> None:
    """The interpreter cuts fp32 to bf16 off; devices round it to the nearest."""
    from triton.runtime import interpreter

    convert, bf16, fp32 = (
        interpreter._convert_float,
        triton.language.bfloat16,
        triton.language.float32,
    )

    def as_on_devices(x, dtype, to_dtype, mode):
        given = torch.from_numpy(np.ascontiguousarray(x))
        if (dtype, to_dtype) == (fp32, bf16):
            return given.to(BF16).view(torch.uint16).numpy()
        if (dtype, to_dtype) == (bf16, fp32):
            return given.view(BF16).float().numpy()
        return convert(x, dtype, to_dtype, mode)

    monkeypatch.setattr(interpreter, "_convert_float", as_on_devices)


@pytest.fixture
def kernels(device: str) -> ModuleType:
    return load_kernels(device)


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Dense ``(out [T, H, D], lse [H, T])`` over the visible ``[T, N]`` keys; 0, -inf of none."""
    scores = torch.einsum("qhd,khd->hqk", q, k).masked_fill(~visible, float("-inf"))
    out = torch.einsum("hqk,khd->qhd", scores.softmax(-1).nan_to_num(0.0), v)
    return out, scores.logsumexp(-1)


def two_blocks(dim: int) -> int:
    """Rows that fill one block of a kernel and begin another."""
    return 2048 // triton.next_power_of_2(dim) + 5


def rows_flags(rows: Tensor | None, num_rows: int, device: str) -> Tensor | None:
    """Rows as the kernels take them: a flag for each."""
    if rows is None:
        return None
    return torch.zeros(num_rows, dtype=torch.bool, device=device).index_fill_(0, rows, True)


def some_rows(num_rows: int, device: str) -> Tensor:
    return (torch.rand(num_rows, device=device) < 0.6).nonzero()[:, 0]


@pytest.mark.parametrize("num_passes, has_sink", [(1, False), (4, False), (1, True)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim, num_heads", [(80, 3), (128, 5)])
def test_merge(kernels, device, dim, num_heads, dtype, num_passes, has_sink) -> None:
    """Against the definition bit for bit where that has the same operators, and dense truth."""
    num_rows, num_keys = two_blocks(dim), 3
    q = 2 * dim**-0.5 * torch.randn(num_rows, num_heads, dim, dtype=F64, device=device)
    k, v = torch.randn(2, (1 + num_passes) * num_keys, num_heads, dim, dtype=F64, device=device)
    visible = torch.rand(num_rows, len(k), device=device) < 0.8
    visible[:, 0] = True
    parts = [slice(i * num_keys, (i + 1) * num_keys) for i in range(1 + num_passes)]
    out, lse = (x.contiguous() for x in attend(q, k[parts[0]], v[parts[0]], visible[:, parts[0]]))
    passes, indexed, touched = [], [], torch.zeros(num_rows, dtype=torch.bool, device=device)
    for i, part in enumerate(parts[1:]):
        # Slices begin and end at different rows; every second has gaps, whose rows hold garbage.
        rows, length = slice(1 + 2 * i, num_rows - 2 * i), num_rows - 4 * i - 1
        index = some_rows(length, device) if i % 2 == 0 else None
        pass_out, pass_lse = attend(q[rows], k[part], v[part], visible[rows, part])
        flags = rows_flags(index, length, device)
        takes = torch.zeros_like(touched)
        takes[rows] = True if flags is None else flags
        visible[:, part] &= takes[:, None]
        touched |= takes
        pass_out[~takes[rows]], pass_lse[:, ~takes[rows]] = torch.nan, torch.nan
        given = pass_out.to(dtype), pass_lse.to(LSE_DTYPES[dtype])
        passes.append(PassOut(rows, flags, *given))
        indexed.append(PassOut(rows, index, *given))
    assert touched.any() and not touched.all()
    sink = torch.randn(num_heads, dtype=dtype, device=device) if has_sink else None
    truth, truth_lse = attend(q, k, v, visible)
    if has_sink:
        add_sink(truth, truth_lse, sink.double())
    out, lse = out.to(dtype), lse.to(LSE_DTYPES[dtype])
    before, before_lse, want, want_lse = out.clone(), lse.clone(), out.clone(), lse.clone()
    merge_plain.merge_out_lse(want, want_lse, indexed, sink)
    kernels.merge_out_lse(out, lse, passes, sink)

    assert out.dtype == dtype and not out.isnan().any() and not lse.isnan().any()
    # Both round the same numbers, which may differ in their last bit, once.
    bound = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 2e-6, F64: 1e-14}[dtype]
    assert_close("out", out, want, bound)
    assert_close("lse", lse, want_lse, 1e-6 if dtype != F64 else 1e-14)
    assert_close_to_control("out", out, want, truth)
    assert_close("lse", lse, truth_lse, 1e-3 if dtype == torch.float16 else 1e-6)
    if not has_sink:
        assert torch.equal(out[~touched], before[~touched]), "rows that take no part stay"
        assert torch.equal(lse[:, ~touched], before_lse[:, ~touched])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_place_is_what_a_wide_running_result_is_rounded_to(kernels, device, dtype) -> None:
    """Bit for bit, however many passes a launch merges."""
    num_rows = two_blocks(64)
    out, *outs = torch.randn(4, num_rows, 3, 64, device=device).to(dtype)
    lse, *lses = 3 * torch.randn(4, 3, num_rows, device=device)
    flags = [None, rows_flags(some_rows(num_rows, device), num_rows, device), None]
    passes = [PassOut(slice(0, num_rows), *p) for p in zip(flags, outs, lses)]
    for merged in (passes[:1], passes):
        wide, wide_lse = out.float(), lse.clone()
        for p in merged:
            kernels.merge_out_lse(wide, wide_lse, [p])
        got, got_lse = out.clone(), lse.clone()
        kernels.merge_out_lse(got, got_lse, merged)
        assert torch.equal(got, wide.to(dtype)) and torch.equal(got_lse, wide_lse)
        assert not torch.equal(got, out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides(kernels, device, dtype) -> None:
    """A running result within a wider one, outputs whose heads are slices or stand apart."""
    num_rows, dim = two_blocks(64), 64
    wide = torch.randn(num_rows, 5, dim + 8, device=device).to(dtype)
    out = wide[:, 1:4, :dim]
    lse = torch.randn(num_rows, 3, device=device).t()
    apart = torch.randn(3, num_rows, dim, device=device).to(dtype).transpose(0, 1)
    backwards = torch.randn(num_rows, dim, 3, device=device).to(dtype).transpose(1, 2)
    sliced = torch.randn(num_rows, 3, dim + 8, device=device).to(dtype)[..., :dim]
    want, want_lse, before = out.clone(), lse.clone(), wide.clone()
    rows, total, sums = slice(0, num_rows), out.clone(), out.clone()
    for given in ([sliced], [sliced, apart], [backwards]):
        lses = [torch.randn(num_rows, 3, device=device).t() for _ in given]
        passes = [PassOut(rows, None, *p) for p in zip(given, lses)]
        merge_plain.merge_out_lse(want, want_lse, passes)
        kernels.merge_out_lse(out, lse, passes)
        grads = [PassGrads(rows, None, (x,)) for x in given]
        merge_plain.add_grads([total], grads)
        kernels.add_grads([sums], grads)
        assert torch.equal(total, sums)
    assert_close("out", out, want, 1e-6 if dtype == torch.float32 else 2e-2)
    assert_close("lse", lse, want_lse, 1e-6)
    before[:, 1:4, :dim] = wide[:, 1:4, :dim]
    assert torch.equal(wide, before), "numbers beside the running result stay"


def test_every_pair_of_log_sum_exps_merges_as_plain(kernels, device) -> None:
    inf = float("inf")
    values = torch.tensor([-inf, -1e4, -50.0, -1.0, 0.0, 1e-8, 1.0, 50.0, 1e4, inf, float("nan")])
    lse, pass_lse = (
        x.flatten().repeat(2, 1).to(device) for x in torch.meshgrid(values, values, indexing="ij")
    )
    out, pass_out = torch.randn(2, lse.shape[1], 2, 5, device=device)
    want, want_lse = out.clone(), lse.clone()
    passes = [PassOut(slice(0, len(out)), None, pass_out, pass_lse)]
    merge_plain.merge_out_lse(want, want_lse, passes)
    before = out.clone()
    kernels.merge_out_lse(out, lse, passes)
    torch.testing.assert_close(out, want, rtol=1e-6, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(lse, want_lse, rtol=1e-6, atol=1e-6, equal_nan=True)
    # The grid is [lse, pass_lse]: 0 is no keys on both sides, 1 on ours, len(values) on theirs.
    assert out[0].isnan().all() and (lse[:, 0] == -inf).all()
    assert torch.equal(out[1], pass_out[1]) and (lse[:, 1] == -1e4).all()
    at = len(values)
    assert torch.equal(out[at], before[at]) and (lse[:, at] == -1e4).all()


@pytest.mark.parametrize("num_rows", [0, 4])
def test_no_rows(kernels, device, num_rows) -> None:
    out, pass_out = torch.randn(2, num_rows, 3, 8, device=device)
    lse, pass_lse = torch.randn(2, 3, num_rows, device=device)
    before, before_lse = out.clone(), lse.clone()
    flags, rows = torch.zeros(num_rows, dtype=torch.bool, device=device), slice(0, num_rows)
    kernels.merge_out_lse(out, lse, [PassOut(rows, flags, pass_out, pass_lse)])
    kernels.merge_out_lse(out, lse, [])
    kernels.add_grads([out], [PassGrads(rows, flags, (pass_out,))])
    kernels.add_grads([out], [])
    assert torch.equal(out, before) and torch.equal(lse, before_lse)
    if num_rows == 0:
        kernels.merge_out_lse(out, lse, [PassOut(rows, None, pass_out, pass_lse)], out.new_zeros(3))
        kernels.add_grads([out], [PassGrads(rows, None, (pass_out,))])


@pytest.mark.parametrize("num_passes", [1, 3])
@pytest.mark.parametrize("dtype, share_dtype", [*((d, d) for d in DTYPES), (torch.float32, BF16)])
@pytest.mark.parametrize("dims", [(80,), (128, 128), (128, 80)])
def test_add_grads(kernels, device, dims, dtype, share_dtype, num_passes) -> None:
    """For dq; for dk and dv; and where values are of another size."""
    num_rows = two_blocks(dims[0])
    totals = [torch.randn(num_rows, 3, d, dtype=F64, device=device).to(dtype) for d in dims]
    flagged, indexed, touched = [], [], torch.zeros(num_rows, dtype=torch.bool, device=device)
    for i in range(num_passes):
        rows, length = slice(1 + i, num_rows - 3 * i), num_rows - 4 * i - 1
        index = some_rows(length, device) if i != 1 else None
        flags = rows_flags(index, length, device)
        grads = tuple(torch.randn(length, 3, d, device=device).to(share_dtype) for d in dims)
        if flags is not None:
            for grad in grads:
                grad[~flags] = torch.nan
        touched[rows] |= True if flags is None else flags
        flagged.append(PassGrads(rows, flags, grads))
        indexed.append(PassGrads(rows, index, grads))
    before, want = [x.clone() for x in totals], [x.clone() for x in totals]
    merge_plain.add_grads(want, indexed)
    kernels.add_grads(totals, flagged)
    assert not touched.all()
    for got, w, b in zip(totals, want, before):
        assert torch.equal(got, w) and not torch.equal(got, b)
        assert torch.equal(got[~touched], b[~touched])


def compile_kernel(
    kernel, dtypes: list[str], dim: int, num_passes: int, has_flags: bool, cache: Path
) -> Any:
    """What a launch on contiguous tensors compiles for sm_90, which need not be there."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    block_d = triton.next_power_of_2(dim)
    constants: dict[Any, Any] = {"HEAD_DIM": dim, "BLOCK_T": 2048 // block_d, "BLOCK_D": block_d}
    constants |= {"lse_stride_t": 1} if "lse_stride_t" in kernel.arg_names else {}
    signature: dict[str, Any] = dict.fromkeys(kernel.arg_names, "i32")
    signature |= dict(zip(kernel.arg_names, dtypes)) | dict.fromkeys(constants, "constexpr")
    names = list(kernel.arg_names)
    attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if "stride_" in n}
    attributes[0,] = [["tt.divisibility", 16]]
    # As for dk and dv: two totals, and two gradients of each pass.
    lengths = {"pass_outs": num_passes, "totals": 2, "grads": 2 * num_passes}
    for name in lengths.keys() & signature.keys():
        at, length = names.index(name), lengths[name]
        signature[name] = (dtypes[0],) * length
        attributes |= {(at, i): [["tt.divisibility", 16]] for i in range(length)}
    attributes = {at: a for at, a in attributes.items() if at != (0,) or "totals" not in names}
    if "pass_lses" in signature:
        signature["pass_lses"] = ("*fp32",) * num_passes
    at = names.index("selections")
    signature["selections"] = ("*u1" if has_flags else "constexpr",) * num_passes
    if not has_flags:
        constants |= {(at, i): None for i in range(num_passes)}
    if "sink_ptr" in signature and signature["sink_ptr"] == "constexpr":
        constants["sink_ptr"] = None
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32))


@pytest.mark.parametrize("dim", [64, 80, 256])
@pytest.mark.parametrize("num_passes, has_flags", [(1, False), (4, True)])
@pytest.mark.parametrize(
    "name, dtypes",
    [
        ("_merge_kernel", ["*bf16", "*fp32", "constexpr"]),
        ("_merge_kernel", ["*bf16", "*fp32", "*bf16"]),
        ("_add_kernel", ["*bf16"]),
    ],
)
def test_kernels_compile_for_sm_90(
    tmp_path, monkeypatch, name, dtypes, num_passes, has_flags, dim
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(load_kernels("cuda"), name)
    compiled = compile_kernel(kernel, dtypes, dim, num_passes, has_flags, tmp_path)
    ptx = compiled.asm["ptx"]
    assert ".target sm_90" in ptx and len(compiled.asm["cubin"]) > 1000
    # Tokens * heads * dim may exceed 2**31.
    pointers = [line for line in compiled.asm["ttir"].splitlines() if "tt.addptr" in line]
    assert len(pointers) >= 1 + num_passes
    assert all(re.search(r"i64>?( loc\(.*\))?$", line) for line in pointers), pointers
    if dim % 64 == 0:
        # Eight numbers of bf16 at a time, and nothing that does not fit the registers.
        assert re.search(r"ld\.global\.v4\.(b32|u32)", ptx), "loads are not of 128 bits"
        assert re.search(r"st\.global\.v4\.(b32|u32)", ptx), "stores are not of 128 bits"
    used = resources(compiled.asm["cubin"], tmp_path)
    assert used["REG"] <= 96 and used["STACK"] == used["LOCAL"] == 0, used
    if name == "_merge_kernel":
        # Warps that hold the same lse must all have read it before one of them writes it.
        after_reads, before_writes = ptx.rindex("ld.global"), ptx.index("st.global")
        assert "bar.sync" in ptx[after_reads:before_writes]


def resources(cubin: bytes, folder: Path) -> dict[str, int]:
    """Registers, stack and local memory of a compiled kernel."""
    from triton import knobs

    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    tool = str(Path(knobs.nvidia.ptxas.path).with_name("cuobjdump"))
    report = subprocess.run(
        [tool, "-res-usage", str(path)], capture_output=True, text=True, check=True
    )
    found = re.findall(r"(REG|STACK|LOCAL):(\d+)", report.stdout)
    assert len(found) >= 3, report.stdout
    return {name: int(number) for name, number in found}


def test_attention_merges_with_either(monkeypatch) -> None:
    trees = [
        PrefixTree.from_sequences([[1] * 9 + [2] * 4 + [i] * 3 for i in (3, 4)] + [[1] * 9 + [5]]),
        PrefixTree.from_group(7, [3, 2, 4]),
    ]
    layout = pack_trees(trees, 8)
    plan, cpu = make_attention_plan(layout), torch.device("cpu")
    passes = ATTENTION_BACKENDS["cpu"].prepare(plan, cpu).passes[1:]
    assert any(p.q_rows is not None for p in passes) and any(p.q_rows is None for p in passes)
    assert any(p.kv_rows is not None for p in passes)
    q, k, v = (torch.randn(layout.total_tokens, heads, 16) for heads in (4, 2, 2))
    dout, sink = torch.randn_like(q), torch.randn(4)

    def run(kind: AttentionKind, *sinks: Tensor) -> list[Tensor]:
        # A layout of its own: what is prepared depends on what merges.
        row = pack_trees(trees, 8)
        leaves = [x.clone().requires_grad_() for x in (q, k, v, *sinks)]
        call = dict(zip(("sink",), leaves[3:]))
        out = prefix_grouped_attention(*leaves[:3], row, backend="cpu", kind=kind, **call)
        out.backward(dout)
        return [out.detach(), *(x.grad for x in leaves)]

    cases = [(AttentionKind(),), (AttentionKind(has_sink=True), sink)]
    cases.append((AttentionKind(has_sink=True, window=4), sink))
    want = [run(*case) for case in cases]
    kernels, calls = load_kernels("cpu"), []

    def counted(function: Callable[..., None]) -> Callable[..., None]:
        return lambda *args: (calls.append((function.__name__, len(args[-1]))), function(*args))

    def merged(*args: Any) -> None:
        calls.append(("merge_out_lse", len(args[2])))
        kernels.merge_out_lse(*args)

    replaced = SimpleNamespace(
        MAX_PASSES=kernels.MAX_PASSES,
        select_rows=kernels.select_rows,
        merge_out_lse=merged,
        add_grads=counted(kernels.add_grads),
    )
    for module in (merge, kernel_passes):
        monkeypatch.setattr(module, "merge_functions", lambda device: replaced)
    got = [run(*case) for case in cases]
    # Two passes a launch, a sink alone, and the keys of both passes.
    assert {("merge_out_lse", 2), ("merge_out_lse", 0), ("add_grads", 2)} == set(calls)
    for case, results, truth in zip(cases, got, want):
        for name, g, w in zip(("out", "dq", "dk", "dv", "dsink"), results, truth):
            assert_close(f"{case} {name}", g, w, 2e-6)


def test_attention_takes_what_merge_implementation_names(monkeypatch) -> None:
    from megatron_pg.attention import kernels

    assert kernels.merge_functions(torch.device("cpu")) is merge_plain
    monkeypatch.setattr(kernels, "merge_implementation", lambda device: "triton")
    chosen = kernels.merge_functions(torch.device("cpu"))
    assert chosen.__name__ == "megatron_pg.attention.kernels.merge_triton"
