"""The tokenizer of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...checkpoint import has_tokenizer
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

    unusable = f"{config.model.hf} has no usable tokenizer"
    # Without one transformers advises to install packages, and of some architectures makes an empty
    # one from config.json alone.
    if not has_tokenizer(Path(config.model.hf)):
        raise ValueError(
            f"{unusable}: there is no tokenizer.json or other vocabulary; copy the tokenizer's "
            "files there, or train from recorded token ids"
        )
    try:
        return AutoTokenizer.from_pretrained(config.model.hf)
    except (OSError, ValueError) as error:
        raise ValueError(f"{unusable}: {error}") from error
