"""Linear attention of one layer: packed forests against Megatron-Core's layer, sample by sample."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm import gated_delta_net
from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor
from torch._dynamo.utils import counters

from megatron_pg import PackedLayout, PrefixTree, pack_trees
from megatron_pg.mcore import (
    PrefixGroupedSeqParams,
    SequenceParallelRMSNorm,
    validate_config,
    with_prefix_grouped_attention,
)
from megatron_pg.mcore.layers import PrefixGroupedLinearAttention, linear_attention
from megatron_pg.mcore.layers.linear_attention import prefix_grouped_linear_attention
from megatron_pg.tree import join_chains
from tests.linear.rows import an_agent, random_row, relative
from tests.mcore import cases, harness
from tests.mcore.linear_rules import in_fp64

pytestmark = [pytest.mark.megatron, pytest.mark.usefixtures("one_rank")]

PARTS = GatedDeltaNetSubmodules(ColumnParallelLinear, SequenceParallelRMSNorm, RowParallelLinear)
# Around the borders of chunks, where those of segments end and those of samples do not.
PROMPTS, RESPONSES = (63, 64, 65, 200), (40, 90)


def make_layers(dtype: torch.dtype, **settings: Any) -> tuple[Any, Any]:
    """The layer of Megatron-Core and the wrapped one, with the same weights."""
    config = harness.make_config(
        harness.Case(**cases.recomputed(cases.LINEAR, params_dtype=dtype, **settings))
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    torch.manual_seed(3)
    stock, ours = (
        cls(config, PARTS, layer_number=1, pg_collection=groups)
        for cls in (GatedDeltaNet, prefix_grouped_linear_attention(GatedDeltaNet))
    )
    harness.make_states_reach_far([stock])
    with torch.no_grad():
        stock.out_norm.weight.uniform_(0.5, 1.5)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def normal(num_tokens: int, seed: int, dtype: torch.dtype) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, 32, generator=gen, dtype=torch.float64).to(dtype)


Tensors = dict[str, Tensor]


def packed(layer: Any, layout: PackedLayout, x: Tensor, told: Tensor) -> Tensors:
    """Output by sample, and gradients of the input and of every weight."""
    layer.zero_grad()
    leaf = x.clone().requires_grad_()
    params = PrefixGroupedSeqParams.from_layout(layout)
    out = layout.expand(layer(leaf[:, None], None, packed_seq_params=params)[0][:, 0])
    (out * told).sum().backward()
    return _found(layer, out, leaf)


def written_out(layer: Any, layout: PackedLayout, x: Tensor, told: Tensor) -> Tensors:
    """The same of Megatron-Core's layer, samples of one length at once."""
    layer.zero_grad()
    leaf = x.clone().requires_grad_()
    samples, lens = layout.expand(leaf), layout.sample_lens
    if len(lens.unique()) == 1:
        batch = samples.unflatten(0, (len(lens), -1)).transpose(0, 1)
        out = layer(batch, None)[0].transpose(0, 1).flatten(0, 1)
    else:
        parts = samples.split(lens.tolist())
        out = torch.cat([layer(sample[:, None], None)[0][:, 0] for sample in parts])
    (out * told).sum().backward()
    return _found(layer, out, leaf)


def _found(layer: Any, out: Tensor, leaf: Tensor) -> Tensors:
    grads = {name: p.grad.clone() for name, p in layer.named_parameters()}
    assert leaf.grad is not None
    return {"output": out.detach(), "input": leaf.grad, **grads}


def compare(layout: PackedLayout, seed: int, **settings: Any) -> dict[str, float]:
    """Worst relative errors in fp64."""
    stock, ours = make_layers(torch.float64, **settings)
    x = normal(layout.total_tokens, seed, torch.float64)
    told = normal(layout.logical_tokens, seed + 1, torch.float64)
    with in_fp64():
        got, want = packed(ours, layout, x, told), written_out(stock, layout, x, told)
    assert all(value.abs().max() > 0 for value in want.values())
    return {name: relative(got[name], want[name]) for name in want}


# Their depths, with chains joined: a state is handed on as often.
FORESTS = {0: 4, 2: 4, 3: 3, 4: 5, 5: 4}


@pytest.mark.parametrize("seed", FORESTS)
def test_forests(seed: int) -> None:
    """Segments of 1 to 200 tokens, and convolutions over 2 to 5."""
    layout = random_row(seed)
    assert layout.reuse_ratio > 1.05 and join_chains(layout.forest).depth == FORESTS[seed]
    errors = compare(layout, seed, linear_conv_kernel_dim=2 + seed % 4)
    harness.assert_within(errors, 1e-10)


def test_borders_of_chunks_and_kernel_at_every_offset() -> None:
    """Prompts of 1 to 69 tokens, and responses of as many as are left of 70."""
    trees = [PrefixTree.from_group(n, [70 - n] * 2) for n in range(1, 70)]
    of_one_head = dict(linear_num_key_heads=1, linear_num_value_heads=1)
    harness.assert_within(compare(pack_trees(trees), 0, **of_one_head), 1e-10)


def rounded(layout: PackedLayout, dtype: torch.dtype) -> tuple[Tensors, Tensors, Tensors]:
    """Packed and written out in this type, and written out in fp64 of the same numbers."""
    x, told = (
        normal(n, 2, torch.float64).to(dtype) for n in (layout.total_tokens, layout.logical_tokens)
    )
    exact, _ = make_layers(torch.float64)
    stock, ours = make_layers(dtype)
    exact.load_state_dict(stock.state_dict())
    with in_fp64():
        truth = written_out(exact, layout, x.double(), told.double())
    got, control = packed(ours, layout, x, told), written_out(stock, layout, x, told)
    return got, control, truth


@pytest.mark.parametrize("seed", [0, 4])
def test_forests_in_fp32(seed: int) -> None:
    layout = random_row(seed)
    assert join_chains(layout.forest).depth == FORESTS[seed]
    got, control, truth = rounded(layout, torch.float32)
    harness.assert_within({n: relative(got[n], control[n]) for n in truth}, 1e-5)
    harness.assert_within({n: relative(got[n].double(), truth[n]) for n in truth}, 1e-5)


@pytest.mark.parametrize(
    ("dtype", "of_output", "least"), [(torch.float32, 1e-6, 1e-5), (torch.bfloat16, 1e-2, 2e-2)]
)
def test_chunks_that_begin_anew_round_as_those_that_run_through(
    dtype: torch.dtype, of_output: float, least: float
) -> None:
    """What the README of ``megatron_pg.linear`` says that the partition does."""
    layout = pack_trees([PrefixTree.from_group(n, RESPONSES) for n in PROMPTS])
    got, control, truth = rounded(layout, dtype)
    assert 0 < relative(got["output"].double(), control["output"].double()) < of_output
    for name, want in truth.items():
        bound = max(least, 2 * relative(control[name].double(), want))
        assert relative(got[name].double(), want) <= bound, name


def test_rates_of_sixteen_bits_are_not_rounded_again() -> None:
    """As the model's own code and engines have them: the exponential is taken in fp32."""
    _, ours = make_layers(torch.bfloat16)
    alpha, beta = (normal(9, seed, torch.bfloat16)[:, :4] for seed in (0, 1))
    decay, _ = ours._gates(torch.cat([beta, alpha], 1), None)
    step = torch.nn.functional.softplus(alpha.double() + ours.dt_bias.double())
    want = -ours.A_log.double().exp() * step
    assert decay.dtype == torch.float32 and relative(decay.double(), want) < 1e-6


def test_what_is_compiled_for_a_device_computes_the_same() -> None:
    """Rows differ in length, which must not be compiled in."""
    heads = [normal(1, seed, torch.float32)[0, :4].requires_grad_() for seed in (2, 3)]
    compiled = counters["stats"]["unique_graphs"]
    for length in (9, 70):
        rates = [normal(length, seed, torch.bfloat16)[:, :4].requires_grad_() for seed in (0, 1)]
        found = []
        for function in (linear_attention.gates, linear_attention._fused_gates):
            with torch.compiler.set_stance("default"):
                decay, beta = function(*rates, *heads)
            told = normal(length, 4, torch.float32)[:, :4]
            loss = ((decay + beta) * told).sum()
            found.append([decay, beta, *torch.autograd.grad(loss, [*rates, *heads])])
        for want, got in zip(*found):
            assert got.dtype == want.dtype and relative(got.double(), want.double()) < 4e-3
    assert counters["stats"]["unique_graphs"] > compiled


def test_siblings_are_isolated_bit_for_bit() -> None:
    _, ours = make_layers(torch.float32)
    layout = random_row(4, longest=70)
    forest, params = layout.forest, PrefixGroupedSeqParams.from_layout(layout)

    def run(x: Tensor) -> Tensor:
        with torch.no_grad():
            out: Tensor = ours(x[:, None], None, packed_seq_params=params)[0][:, 0]
        return out

    x = normal(layout.total_tokens, 0, torch.float32)
    plain = run(x)
    for segment in range(forest.num_segments):
        start, end = (int(a[segment]) for a in (forest.segment_starts, forest.segment_subtree_ends))
        changed = x.clone()
        changed[start] = 0.7
        differs = (run(changed) != plain).any(-1)
        assert differs[start] and not differs[:start].any() and not differs[end:].any()


@contextmanager
def counted() -> Iterator[list[tuple[int, int]]]:
    """Segments and tokens of every batch that Megatron-Core's rule gets."""
    calls: list[tuple[int, int]] = []
    rule = gated_delta_net.torch_chunk_gated_delta_rule

    def counting(query: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append((query.shape[0], query.shape[1]))
        return rule(query, *args, **kwargs)

    with mock.patch.object(gated_delta_net, "torch_chunk_gated_delta_rule", counting):
        yield calls


def test_launches_grow_with_depth_and_not_with_segments() -> None:
    _, ours = make_layers(torch.float32)
    found = []
    for num_responses in (2, 50):
        layout = pack_trees([PrefixTree.from_group(40, [20, 5] * (num_responses // 2))])
        params = PrefixGroupedSeqParams.from_layout(layout)
        with torch.no_grad(), counted() as calls:
            ours(torch.zeros(layout.total_tokens, 1, 32), None, packed_seq_params=params)
        found.append(calls)
    assert found == [[(1, 40), (2, 20)], [(1, 40), (50, 20)]]


def test_turns_of_an_agent_take_one_launch_until_it_branches() -> None:
    """Not one a turn; the samples that end after each are those of Megatron-Core's layer."""
    _, ours = make_layers(torch.float32)
    layout = an_agent(20, 11, turn_tokens=7)
    params = PrefixGroupedSeqParams.from_layout(layout)
    with torch.no_grad(), counted() as calls:
        ours(torch.zeros(layout.total_tokens, 1, 32), None, packed_seq_params=params)
    assert layout.forest.depth == 19 and layout.num_samples == 21
    assert calls == [(1, 84), (2, 56)]
    harness.assert_within(compare(layout, 0), 1e-10)


# On a device: kernels are asked for what the row is.


class Kernels:
    """FLA's calls over sequences side by side, by Megatron-Core's rule one after another."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, bool, bool]] = []

    def rule(
        self,
        *args: Tensor,
        cu_seqlens: Tensor,
        initial_state: Any,
        g: Tensor,
        beta: Tensor,
        chunk_indices: Tensor | None = None,
        **kw: Any,
    ) -> tuple[Tensor, Tensor | None]:
        assert chunk_indices is not None
        assert torch.equal(chunk_indices[:, 0].unique(), torch.arange(len(cu_seqlens) - 1))
        self.calls.append((cu_seqlens, initial_state is None, kw["output_final_state"]))
        outs, states = [], []
        for i, (a, b) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist())):
            before = None if initial_state is None else initial_state[i : i + 1]
            q, k, v, decay, write = (x[:, a:b] for x in (*args, g, beta))
            out, state = gated_delta_net.torch_chunk_gated_delta_rule(
                q, k, v, g=decay, beta=write, initial_state=before, **kw
            )
            outs.append(out)
            states.append(state)
        final = torch.cat(states) if kw["output_final_state"] else None
        return torch.cat(outs, 1), final


def _columns(x: Tensor, weight: Tensor, bias: Any, activation: str) -> Tensor:
    """As the package ``causal_conv1d``: channels before tokens."""
    assert activation == "silu"
    y = torch.nn.functional.conv1d(
        x, weight[:, None], bias, padding=weight.shape[1] - 1, groups=len(weight)
    )
    return torch.nn.functional.silu(y[..., : x.shape[-1]])


@pytest.mark.parametrize("has_package", [False, True], ids=["fla", "causal_conv1d"])
def test_kernels_get_every_depth_as_sequences_side_by_side(has_package: bool) -> None:
    _, ours = make_layers(torch.float64)
    layout, kernels = random_row(2, longest=70), Kernels()
    x, told = (normal(n, 0, torch.float64) for n in (layout.total_tokens, layout.logical_tokens))
    with in_fp64():
        want = packed(ours, layout, x, told)
        with (
            mock.patch.object(PrefixGroupedLinearAttention, "_runs_torch", lambda *_: False),
            mock.patch.object(gated_delta_net, "chunk_gated_delta_rule", kernels.rule),
            mock.patch.object(gated_delta_net, "causal_conv1d_fn", _columns, create=True),
        ):
            if has_package:
                with mock.patch.object(gated_delta_net, "causal_conv1d", None, create=True):
                    got = packed(ours, layout, x, told)
            else:
                got = packed(ours, layout, x, told)
                packed(ours, layout, x, told)
    harness.assert_within({n: relative(got[n], want[n]) for n in want}, 1e-12)
    depth = join_chains(layout.forest).depth + 1
    assert depth > 2
    calls = kernels.calls[:depth]
    assert [(first, wants) for _, first, wants in calls] == [
        (d == 0, d + 1 < depth) for d in range(depth)
    ]
    # Kernels keep what they make of a row's bounds by the tensor that they get.
    again = kernels.calls[depth:]
    assert all(a is b for (a, *_), (b, *_) in zip(calls, again)) and bool(again) != has_package


# What is refused.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(tensor_model_parallel_size=2), "set sequence_parallel=True"),
        (dict(context_parallel_size=4), "linear_num_key_heads=2 is no multiple"),
        (dict(linear_num_value_heads=3, context_parallel_size=2), "linear_num_value_heads=3"),
        (dict(linear_num_key_heads=3), "=4 is no multiple of linear_num_key_heads=3"),
        (dict(linear_conv_kernel_dim=1), "set linear_conv_kernel_dim=2"),
    ],
)
def test_settings(changes: dict[str, Any], message: str) -> None:
    config = harness.make_config(harness.Case(**cases.LINEAR))
    validate_config(config)
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        validate_config(config)
    # Whatever a hybrid model calls itself.
    config.experimental_attention_variant = None
    with pytest.raises(ValueError, match=message):
        validate_config(config, has_linear_layers=True)


def test_rows_that_are_not_the_layouts() -> None:
    _, ours = make_layers(torch.float32)
    params = PrefixGroupedSeqParams.from_layout(random_row(0))
    with pytest.raises(ValueError, match=r"1 row\(s\) of 3 tokens"):
        ours(torch.zeros(3, 1, 32), None, packed_seq_params=params)
    hidden = torch.zeros(params.layout.total_tokens, 1, 32)
    with pytest.raises(NotImplementedError, match=r"sample with mcore\.generate"):
        ours(hidden, None, packed_seq_params=params, inference_context=object())
    assert ours.num_prefix_grouped_calls == ours.num_ordinary_calls == 0


def test_ordinary_batches_where_a_rank_would_scan_its_own_tokens_alone() -> None:
    stock, ours = make_layers(torch.float32)
    x = normal(5, 0, torch.float32)[:, None]
    assert torch.equal(ours(x, None)[0], stock(x, None)[0])
    assert ours.num_ordinary_calls == 1
    if hasattr(ours, "cp_size"):
        return
    ours.config.context_parallel_size = 2
    with pytest.raises(NotImplementedError, match="scans the tokens of its own rank alone"):
        ours(x, None)


def test_a_spec_is_wrapped_once_and_keeps_the_keys() -> None:
    def wrapped(attention: Any) -> Any:
        layer = harness.get_gpt_layer_local_spec(normalization="RMSNorm")
        layer.submodules.self_attention = attention
        return with_prefix_grouped_attention(layer).submodules.self_attention

    once = wrapped(ModuleSpec(GatedDeltaNet, submodules=PARTS))
    assert issubclass(once.module, PrefixGroupedLinearAttention) and once.submodules is PARTS
    assert wrapped(once) == once and wrapped(GatedDeltaNet) is once.module
    stock, ours = make_layers(torch.float32)
    assert list(ours.state_dict()) == list(stock.state_dict())
