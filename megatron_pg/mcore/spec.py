"""One line for users: a GPT spec in, the same spec with prefix-grouped attention out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from functools import partial
from inspect import signature
from types import MethodType
from typing import Any, TypeVar

from megatron.core.extensions import transformer_engine
from megatron.core.ssm.gated_delta_net import GatedDeltaNet
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec, get_module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer

from ..attention import check_backend_name
from .layers import (
    PrefixGroupedCoreAttention,
    PrefixGroupedLayer,
    PrefixGroupedLinearAttention,
    PrefixGroupedMamba,
    PrefixGroupedSelfAttention,
    latent_core_attention,
    prefix_grouped_core_attention,
    prefix_grouped_latent_attention,
    prefix_grouped_layer,
    prefix_grouped_linear_attention,
    prefix_grouped_mamba,
    prefix_grouped_router,
    prefix_grouped_self_attention,
)
from .versions import HAS_HYBRID_MODEL

_STACKS: tuple[type, ...] = ()
if HAS_HYBRID_MODEL:
    from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules
    from megatron.core.ssm.mamba_mixer import MambaMixer

    _STACKS = (HybridStackSubmodules,)

# Without Transformer Engine its attention is no class.
_SOFTMAX_ATTENTION = tuple(
    cls
    for cls in (DotProductAttention, transformer_engine.TEDotProductAttention)
    if isinstance(cls, type)
)

# Layers of a hybrid's stack; the others mix tokens in ways that no packed row knows.
_WRAPPED_KINDS = (
    *("attention_layer", "mla_layer", "gdn_layer", "mamba_layer"),
    *("mlp_layer", "moe_layer"),
)

Spec = TypeVar("Spec", ModuleSpec, TransformerBlockSubmodules, "HybridStackSubmodules")


def with_prefix_grouped_attention(spec: Spec, backend: str | None = None) -> Spec:
    """The same spec, its self-attention able to run packed groups; the given one is unchanged.

    Equals the given spec for ordinary batches, with the same state-dict keys. The self-attention
    and core-attention classes are replaced by subclasses of themselves (local, Transformer Engine
    or your own), and so is the router of experts, so norms, projections, MLP and experts stay what
    they were. The layer's class is replaced too where its MLP or router reads which samples hold
    a token: one of your own says so by a true ``reads_row_mask``, and gets its microbatch's
    ``row_mask`` as ``padding_mask``. Layers of a hybrid's stack that cannot be wrapped stay as they
    are: whether the model has such layers its pattern says, and ``PrefixGroupedHybridModel`` then
    refuses to be built.

    Args:
        spec: a layer's ``ModuleSpec``, a block's ``ModuleSpec`` or ``TransformerBlockSubmodules``,
            a hybrid stack's ``ModuleSpec`` or ``HybridStackSubmodules``.
        backend: attention backend by name, or "auto" for the fastest that takes the inputs. None:
            "auto", or the one of a spec that is wrapped already.

    Returns:
        The same kind of object. A spec that is wrapped already comes back equal.

    Raises:
        ValueError: if the object is no such spec, or is wrapped already with another backend.
        NotImplementedError: if a layer's attention is not Megatron-Core's ``SelfAttention`` or
            ``MLASelfAttention`` over plain softmax attention, nor its ``GatedDeltaNet``; if another
            part of it mixes tokens, or its router is one that is not known.
    """
    if backend is not None:
        check_backend_name(backend)
    if isinstance(spec, TransformerBlockSubmodules):
        if spec.layer_specs is None:
            raise ValueError("TransformerBlockSubmodules.layer_specs is None: nothing to wrap")
        layers = [with_prefix_grouped_attention(layer, backend) for layer in spec.layer_specs]
        return replace(spec, layer_specs=layers)
    if isinstance(spec, _STACKS):
        return _wrap_stack(spec, backend)
    if not isinstance(spec, ModuleSpec):
        raise ValueError(
            f"expected a ModuleSpec or TransformerBlockSubmodules, got {type(spec).__name__}; "
            "pass what get_gpt_layer_local_spec(), get_gpt_layer_with_transformer_engine_spec() "
            "or get_gpt_decoder_block_spec() returns"
        )
    if isinstance(spec.submodules, (TransformerBlockSubmodules, *_STACKS)):
        return replace(spec, submodules=with_prefix_grouped_attention(spec.submodules, backend))
    if HAS_HYBRID_MODEL and hasattr(spec.submodules, "mixer"):
        mixer = _wrap_mixer(spec.submodules.mixer)
        return replace(spec, submodules=replace(spec.submodules, mixer=mixer))
    if not hasattr(spec.submodules, "self_attention"):
        raise NotImplementedError(
            f"{get_module(spec).__name__} has no self_attention submodule; prefix grouping "
            "supports transformer layers, and hybrids of them since megatron-core 0.18 "
            "(PrefixGroupedHybridModel)"
        )
    spec = replace(spec, submodules=replace(spec.submodules, mlp=_wrap_router(spec.submodules.mlp)))
    parts = {part.name: getattr(spec.submodules, part.name) for part in fields(spec.submodules)}
    attention = _wrap_attention(parts.pop("self_attention"), backend)
    for part, classes in {name: list(_classes(part)) for name, part in parts.items()}.items():
        for cls in filter(_takes_a_row, classes):
            raise NotImplementedError(
                f"{part} of {get_module(spec).__name__} is {cls.__name__}, whose call takes a "
                "row; prefix grouping supports layers whose self_attention alone mixes tokens"
            )
        if any(getattr(cls, "reads_row_mask", False) for cls in classes):
            spec = _wrap_layer(spec)
    return replace(spec, submodules=replace(spec.submodules, self_attention=attention))


def is_wrapped(spec: Any) -> bool:
    """Whether ``with_prefix_grouped_attention`` would leave a layer's spec as it is.

    Raises:
        NotImplementedError: if it cannot be wrapped.
    """
    return list(_classes(spec)) == list(_classes(with_prefix_grouped_attention(spec)))


def _wrap_stack(stack: Any, backend: str | None) -> Any:
    layers = {name: getattr(stack, name, IdentityOp) for name in _WRAPPED_KINDS}
    wrapped = {}
    for name, layer in layers.items():
        if layer is not IdentityOp:
            with suppress(NotImplementedError):
                wrapped[name] = with_prefix_grouped_attention(layer, backend)
    return replace(stack, **wrapped)


def _classes(spec: Any) -> Iterator[type]:
    """All classes in (a part of) a spec."""
    if isinstance(spec, type):
        yield spec
    elif isinstance(spec, ModuleSpec):
        yield from _classes([get_module(spec), spec.submodules])
    elif isinstance(spec, MethodType):
        yield from _classes(spec.__self__)
    elif isinstance(spec, partial):
        yield from _classes([spec.func, *spec.args, *spec.keywords.values()])
    elif isinstance(spec, list | tuple):
        for part in spec:
            yield from _classes(part)
    elif is_dataclass(spec):
        yield from _classes([getattr(spec, part.name) for part in fields(spec)])


def _takes_a_row(cls: type) -> bool:
    call = getattr(cls, "forward", None)
    return call is not None and "packed_seq_params" in signature(call).parameters


def _wrap_layer(spec: ModuleSpec) -> ModuleSpec:
    cls: Any = _class_of("the layer", spec)
    if not issubclass(cls, TransformerLayer):
        raise NotImplementedError(
            f"a part of {cls.__name__} reads the row mask, but the layer is no TransformerLayer, "
            "which hands padding_mask to its MLP; derive it from that"
        )
    if issubclass(cls, PrefixGroupedLayer):
        return spec
    return replace(spec, module=prefix_grouped_layer(cls))


def _wrap_router(mlp: Any) -> Any:
    """The MLP's spec, its router able to count packed rows where it has one."""
    if isinstance(mlp, ModuleSpec):
        parts = mlp.submodules
    else:  # since core 0.19
        parts = mlp.keywords.get("submodules") if isinstance(mlp, partial) else None
    if not isinstance(parts, MoESubmodules):
        return mlp
    parts = replace(parts, router=prefix_grouped_router(_class_of("router", parts.router)))
    if isinstance(mlp, ModuleSpec):
        return replace(mlp, submodules=parts)
    return partial(mlp.func, *mlp.args, **(mlp.keywords | {"submodules": parts}))


def _class_of(name: str, spec: Any) -> type:
    cls = get_module(spec) if isinstance(spec, type | ModuleSpec) else None
    if not isinstance(cls, type):
        raise NotImplementedError(
            f"{name} is {spec!r}; prefix grouping needs a class or its ModuleSpec"
        )
    return cls


def _wrap_mixer(spec: Any) -> Any:
    """Of a state-space layer."""
    cls: Any = _class_of("mixer", spec)
    if not issubclass(cls, MambaMixer):
        raise NotImplementedError(
            f"mixer is {cls.__name__}; prefix grouping supports MambaMixer and its subclasses"
        )
    return (
        spec
        if issubclass(cls, PrefixGroupedMamba)
        else replace(spec, module=prefix_grouped_mamba(cls))
    )


def _wrap_attention(spec: Any, backend: str | None) -> Any:
    cls: Any = _class_of("self_attention", spec)
    if cls is IdentityOp:
        return spec
    if issubclass(cls, GatedDeltaNet):
        if not issubclass(cls, PrefixGroupedLinearAttention):
            cls = prefix_grouped_linear_attention(cls)
        return replace(spec, module=cls) if isinstance(spec, ModuleSpec) else cls
    is_latent = issubclass(cls, MLASelfAttention)
    if not (is_latent or issubclass(cls, SelfAttention)):
        raise NotImplementedError(
            f"self_attention is {cls.__name__}; prefix grouping supports SelfAttention, "
            "MLASelfAttention, GatedDeltaNet and their subclasses (no sparse attention)"
        )
    core = spec.submodules.core_attention
    core_cls: Any = _class_of("core_attention", core)
    if not issubclass(core_cls, _SOFTMAX_ATTENTION):
        raise NotImplementedError(
            f"core_attention is {core_cls.__name__}; prefix grouping supports plain softmax "
            f"attention: {', '.join(known.__name__ for known in _SOFTMAX_ATTENTION)} and their "
            "subclasses"
        )
    if not issubclass(core_cls, PrefixGroupedCoreAttention):
        core_cls = latent_core_attention(core_cls) if is_latent else core_cls
        core_cls = prefix_grouped_core_attention(core_cls, "auto" if backend is None else backend)
    elif backend not in (None, core_cls.attention_backend):
        raise ValueError(
            f"backend={backend!r}, but the spec is wrapped already with "
            f"{core_cls.attention_backend!r}; wrap the original spec, or leave backend out"
        )
    if not issubclass(cls, PrefixGroupedSelfAttention):
        wrap = prefix_grouped_latent_attention if is_latent else prefix_grouped_self_attention
        cls = wrap(cls)
    core = replace(core, module=core_cls) if isinstance(core, ModuleSpec) else core_cls
    return replace(
        spec,
        module=cls,
        submodules=replace(spec.submodules, core_attention=core),
    )
