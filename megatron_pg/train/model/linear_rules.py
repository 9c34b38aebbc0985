"""What a run asks of layers that carry a state, and would not get."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

import megatron.core
from megatron.core.transformer.transformer_config import TransformerConfig

from ...mcore import DIVIDES_LINEAR_ATTENTION


def undivided_problems(settings: Mapping[str, Any]) -> Iterator[str]:
    """Context parallelism of a Megatron-Core whose configuration refuses it, without a remedy.

    Args:
        settings: what the configuration is to be made of.
    """
    size = settings.get("context_parallel_size", 1)
    is_linear = settings.get("experimental_attention_variant") == "gated_delta_net"
    if is_linear and size > 1 and not DIVIDES_LINEAR_ATTENTION:
        yield (
            f"parallel.context_parallel_size={size}: linear attention of megatron-core "
            f"{megatron.core.__version__} takes whole rows; install megatron-core 0.18 or later "
            "(Python 3.12), or set it to 1"
        )


def kernel_problems(config: TransformerConfig, hybrid_layer_pattern: str) -> Iterator[str]:
    """Kernels without which Megatron-Core builds no such layer on CUDA, and that are not here.

    Args:
        config: as Megatron-Core made it.
        hybrid_layer_pattern: of a hybrid; empty of a GPT model.
    """
    if config.experimental_attention_variant == "gated_delta_net" and _is_missing("fla"):
        yield (
            "linear attention on CUDA takes its kernels from FLA, which is not installed: pip "
            "install flash-linear-attention"
        )
    if "M" in hybrid_layer_pattern and _is_missing("mamba_ssm"):
        yield (
            "Mamba-2 layers on CUDA take their kernels from mamba_ssm, which is not installed: "
            "pip install --no-build-isolation mamba-ssm, which compiles for the installed PyTorch"
        )


def _is_missing(package: str) -> bool:
    return importlib.util.find_spec(package) is None


def linear_problems(config: TransformerConfig, asked: Mapping[str, Any]) -> Iterator[str]:
    """Settings without effect, and a pattern that is none.

    Args:
        config: as Megatron-Core made it.
        asked: the fields that a user set, by name.
    """
    if config.experimental_attention_variant != "gated_delta_net":
        for name in asked if config.experimental_attention_variant is None else ():
            if name.startswith("linear_"):
                yield (
                    f"model.transformer.{name}={asked[name]!r} would be ignored: no layer has "
                    "linear attention; remove it, or set experimental_attention_variant: "
                    "gated_delta_net"
                )
        return
    pattern = config.linear_attention_freq
    if not is_layer_pattern(pattern, config.num_layers, least=2):
        yield (
            f"linear_attention_freq={pattern!r} must be a whole number from 2 (every so many "
            "layers one attends), or a 1 (linear attention) or 0 for each of num_layers="
            f"{config.num_layers}, with a 1 among them"
        )


def is_layer_pattern(pattern: Any, num_layers: int, least: int) -> bool:
    """Whether it is a whole number from ``least``, or a 1 or 0 for each layer with a 1 among them.

    Args:
        pattern: a number or a list, as the field's type has it.
        num_layers: of the model.
        least: smallest number.
    """
    if isinstance(pattern, int):
        return pattern >= least
    return len(pattern) == num_layers and set(pattern) <= {0, 1} and 1 in pattern
