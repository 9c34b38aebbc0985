"""Windows, sinks and value sizes: what they cost beside what their arithmetic says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from megatron_pg import PackedLayout, prefix_grouped_attention
from megatron_pg.attention import AttentionKind
from megatron_pg.tree import pairs_within
from tools.bench.registry import BenchmarkRow, Options
from tools.bench.shapes import Shape, select, star
from tools.bench.timing import check_equal, peak_bytes, time_interleaved


@dataclass(frozen=True)
class Layer:
    """Heads of a layer and what its attention computes."""

    kind: AttentionKind = field(default_factory=AttentionKind)
    head_dim: int = 64
    num_heads: int = 4
    num_kv_heads: int = 4

    @property
    def value_dim(self) -> int:
        return self.kind.value_dim or self.head_dim

    def multiplications(self, layout: PackedLayout) -> int:
        """Of forward and backward: two products and five, per visible pair."""
        per_pair = 4 * self.head_dim + 3 * self.value_dim
        return self.num_heads * per_pair * pairs_within(layout.forest, self.kind.window)

    def inputs(self, num_tokens: int, options: Options) -> tuple[list[Tensor], Tensor]:
        """q, k, v, a sink where there is one; and the output's gradient."""
        generator = torch.Generator().manual_seed(0)

        def random(*size: int) -> Tensor:
            made = torch.randn(*size, generator=generator)
            return made.to(options.device, options.dtype)

        q, dout = (random(num_tokens, self.num_heads, n) for n in (self.head_dim, self.value_dim))
        kv = [random(num_tokens, self.num_kv_heads, n) for n in (self.head_dim, self.value_dim)]
        return [q, *kv, *[random(self.num_heads)] * self.kind.has_sink], dout

    def attend(self, layout: PackedLayout) -> Callable[..., Tensor]:
        """Of q, k, v and a sink where there is one."""
        return lambda q, k, v, sink=None: prefix_grouped_attention(
            q, k, v, layout, kind=self.kind, sink=sink
        )


def plain_layer(options: Options) -> Layer:
    """The heads that attention is measured with: an 8B model's on a GPU."""
    if options.device.type == "cuda" and not options.quick:
        return Layer(head_dim=128, num_heads=32, num_kv_heads=8)
    return Layer()


@dataclass(frozen=True)
class Case:
    """A layer on a shape, and the other layers that its cost is compared with."""

    shape: Shape
    layer: Layer
    others: dict[str, Layer]


def kind_cases(options: Options) -> list[Case]:
    """Windows shorter than a response and than a prompt, a sink, the heads of DeepSeek-V3."""
    plain = plain_layer(options)
    long, short = star(4096, 512, 8), star(1024, 128, 8)
    windows: tuple[int, ...] = (128, 512, 1024)
    head_dim, value_dim = 192, 128
    if options.quick:
        long, short, windows, head_dim, value_dim = star(32, 8, 4), star(16, 4, 4), (4,), 48, 16
    elif options.device.type == "cuda":
        short = star(2048, 512, 8)
    cases = [
        _case(
            *(long, f"window {n}", replace(plain, kind=AttentionKind(window=n))),
            {"no window": plain},
        )
        for n in windows
    ]
    sink = replace(plain, kind=AttentionKind(has_sink=True))
    cases.append(_case(short, "sink", sink, {"no sink": plain}))
    heads = plain.num_heads
    latent = Layer(AttentionKind(value_dim=value_dim), head_dim, heads, heads)
    grouped = Layer(AttentionKind(), (head_dim + value_dim) // 2, heads, heads // 2)
    name = f"grouped heads of {grouped.head_dim}"
    cases.append(_case(short, f"heads {head_dim}/{value_dim}", latent, {name: grouped}))
    return [case for case in cases if select(case.shape, options)]


def _case(shape: Shape, words: str, layer: Layer, others: dict[str, Layer]) -> Case:
    fields = {**shape.fields, "name": f"{shape.name} {words}"}
    return Case(Shape(shape.tree, fields), layer, others)


def kind_rows(options: Options) -> Iterator[BenchmarkRow]:
    """Against the same layer on written-out rows, and against other layers on the packed row."""
    for case in kind_cases(options):
        yield from _compare(case, options)


def _compare(case: Case, options: Options) -> list[BenchmarkRow]:
    shape, layer = case.shape, case.layer
    inputs, dout = layer.inputs(shape.tree.unique_tokens, options)
    expanded = [shape.packed.expand(x) for x in inputs[:3]] + inputs[3:]
    expanded_dout = shape.packed.expand(dout)
    written_out = measured_path(layer.attend(shape.written_out), expanded, expanded_dout)
    ours = layer.attend(shape.packed)
    paths = {"ours": measured_path(ours, inputs, dout), "written out": written_out}
    work = {"written out": layer.multiplications(shape.written_out)}
    others = {name: other for name, other in case.others.items() if options.takes(name)}
    for name, other in others.items():
        paths[name] = measured_path(
            other.attend(shape.packed), *other.inputs(shape.tree.unique_tokens, options)
        )
        work[name] = other.multiplications(shape.packed)

    want_out, *want = written_out()
    # With an output gradient per sample, ours gets the sum over samples that share a row.
    out, *got = measured_path(ours, inputs, shape.packed.reduce(expanded_dout))()
    pairs = [("out", shape.packed.expand(out), want_out)]
    names = ("dq", "dk", "dv")
    pairs += [(name, g, shape.packed.reduce(w)) for name, g, w in zip(names, got, want)]
    pairs += [("dsink", g, w) for g, w in zip(got[3:], want[3:])]
    error = check_equal(pairs, 1e-5 if options.dtype == torch.float32 else 3e-2)

    times = time_interleaved(paths, options.num_rounds(9), options.clock)
    ours_peak, written_out_peak = peak_bytes(paths["ours"]), peak_bytes(written_out)
    described = shape.describe(
        heads=layer.num_heads,
        query_groups=layer.num_kv_heads,
        head_dim=layer.head_dim,
        value_dim=layer.value_dim,
        window=layer.kind.window,
        has_sink=layer.kind.has_sink,
        dtype=str(options.dtype),
    )
    return [
        BenchmarkRow(
            benchmark="attention",
            shape=described,
            baseline=name,
            bound=work[name] / layer.multiplications(shape.packed),
            max_error=error if name == "written out" else None,
            ours_peak_bytes=ours_peak,
            baseline_peak_bytes=written_out_peak if name == "written out" else None,
            ours_flops=2 * layer.multiplications(shape.packed),
            **times.against(name),
        )
        for name in work
        if options.takes(name)
    ]


def measured_path(
    attend: Callable[..., Tensor], inputs: list[Tensor], dout: Tensor
) -> Callable[[], tuple[Tensor, ...]]:
    """A run that returns the output and the gradients of ``inputs``."""
    leaves = [x.detach().requires_grad_() for x in inputs]

    def run() -> tuple[Tensor, ...]:
        out = attend(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, dout)

    return run
