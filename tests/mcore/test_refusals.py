"""Every unsupported setting and every wrong microbatch is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType

from megatron_pg import PrefixTree, pack_trees
from megatron_pg.mcore import (
    Predictions,
    PrefixGroupedSeqParams,
    SequenceParallelLayerNorm,
    SequenceParallelRMSNorm,
    cpu,
    validate_config,
    with_sequence_parallel_norms,
)
from megatron_pg.mcore.refused_fields import REFUSED
from megatron_pg.mcore.versions import DIVIDES_GATES
from tests.mcore import harness

pytestmark = pytest.mark.megatron

# Of the other refused fields: on, where they are switches, else any number.
UNSUPPORTED = {
    "attention_dropout": 0.1,
    "hidden_dropout": 0.1,
    "mrope_section": [16, 24, 24],
    "attn_logit_softcapping": 30.0,
    "fp8": "hybrid",
    "fp4": "e2m1",
    "cuda_graph_impl": "local",
    "moe_router_load_balancing_type": "sinkhorn",
    "moe_expert_capacity_factor": 1.0,
    "moe_input_jitter_eps": 1e-2,
}


def config_with(**changes):
    config = harness.make_config(harness.Case())
    for name, value in changes.items():
        setattr(config, name, value)
    return config


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_setting(name: str) -> None:
    neutral = REFUSED[name][0][0]
    value = UNSUPPORTED.get(name, True if neutral is False else 3)
    with pytest.raises(ValueError) as error:
        validate_config(config_with(**{name: value}))
    message = str(error.value)
    assert f"{name}={value!r}" in message and f"set {name}={neutral!r}" in message
    assert message.startswith("1 setting(s)")
    for allowed in REFUSED[name][0]:
        validate_config(config_with(**{name: allowed}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(moe_router_load_balancing_type="global_aux_loss", moe_aux_loss_coeff=0.01),
            "'global_aux_loss' with moe_aux_loss_coeff=0.01: it is a running mean",
        ),
        (
            dict(
                moe_router_load_balancing_type=["aux_loss", "global_aux_loss"],
                moe_aux_loss_coeff=[0.0, 0.02],
            ),
            "'global_aux_loss' with moe_aux_loss_coeff=0.02",
        ),
        (
            dict(
                num_moe_experts=4,
                expert_model_parallel_size=2,
                moe_token_dispatcher_type="allgather",
            ),
            "rows of all replicas that share experts",
        ),
        (
            dict(context_parallel_size=3),
            "num_attention_heads=4 is no multiple of context_parallel_size=3",
        ),
        (
            dict(context_parallel_size=2, hybrid_context_parallel=True),
            "hybrid_context_parallel=True: context_parallel_size ranks divide every packed row",
        ),
        (dict(tensor_model_parallel_size=3), "num_attention_heads=4 is no multiple"),
        (
            dict(num_attention_heads=6, num_query_groups=3, tensor_model_parallel_size=2),
            "num_query_groups=3 neither divides",
        ),
        (
            dict(num_query_groups=3),
            "num_attention_heads=4 is no multiple of num_query_groups=3",
        ),
        (
            dict(num_moe_experts=4, tensor_model_parallel_size=2, expert_tensor_parallel_size=1),
            "expert_tensor_parallel_size=1 with expert_model_parallel_size=1",
        ),
        (
            dict(virtual_pipeline_model_parallel_size=2, microbatch_group_size_per_vp_stage=3),
            "microbatch_group_size_per_vp_stage=3",
        ),
        (
            dict(pipeline_model_parallel_size=2, variable_seq_lengths=False),
            "variable_seq_lengths=False with pipeline_model_parallel_size=2",
        ),
    ],
)
def test_unsupported_combination(changes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate_config(config_with(**changes))


def test_gates_of_a_divided_group() -> None:
    """Ranks share a group of one; before 0.17 each then had the gates of all of its heads."""
    config = config_with(
        attention_output_gate=True, num_query_groups=1, tensor_model_parallel_size=2
    )
    if DIVIDES_GATES:
        validate_config(config)
        return
    with pytest.raises(ValueError, match="set tensor_model_parallel_size=1, or install"):
        validate_config(config)
    config.num_query_groups = 2
    validate_config(config)


def test_all_problems_are_reported_at_once_when_the_model_is_built(one_rank) -> None:
    case = harness.Case()
    config = config_with(attention_dropout=0.1, window_size=(4, 1), fp8="hybrid")
    with pytest.raises(ValueError) as error:
        harness.build(case, config, packed=True)
    for name in ("3 setting(s)", "attention_dropout", "window_size", "fp8"):
        assert name in str(error.value)
    validate_config(config_with())


def row(pad: int = 1):
    return harness.make_rows(0, pad)


def call(model, tokens, params):
    return model(tokens[None], torch.arange(len(tokens))[None], None, packed_seq_params=params)


def test_wrong_microbatches(one_rank) -> None:
    case = harness.Case()
    (model,) = harness.build(case, harness.make_config(case), packed=True)
    rows = row()
    tokens = rows.layout.pack_tokens(rows.sequences)
    params = PrefixGroupedSeqParams.from_layout(rows.layout)
    with pytest.raises(ValueError, match="the layout describes one row of"):
        call(model, tokens[:-1], params)
    with pytest.raises(ValueError, match="given 2 row"):
        both = tokens.expand(2, -1)
        model(both, both, None, packed_seq_params=params)
    core = model.decoder.layers[0].self_attention.core_attention
    q = torch.zeros(len(tokens), 1, 4, 8)
    with pytest.raises(NotImplementedError, match="attention_bias"):
        core(q, q, q, None, AttnMaskType.causal, attention_bias=q, packed_seq_params=params)


def test_tables_that_are_not_indexed_by_position() -> None:
    params = PrefixGroupedSeqParams.from_layout(row().layout)
    with pytest.raises(ValueError, match="'mrope' is not supported"):
        params.gather_rotary(torch.zeros(row().layout.total_tokens, 1, 1, 8))
    assert params.gather_rotary(None) is None


def test_rotary_rows_are_gathered_once_per_table() -> None:
    layout = row().layout
    params = PrefixGroupedSeqParams.from_layout(layout)
    table = torch.randn(layout.max_position + 1, 1, 1, 8)
    first = params.gather_rotary(table)
    assert torch.equal(first, table[layout.position_ids])
    assert params.gather_rotary(table.detach()) is first, "a recomputed layer gets the same rows"
    pair = params.gather_rotary((table, table))
    assert pair[0] is first and pair[1] is first
    other = torch.randn_like(table)
    assert torch.equal(params.gather_rotary(other), other[layout.position_ids])


def test_rows_that_sequence_parallelism_cannot_split() -> None:
    layout = pack_trees([PrefixTree.from_group(2, [1, 2])])
    config = config_with(sequence_parallel=True, tensor_model_parallel_size=2)
    with pytest.raises(ValueError, match=r"total_tokens=5 .* pad_to_multiple=2"):
        PrefixGroupedSeqParams.from_layout(layout, config=config)
    padded = pack_trees([PrefixTree.from_group(2, [1, 2])], pad_to_multiple=2)
    PrefixGroupedSeqParams.from_layout(padded, config=config)


def test_predictions() -> None:
    ids = torch.arange(3)
    with pytest.raises(ValueError, match="equally long"):
        Predictions(predictor_ids=ids, target_tokens=ids[:2])
    for name in ("predictor_ids", "target_tokens"):
        with pytest.raises(ValueError, match=f"{name} must stay on the CPU"):
            Predictions(**{"predictor_ids": ids, "target_tokens": ids, name: ids.to("meta")})


@pytest.mark.parametrize("norm", [SequenceParallelRMSNorm, SequenceParallelLayerNorm])
def test_norms(norm) -> None:
    module = norm(config_with(sequence_parallel=True), hidden_size=8, eps=1e-6)
    assert all(p.sequence_parallel for p in module.parameters())
    assert not any(p.sequence_parallel for p in norm(config_with(), 8).parameters())
    x = torch.randn(3, 8, dtype=torch.float64)
    stock = {
        SequenceParallelRMSNorm: torch.nn.RMSNorm,
        SequenceParallelLayerNorm: torch.nn.LayerNorm,
    }[norm](8, eps=1e-6, dtype=torch.float64)
    assert torch.equal(module(x), stock(x))
    centered = norm(config_with(layernorm_zero_centered_gamma=True), hidden_size=8, eps=1e-6)
    assert torch.equal(centered(x), stock(x)) and not centered.weight.any()
    # One and the weight are added before they are rounded.
    half = centered.to(torch.bfloat16)
    torch.nn.init.constant_(half.weight, 2**-10)
    want = stock(x.bfloat16().double()) * (1 + 2**-10)
    assert torch.equal(half(x.bfloat16()), want.to(torch.bfloat16))
    with pytest.raises(ValueError, match="normalization='L2Norm'"):
        with_sequence_parallel_norms(None, config_with(normalization="L2Norm"))


def test_cpu_stand_ins_are_put_back() -> None:
    if torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="machines without CUDA"), cpu.emulate_cuda():
            pass
        return
    before = torch.cuda.current_device, torch.Tensor.cuda, torch.cuda.Stream
    compiled = []

    def compiles(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        compiled.append(graph)
        return graph.forward

    fused = torch.compile(lambda x: x + 1, backend=compiles)
    with cpu.emulate_cuda():
        assert fused(torch.zeros(1)) == 1 and not compiled
        assert torch.cuda.current_device() == torch.device("cpu")
        assert torch.zeros(1, device="cuda").device.type == "cpu"
        assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
        assert torch.zeros(1).cuda().device.type == "cpu"
    assert before == (torch.cuda.current_device, torch.Tensor.cuda, torch.cuda.Stream)
    assert torch.zeros(1).type() == "torch.FloatTensor"
    assert fused(torch.zeros(1)) == 1 and len(compiled) == 1
