"""The ``args`` of a Megatron-LM checkpoint, made from a model and a layout."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, fields, replace

import torch

from ...mcore import make_transformer_config, stage_problems
from ...parallel import MEGATRON_NAMES, ParallelSizes, PipelineSplit
from ..description import HfModel

_ONE_RANK, _EVEN = ParallelSizes(), PipelineSplit()
# Fields of a split that Megatron-LM calls otherwise.
_OWN_NAMES = {
    "num_layers_in_first_pipeline_stage": "decoder_first_pipeline_num_layers",
    "num_layers_in_last_pipeline_stage": "decoder_last_pipeline_num_layers",
}
# Which weights are on which rank.
LAYOUT_ARGUMENTS = (
    *(name for field, name in MEGATRON_NAMES.items() if field not in ("sp", "cp")),
    *(_OWN_NAMES.get(field.name, field.name) for field in fields(PipelineSplit)),
    "num_layers_per_virtual_pipeline_stage",
)


def make_megatron_args(
    model: HfModel,
    sizes: ParallelSizes = _ONE_RANK,
    split: PipelineSplit = _EVEN,
    *,
    make_vocab_size_divisible_by: int = 128,
    dtype: torch.dtype | None = None,
) -> Namespace:
    """What Megatron-LM stores as ``common.pt["args"]`` and reads by ``--use-checkpoint-args``.

    Args:
        model: the architecture.
        sizes: the layout that the checkpoint is meant for; the tensors do not depend on it.
        split: how its stages come by their layers.
        make_vocab_size_divisible_by: decides ``padded_vocab_size``.
        dtype: of the parameters; None: the model's.

    Raises:
        ValueError: if the model cannot be laid out so.
    """
    check_layout(model, sizes, split)
    dtype = dtype or model.dtype
    is_counted = sizes.vpp is not None and split.is_even
    return Namespace(
        **model.megatron_arguments(),
        group_query_attention=model.num_query_groups != model.num_attention_heads,
        seq_length=model.max_sequence_length,
        max_position_embeddings=model.max_sequence_length,
        use_rotary_position_embeddings=model.has_positions and model.yarn is None,
        add_position_embedding=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        apply_query_key_layer_scaling=False,
        vocab_size=model.vocab_size,
        make_vocab_size_divisible_by=make_vocab_size_divisible_by,
        padded_vocab_size=model.padded_vocab_size(sizes.tp, make_vocab_size_divisible_by),
        **sizes.group_arguments() | {"expert_tensor_parallel_size": sizes.expert_tp},
        **{_OWN_NAMES.get(name, name): value for name, value in asdict(split).items()},
        num_layers_per_virtual_pipeline_stage=(
            model.num_layers // sizes.num_chunks if is_counted else None
        ),
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        iteration=0,
        consumed_train_samples=0,
        consumed_valid_samples=0,
        # The random state belongs to another layout.
        no_save_rng=True,
        no_save_optim=True,
        ckpt_format="torch_dist",
        hf_architecture=model.architecture,
    )


def check_layout(model: HfModel, sizes: ParallelSizes, split: PipelineSplit = _EVEN) -> None:
    """Refuse a layout in which the model's heads, widths, experts or layers do not divide.

    Raises:
        ValueError: listing every size that is below 1 or does not divide, and the remedy.
    """
    if split.is_even:
        sizes.check(model.sizes)
        return
    sizes.check(replace(model.sizes, num_layers=None))
    problems = list(_split_problems(model, sizes, split))
    if problems:
        raise ValueError("; also ".join(problems))


def _split_problems(model: HfModel, sizes: ParallelSizes, split: PipelineSplit) -> Iterator[str]:
    settings = model.transformer_config() | sizes.group_arguments() | split.settings()
    try:
        config = make_transformer_config(settings | {"pipeline_dtype": model.dtype})
    except (AssertionError, ValueError) as error:
        yield f"{error}; change {' or '.join(split.settings())}"
        return
    if config.virtual_pipeline_model_parallel_size != sizes.vpp:
        made = config.virtual_pipeline_model_parallel_size
        yield (
            f"pipeline_model_parallel_layout={split.pipeline_model_parallel_layout!r} has {made} "
            f"chunks a rank: set virtual_pipeline_model_parallel_size={made}, got {sizes.vpp}"
        )
    yield from stage_problems(config)
