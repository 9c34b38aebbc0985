"""What verl can be told and packed rows do not compute, by verl's names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.utils.dataset.dataset_utils import DatasetPadMode
from verl.utils.model import extract_multi_modal_inputs


def check_engine(model_config: Any, engine_config: Any) -> None:
    """Refuse settings of an engine before anything is built.

    Args:
        model_config: verl's ``HFModelConfig``.
        engine_config: verl's ``McoreEngineConfig``.

    Raises:
        NotImplementedError: listing every one, and what to set instead.
    """
    _refuse("verl's configuration", engine_problems(model_config, engine_config))


def check_batch(data: TensorDict, *, reads_samples_alone: bool) -> None:
    """Refuse what a batch asks for.

    Args:
        data: as verl hands it to its engine.
        reads_samples_alone: whether the loss is known to add up over samples.

    Raises:
        NotImplementedError: listing everything, and what to set instead.
    """
    _refuse("the batch", _batch_problems(data, reads_samples_alone))


def engine_problems(model_config: Any, engine_config: Any) -> Iterator[str]:
    """One sentence for each setting that the engine does not honour."""
    hf_config, lora = model_config.hf_config, getattr(model_config, "lora", None) or {}
    refused = {
        "model with vision_config": (
            hasattr(hf_config, "vision_config"),
            "images and their positions are no tokens that can be compared; train text models",
        ),
        "mtp.enable=True": (
            model_config.mtp.enable,
            "multi-token prediction reads the next tokens of a row; set it to False",
        ),
        "use_fused_kernels=True": (
            engine_config.use_fused_kernels,
            "verl's fused forward replaces the one of packed rows, which makes no logits of "
            "unread tokens anyway; set it to False",
        ),
        "use_remove_padding=False": (
            not engine_config.use_remove_padding,
            "packed rows have no padding; set it to True",
        ),
        "pad_to_length=True": (
            engine_config.pad_to_length,
            "rows are as long as their tokens; set it to False",
        ),
        "dynamic_context_parallel=True": (
            engine_config.dynamic_context_parallel,
            "every row is divided over the same ranks; set it to False, and context_parallel_size "
            "to their number",
        ),
        "vanilla_mbridge=True": (
            getattr(engine_config, "vanilla_mbridge", False),
            "mbridge builds layers that are not wrapped; set it to False (Megatron Bridge)",
        ),
        "use_megatron_fsdp=True": (
            getattr(engine_config, "use_megatron_fsdp", False),
            "nothing shows that packed rows are exact under it; set it to False",
        ),
        "qat.enable=True": (
            getattr(getattr(engine_config, "qat", None), "enable", False),
            "quantized layers are not wrapped; set it to False",
        ),
        f"lora.rank={lora.get('rank', 0)}": (
            lora.get("rank", 0) > 0,
            "nothing shows that packed rows are exact with adapters; set it to 0",
        ),
    }
    for name, (is_set, remedy) in refused.items():
        if is_set:
            yield f"{name}: {remedy}"


def _batch_problems(data: TensorDict, reads_samples_alone: bool) -> Iterator[str]:
    for name, reason in (
        ("distillation_use_topk", "logits of a row are not kept for a teacher's top-k"),
        ("distillation_only", "logits of a row are not kept for a teacher's top-k"),
        ("calculate_sum_pi_squared", "logits of a row are not kept"),
    ):
        if tu.get_non_tensor_data(data, name, False):
            yield f"{name}=True: {reason}; set it to False"
    if extract_multi_modal_inputs(data.get("multi_modal_inputs", [])):
        yield "multi_modal_inputs: images are no tokens that can be compared; train text"
    if not data["input_ids"].is_nested:
        yield "input_ids with padding: hand them over jagged, as left_right_2_no_padding makes them"
    mode = tu.get_non_tensor_data(data, "pad_mode", DatasetPadMode.NO_PADDING)
    if mode != DatasetPadMode.NO_PADDING:
        yield f"pad_mode={mode}: packed rows have no padding; use NO_PADDING"
    forced = tu.get_non_tensor_data(data, "force_group_size", 1)
    if forced > 1 and not reads_samples_alone:
        yield (
            f"force_group_size={forced}: the loss may read several samples at once, which stand "
            "in different rows; use verl's ppo_loss or leave it out"
        )


def _refuse(where: str, problems: Iterator[str]) -> None:
    found = list(problems)
    if found:
        listed = "\n".join(f"  - {problem}" for problem in found)
        raise NotImplementedError(
            f"{where} asks for {len(found)} thing(s) that the prefix-grouped engine does not do; "
            f"change them, or unset VERL_ENGINE_VENDOR to use verl's own engine:\n{listed}"
        )
