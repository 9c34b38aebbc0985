"""The tokenizer of a run."""

from __future__ import annotations

from typing import Any

from ..config import (
    TrainConfig,
)


def load_tokenizer(config: TrainConfig) -> Any:
    """The tokenizer of ``model.hf``. Raises ValueError when the folder has none."""
    if config.model.hf is None:
        raise ValueError(
            f"rollout.source={config.rollout.source} needs a tokenizer: set model.hf to a Hugging "
            "Face folder, or train from recorded token ids"
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(config.model.hf)
    except (OSError, ValueError) as error:
        raise ValueError(f"{config.model.hf} has no usable tokenizer: {error}") from error
