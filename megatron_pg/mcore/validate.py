"""Every setting that prefix grouping cannot honour, reported at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from megatron.core.transformer.transformer_config import TransformerConfig

from ..parallel import ModelSizes, ParallelSizes
from . import config_fields
from .refused_fields import REFUSED
from .versions import DIVIDES_GATES


@dataclass(frozen=True, kw_only=True, slots=True)
class FieldVerdict:
    """What is known about a field of ``TransformerConfig``.

    Attributes:
        kind: as ``config_fields`` defines the three.
        changes_model: whether the same weights give other outputs under another value.
        allows: whether a value is fine.
        problem: why any other is not, and what to do.
        is_inert: whether it only qualifies a setting that is refused or off.
    """

    kind: Literal["proven", "harmless", "refused"]
    changes_model: bool
    allows: Callable[[Any], bool]
    problem: str = ""
    is_inert: bool = False


def field_verdict(name: str) -> FieldVerdict | None:
    """The verdict on a field of any supported Megatron-Core; None when nothing is known of it."""
    return _VERDICTS.get(name)


def validate_config(config: TransformerConfig, *, has_linear_layers: bool = False) -> None:
    """Refuse a configuration under which packed groups would differ from written-out samples.

    Called by every wrapped layer when the model is built, before any work is done. A field of which
    nothing is known, of a newer Megatron-Core or a subclass, must have its default.

    Args:
        config: of the model.
        has_linear_layers: whether the model has them, whatever ``experimental_attention_variant``
            says.

    Raises:
        ValueError: listing every unsupported setting, its value and the remedy.
    """
    problems = list(_problems(config))
    if has_linear_layers or config.experimental_attention_variant == "gated_delta_net":
        problems += _linear_problems(config)
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise ValueError(
            f"{len(problems)} setting(s) are not supported with prefix-grouped attention:\n{listed}"
        )


def _problems(config: TransformerConfig) -> Iterator[str]:
    fields = {field.name: field for field in dataclasses.fields(config)}
    # Models also read attributes that the class does not declare.
    for name in dict.fromkeys([*fields, *(n for n in vars(config) if n in _VERDICTS)]):
        value, verdict = getattr(config, name, None), field_verdict(name)
        if verdict is not None:
            if not verdict.allows(value):
                yield f"{name}={value!r}: {verdict.problem}"
        elif not _is_default(fields[name], value):
            yield (
                f"{name}={value!r}: nothing is known of this field of {type(config).__name__}; "
                "leave it at its default"
            )
    layers = config.window_attn_skip_freq
    if isinstance(layers, list) and len(layers) != config.num_layers:
        yield (
            f"window_attn_skip_freq={layers!r}: {len(layers)} entries for num_layers="
            f"{config.num_layers}; give one 0 or 1 per layer of the whole model"
        )
    yield from _parallel_problems(config)
    if getattr(config, "multi_latent_attention", False):
        yield from _latent_problems(config)
    yield from _router_problems(config)


def _is_default(field: Any, value: Any) -> bool:
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    return value is default or (type(value) is type(default) and bool(value == default))


def _parallel_problems(config: TransformerConfig) -> Iterator[str]:
    sizes = ParallelSizes.from_config(config)
    yield from sizes.problems()
    yield from sizes.model_problems(ModelSizes.from_config(config))
    if sizes.pp > 1 and not config.variable_seq_lengths:
        yield (
            f"variable_seq_lengths=False with pipeline_model_parallel_size={sizes.pp}: packed rows "
            "differ in length between microbatches; set variable_seq_lengths=True"
        )
    if sizes.cp > 1:
        for name in ("yarn_original_max_position_embeddings", "original_max_position_embeddings"):
            if (length := getattr(config, name, None) or 0) % (2 * sizes.cp):
                yield (
                    f"{name}={length} with context_parallel_size={sizes.cp}: Megatron-Core cuts "
                    f"YaRN's table into {2 * sizes.cp} parts when it makes it; choose a "
                    "context_parallel_size of which twice divides it"
                )
    groups = config.num_query_groups or config.num_attention_heads
    if config.attention_output_gate and groups < sizes.tp and not DIVIDES_GATES:
        yield (
            f"attention_output_gate=True with num_query_groups={groups} and "
            f"tensor_model_parallel_size={sizes.tp}: this Megatron-Core gives every rank the gates "
            f"of a whole group; set tensor_model_parallel_size={groups}, or install megatron-core "
            "0.17"
        )
    chunk = config.microbatch_group_size_per_vp_stage
    if sizes.vpp is not None and chunk not in (None, sizes.pp):
        yield (
            f"microbatch_group_size_per_vp_stage={chunk}: rows are made in multiples of "
            f"pipeline_model_parallel_size={sizes.pp}; set microbatch_group_size_per_vp_stage=None"
        )


def _latent_problems(config: TransformerConfig) -> Iterator[str]:
    if config.apply_rope_fusion:
        yield (
            "apply_rope_fusion=True with multi_latent_attention: the fused kernel places tokens by "
            "their index in the row; set apply_rope_fusion=False"
        )
    if config.num_query_groups not in (None, config.num_attention_heads):
        yield (
            f"num_query_groups={config.num_query_groups} with multi_latent_attention: each of "
            f"num_attention_heads={config.num_attention_heads} heads has its own keys; set "
            "num_query_groups=None"
        )


def _linear_problems(config: TransformerConfig) -> Iterator[str]:
    sizes = ParallelSizes.from_config(config)
    if sizes.tp > 1 and not sizes.sp:
        yield (
            f"sequence_parallel=False with tensor_model_parallel_size={sizes.tp} and linear "
            "attention: a rank's output norm sees its heads alone, and its gradient is not summed "
            "over the ranks; set sequence_parallel=True"
        )
    for name in ("linear_num_key_heads", "linear_num_value_heads"):
        if (heads := getattr(config, name)) % (sizes.tp * sizes.cp):
            yield (
                f"{name}={heads} is no multiple of tensor_model_parallel_size={sizes.tp} x "
                f"context_parallel_size={sizes.cp}, which divide linear attention by heads; choose "
                "sizes that divide it"
            )
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    # Megatron-Core asks by the variant, which hybrid models do not name.
    if keys < 1 or values % keys:
        yield (
            f"linear_num_value_heads={values} is no multiple of linear_num_key_heads={keys}, each "
            "of which serves equally many; choose sizes that are"
        )
    if config.linear_conv_kernel_dim < 2:
        yield (
            f"linear_conv_kernel_dim={config.linear_conv_kernel_dim}: a convolution over one token "
            "is none; set linear_conv_kernel_dim=2 or more"
        )


def _router_problems(config: TransformerConfig) -> Iterator[str]:
    kinds, coefficients = config.moe_router_load_balancing_type, config.moe_aux_loss_coeff
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if not isinstance(coefficients, list):
        coefficients = [coefficients] * len(kinds)
    for kind, coefficient in zip(kinds, coefficients):
        if kind == "global_aux_loss" and coefficient:
            yield (
                f"moe_router_load_balancing_type='global_aux_loss' with moe_aux_loss_coeff="
                f"{coefficient}: it is a running mean over microbatches, whose number packing "
                "changes; use 'aux_loss' or 'seq_aux_loss'"
            )
    sizes = ParallelSizes.from_config(config)
    if config.moe_token_dispatcher_type == "allgather" and sizes.shares_experts:
        yield (
            f"moe_token_dispatcher_type='allgather' with expert_model_parallel_size={sizes.ep}: it "
            "takes the rows of all replicas that share experts to be equally long; set "
            "moe_token_dispatcher_type='alltoall'"
        )


def _one_of(values: tuple[Any, ...]) -> Callable[[Any], bool]:
    """Whether it is one of them, or a list of them; 1 is not True."""
    known = [(type(value), value) for value in values]

    def allows(value: Any) -> bool:
        items = value if isinstance(value, list | tuple) and value else [value]
        return all((type(item), item) in known for item in items)

    return allows


def _make_verdicts() -> dict[str, FieldVerdict]:
    verdicts: dict[str, FieldVerdict] = {}

    def add(name: str, *args: Any) -> None:
        assert name not in verdicts, f"two verdicts on {name}"
        names = ("kind", "changes_model", "allows", "problem", "is_inert")
        verdicts[name] = FieldVerdict(**dict(zip(names, args)))

    def anything(value: Any) -> bool:
        return True

    def limited(values: tuple[Any, ...]) -> str:
        return f"no other than {', '.join(map(repr, values))} is known to be exact; set one of them"

    for name in config_fields.PROVEN_MODEL:
        add(name, "proven", True, anything)
    for name in config_fields.PROVEN_RUN:
        add(name, "proven", False, anything)
    for name in config_fields.HARMLESS_MODEL:
        add(name, "harmless", True, anything)
    for name in config_fields.HARMLESS_RUN:
        add(name, "harmless", False, anything)
    for name in config_fields.INERT:
        add(name, "harmless", False, anything, "", True)
    for name, (values, changes) in config_fields.PROVEN_VALUES.items():
        add(name, "proven", changes, _one_of(values), limited(values))
    for name, (allows, form, changes) in config_fields.PROVEN_FORMS.items():
        add(name, "proven", changes, allows, f"it is none of the known forms; set {form}")
    for name, values in config_fields.HARMLESS_VALUES.items():
        add(name, "harmless", False, _one_of(values), limited(values))
    for name, (values, reason, changes) in REFUSED.items():
        add(name, "refused", changes, _one_of(values), f"{reason}; set {name}={values[0]!r}")
    return verdicts


_VERDICTS = _make_verdicts()
