"""GLM-4.7-Flash: latent attention and experts, as DeepSeek-V3 has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..description import BiasedExpertsModel, ConfigValues, LatentModel, register

_KINDS = ("dense", "sparse")


@register("Glm4MoeLiteForCausalLM", "glm4_moe_lite")
@dataclass(frozen=True, kw_only=True)
class Glm4MoeLite(LatentModel, BiasedExpertsModel):
    """As its parts; ``mlp_layer_types`` names the layers with experts: all but the first."""

    @classmethod
    def read_pattern(cls, values: ConfigValues, num_layers: int) -> tuple[int, ...]:
        """See ``ExpertsModel``."""
        kinds = values.get("mlp_layer_types")
        if kinds is None:
            values.must("first_k_dense_replace", 1)
            return tuple(int(layer > 0) for layer in range(num_layers))
        is_list = isinstance(kinds, list) and len(kinds) == num_layers
        if not is_list or any(kind not in _KINDS for kind in kinds):
            values.problems.append(
                f"mlp_layer_types={kinds!r:.80} must be dense or sparse for {num_layers} layers"
            )
            return (1,) * num_layers
        # Not read where layers are named; other programs read it.
        values.must("first_k_dense_replace", kinds.index("sparse") if "sparse" in kinds else 0)
        return tuple(map(_KINDS.index, kinds))

    def config_json(self) -> dict[str, Any]:
        """See ``HfModel``."""
        kinds = [_KINDS[self.has_experts(layer)] for layer in range(self.num_layers)]
        return super().config_json() | dict(mlp_layer_types=kinds)
