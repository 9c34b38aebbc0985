"""Megatron's fused kernels: which a run takes by itself, and which it cannot have."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import silu

from ...mcore import FREES_AFTER_SENDING, transformer_config_class

# Fields whose kernels are Transformer Engine's, of which Megatron-Core asks whether it is there.
OF_TE = ("apply_rope_fusion", "moe_permute_fusion")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What decides which fused kernels there are.

    Attributes:
        has_cuda: whether the model runs on CUDA.
        has_te_layers: whether its layers are Transformer Engine's.
        has_te: whether Transformer Engine is installed.
        has_apex_gradients: whether Apex's ``fused_weight_gradient_mlp_cuda`` is installed.
        is_here: whether it is this one.
    """

    has_cuda: bool
    has_te_layers: bool
    has_te: bool
    has_apex_gradients: bool
    is_here: bool = True

    @classmethod
    def with_cuda(cls, has_te_layers: bool) -> Machine:
        """Another one, with CUDA and Transformer Engine; Apex is on no package index."""
        return cls(
            has_cuda=True,
            has_te_layers=has_te_layers,
            has_te=True,
            has_apex_gradients=False,
            is_here=False,
        )

    @classmethod
    def here(cls, has_te_layers: bool) -> Machine:
        """This one, under a run with these layers."""
        return cls(
            has_cuda=torch.cuda.is_available(),
            has_te_layers=has_te_layers,
            has_te=_is_there("transformer_engine"),
            has_apex_gradients=_is_there("fused_weight_gradient_mlp_cuda"),
        )


def fusion_defaults(
    settings: Mapping[str, Any], position_embedding_type: str, machine: Machine
) -> dict[str, Any]:
    """Fields of ``TransformerConfig`` that speed a run up and change no result beyond rounding.

    Equals what Megatron-LM's arguments default to, where the model and the machine allow it, with
    grouped products of experts and without its wait after every exchange of two stages (both of
    which Megatron-LM leaves to its user). Nothing without CUDA.

    Args:
        settings: of the model so far, by field; what is left out has its class's default.
        position_embedding_type: of the model.
        machine: that the run is on.
    """
    if not machine.has_cuda:
        return {}
    model = _Fields(settings)
    has_bias = model.add_bias_linear
    has_experts = bool(model.num_moe_experts)
    is_half = settings.get("params_dtype", torch.float32).itemsize == 2
    groups_experts = machine.has_te_layers and has_experts and is_half and not has_bias
    # Its kernel turns halves of whole heads, neither scaled nor in two ways.
    turns_plainly = position_embedding_type == "rope" and not (
        model.multi_latent_attention or model.rotary_interleaved or model.window_rotary_base
    )
    return {
        "apply_rope_fusion": machine.has_te_layers and turns_plainly,
        # That of GELU is an approximation of it.
        "bias_activation_fusion": _is_swiglu(model) and not _activation_problems(model),
        "bias_dropout_fusion": True,
        "gradient_accumulation_fusion": machine.has_apex_gradients,
        "deallocate_pipeline_outputs": not _frees_too_early(model),
        # Of PyTorch versions long before the oldest that runs here.
        "batch_p2p_sync": False,
        "moe_grouped_gemm": groups_experts,
    }


def fusion_problems(config: TransformerConfig, machine: Machine) -> Iterator[str]:
    """Kernels that Megatron-Core only finds missing, or wrong, once the model is built or run."""
    if config.gradient_accumulation_fusion and not machine.has_apex_gradients:
        yield (
            "gradient_accumulation_fusion=True needs Apex's fused_weight_gradient_mlp_cuda for the "
            "output layer, which is not installed; set it to false"
        )
    if config.moe_grouped_gemm and not machine.has_te_layers:
        yield "moe_grouped_gemm=True needs Transformer Engine's layers; leave it out"
    elif config.moe_grouped_gemm and config.add_bias_linear and config.bias_dropout_fusion:
        yield (
            "bias_dropout_fusion=True with moe_grouped_gemm and add_bias_linear: Megatron-Core has "
            "no such kernel; set bias_dropout_fusion to false"
        )
    if config.deallocate_pipeline_outputs and _frees_too_early(config):
        yield (
            "deallocate_pipeline_outputs=True: this Megatron-Core frees what the interleaved "
            "schedule still sends; set it to false, or install megatron-core 0.19"
        )
    if config.bias_activation_fusion:
        for problem in _activation_problems(config):
            yield f"bias_activation_fusion=True {problem}; set it to false"
    if machine.has_te:
        return
    needing = {"moe_router_fusion": config.moe_router_fusion}
    if config.recompute_granularity == "selective":
        needing |= {
            f"recompute_modules={name!r}": name in config.recompute_modules
            for name in ("layernorm", "moe_act")
        }
    for name in [name for name, is_on in needing.items() if is_on]:
        yield f"{name} needs Transformer Engine, which is not installed; leave it out"


def _activation_problems(model: Any) -> list[str]:
    """What the fused activation would compute otherwise than the model says, or not at all."""
    problems = []
    if model.activation_func_clamp_value is not None or model.glu_linear_offset:
        problems.append("would leave out activation_func_clamp_value and glu_linear_offset")
    if model.num_moe_experts and (model.add_bias_linear or not _is_swiglu(model)):
        problems.append("has a kernel for experts with silu, gated_linear_unit and no bias alone")
    return problems


def _frees_too_early(model: Any) -> bool:
    return model.virtual_pipeline_model_parallel_size is not None and not FREES_AFTER_SENDING


def _is_swiglu(model: Any) -> bool:
    return model.activation_func is silu and bool(model.gated_linear_unit)


class _Fields:
    """Settings, and the defaults of what they leave out."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = settings
        self._class = transformer_config_class(settings)

    def __getattr__(self, name: str) -> Any:
        return self._settings.get(name, getattr(self._class, name, None))


def _is_there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
