"""Decoders with experts of which every token goes through one, weighed by a gate."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .argument_values import ArgumentValues
from .config_values import ConfigValues
from .experts import ExpertNames, ExpertsModel

_SHARED = "shared_expert_intermediate_size"


@dataclass(frozen=True, kw_only=True)
class GatedExpertsModel(ExpertsModel):
    """As ``ExpertsModel``, with such an expert."""

    names = ExpertNames(shared="shared_expert.")
    moe_shared_expert_gate = True

    moe_shared_expert_intermediate_size: int = field()

    @classmethod
    def read_config(cls, values: ConfigValues) -> dict[str, Any]:
        """See ``HfModel``."""
        width = values.size(_SHARED)
        return super().read_config(values) | dict(moe_shared_expert_intermediate_size=width)

    def config_json(self) -> dict[str, Any]:
        """See ``HfModel``."""
        shared = {_SHARED: self.moe_shared_expert_intermediate_size}
        return super().config_json() | shared

    @classmethod
    def read_arguments(cls, read: ArgumentValues) -> dict[str, Any]:
        """See ``HfModel``."""
        width = read.size("moe_shared_expert_intermediate_size")
        return super().read_arguments(read) | dict(moe_shared_expert_intermediate_size=width)
