"""A Mamba-2 layer on packed rows against transformers' own, and what it calls of mamba_ssm."""

from __future__ import annotations

import inspect
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.activations import squared_relu
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from megatron_pg import PrefixTree, pack_trees
from megatron_pg.linear import state_space_scan
from megatron_pg.mcore import (
    Predictions,
    PrefixGroupedHybridModel,
    PrefixGroupedSeqParams,
    hybrid_stack_local_spec,
    with_prefix_grouped_attention,
)
from megatron_pg.mcore.layers import mamba as layer_module
from megatron_pg.mcore.layers import prefix_grouped_mamba
from megatron_pg.mcore.versions import HAS_HYBRID_MODEL
from tests.linear.rows import random_row, relative
from tests.mcore import harness
from tests.mcore.cases import linear_hybrid
from tests.mcore.linear_rules import in_fp64

pytestmark = [
    pytest.mark.megatron,
    pytest.mark.skipif(not HAS_HYBRID_MODEL, reason="Mamba-2 layers need HybridModel, from 0.18"),
]


def make_mixer(dtype: torch.dtype = torch.float64, **config: Any) -> Any:
    from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules

    case = harness.Case(**linear_hybrid("M", layernorm_epsilon=1e-5, **config))
    mixer = prefix_grouped_mamba(MambaMixer)(
        harness.make_config(case),
        MambaMixerSubmodules(ColumnParallelLinear, RowParallelLinear),
        d_model=32,
        layer_number=1,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    ).to(dtype)
    harness.make_states_reach_far([mixer])
    for name in ("norm.weight", "D"):
        weight = mixer.get_parameter(name)
        weight.data += 0.3 * torch.randn(weight.shape, dtype=dtype)
    return mixer


def transformers_mixer(mixer: Any) -> torch.nn.Module:
    """Theirs with the same weights."""
    from transformers.models.nemotron_h.configuration_nemotron_h import NemotronHConfig
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

    theirs = NemotronHMamba2Mixer(
        NemotronHConfig(
            hidden_size=32,
            layers_block_type=["linear_attention"],
            mamba_num_heads=mixer.nheads,
            mamba_head_dim=mixer.headdim,
            n_groups=mixer.ngroups,
            ssm_state_size=mixer.d_state,
            chunk_size=16,
            layer_norm_epsilon=1e-5,
            time_step_min=0.0,
        ),
        layer_idx=0,
    ).double()
    state = {n.replace("conv1d_", "conv1d."): p for n, p in mixer.named_parameters()}
    theirs.load_state_dict(state)
    return theirs


@pytest.mark.parametrize("seed", range(3))
def test_packed_equals_transformers_on_written_out_samples(one_rank: None, seed: int) -> None:
    from transformers.models.nemotron_h import modeling_nemotron_h

    torch.manual_seed(seed)
    layout = random_row(seed, longest=80)
    assert layout.reuse_ratio > 1.05 and layout.forest.depth > 1
    x = torch.randn(layout.total_tokens, 32, dtype=torch.float64, requires_grad=True)
    told = torch.randn(layout.logical_tokens, 32, dtype=torch.float64)
    # Their gated norm names fp32; what it computes is written out here in fp64.
    norm = modeling_nemotron_h.NemotronHRMSNormGated
    exact = inspect.getsource(norm).replace("torch.float32", "torch.float64")
    scope = dict(vars(modeling_nemotron_h))
    exec(exact, scope)
    with (
        in_fp64(),
        mock.patch.object(modeling_nemotron_h, norm.__name__, scope[norm.__name__]),
    ):
        mixer = make_mixer()
        theirs = transformers_mixer(mixer)
        params = PrefixGroupedSeqParams.from_layout(layout)
        got = layout.expand(mixer(x[:, None], packed_seq_params=params)[0][:, 0])
        samples = [layout.sample_indices(i) for i in range(layout.num_samples)]
        want = torch.cat([theirs(x[tokens][None])[0] for tokens in samples])
        names, weights = zip(*mixer.named_parameters())
        grads = torch.autograd.grad((got * told).sum(), [x, *weights])
        parts = dict(theirs.named_parameters())
        same = [parts[name.replace("conv1d_", "conv1d.")] for name in names]
        wanted = torch.autograd.grad((want * told).sum(), [x, *same])
    assert len(names) == 8 and all(grad.abs().max() > 0 for grad in wanted)
    pairs = dict(zip(["out", "x", *names], zip([got, *grads], [want, *wanted])))
    harness.assert_within({name: relative(*pair) for name, pair in pairs.items()}, 1e-10)
    assert (mixer.num_prefix_grouped_calls, mixer.num_ordinary_calls) == (1, 0)


def test_siblings_are_isolated_bit_for_bit(one_rank: None) -> None:
    mixer = make_mixer(torch.float32)
    layout = pack_trees([PrefixTree.from_group(70, [5, 66, 1])])
    params = PrefixGroupedSeqParams.from_layout(layout)
    x = torch.randn(layout.total_tokens, 1, 32)
    with torch.no_grad():
        plain = mixer(x, packed_seq_params=params)[0]
        changed = x.clone()
        changed[75:141] = torch.randn(66, 1, 32)
        other = mixer(changed, packed_seq_params=params)[0]
    assert torch.equal(plain[:75], other[:75]) and torch.equal(plain[141:], other[141:])
    assert not torch.equal(plain[75:141], other[75:141])


def test_kernels_of_mamba_ssm_are_called_as_it_defines_them(one_rank: None) -> None:
    """``mamba_chunk_scan_combined`` by its own signature, a batch a depth and size."""
    from megatron.core.ssm import mamba_mixer

    calls = []

    def scan(
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int,
        D: Tensor | None = None,
        z: Tensor | None = None,
        dt_bias: Tensor | None = None,
        initial_states: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        return_final_states: bool = False,
        return_varlen_states: bool = False,
    ) -> Any:
        batch, length, heads, head_dim = x.shape
        assert dt.shape == (batch, length, heads) and A.shape == (heads,)
        assert B.shape == C.shape == (batch, length, 2, 6) and chunk_size == 128
        assert all(y.stride(-1) == 1 for y in (x, B, C)) and (A < 0).all() and (dt >= 0).all()
        assert z is dt_bias is seq_idx is cu_seqlens is None and not dt_softplus
        assert D is not None and D.shape == (heads,) and D.dtype == torch.float32
        assert all(y.is_contiguous() for y in (x, dt, B, C))
        if initial_states is not None:
            assert initial_states.shape == (batch, heads, head_dim, 6)
        calls.append((batch, length, initial_states is None))
        out, final = state_space_scan(x, dt, A, B, C, initial_states, chunk_size)
        return out + D[:, None] * x, final

    mixer = make_mixer(torch.float32)
    layout = pack_trees([PrefixTree.from_group(9, [3] * 6), PrefixTree.from_group(5, [2, 3])])
    params = PrefixGroupedSeqParams.from_layout(layout)
    x = torch.randn(layout.total_tokens, 1, 32)
    with torch.no_grad():
        want = mixer(x, packed_seq_params=params)[0]
        with (
            mock.patch.object(mamba_mixer, "mamba_chunk_scan_combined", scan),
            mock.patch.object(layer_module, "runs_kernels", lambda x: True),
            mock.patch.object(mamba_mixer, "causal_conv1d_fn", _causal_conv1d, create=True),
        ):
            got = mixer(x, packed_seq_params=params)[0]
    assert relative(got, want) < 1e-5
    assert calls == [(2, 9, True), (8, 3, False)]


def _causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None
) -> Tensor:
    """``[batch, channels, tokens]``, as the package causal_conv1d defines it."""
    assert x.shape[1] == len(weight) and activation == "silu"
    y = torch.nn.functional.conv1d(
        x, weight[:, None], bias, padding=weight.shape[1] - 1, groups=len(weight)
    )
    return torch.nn.functional.silu(y[..., : x.shape[-1]])


def test_ordinary_batches_run_through_the_given_class(one_rank: None) -> None:
    from megatron.core.ssm.mamba_mixer import MambaMixer

    mixer = make_mixer()
    x = torch.randn(7, 2, 32, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(mixer(x)[0], MambaMixer.forward(mixer, x)[0])
    assert (mixer.num_prefix_grouped_calls, mixer.num_ordinary_calls) == (0, 1)


def test_rows_that_are_not_the_layouts(one_rank: None) -> None:
    mixer = make_mixer()
    params = PrefixGroupedSeqParams.from_layout(pack_trees([PrefixTree.from_group(3, [2, 1])]))
    with pytest.raises(ValueError, match="1 row.s. of 5 tokens, the layout describes one row of 6"):
        mixer(torch.zeros(5, 1, 32), packed_seq_params=params)
    with pytest.raises(NotImplementedError, match="no inference_context"):
        mixer(torch.zeros(6, 1, 32), object(), packed_seq_params=params)


def test_nemotron_h_of_transformers(one_rank: None) -> None:
    """Mamba-2, attention without positions and squared ReLU: a whole model, in fp32."""
    theirs, model = nemotron_h()
    samples = [torch.randint(50, (n,)) for n in (9, 12, 7)]
    samples = [torch.cat([samples[0], sample]) for sample in samples]
    layout = pack_trees([PrefixTree.from_sequences([s.tolist() for s in samples])])
    assert layout.reuse_ratio > 1.3
    tokens = layout.pack_tokens(samples)
    predictions = Predictions(
        predictor_ids=layout.predictor_ids, target_tokens=tokens[layout.target_ids]
    )
    params = PrefixGroupedSeqParams.from_layout(layout, predictions=predictions)
    with torch.no_grad():
        got, _ = model(tokens[None], params.position_ids[None], None, packed_seq_params=params)
        found = {}
        for sample, path in zip(samples, map(layout.sample_indices, range(len(samples)))):
            logprobs = theirs(sample[None]).logits[0, :-1].log_softmax(-1)
            wanted = logprobs.gather(1, sample[1:, None])[:, 0]
            found |= {(int(a), int(b)): w for a, b, w in zip(path, path[1:], wanted)}
    edges = zip(layout.predictor_ids.tolist(), layout.target_ids.tolist())
    want = torch.stack([found[edge] for edge in edges])
    assert want.std() > 0.3 and float((got - want).abs().max()) < 5e-5


def nemotron_h() -> tuple[torch.nn.Module, torch.nn.Module]:
    """Theirs, and ours with the same weights."""
    from transformers.models.nemotron_h import NemotronHConfig, NemotronHForCausalLM

    kinds = {"M": "linear_attention", "*": "full_attention", "-": "mlp"}
    pattern = "M*-M-"
    theirs = NemotronHForCausalLM(
        NemotronHConfig(
            vocab_size=50,
            hidden_size=32,
            layers_block_type=[kinds[symbol] for symbol in pattern],
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            intermediate_size=48,
            ssm_state_size=6,
            mamba_num_heads=4,
            mamba_head_dim=8,
            n_groups=2,
            chunk_size=16,
            # Megatron-Core takes steps as they are.
            time_step_min=1e-12,
        )
    ).eval()
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            noise = torch.randn_like(weight)
            weight.copy_(1 + 0.2 * noise if "norm" in name else 0.2 * noise)
    config = harness.make_config(
        harness.Case(
            **linear_hybrid(
                pattern,
                layernorm_epsilon=1e-5,
                gated_linear_unit=False,
                activation_func=squared_relu,
                kv_channels=8,
            ),
            dtype=torch.float32,
        )
    )
    model = PrefixGroupedHybridModel(
        config,
        with_prefix_grouped_attention(hybrid_stack_local_spec(config)),
        vocab_size=50,
        max_sequence_length=64,
        hybrid_layer_pattern=pattern,
    )
    left = model.load_state_dict(in_megatron(theirs.state_dict(), pattern), strict=False)
    assert not left.missing_keys and not left.unexpected_keys
    return theirs, model.eval()


def in_megatron(state: dict[str, Tensor], pattern: str) -> dict[str, Tensor]:
    """Weights of a NemotronH by Megatron's names."""
    made = {
        "embedding.word_embeddings.weight": state["model.embeddings.weight"],
        "decoder.final_norm.weight": state["model.norm_f.weight"],
        "output_layer.weight": state["lm_head.weight"],
    }
    conv = "conv1d_" if "conv1d_weight" in dict(make_mixer().named_parameters()) else "conv1d."
    for i, symbol in enumerate(pattern):
        ours, theirs = f"decoder.layers.{i}.", f"model.layers.{i}."
        part = {k.removeprefix(theirs): v for k, v in state.items() if k.startswith(theirs)}
        norm = part.pop("norm.weight")
        part = {k.removeprefix("mixer."): v for k, v in part.items()}
        if symbol == "M":
            made[f"{ours}norm.weight"] = norm
            made |= {f"{ours}mixer.{k.replace('conv1d.', conv)}": v for k, v in part.items()}
        elif symbol == "-":
            made[f"{ours}pre_mlp_layernorm.weight"] = norm
            made[f"{ours}mlp.linear_fc1.weight"] = part["up_proj.weight"]
            made[f"{ours}mlp.linear_fc2.weight"] = part["down_proj.weight"]
        else:
            made[f"{ours}input_layernorm.weight"] = norm
            q, k, v = (part[f"{x}_proj.weight"].unflatten(0, (2, -1)) for x in "qkv")
            made[f"{ours}self_attention.linear_qkv.weight"] = torch.cat([q, k, v], 1).flatten(0, 1)
            made[f"{ours}self_attention.linear_proj.weight"] = part["o_proj.weight"]
    return made
