"""Kernels that carry a state, on packed rows, against fp64 token by token.

FLA's for Gated DeltaNet and mamba_ssm's for Mamba-2 where there is a GPU with them; PyTorch's own
rules on the CPU, which prove the comparison. The yardstick is the same kernel, written out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

pytest.importorskip("megatron.core", reason="needs megatron-core")

from megatron.core.ssm import gated_delta_net  # noqa: E402

from megatron_pg import PackedLayout, PrefixTree, pack_trees  # noqa: E402
from megatron_pg.linear import (  # noqa: E402
    Scan,
    forked_convolution,
    forked_scan,
    in_batches,
    of_layout,
)
from megatron_pg.mcore.layers import linear_attention, mamba  # noqa: E402
from megatron_pg.mcore.versions import HAS_HYBRID_MODEL  # noqa: E402
from tests.attention.test_gpu import deep, groups  # noqa: E402
from tests.linear.rows import delta_rule  # noqa: E402

pytestmark = pytest.mark.megatron

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
WIDTH = 4
ROWS = {"groups": groups, "deep": deep}
# Of rounding in bf16, from states over hundreds of tokens.
MOST = 0.05
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Recurrence:
    """What is scanned.

    Attributes:
        inputs: ``(tokens, dim, generator)`` to what a scan takes of every token, in fp64, and the
            dtypes in which it gets it.
        weights: the same of what all tokens share.
        truth: ``(inputs [batch, tokens, ...], weights)`` to outputs, token by token.
    """

    inputs: Callable[[int, int, torch.Generator], Inputs]
    dtypes: dict[str, torch.dtype]
    weights: Callable[[torch.Generator], Inputs]
    truth: Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]


HEADS, GROUPS = 4, 2


def normal(gen: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=gen, dtype=FP64)


def delta_inputs(num_tokens: int, dim: int, gen: torch.Generator) -> Inputs:
    q, k, v = (normal(gen, num_tokens, HEADS, dim) for _ in range(3))
    q, k = functional.normalize(q, dim=-1), functional.normalize(k, dim=-1)
    # Some heads forget within tokens, some keep a prompt.
    g = -functional.softplus(normal(gen, num_tokens, HEADS)) * torch.tensor([1e-3, 0.01, 0.1, 1.0])
    return dict(q=q, k=k, v=v, g=g, beta=normal(gen, num_tokens, HEADS).sigmoid())


def delta_truth(inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    batch, length, heads, dim = inputs[0].shape
    per_head = [x.transpose(1, 2).flatten(0, 1) for x in inputs]
    per_head[0] = per_head[0] * dim**-0.5
    out, _ = delta_rule(per_head, None)
    return out.unflatten(0, (batch, heads)).transpose(1, 2)


def space_inputs(num_tokens: int, dim: int, gen: torch.Generator) -> Inputs:
    dt = functional.softplus(normal(gen, num_tokens, HEADS))
    x, b, c = (normal(gen, num_tokens, n, dim) for n in (HEADS, GROUPS, GROUPS))
    return dict(x=x, dt=dt, b=b / dim**0.5, c=c)


def space_weights(gen: torch.Generator) -> Inputs:
    rates = -torch.tensor([1e-3, 0.01, 0.1, 1.0], dtype=FP64)
    return dict(rates=rates, skip=normal(gen, HEADS))


def space_truth(inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    (x, dt, b, c), (rates, skip) = inputs, weights
    b, c = (y.repeat_interleave(HEADS // GROUPS, 2) for y in (b, c))
    state, outs = x.new_zeros(*x[:, 0].shape, b.shape[-1]), []
    for t in range(x.shape[1]):
        kept = (dt[:, t] * rates).exp()[..., None, None]
        state = kept * state + (dt[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None]
        outs.append((state * c[:, t, :, None]).sum(-1))
    return torch.stack(outs, 1) + skip[:, None] * x


DELTA = Recurrence(
    delta_inputs, dict(q=BF16, k=BF16, v=BF16, g=FP32, beta=BF16), lambda gen: {}, delta_truth
)
SPACE = Recurrence(space_inputs, dict(x=BF16, dt=FP32, b=BF16, c=BF16), space_weights, space_truth)
# (recurrence, whether it needs a GPU, the scan of its weights)
SCANS: dict[str, tuple[Recurrence, bool, Callable[..., Scan]]] = {
    "torch delta rule": (DELTA, False, lambda: in_batches(linear_attention._torch_rule)),
    "fla": (DELTA, True, lambda: linear_attention._kernel_rule),
    "torch state space": (
        SPACE,
        False,
        lambda *weights: in_batches(partial(mamba._torch_rule, *weights)),
    ),
    "mamba_ssm": (
        SPACE,
        True,
        lambda *weights: in_batches(
            partial(mamba.PrefixGroupedMamba._kernel, SimpleNamespace(chunk_size=128), *weights)
        ),
    ),
}


def skip_without(name: str) -> None:
    """Skip, by name, where the package of a kernel is missing."""
    if name in ("fla", "fla convolution") and not getattr(gated_delta_net, "HAVE_FLA", False):
        pytest.skip("needs flash-linear-attention")
    if name in ("mamba_ssm", "causal_conv1d"):
        if not HAS_HYBRID_MODEL:
            pytest.skip("needs megatron-core 0.18")
        wanted = {"mamba_ssm": "mamba_chunk_scan_combined", "causal_conv1d": "causal_conv1d_fn"}
        if mamba._names().get(wanted[name]) is None:
            pytest.skip(f"needs {name.replace('_', '-')}")


def written_out(layout: PackedLayout) -> PackedLayout:
    lens = [len(layout.sample_indices(i)) for i in range(layout.num_samples)]
    return pack_trees([PrefixTree(np.array([n]), np.array([-1]), np.array([0])) for n in lens])


def by_sample(layout: PackedLayout, x: Tensor) -> Tensor:
    """``[samples, longest, ...]``, zeros behind the ends."""
    paths = [x[layout.sample_indices(i)] for i in range(layout.num_samples)]
    return torch.nn.utils.rnn.pad_sequence(paths, batch_first=True)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def errors(
    layout: PackedLayout, run: Callable[[PackedLayout, list[Tensor], list[Tensor]], Tensor],
    truth: Callable[[list[Tensor], list[Tensor]], Tensor],
    inputs: Inputs, dtypes: dict[str, torch.dtype], weights: Inputs, device: str,
) -> list[dict[str, float]]:  # fmt: skip
    """Of the packed row, and of the written-out samples, of outputs and gradients."""
    # All see the numbers as they are rounded.
    rounded = {n: x.to(dtypes.get(n, FP32)).to(device) for n, x in (inputs | weights).items()}
    found, told = [], None
    for kind in ("truth", "packed", "written out"):
        wide = FP64 if kind == "truth" else FP32
        leaves = {n: x.to(wide).requires_grad_() for n, x in rounded.items()}
        tokens, shared = [leaves[n] for n in inputs], [leaves[n] for n in weights]
        if kind == "truth":
            padded = truth([by_sample(layout, x) for x in tokens], shared)
            lens = [len(layout.sample_indices(i)) for i in range(layout.num_samples)]
            out = torch.cat([sample[:n] for sample, n in zip(padded, lens)])
            gen = torch.Generator().manual_seed(1)
            told = normal(gen, *out.shape).to(device)
        else:
            row = layout if kind == "packed" else written_out(layout)
            if kind == "written out":
                tokens = [layout.expand(x) for x in tokens]
            tokens = [x.to(dtypes[n]) for n, x in zip(inputs, tokens)]
            out = run(row, tokens, shared)
            out = layout.expand(out) if kind == "packed" else out
        grads = torch.autograd.grad((out * told).sum(), list(leaves.values()))
        results = dict(zip(["out", *leaves], [out.detach(), *grads]))
        if kind == "truth":
            wanted = results
            assert all(x.abs().max() > 0 for x in wanted.values())
        else:
            found.append({name: relative(x, wanted[name]) for name, x in results.items()})
    return found


def check(found: list[dict[str, float]], name: str, record: Callable[[str, object], None]) -> None:
    packed, control = found
    record("backend", name)
    record("error", max(packed.values()))
    assert max(control.values()) < MOST, control
    for key, error in packed.items():
        assert error < 2 * control[key] + 1e-3, (key, error, control[key])


def check_scan(name: str, layout: PackedLayout, dim: int, record: Any) -> None:
    recurrence, needs_gpu, scan = SCANS[name]
    skip_without(name)
    device, gen = "cuda" if needs_gpu else "cpu", torch.Generator().manual_seed(0)

    def run(row: PackedLayout, tokens: list[Tensor], weights: list[Tensor]) -> Tensor:
        forks = of_layout(row, WIDTH, device)
        inputs = [forks.depth_major(x) for x in tokens]
        return forks.packed(forked_scan(inputs, forks, scan(*weights)).out)

    inputs = recurrence.inputs(layout.total_tokens, dim, gen)
    given = inputs, recurrence.dtypes, recurrence.weights(gen), device
    check(errors(layout, run, recurrence.truth, *given), name, record)


GPU_SCANS = [
    pytest.param(name, marks=[pytest.mark.gpu] if needs_gpu else [])
    for name, (_, needs_gpu, _) in SCANS.items()
]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", GPU_SCANS)
def test_scans_of_small_rows_equal_fp64(name, rows, record_property) -> None:
    layout = ROWS[rows](100, 90).layout
    assert layout.forest.depth == (2 if rows == "deep" else 1) and layout.reuse_ratio > 1.2
    check_scan(name, layout, 32, record_property)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", ["fla", "mamba_ssm"])
def test_scans_equal_fp64(name, rows, record_property) -> None:
    """Heads of 128, as models have them, and segments of many chunks."""
    check_scan(name, ROWS[rows](500, 300).layout, 128, record_property)


def torch_convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = functional.conv1d(x.t()[None], weight[:, None], bias, padding=WIDTH - 1, groups=len(weight))
    return functional.silu(y[0, :, : len(x)].t())


def fla_convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    kernel = linear_attention._convolution_kernel()
    assert kernel is not None
    return kernel(x, weight, bias, "silu")


def package_convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    parameters = SimpleNamespace(
        get_conv1d_weight=lambda: weight[:, None], get_conv1d_bias=lambda: bias
    )
    layer: Any = SimpleNamespace(cp=parameters, activation="silu", d_conv=WIDTH)
    return mamba.PrefixGroupedMamba._convolve(layer, x)


CONVOLUTIONS = {
    "torch convolution": torch_convolution,
    "fla convolution": fla_convolution,
    "causal_conv1d": package_convolution,
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name.startswith("torch") else [pytest.mark.gpu])
        for name in CONVOLUTIONS
    ],
)
def test_convolutions_of_small_rows_equal_fp64(name, rows, record_property) -> None:
    skip_without(name)
    layout, channels = ROWS[rows](200, 140).layout, 256
    gen = torch.Generator().manual_seed(0)
    inputs = dict(x=normal(gen, layout.total_tokens, channels))
    weights = dict(weight=normal(gen, channels, WIDTH) / 2, bias=normal(gen, channels))
    device = "cpu" if name.startswith("torch") else "cuda"

    def run(row: PackedLayout, tokens: list[Tensor], shared: list[Tensor]) -> Tensor:
        forks = of_layout(row, WIDTH, device)
        weight, bias = (y.to(BF16) for y in shared)
        convolve = partial(CONVOLUTIONS[name], weight=weight, bias=bias)
        return forks.packed(forked_convolution(tokens[0], forks, convolve))

    def truth(tokens: list[Tensor], shared: list[Tensor]) -> Tensor:
        return torch.stack([torch_convolution(x, *shared) for x in tokens[0]])

    dtypes = dict(x=BF16, weight=BF16, bias=BF16)
    check(errors(layout, run, truth, inputs, dtypes, weights, device), name, record_property)
