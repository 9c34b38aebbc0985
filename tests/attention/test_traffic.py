"""Memory traffic of a layer's attention beside its kernels' own: merges, sums, casts and copies.

Counted twice: by what masks let the Triton kernels load and store, in Triton's interpreter, on a
small row; and by what calls are given, which the small row proves, on a row of a training's size.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_pg import PackedLayout, PrefixTree, pack_trees, prefix_grouped_attention
from megatron_pg.attention import ATTENTION_BACKENDS, AttentionKind, kernel_passes, merge
from megatron_pg.attention.kernels import PassGrads, PassOut
from tests.attention.flash_rule import DenseFlashAttention

pytest.importorskip(
    "triton", reason="needs triton, which the Python 3.12 lane has: LANES=312 bash tests/run.sh"
)
pytestmark = pytest.mark.triton


@pytest.fixture
def kernels(monkeypatch) -> ModuleType:
    """The Triton merge for the interpreter."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    spec = importlib.util.find_spec("megatron_pg.attention.kernels.merge_triton")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Operators(TorchDispatchMode):
    """Bytes that operators other than attention read and write; views move none."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        is_view = any(r.alias_info is not None for r in func._schema.returns)
        writes = any(a.alias_info and a.alias_info.is_write for a in func._schema.arguments)
        if "_flash_attention" not in name and "empty" not in name and (writes or not is_view):
            self.num_bytes += sum(
                x.numel() * x.element_size()
                for x in tree_leaves((args, kwargs, out))
                if isinstance(x, Tensor)
            )
        return out


class Merges:
    """Stands for the merge functions: bytes that their arguments say must be moved."""

    MAX_PASSES = 4

    def __init__(self, kernels: ModuleType, run: bool) -> None:
        self.kernels, self.run, self.num_bytes = kernels, run, 0
        self.select_rows = kernels.select_rows

    def merge_out_lse(
        self, out: Tensor, lse: Tensor, passes: list[PassOut], sink: Tensor | None = None
    ) -> None:
        touched = self._count(out, passes, all_rows=sink is not None)
        lse_bytes = lse.shape[0] * lse.element_size()
        self.num_bytes += 2 * touched * lse_bytes
        self.num_bytes += sum(_num_rows(p) for p in passes) * lse_bytes
        if self.run:
            self.kernels.merge_out_lse(out, lse, passes, sink)

    def add_grads(self, totals: list[Tensor], passes: list[PassGrads]) -> None:
        if len(passes) == 1 and passes[0].selected is None:
            for total, grad in zip(totals, passes[0].grads):
                total[passes[0].rows].add_(grad)
            return
        for total in totals:
            self._count(total, passes)
        if self.run:
            self.kernels.add_grads(totals, passes)

    def _count(self, running: Tensor, passes: list[Any], all_rows: bool = False) -> int:
        flags = torch.full((len(running),), all_rows)
        for p in passes:
            flags[p.rows] |= True if p.selected is None else p.selected.cpu()
            given = p.out if isinstance(p, PassOut) else p.grads[0]
            self.num_bytes += _num_rows(p) * running[0].numel() * given.element_size()
        touched = int(flags.sum())
        self.num_bytes += 2 * touched * running[0].numel() * running.element_size()
        return touched


def _num_rows(p: Any) -> int:
    return p.rows.stop - p.rows.start if p.selected is None else int(p.selected.sum())


def run_layer(
    layout: PackedLayout, heads: tuple[int, int], kind: AttentionKind, device: str
) -> int:
    """One layer forward and backward on ``flash``; bytes of operators."""
    dtype = torch.bfloat16 if device == "meta" else torch.float32
    make = dict(dtype=dtype, device=device, requires_grad=True)
    q, k, v = (torch.randn(layout.total_tokens, n, 128, **make) for n in (heads[0], *heads[1:] * 2))
    sink = torch.randn(heads[0], **make) if kind.has_sink else None
    dout = torch.randn_like(q)
    with Operators() as operators:
        out = prefix_grouped_attention(q, k, v, layout, backend="flash", kind=kind, sink=sink)
        out.backward(dout)
    return operators.num_bytes


@pytest.fixture
def count(kernels, monkeypatch) -> Callable[..., tuple[int, int]]:
    """Counts a layer's bytes in merges, and in other operators."""
    flash = ATTENTION_BACKENDS["flash"]
    monkeypatch.setattr(type(flash), "refusal", lambda self, inputs: None)

    def layer(layout, heads, device: str, kind: AttentionKind) -> tuple[int, int]:
        merges = Merges(kernels, run=device == "cpu")
        for module in (merge, kernel_passes):
            monkeypatch.setattr(module, "merge_functions", lambda device: merges)
        operators = run_layer(layout, heads, kind, device)
        return merges.num_bytes, operators

    return layer


@pytest.mark.parametrize("pad_to_multiple", [1, 100])
def test_a_row_of_a_training(count, pad_to_multiple) -> None:
    layout = pack_trees([PrefixTree.from_group(2048, [512] * 8)], pad_to_multiple)
    merges, operators = count(layout, (32, 8), "meta", AttentionKind())
    # Two reads and a write in bf16: merged rows of out, then of dq, and the prompt's of dk and dv.
    assert merges == 3 * 4096 * 32 * (2 * 128 + 4)
    rows = 3 * 2 * 128 * (4096 * 32 + 2 * 2048 * 8)
    # The lse of the second pass, side by side, and padding that is set.
    padding = 100e3 * (layout.total_tokens - layout.unique_tokens)
    assert 0 < operators - rows < 2e6 + padding
    assert merges + operators <= 230e6 + padding


SMALL = {
    "one group": (AttentionKind(), [PrefixTree.from_group(9, [3, 4])], 1),
    "gaps": (AttentionKind(), [PrefixTree.from_group(n, [3, 4]) for n in (9, 5, 20)], 1),
    "deep": (
        AttentionKind(),
        [PrefixTree.from_sequences([[1] * 9 + [2] * 4 + [i] * 3 for i in (3, 4)] + [[1] * 9 + [5]])]
        * 2,
        2,
    ),
    "sink": (AttentionKind(has_sink=True), [PrefixTree.from_group(9, [3, 4])] * 2, 1),
}


@pytest.mark.parametrize("name", SMALL)
def test_kernels_move_what_their_arguments_say(count, monkeypatch, name) -> None:
    from triton.runtime import interpreter

    kind, trees, num_passes = SMALL[name]
    moved = 0
    interpreted = interpreter._interpreter

    def load(pointers: Any, mask: Any, other: Any, dtype: Any) -> Any:
        nonlocal moved
        # Flags of rows, a byte each, stand beside the count.
        size = np.dtype(dtype).itemsize
        moved += int(mask.sum()) * size if size > 1 else 0
        return interpreted.load(pointers, mask, other, dtype)

    def store(pointers: Any, values: Any, mask: Any) -> Any:
        nonlocal moved
        moved += int(mask.sum()) * values.itemsize
        return interpreted.store(pointers, values, mask)

    seen = SimpleNamespace(**{n: getattr(interpreted, n) for n in dir(interpreted)})
    seen.load, seen.store = load, store
    monkeypatch.setattr(interpreter, "_interpreter", seen)
    rule = DenseFlashAttention()
    aten = torch.ops.aten
    monkeypatch.setattr(aten, "_flash_attention_forward", rule.aten_forward, raising=False)
    monkeypatch.setattr(aten, "_flash_attention_backward", rule.aten_backward, raising=False)
    layout = pack_trees(trees, 1)
    merges, _ = count(layout, (4, 2), "cpu", kind)
    assert len(layout.segment_ids) and layout.forest.depth == num_passes
    # A sink is read by each program: 4 heads, 4 bytes, and blocks of 16 rows.
    sinks = 4 * 4 * -(-layout.total_tokens // 16) if kind.has_sink else 0
    assert moved == merges + sinks
