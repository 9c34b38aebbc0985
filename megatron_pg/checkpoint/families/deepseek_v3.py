"""DeepSeek-V3, and what is stored as it (Moonlight, Kimi-K2): latent attention and experts."""

from __future__ import annotations

from dataclasses import dataclass

from ..description import (
    ArgumentValues,
    BiasedExpertsModel,
    LatentModel,
    kind_of_experts,
    register,
)


@register("DeepseekV3ForCausalLM", "deepseek_v3", "kimi_k2")
@dataclass(frozen=True, kw_only=True)
class DeepseekV3(LatentModel, BiasedExpertsModel):
    """As its parts; the first layers have no experts."""

    @classmethod
    def is_of_arguments(cls, read: ArgumentValues) -> bool:
        """See ``HfModel``; families of the same layers are not told apart."""
        return kind_of_experts(read) == "latent"
