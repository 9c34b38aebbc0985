"""One line for users: a GPT spec in, the same spec with prefix-grouped attention out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec, get_module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from .core_attention import PrefixGroupedCoreAttention, prefix_grouped_core_attention
from .self_attention import PrefixGroupedSelfAttention, prefix_grouped_self_attention

Spec = TypeVar("Spec", ModuleSpec, TransformerBlockSubmodules)


def with_prefix_grouped_attention(spec: Spec, backend: str | None = None) -> Spec:
    """The same spec, its self-attention able to run packed groups; the given one is unchanged.

    Equals the given spec for ordinary batches, with the same state-dict keys. The self-attention
    and core-attention classes are replaced by subclasses of themselves (local, Transformer Engine
    or your own), so norms, projections, MLP and MoE stay what they were.

    Args:
        spec: a layer's ``ModuleSpec``, a block's ``ModuleSpec`` or ``TransformerBlockSubmodules``.
        backend: attention backend by name, or "auto" for the fastest that takes the inputs. None:
            "auto", or the one of a spec that is wrapped already.

    Returns:
        The same kind of object. A spec that is wrapped already comes back equal.

    Raises:
        ValueError: if the object is no such spec, or is wrapped already with another backend.
        NotImplementedError: if a layer's attention is not Megatron-Core's ``SelfAttention``.
    """
    if isinstance(spec, TransformerBlockSubmodules):
        if spec.layer_specs is None:
            raise ValueError("TransformerBlockSubmodules.layer_specs is None: nothing to wrap")
        layers = [with_prefix_grouped_attention(layer, backend) for layer in spec.layer_specs]
        return replace(spec, layer_specs=layers)
    if not isinstance(spec, ModuleSpec):
        raise ValueError(
            f"expected a ModuleSpec or TransformerBlockSubmodules, got {type(spec).__name__}; "
            "pass what get_gpt_layer_local_spec(), get_gpt_layer_with_transformer_engine_spec() "
            "or get_gpt_decoder_block_spec() returns"
        )
    if isinstance(spec.submodules, TransformerBlockSubmodules):
        return replace(spec, submodules=with_prefix_grouped_attention(spec.submodules, backend))
    if not hasattr(spec.submodules, "self_attention"):
        raise NotImplementedError(
            f"{get_module(spec).__name__} has no self_attention submodule; prefix grouping "
            "supports transformer layers, not state-space or linear-attention layers"
        )
    attention = _wrap_attention(spec.submodules.self_attention, backend)
    return replace(spec, submodules=replace(spec.submodules, self_attention=attention))


def _wrap_attention(spec: Any, backend: str | None) -> Any:
    cls: Any = get_module(spec)
    if cls is IdentityOp:
        return spec
    if not issubclass(cls, SelfAttention):
        raise NotImplementedError(
            f"self_attention is {cls.__name__}; prefix grouping supports SelfAttention and its "
            "subclasses (no latent, linear or sparse attention)"
        )
    core = spec.submodules.core_attention
    core_cls: Any = get_module(core)
    is_class = isinstance(core_cls, type)
    if not is_class:
        raise NotImplementedError(
            f"core_attention is {core!r}; prefix grouping needs a class or its ModuleSpec"
        )
    if not issubclass(core_cls, PrefixGroupedCoreAttention):
        core_cls = prefix_grouped_core_attention(core_cls, "auto" if backend is None else backend)
    elif backend not in (None, core_cls.attention_backend):
        raise ValueError(
            f"backend={backend!r}, but the spec is wrapped already with "
            f"{core_cls.attention_backend!r}; wrap the original spec, or leave backend out"
        )
    if not issubclass(cls, PrefixGroupedSelfAttention):
        cls = prefix_grouped_self_attention(cls)
    core = replace(core, module=core_cls) if isinstance(core, ModuleSpec) else core_cls
    return replace(
        spec,
        module=cls,
        submodules=replace(spec.submodules, core_attention=core),
    )
