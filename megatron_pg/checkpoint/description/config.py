"""What a Hugging Face ``config.json`` says, or why it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..files import NAMED_DTYPES, read_json
from .config_values import ConfigValues
from .hf_model import HfModel
from .registry import FAMILIES

# Of generation, initialisation and provenance, and of windows where there are none.
_NEUTRAL_KEYS = {
    *("architectures", "model_type", "dtype", "torch_dtype", "max_window_layers"),
    *("transformers_version", "use_cache", "initializer_range", "attention_dropout"),
    *("pretraining_tp", "output_router_logits", "router_aux_loss_coef", "auto_map"),
    *("transformers.js_config", "is_llama_config", "unsloth_fixed", "unsloth_version"),
    *("id2label", "label2id", "problem_type", "task_specific_params", "tokenizer_class"),
    *("chunk_size_feed_forward", "return_dict", "max_length"),
}


def read_hf_config(hf_dir: str | Path) -> HfModel:
    """Read ``hf_dir/config.json`` (raw, so that no version of transformers reinterprets it).

    Raises:
        ValueError: no such file, no JSON, a missing key, or a setting that contradicts another.
        NotImplementedError: an architecture, rope type or setting that is not supported.
    """
    path = Path(hf_dir) / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{hf_dir}: no config.json; pass a Hugging Face model folder, as "
            "`hf download NAME --local-dir FOLDER` writes it"
        )
    return parse_hf_config(read_json(path), str(path))


def parse_hf_config(config: dict[str, Any], where: str = "config.json") -> HfModel:
    """The model of a ``config.json``'s content; ``where`` names it in errors.

    Raises:
        ValueError: a missing key, a value of another type or beyond what a model can have, or a
            setting that contradicts another.
        NotImplementedError: an architecture, rope type or setting that is not supported.
    """
    values = ConfigValues(config, where)
    family = _family(config, where).of_config(values)
    fields = family.read_config(values)
    values.finish(_NEUTRAL_KEYS)
    return family(**fields, dtype=_dtype(config, where))


def _family(config: dict[str, Any], where: str) -> type[HfModel]:
    named, kind = config.get("architectures"), config.get("model_type")
    architecture = named[0] if isinstance(named, list) and len(named) == 1 else named
    if not isinstance(architecture, str) or architecture not in FAMILIES:
        raise NotImplementedError(
            f"{where}: architecture {architecture!r} is not supported; supported are "
            + ", ".join(FAMILIES)
            + _advice(config, architecture)
        )
    family = FAMILIES[architecture]
    if kind not in (None, family.model_type, *family.other_types):
        raise ValueError(
            f"{where}: model_type={kind!r} contradicts architectures=[{architecture!r}], which is "
            f"of type {family.model_type!r}; correct the one that is wrong"
        )
    return family


# ``from_pretrained`` of the text model's class finds no weight by its name, and draws them all.
_ITS_TEXT_MODEL = (
    ". Take its text model, saved alone: whole = AutoModelForImageTextToText.from_pretrained(...); "
    "text = {name}(whole.config.text_config); "
    "text.model, text.lm_head = whole.model.language_model, whole.lm_head; "
    "text.save_pretrained(...). {name}.from_pretrained would begin with random weights"
)

# Of layers that no supported Megatron-Core has, so that nothing can convert them.
_LAYERS_OF_THEIR_OWN = {
    "KimiLinearForCausalLM": "its delta attention has a decay of its own in every channel",
}


def _advice(config: dict[str, Any], architecture: Any) -> str:
    """What can be done about an architecture that is not held."""
    if isinstance(architecture, str) and architecture in _LAYERS_OF_THEIR_OWN:
        why = _LAYERS_OF_THEIR_OWN[architecture]
        return f". No supported Megatron-Core has such layers: {why}; choose another model"
    within = config.get("text_config")
    texts = [config, within] if isinstance(within, dict) else [config]
    for name, family in FAMILIES.items():
        if any(text.get("model_type") == family.model_type for text in texts):
            if texts[1:]:
                return _ITS_TEXT_MODEL.format(name=name)
            if not architecture:
                return f". By its model_type it may be {name}: name that in architectures"
    return ". tools/hf_to_megatron.py --bridge converts others by Megatron Bridge"


def _dtype(config: dict[str, Any], where: str) -> torch.dtype:
    named = [config[key] for key in ("dtype", "torch_dtype") if config.get(key) is not None]
    for dtype in named:
        if not isinstance(dtype, str) or dtype not in NAMED_DTYPES:
            raise NotImplementedError(
                f"{where}: dtype {dtype!r} is not supported; use one of {', '.join(NAMED_DTYPES)}"
            )
    if len(set(named)) > 1:
        raise ValueError(f"{where}: dtype and torch_dtype are {' and '.join(named)}; keep one")
    return NAMED_DTYPES[named[0] if named else "float32"]
