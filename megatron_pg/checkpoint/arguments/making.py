"""The ``args`` of a Megatron-LM checkpoint, made from a model and a layout."""

from __future__ import annotations

from argparse import Namespace

import torch

from ...parallel import ParallelSizes
from ..description import HfModel


def make_megatron_args(
    model: HfModel,
    *,
    tp_size: int = 1,
    pp_size: int = 1,
    vpp_size: int | None = None,
    make_vocab_size_divisible_by: int = 128,
    dtype: torch.dtype | None = None,
) -> Namespace:
    """What Megatron-LM stores as ``common.pt["args"]`` and reads by ``--use-checkpoint-args``.

    Args:
        model: the architecture.
        tp_size: the layout that the checkpoint is meant for; the tensors do not depend on it.
        pp_size: as tp_size.
        vpp_size: model chunks per pipeline rank; None without interleaving.
        make_vocab_size_divisible_by: decides ``padded_vocab_size``.
        dtype: of the parameters; None: the model's.

    Raises:
        ValueError: if the model cannot be laid out so.
    """
    check_layout(model, tp_size, pp_size, vpp_size)
    dtype = dtype or model.dtype
    chunks = pp_size * (vpp_size or 1)
    return Namespace(
        **model.megatron_arguments(),
        group_query_attention=model.num_query_groups != model.num_attention_heads,
        seq_length=model.max_sequence_length,
        max_position_embeddings=model.max_sequence_length,
        use_rotary_position_embeddings=model.yarn is None,
        add_position_embedding=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        apply_query_key_layer_scaling=False,
        vocab_size=model.vocab_size,
        make_vocab_size_divisible_by=make_vocab_size_divisible_by,
        padded_vocab_size=model.padded_vocab_size(tp_size, make_vocab_size_divisible_by),
        tensor_model_parallel_size=tp_size,
        pipeline_model_parallel_size=pp_size,
        virtual_pipeline_model_parallel_size=vpp_size,
        num_layers_per_virtual_pipeline_stage=model.num_layers // chunks if vpp_size else None,
        context_parallel_size=1,
        expert_model_parallel_size=1,
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


def check_layout(model: HfModel, tp_size: int, pp_size: int, vpp_size: int | None = None) -> None:
    """Refuse a layout in which the model's heads, feed-forward rows or layers do not divide.

    Raises:
        ValueError: listing every size that is below 1 or does not divide, and the remedy.
    """
    ParallelSizes(tp=tp_size, pp=pp_size, vpp=vpp_size).check(model.sizes)
