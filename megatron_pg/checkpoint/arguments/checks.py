"""Whether a checkpoint's ``args`` describe the model that is read from it."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch

from ...mcore import field_verdict, make_transformer_config
from ..description import HfModel, expand_pattern
from .names import ORDINARY, says_nothing_of_the_model

# What Megatron-LM is told to build hybrids from: one stack, by its names up to core 0.17 and since.
_STACKS = (
    ["megatron.core.models.mamba.mamba_layer_specs", "mamba_stack_spec"],
    ["megatron.core.models.hybrid.hybrid_layer_specs", "hybrid_stack_spec"],
)


def check_arguments(args: Namespace, model: HfModel, where: str, *, by_configuration: bool) -> None:
    """Refuse arguments under which the same weights would be another model.

    Args:
        args: as the checkpoint holds them.
        model: as it is read.
        where: the checkpoint, for the message.
        by_configuration: the model was read from a ``config.json``, not from these arguments: of a
            framework's own arguments nothing is known then, and nothing depends on them.

    Raises:
        ValueError: with a configuration, listing every argument that contradicts it.
        NotImplementedError: without, listing also every argument of which nothing is known.
    """
    described = model.megatron_arguments()
    said, meant = _statements(vars(args)), _statements({"group_query_attention": True} | described)
    # What is off in the model is said by arguments that are off, or not at all.
    meant = {name: meant.get(name) for name in described}
    if "hybrid_layer_pattern" in described:
        _say_hybrid(said)
    fields = make_transformer_config(model.transformer_config())
    problems = []
    for name, value in said.items():
        wanted: Any = None
        verdict = field_verdict(name)
        if name in meant:
            wanted, is_right = meant[name], _same(value, meant[name])
        elif name in ORDINARY:
            wanted, is_right = ORDINARY[name][0], _all_among(value, ORDINARY[name])
        elif verdict is not None:
            wanted = getattr(fields, name, None)
            is_neutral = verdict.kind == "refused" and verdict.allows(value)
            # Every checkpoint has sizes of latent attention, which its model need not have.
            is_idle = verdict.kind == "proven" and not hasattr(fields, name)
            is_right = not verdict.changes_model or is_neutral or is_idle or _same(value, wanted)
        else:
            is_right = by_configuration or _is_off(value) or says_nothing_of_the_model(name)
            if not (is_right or _is_ours(name, value)):
                problems.append(f"{name}={_short(value)} (nothing is known of it)")
            continue
        if not is_right:
            problems.append(f"{name}={_short(value)} (must be {wanted!r})")
    listed = "; ".join(problems)
    if problems and by_configuration:
        raise ValueError(
            f"{where}: its args contradict the configuration given for it: {listed}. Give the "
            "config.json of the model that was trained"
        )
    if problems:
        raise NotImplementedError(
            f"{where}: its args describe another model than is supported: {listed}. Where an "
            "argument does not change the model, give the model's configuration by hf_config=DIR"
        )


def _statements(values: dict[str, Any]) -> dict[str, Any]:
    """What arguments say: those that are set and have an effect, as Megatron-LM reads them."""
    num_layers = values.get("num_layers") or 0
    said = {
        name: expand_pattern(name, value, num_layers)
        for name, value in values.items()
        if value is not None
    }
    heads = said.get("num_attention_heads")
    if not said.get("group_query_attention"):
        said.pop("num_query_groups", None)
        if heads is not None and "group_query_attention" in said:
            said["num_query_groups"] = heads
    if not said.get("window_size"):
        said.pop("window_attn_skip_freq", None)
    if not said.get("use_rope_scaling"):
        said.pop("rope_scaling_factor", None)
    if "layernorm_epsilon" in said:
        said.setdefault("norm_epsilon", said.pop("layernorm_epsilon"))
    if said.get("use_rotary_position_embeddings"):
        said["position_embedding_type"] = "rope"
    if said.get("add_bias_linear") and "add_qkv_bias" in said:
        said["add_qkv_bias"] = True
    if said.get("moe_router_topk_scaling_factor") == 1:
        del said["moe_router_topk_scaling_factor"]
    if said.get("num_experts"):
        _say_experts(said)
    else:
        said = {name: value for name, value in said.items() if not name.startswith("moe_")}
    return said


def _say_experts(said: dict[str, Any]) -> None:
    """What has no effect beside experts goes."""
    pattern, groups = said.get("moe_layer_freq"), said.get("moe_router_num_groups")
    if pattern is None or (isinstance(pattern, list | tuple) and all(x == 1 for x in pattern)):
        said.pop("moe_layer_freq", None)
        said.pop("ffn_hidden_size", None)
    if groups is not None and groups in (1, said.get("moe_router_group_topk")):
        said.pop("moe_router_num_groups")
        said.pop("moe_router_group_topk", None)


def _say_hybrid(said: dict[str, Any]) -> None:
    """The stock stack and marks of stages have no effect, and the pattern has an older name."""
    if said.get("spec") in _STACKS:
        del said["spec"]
    older = said.get("hybrid_override_pattern")
    pattern = said.get("hybrid_layer_pattern") or older
    if older == pattern:
        said.pop("hybrid_override_pattern", None)
    if isinstance(pattern, str):
        said["hybrid_layer_pattern"] = pattern.replace("|", "")


def _same(value: Any, wanted: Any) -> bool:
    """Whether two values say the same; off is off in every spelling."""
    if _is_off(value) or _is_off(wanted):
        return _is_off(value) and _is_off(wanted)
    if isinstance(wanted, list | tuple):
        return isinstance(value, list | tuple) and list(value) == list(wanted)
    if isinstance(value, list | tuple):
        # A pattern over layers, all alike.
        return bool(value) and all(_same(item, wanted) for item in value)
    if isinstance(value, bool | int | float | str | torch.dtype):
        return isinstance(value, bool) == isinstance(wanted, bool) and bool(value == wanted)
    return value is wanted


def _is_off(value: Any) -> bool:
    plain = value is None or isinstance(value, bool | int | float | str | list | tuple | dict)
    return plain and not value


def _all_among(value: Any, allowed: tuple[object, ...]) -> bool:
    items = value if isinstance(value, list | tuple) else [value]
    return all(_is_off(item) or (isinstance(item, str) and item in allowed) for item in items)


def _is_ours(name: str, value: Any) -> bool:
    """Whether ``--spec`` names this project's attention over a stock layer."""
    module = value[0] if name == "spec" and isinstance(value, list | tuple) and value else None
    return isinstance(module, str) and module.startswith(f"{__package__.split('.')[0]}.")


def _short(value: object) -> str:
    return repr(value)[:80]
