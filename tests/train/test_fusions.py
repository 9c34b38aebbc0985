"""Fused kernels of a run: taken where model and machine have them, left or refused where not."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.nn.functional import gelu, silu

pytest.importorskip("megatron.core")

from megatron.core.fusions import fused_bias_dropout, fused_bias_swiglu  # noqa: E402
from megatron.core.models.common.embeddings import rope_utils  # noqa: E402

from megatron_pg.train.config import ModelConfig, ParallelConfig  # noqa: E402
from megatron_pg.train.model import fusions  # noqa: E402
from megatron_pg.train.model import plan as model_plan  # noqa: E402
from megatron_pg.train.model.fusions import Machine, fusion_defaults  # noqa: E402
from megatron_pg.train.model.plan import plan_model  # noqa: E402
from tests.train.test_model_settings import EXPERTS, SIZES  # noqa: E402

CPU = Machine(has_cuda=False, has_te_layers=False, has_te=True, has_apex_gradients=True)
LOCAL = Machine(has_cuda=True, has_te_layers=False, has_te=False, has_apex_gradients=False)
TE = Machine(has_cuda=True, has_te_layers=True, has_te=True, has_apex_gradients=False)
APEX = Machine(has_cuda=True, has_te_layers=True, has_te=True, has_apex_gradients=True)
LLAMA: dict[str, Any] = dict(
    activation_func=silu,
    gated_linear_unit=True,
    add_bias_linear=False,
    params_dtype=torch.bfloat16,
)
MOE = LLAMA | dict(num_moe_experts=4)
ALWAYS = {"bias_dropout_fusion", "deallocate_pipeline_outputs"}


def taken(settings: dict[str, Any], machine: Machine, positions: str = "rope") -> set[str]:
    """Fusions that are on, beside those that CUDA always has."""
    defaults = fusion_defaults(settings, positions, machine)
    assert defaults.pop("batch_p2p_sync") is False
    on = {name for name, is_on in defaults.items() if is_on}
    assert on >= ALWAYS
    return on - ALWAYS


ROPE, SWIGLU, GROUPED = "apply_rope_fusion", "bias_activation_fusion", "moe_grouped_gemm"


@pytest.mark.parametrize(
    ("settings", "machine", "expected"),
    [
        (LLAMA, LOCAL, {SWIGLU}),
        (LLAMA, TE, {SWIGLU, ROPE}),
        (LLAMA, APEX, {SWIGLU, ROPE, "gradient_accumulation_fusion"}),
        (MOE, LOCAL, {SWIGLU}),
        (MOE, TE, {SWIGLU, ROPE, GROUPED}),
        (MOE | dict(params_dtype=torch.float32), TE, {SWIGLU, ROPE}),
        (MOE | dict(add_bias_linear=True), TE, {ROPE}),
        (MOE | dict(activation_func=gelu), TE, {ROPE, GROUPED}),
        (LLAMA | dict(add_bias_linear=True), TE, {SWIGLU, ROPE}),
        (LLAMA | dict(activation_func=gelu), TE, {ROPE}),
        (LLAMA | dict(gated_linear_unit=False), TE, {ROPE}),
        (LLAMA | dict(activation_func_clamp_value=7.0), TE, {ROPE}),
        (LLAMA | dict(glu_linear_offset=1.0), TE, {ROPE}),
        (LLAMA | dict(rotary_interleaved=True), TE, {SWIGLU}),
        (LLAMA | dict(window_rotary_base=1e4), TE, {SWIGLU}),
        (LLAMA | dict(multi_latent_attention=True), TE, {SWIGLU}),
        # The class's own defaults: GELU with biases.
        ({}, APEX, {ROPE, "gradient_accumulation_fusion"}),
    ],
)
def test_what_a_model_takes_on_cuda(
    settings: dict[str, Any], machine: Machine, expected: set[str]
) -> None:
    assert taken(settings, machine) == expected


@pytest.mark.parametrize("positions", ["yarn", "learned_absolute", "none"])
def test_rotary_fusion_is_of_plain_rotary_positions(positions: str) -> None:
    assert taken(LLAMA, TE, positions) == {SWIGLU}


def test_nothing_is_fused_without_cuda() -> None:
    assert fusion_defaults(MOE, "rope", CPU) == {}


@pytest.mark.parametrize(("waits", "vpp"), [(False, 2), (True, 2), (False, None)])
def test_what_is_still_being_sent_is_not_freed(
    waits: bool, vpp: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fusions, "FREES_AFTER_SENDING", waits)
    frees = waits or vpp is None
    settings = LLAMA | dict(virtual_pipeline_model_parallel_size=vpp)
    assert fusion_defaults(settings, "rope", TE)["deallocate_pipeline_outputs"] is frees
    transformer = SIZES | dict(deallocate_pipeline_outputs=True)
    parallel = ParallelConfig(
        pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=vpp
    )
    model = ModelConfig(vocab_size=50, transformer=transformer)
    with nullcontext() if frees else pytest.raises(ValueError, match="frees what the interleaved"):
        assert plan_model(model, parallel).config.deallocate_pipeline_outputs


def plan_on(machine: Machine, monkeypatch: pytest.MonkeyPatch, **transformer: Any) -> Any:
    monkeypatch.setattr(model_plan, "_uses_te", lambda transformer_impl: machine.has_te_layers)
    monkeypatch.setattr(Machine, "here", lambda has_te_layers: machine)
    # Megatron-Core asks whether the kernel is there.
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", object())
    model = ModelConfig(vocab_size=50, transformer=transformer)
    return plan_model(model, ParallelConfig()).config


SWIGLU_EXPERTS = EXPERTS | dict(activation_func="silu", gated_linear_unit=True)


def test_the_configuration_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    config = plan_on(APEX, monkeypatch, **SWIGLU_EXPERTS)
    for name in (*ALWAYS, ROPE, SWIGLU, GROUPED, "gradient_accumulation_fusion"):
        assert getattr(config, name) is True, name
    assert config.batch_p2p_sync is False and config.params_dtype == torch.bfloat16


@pytest.mark.parametrize(
    "name",
    [*ALWAYS, ROPE, SWIGLU, GROUPED, "gradient_accumulation_fusion", "batch_p2p_sync"],
)
def test_what_a_user_sets_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = getattr(plan_on(APEX, monkeypatch, **SWIGLU_EXPERTS), name)
    config = plan_on(APEX, monkeypatch, **SWIGLU_EXPERTS, **{name: not own})
    assert getattr(config, name) is not own


@pytest.mark.parametrize(
    ("machine", "changes", "message"),
    [
        (TE, dict(gradient_accumulation_fusion=True), "needs Apex's fused_weight_gradient_mlp"),
        (LOCAL, dict(moe_grouped_gemm=True), "needs Transformer Engine's layers"),
        (
            TE,
            dict(moe_grouped_gemm=True, add_bias_linear=True, bias_dropout_fusion=True),
            "bias_dropout_fusion=True with moe_grouped_gemm and add_bias_linear",
        ),
        (
            TE,
            dict(bias_activation_fusion=True, activation_func_clamp_value=7.0),
            "would leave out activation_func_clamp_value",
        ),
        (
            TE,
            dict(bias_activation_fusion=True, add_bias_linear=True),
            "has a kernel for experts with silu, gated_linear_unit and no bias alone",
        ),
        (TE, dict(bias_activation_fusion=True, activation_func="gelu"), "has a kernel for experts"),
        (TE, dict(tp_comm_overlap=True), "tp_comm_overlap=True: its buffers are made for rows of"),
        (LOCAL, dict(moe_router_fusion=True), "needs Transformer Engine, which is not installed"),
    ],
)
def test_what_there_is_no_kernel_for(
    machine: Machine, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan_on(machine, monkeypatch, **SWIGLU_EXPERTS)
    with pytest.raises(ValueError) as error:
        plan_on(machine, monkeypatch, **SWIGLU_EXPERTS | changes)
    assert message in str(error.value)


def swiglu(x: torch.Tensor) -> torch.Tensor:
    gate, linear = x.chunk(2, -1)
    return silu(gate) * linear


FUSED: dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "swiglu": (
        lambda x: fused_bias_swiglu.bias_swiglu_impl(x, None),
        swiglu,
        ((5, 1, 12),),
    ),
    "bias_swiglu": (
        fused_bias_swiglu.bias_swiglu_impl,
        lambda x, bias: swiglu(x + bias),
        ((5, 1, 12), (12,)),
    ),
    "weighted_swiglu": (
        lambda x, weights: fused_bias_swiglu.weighted_bias_swiglu_impl(x, None, weights),
        lambda x, weights: swiglu(x) * weights,
        ((5, 12), (5, 1)),
    ),
    "bias_dropout_add": (
        lambda x, rest: fused_bias_dropout.bias_dropout_add_fused_train((x, None), rest, 0.0),
        lambda x, rest: x + rest,
        ((5, 1, 12), (5, 1, 12)),
    ),
}


@pytest.mark.parametrize("name", FUSED)
def test_megatron_s_fused_kernels_equal_what_they_replace(name: str) -> None:
    """As they are written, not as they are compiled: what is compiled is PyTorch's to prove."""
    fused, plain, shapes = FUSED[name]
    torch.manual_seed(0)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    with torch.compiler.set_stance("force_eager"):
        got = fused(*inputs)
        want = plain(*inputs)
        cotangent = torch.randn_like(want)
        gradients = [torch.autograd.grad(out, inputs, cotangent) for out in (got, want)]
    for ours, theirs in [(got, want), *zip(*gradients)]:
        assert theirs.norm() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
