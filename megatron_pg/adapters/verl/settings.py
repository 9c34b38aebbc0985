"""What verl's configuration says to packing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ...grpo import PackingConfig, PrefixGroupConfig, row_cost_model

KEY = "prefix_group"


def read_settings(engine_config: Any) -> PrefixGroupConfig:
    """``override_mcore_model_config.prefix_group`` of an engine: fields of ``PrefixGroupConfig``.

    Raises:
        ValueError: on a name that is no field, on the budget, which verl has a name for, and on
            values that a field does not take.
    """
    overrides = getattr(engine_config, "override_mcore_model_config", None) or {}
    given = dict(overrides.get(KEY) or {})
    known = [field.name for field in fields(PrefixGroupConfig)]
    known.remove("max_tokens_per_microbatch")
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(
            f"{KEY} has {', '.join(unknown)}, but knows {', '.join(known)}; the budget of a row is "
            "verl's ppo_max_token_len_per_gpu and log_prob_max_token_len_per_gpu"
        )
    if problems := [f"{KEY}.{told}" for name in given for told in _problems(name, given[name])]:
        raise ValueError("; ".join(problems))
    return PrefixGroupConfig(**given)


def _problems(name: str, value: Any) -> Iterator[str]:
    kind = get_type_hints(PrefixGroupConfig)[name]
    parts = get_args(kind) or (kind,)
    if get_origin(kind) is Literal:
        if value not in parts:
            yield f"{name}={value!r} must be one of {', '.join(parts)}"
    elif value is None and NoneType in parts:
        return
    elif int in parts and (type(value) is not int or value < 1):
        yield f"{name}={value!r} must be a whole number from 1"
    elif str in parts and not isinstance(value, str):
        yield f"{name}={value!r} must be a name"


def packing_config(
    settings: PrefixGroupConfig, model_config: Any, chunks: Sequence[Any], max_tokens: int
) -> PackingConfig:
    """How rows of ``max_tokens`` are packed for a model.

    Args:
        settings: of ``read_settings``.
        model_config: ``TransformerConfig``.
        chunks: this rank's, unwrapped.
        max_tokens: budget of a row in unique tokens.
    """
    if model_config.param_sync_func is not None and settings.prefix_resident == "auto":
        # Megatron gathers parameters beside the one forward pass that it counts on.
        settings = replace(settings, prefix_resident="never")
    settings = replace(settings, max_tokens_per_microbatch=max_tokens)
    cost_model = row_cost_model(model_config, chunks[0].vocab_size)
    return PackingConfig.from_config(settings, model_config, cost_model)
