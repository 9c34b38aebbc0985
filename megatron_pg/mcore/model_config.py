"""What Megatron-LM builds its GPT model from since core 0.19: a config that names its builder.

Imports ``megatron.training``, which is Megatron-LM's (since 0.19 in the megatron-core wheel too).
"""

from __future__ import annotations

from copy import copy
from inspect import signature
from typing import Any, ClassVar

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig, default_layer_spec

from .sharing import PrefixSharingGPTModel
from .spec import with_prefix_grouped_attention
from .validate import validate_config


class PrefixGroupedGPTModelConfig(GPTModelConfig):
    """``GPTModelConfig`` of a model that is able to run packed groups."""

    builder: ClassVar[str] = f"{__name__}.PrefixGroupedGPTModelBuilder"


class PrefixGroupedGPTModelBuilder(GPTModelBuilder):
    """``GPTModelBuilder`` whose layers are wrapped, whatever spec they come from."""

    def __init__(self, model_config: GPTModelConfig) -> None:
        given = model_config.transformer_layer_spec

        def wrapped_layer_spec(config: GPTModelConfig, vp_stage: int | None = None) -> Any:
            return with_prefix_grouped_attention(_layer_spec(given, config, vp_stage))

        model_config = copy(model_config)
        model_config.transformer_layer_spec = wrapped_layer_spec
        super().__init__(model_config)

    def build_model(self, *args: Any, **kwargs: Any) -> Any:
        """As ``GPTModelBuilder.build_model``, a ``PrefixSharingGPTModel``.

        Raises:
            ValueError: listing every setting that prefix grouping does not support.
            NotImplementedError: if a layer is none that can be wrapped.
        """
        validate_config(self._model_config.transformer)
        model = super().build_model(*args, **kwargs)
        # The builder names GPTModel itself; ours has the same state and other methods.
        model.__class__ = PrefixSharingGPTModel
        return model


def _layer_spec(given: Any, config: GPTModelConfig, vp_stage: int | None) -> Any:
    """What ``GPTModelBuilder`` would take."""
    if given is None:
        return default_layer_spec(config, vp_stage)
    if isinstance(given, ModuleSpec) or not callable(given):
        return given
    if "vp_stage" in signature(given).parameters:
        return given(config, vp_stage=vp_stage)
    return given(config)
