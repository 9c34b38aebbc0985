"""The Triton merge against the plain one and against dense attention over both key sets.

Kernels run on the GPU and, on CPU tensors, in Triton's interpreter.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from megatron_pg import PrefixTree, pack_trees, prefix_grouped_attention
from megatron_pg.attention import ATTENTION_BACKENDS, make_attention_plan, merge
from megatron_pg.attention.kernels import merge_plain
from tests.utils import assert_close, assert_close_to_control

triton = pytest.importorskip(
    "triton", reason="needs triton, which the Python 3.12 lane has: LANES=312 bash tests/run.sh"
)

pytestmark = pytest.mark.triton

DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float64, torch.float64),
]


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


@pytest.fixture
def kernels(device: str) -> ModuleType:
    return load_kernels(device)


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Dense ``(out [T, H, D], lse [H, T])`` over the visible ``[T, N]`` keys; 0, -inf of none."""
    scores = torch.einsum("qhd,khd->hqk", q, k).masked_fill(~visible, float("-inf"))
    out = torch.einsum("hqk,khd->qhd", scores.softmax(-1).nan_to_num(0.0), v)
    return out, scores.logsumexp(-1)


def strided(x: Tensor, is_strided: bool) -> Tensor:
    """The same values as a row slice, or as such a slice with every stride unusual."""
    if not is_strided:
        buffer = x.new_zeros(len(x) + 7, *x.shape[1:])
        buffer[3:-4] = x
        return buffer[3:-4]
    buffer = x.new_zeros(x.shape[2] + 1, len(x) + 7, 2 * x.shape[1])
    buffer[1:, 3:-4, ::2] = x.permute(2, 0, 1)
    return buffer[1:, 3:-4, ::2].permute(1, 2, 0)


def two_blocks(dim: int) -> int:
    """Rows that fill one block of a kernel and begin another."""
    return 2048 // triton.next_power_of_2(dim) + 5


@pytest.mark.parametrize("dtype, pass_dtype", DTYPES)
@pytest.mark.parametrize("is_strided", [False, True])
@pytest.mark.parametrize("takes_all", [True, False])
@pytest.mark.parametrize("num_heads", [1, 3, 8])
@pytest.mark.parametrize("dim", [1, 8, 64, 80, 96, 128])
def test_merge(kernels, device, dim, num_heads, takes_all, is_strided, dtype, pass_dtype) -> None:
    num_rows, num_keys = two_blocks(dim), (5, 3)
    q = torch.randn(num_rows, num_heads, dim, dtype=torch.float64, device=device)
    k, v = torch.randn(2, sum(num_keys), num_heads, dim, dtype=torch.float64, device=device)
    q *= 2 * dim**-0.5
    visible = torch.rand(num_rows, sum(num_keys), device=device) < 0.8
    visible[0::7, : num_keys[0]], visible[1::7, num_keys[0] :] = False, False
    visible[0::7, -1], visible[1::7, 0] = True, True
    first, second = slice(None, num_keys[0]), slice(num_keys[0], None)
    out, lse = attend(q, k[first], v[first], visible[:, first])
    pass_out, pass_lse = attend(q, k[second], v[second], visible[:, second])
    assert lse.isinf().any() and pass_lse.isinf().any() and (lse + pass_lse).isfinite().any()
    truth, truth_lse = attend(q, k, v, visible)

    rows = None
    if not takes_all:
        # Every third row takes no part and holds garbage.
        others = torch.arange(2, num_rows, 3, device=device)
        kept = torch.ones(num_rows, dtype=torch.bool, device=device)
        kept[others] = False
        rows = kept.nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows), device=device)]
        pass_out[others], pass_lse[:, others] = float("nan"), float("nan")
        truth[others], truth_lse[:, others] = out[others], lse[:, others]
        assert 0 < len(rows) < num_rows

    out, pass_out = (strided(x, is_strided) for x in (out.to(dtype), pass_out.to(pass_dtype)))
    lse, pass_lse = lse.to(dtype), pass_lse.to(dtype).t().contiguous().t()
    if is_strided:
        lse, pass_lse = (strided(x.t()[..., None], True)[..., 0].t() for x in (lse, pass_lse))
    before, before_lse = out.clone(), lse.clone()
    want, want_lse = out.clone(), lse.clone()
    merge_plain.merge_out_lse(want, want_lse, pass_out, pass_lse, rows)
    kernels.merge_out_lse(out, lse, pass_out, pass_lse, rows)

    assert not out.isnan().any() and not lse.isnan().any()
    bound = 1e-6 if dtype == torch.float32 else 1e-14
    hidden = want_lse.isinf()
    assert torch.equal(lse.isinf(), hidden), "rows without keys stay without"
    assert_close("out", out, want, bound)
    assert_close("lse", lse.masked_fill(hidden, 0), want_lse.masked_fill(hidden, 0), bound)
    assert_close_to_control("out", out, want, truth)
    assert_close("lse", *(x.masked_fill(hidden, 0) for x in (lse, truth_lse)), bound)
    if not takes_all:
        assert torch.equal(out[others], before[others]), "rows that take no part stay"
        assert torch.equal(lse[:, others], before_lse[:, others])


def test_every_pair_of_log_sum_exps_merges_as_plain(kernels, device) -> None:
    inf = float("inf")
    values = torch.tensor([-inf, -1e4, -50.0, -1.0, 0.0, 1e-8, 1.0, 50.0, 1e4, inf, float("nan")])
    lse, pass_lse = (
        x.flatten().repeat(2, 1).to(device) for x in torch.meshgrid(values, values, indexing="ij")
    )
    out, pass_out = torch.randn(2, lse.shape[1], 2, 5, device=device)
    want, want_lse = out.clone(), lse.clone()
    merge_plain.merge_out_lse(want, want_lse, pass_out, pass_lse, None)
    before = out.clone()
    kernels.merge_out_lse(out, lse, pass_out, pass_lse, None)
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
    rows = torch.empty(0, dtype=torch.int64, device=device)
    kernels.merge_out_lse(out, lse, pass_out, pass_lse, rows)
    kernels.add_rows(out, pass_out, rows)
    assert torch.equal(out, before) and torch.equal(lse, before_lse)
    if num_rows == 0:
        kernels.merge_out_lse(out, lse, pass_out, pass_lse, None)
        kernels.add_rows(out, pass_out, None)


@pytest.mark.parametrize("dtype, share_dtype", DTYPES)
@pytest.mark.parametrize("is_strided", [False, True])
@pytest.mark.parametrize("takes_all", [True, False])
@pytest.mark.parametrize("dim", [1, 8, 80, 128])
def test_add_rows(kernels, device, dim, takes_all, is_strided, dtype, share_dtype) -> None:
    num_rows = two_blocks(dim)
    total = torch.randn(num_rows, 3, dim, dtype=dtype, device=device)
    share = torch.randn(num_rows, 3, dim, device=device).to(share_dtype)
    kept = torch.rand(num_rows, device=device) < 0.6
    rows = None
    if not takes_all:
        rows = kept.nonzero()[:, 0].flip(0)
        share[~kept] = float("nan")
        assert 0 < len(rows) < num_rows
    total, share = strided(total, is_strided), strided(share, is_strided)
    want, before = total.clone(), total.clone()
    merge_plain.add_rows(want, share, rows)
    kernels.add_rows(total, share, rows)
    assert torch.equal(total, want) and not torch.equal(total, before)
    assert takes_all or torch.equal(total[~kept], before[~kept])


def compile_kernel(
    kernel, dtypes: list[str], dim: int, has_rows: bool, target: tuple[str, int, int]
) -> dict[str, str]:
    """What a launch on contiguous tensors compiles, for a device that need not be there."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    block_d = triton.next_power_of_2(dim)
    constants = {"HEAD_DIM": dim, "BLOCK_T": 2048 // block_d, "BLOCK_D": block_d}
    constants |= {name: 1 for name in kernel.arg_names if name.endswith("_stride_d")}
    if not has_rows:
        constants["rows_ptr"] = None
    signature = dict.fromkeys(kernel.arg_names, "i32") | {"rows_ptr": "*i64"}
    signature |= dict(zip(kernel.arg_names, dtypes)) | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature, constants)
    return triton.compile(source, target=GPUTarget(*target)).asm


@pytest.mark.parametrize("dim", [1, 64, 80, 128, 256])
@pytest.mark.parametrize("has_rows", [False, True])
@pytest.mark.parametrize(
    "name, dtypes",
    [
        ("_merge_kernel", ["*fp32", "*fp32", "*bf16", "*fp32"]),
        ("_merge_kernel", ["*fp64", "*fp64", "*fp64", "*fp64"]),
        ("_add_kernel", ["*fp32", "*bf16"]),
    ],
)
def test_kernels_compile_for_sm_90(tmp_path, monkeypatch, name, dtypes, has_rows, dim) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(load_kernels("cuda"), name)
    asm = compile_kernel(kernel, dtypes, dim, has_rows, ("cuda", 90, 32))
    ptx = asm["ptx"]
    assert ".target sm_90" in ptx and len(asm["cubin"]) > 1000
    # Tokens * heads * dim may exceed 2**31.
    pointers = [line for line in asm["ttir"].splitlines() if "tt.addptr" in line]
    assert len(pointers) >= len(dtypes)
    assert all(re.search(r"i64>?( loc\(.*\))?$", line) for line in pointers), pointers
    if name == "_merge_kernel":
        # Warps that hold the same lse must all have read it before one of them writes it.
        after_reads, before_writes = ptx.rindex("ld.global"), ptx.index("st.global")
        assert "bar.sync" in ptx[after_reads:before_writes]


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
    dout = torch.randn_like(q)

    def run() -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = prefix_grouped_attention(*leaves, layout, backend="cpu")
        out.backward(dout)
        return [out.detach(), *(x.grad for x in leaves)]

    want = run()
    kernels, calls = load_kernels("cpu"), []

    def counted(function: Callable[..., None]) -> Callable[..., None]:
        return lambda *args: (calls.append((function.__name__, args[-1] is None)), function(*args))

    functions = [counted(f) for f in (kernels.merge_out_lse, kernels.add_rows)]
    replaced = SimpleNamespace(merge_out_lse=functions[0], add_rows=functions[1])
    monkeypatch.setattr(merge, "_merge_functions", lambda device: replaced)
    got = run()
    assert set(calls) == {(n, a) for n in ("merge_out_lse", "add_rows") for a in (True, False)}
    for name, g, w in zip(("out", "dq", "dk", "dv"), got, want):
        assert_close(name, g, w, 1e-6)


def test_attention_takes_what_merge_implementation_names(monkeypatch) -> None:
    assert merge._merge_functions(torch.device("cpu")) is merge_plain
    monkeypatch.setattr(merge, "merge_implementation", lambda device: "triton")
    chosen = merge._merge_functions(torch.device("cpu"))
    assert chosen.__name__ == "megatron_pg.attention.kernels.merge_triton"
