"""Megatron-Core's model of several layer kinds, by a pattern, with the loss edge of ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from inspect import signature
from typing import Any

from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_mlp_module_spec
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from ..data import RouteShape
from .linear_specs import local_gated_delta
from .model import PrefixGroupedModel
from .norm import norm_class
from .pipeline import layers_of_stages
from .spec import is_wrapped, with_prefix_grouped_attention
from .validate import validate_config
from .versions import HAS_HYBRID_MODEL

if HAS_HYBRID_MODEL:
    from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
    from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
    from megatron.core.ssm.mlp_layer import MLPLayer
    from megatron.core.transformer.transformer_layer import MoETransformerLayer

    class _LocalStack(HybridStack):
        """A stack that ends in a local norm, where the given one asks Transformer Engine for it."""

        def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, post_layer_norm=False, **kwargs)
            self.post_layer_norm = True
            if self.post_process:
                norm = norm_class(config)
                self.final_norm = norm(config, config.hidden_size, config.layernorm_epsilon)

else:

    class HybridModel:  # type: ignore[no-redef]
        """Stands where Megatron-Core has none."""


# Symbols of a pattern, and the part of a stack's spec that layers of the kind are built from.
_LAYER_KINDS = {
    "*": "attention_layer",
    "+": "mla_layer",
    "-": "mlp_layer",
    "D": "dsa_layer",
    "E": "moe_layer",
    "G": "gdn_layer",
    "M": "mamba_layer",
}
# Older spellings of a pattern.
_DEPRECATED = ("hybrid_attention_ratio", "hybrid_mlp_ratio", "hybrid_override_pattern")


class PrefixGroupedHybridModel(PrefixGroupedModel, HybridModel):
    """``HybridModel`` that returns logprobs of ``packed_seq_params.predictions`` on the last stage.

    It is to ``HybridModel`` what ``PrefixGroupedGPTModel`` is to ``GPTModel``. Takes the arguments
    of that, ``hybrid_stack_spec`` as ``with_prefix_grouped_attention`` returns it.

    Raises:
        NotImplementedError: if Megatron-Core has no such model; if the pattern names layers that do
            not know packed rows, by their symbols, or multi-token prediction.
        ValueError: listing every setting that prefix grouping does not support; without a pattern,
            or with one of another number of layers or stages than the configuration's, or of other
            layers with experts than its ``moe_layer_freq``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_hybrid_model()
        given = signature(HybridModel).bind(*args, **kwargs).arguments
        validate_config(given["config"])
        _check_pattern(**given)
        super().__init__(*args, **kwargs)

    def _run(self, *args: Any, packed_seq_params: Any = None, **kwargs: Any) -> Any:
        if not self.is_asked(packed_seq_params):
            return super()._run(*args, packed_seq_params=packed_seq_params, **kwargs)
        with self._without_logits():
            hidden = super()._run(*args, packed_seq_params=packed_seq_params, **kwargs)
        return self.answer(hidden, packed_seq_params)

    @contextmanager
    def _without_logits(self) -> Iterator[None]:
        """The stock forward has no seam before its projection; earlier stages stop there."""
        self.post_process = False
        try:
            yield
        finally:
            self.post_process = True


def check_hybrid_model() -> None:
    """Raise NotImplementedError where Megatron-Core has no ``HybridModel``."""
    if not HAS_HYBRID_MODEL:
        raise NotImplementedError(
            "HybridModel came with megatron-core 0.18: install that or a newer one (Python 3.12), "
            "or build PrefixGroupedGPTModel"
        )


def _check_pattern(
    config: TransformerConfig,
    hybrid_stack_spec: ModuleSpec,
    hybrid_layer_pattern: str | None = None,
    **others: Any,
) -> None:
    for name in _DEPRECATED:
        if others.get(name):
            raise ValueError(f"{name}={others[name]!r} is deprecated; give hybrid_layer_pattern")
    if hybrid_layer_pattern is None:
        raise ValueError('hybrid_layer_pattern=None: name every layer, as in "*-*-|*-*-"')
    if "/" in hybrid_layer_pattern:
        raise NotImplementedError(
            f"hybrid_layer_pattern={hybrid_layer_pattern!r}: multi-token prediction, after '/', "
            "rolls labels across samples of a row; leave it out"
        )
    layers = hybrid_layer_pattern.replace("|", "")
    if len(layers) != config.num_layers:
        raise ValueError(
            f"hybrid_layer_pattern={hybrid_layer_pattern!r} has {len(layers)} layers, the "
            f"configuration num_layers={config.num_layers}; make them equal"
        )
    stages, chunks = hybrid_layer_pattern.count("|") + 1, config.pipeline_model_parallel_size
    chunks *= config.virtual_pipeline_model_parallel_size or 1
    # Megatron-Core gives every chunk its part, and leaves out what is beyond the last.
    if stages not in (1, chunks):
        raise ValueError(
            f"hybrid_layer_pattern={hybrid_layer_pattern!r} has {stages} stages between '|', the "
            f"configuration {chunks}: pipeline_model_parallel_size="
            f"{config.pipeline_model_parallel_size} times virtual_pipeline_model_parallel_size="
            f"{config.virtual_pipeline_model_parallel_size}; make them equal"
        )
    _check_experts(config, layers)
    reasons = dict(_unknown_layers(layers, hybrid_stack_spec.submodules))
    if reasons:
        listed = "\n".join(f"  - {symbol!r}: {reason}" for symbol, reason in reasons.items())
        raise NotImplementedError(
            f"hybrid_layer_pattern={hybrid_layer_pattern!r} has layers that do not know packed "
            f"rows:\n{listed}"
        )


def _check_experts(config: TransformerConfig, layers: str) -> None:
    """Refuse a configuration that names others: routes and routers' losses are counted by it."""
    shape, named = RouteShape.from_config(config), tuple(symbol == "E" for symbol in layers)
    if shape is not None and shape.has_experts != named:
        raise ValueError(
            f"moe_layer_freq={config.moe_layer_freq!r} names other layers with experts than "
            f"hybrid_layer_pattern={layers!r}; set moe_layer_freq={list(map(int, named))}"
        )


def _unknown_layers(layers: str, stack: Any) -> Iterator[tuple[str, str]]:
    """Symbols of layers that do not know packed rows, and why."""
    for symbol in sorted(set(layers) & set(_LAYER_KINDS)):
        layer = getattr(stack, _LAYER_KINDS[symbol], IdentityOp)
        try:
            if layer is IdentityOp or not is_wrapped(layer):
                yield symbol, "build the model from a spec by with_prefix_grouped_attention"
        except NotImplementedError as error:
            yield symbol, str(error)


def hybrid_stack_local_spec(config: TransformerConfig) -> ModuleSpec:
    """The stack of a ``HybridModel`` with local layers and norms that allow sequence parallelism.

    Megatron-Core's own ``hybrid_stack_spec`` is of Transformer Engine alone. Distributed
    checkpoints have the same keys. It has every kind of layer that can run packed rows, but for
    latent attention.

    Raises:
        NotImplementedError: if Megatron-Core has no such model.
        ValueError: if ``config.normalization`` is neither "RMSNorm" nor "LayerNorm".
    """
    check_hybrid_model()
    norm = norm_class(config)
    attention = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm).submodules.self_attention
    if config.qk_layernorm:
        norms = dict(q_layernorm=norm, k_layernorm=norm)
        attention = replace(attention, submodules=replace(attention.submodules, **norms))
    layers: dict[str, ModuleSpec] = dict(
        attention_layer=_layer(
            TransformerLayer,
            input_layernorm=norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=_fused("input_layernorm", "self_attention.linear_qkv"),
        ),
        mlp_layer=_layer(
            MLPLayer,
            pre_mlp_layernorm=norm,
            mlp=get_mlp_module_spec(use_te=False),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=_fused("pre_mlp_layernorm", "mlp.linear_fc1"),
        ),
    )
    layers["gdn_layer"] = _layer(
        TransformerLayer,
        input_layernorm=norm,
        self_attention=local_gated_delta(norm),
        self_attn_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map=_fused("input_layernorm", "self_attention.in_proj"),
    )
    layers["mamba_layer"] = ModuleSpec(
        MambaLayer,
        submodules=MambaLayerSubmodules(
            # Core 0.18 does not hand on the epsilon.
            norm=partial(norm, eps=config.layernorm_epsilon),
            mixer=ModuleSpec(
                MambaMixer, submodules=MambaMixerSubmodules(ColumnParallelLinear, RowParallelLinear)
            ),
            mamba_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=_fused("norm", "mixer.in_proj"),
        ),
    )
    if config.num_moe_experts:
        layers["moe_layer"] = _layer(
            MoETransformerLayer,
            pre_mlp_layernorm=norm,
            mlp=get_mlp_module_spec(use_te=False, num_experts=config.num_moe_experts),
            mlp_bda=get_bias_dropout_add,
        )
    return ModuleSpec(_LocalStack, submodules=HybridStackSubmodules(**layers))


def build_hybrid_chunks(
    config: TransformerConfig, hybrid: Mapping[str, Any], use_te: bool, attention_backend: str
) -> list[PrefixGroupedModel]:
    """As ``build_gpt_chunks``, of a ``HybridModel``; its pattern is divided as layers are.

    Args:
        config: see there.
        hybrid: keyword arguments of ``HybridModel`` beside configuration, stack and place.
        use_te: see there.
        attention_backend: see there.
    """
    check_hybrid_model()
    if use_te:
        from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec as stack
    else:
        stack = hybrid_stack_local_spec(config)
    stack = with_prefix_grouped_attention(stack, attention_backend)
    pattern = _with_stages(hybrid["hybrid_layer_pattern"], config)
    vpp = config.virtual_pipeline_model_parallel_size
    chunks: list[PrefixGroupedModel] = []
    for vp_stage in [None] if vpp is None else range(vpp):
        place: dict[str, Any] = dict(ignore_virtual=False, vp_stage=vp_stage)
        chunk = PrefixGroupedHybridModel(
            config,
            stack,
            pre_process=parallel_state.is_pipeline_first_stage(**place),
            post_process=parallel_state.is_pipeline_last_stage(**place),
            vp_stage=vp_stage,
            **{**hybrid, "hybrid_layer_pattern": pattern},
        )
        chunks.append(chunk.to(config.params_dtype))
    return chunks


def _with_stages(pattern: str, config: TransformerConfig) -> str:
    """The pattern with a mark behind every stage but the last, unless it has its own."""
    if "|" in pattern or config.pipeline_model_parallel_size == 1:
        return pattern
    # Layers go through the first chunks of all stages, then through the second ones.
    of_chunk = zip(*layers_of_stages(config))
    stages = [layers for chunk in of_chunk for layers in chunk]
    return "|".join("".join(pattern[layer] for layer in layers) for layers in stages)


def _layer(cls: type, **parts: Any) -> ModuleSpec:
    return ModuleSpec(cls, submodules=TransformerLayerSubmodules(**parts))


def _fused(norm: str, linear: str) -> dict[str, str]:
    """The key that a norm has in checkpoints, where Transformer Engine fuses it into a layer."""
    return {f"{norm}.": f"{linear}.layer_norm_"}
