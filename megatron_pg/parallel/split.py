"""How the stages of a pipeline come by their layers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Self


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineSplit:
    """Which layers a pipeline stage holds; as it stands here, equally many each.

    The fields have the names that they have in a ``TransformerConfig``.

    Attributes:
        num_layers_in_first_pipeline_stage: None: as many as stages between.
        num_layers_in_last_pipeline_stage: likewise.
        account_for_embedding_in_pipeline_split: count the embedding as a layer of its stage.
        account_for_loss_in_pipeline_split: count the output layer as a layer of its stage.
        pipeline_model_parallel_layout: every chunk by what it holds, such as ``"Ett|tttL"``.
    """

    num_layers_in_first_pipeline_stage: int | None = None
    num_layers_in_last_pipeline_stage: int | None = None
    account_for_embedding_in_pipeline_split: bool = False
    account_for_loss_in_pipeline_split: bool = False
    pipeline_model_parallel_layout: str | None = None

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """What an object states under these names, such as a ``TransformerConfig``."""
        found = {field.name: getattr(config, field.name, None) for field in fields(cls)}
        layout = "pipeline_model_parallel_layout"
        if found[layout] is not None:
            # Megatron-Core's own object prints what it was made from.
            found[layout] = str(found[layout])
        return cls(**{name: value for name, value in found.items() if value is not None})

    @property
    def is_even(self) -> bool:
        """Whether all chunks hold equally many layers."""
        return self == type(self)()

    def settings(self) -> dict[str, Any]:
        """What is said, under the names of a ``TransformerConfig``."""
        return {name: value for name, value in asdict(self).items() if value}
