"""The ``args`` of a Megatron-LM checkpoint: made from a model, and a model made from them."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch

from .hf_config import HfModel


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
    args = Namespace(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        group_query_attention=model.num_query_groups != model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        seq_length=model.max_sequence_length,
        max_position_embeddings=model.max_sequence_length,
        position_embedding_type="rope",
        use_rotary_position_embeddings=True,
        add_position_embedding=False,
        rotary_base=model.rotary_base,
        rotary_percent=1.0,
        rotary_interleaved=False,
        use_rope_scaling=model.rope_type == "llama3",
        rope_scaling_factor=model.rope_factor,
        rotary_seq_len_interpolation_factor=(
            model.rope_factor if model.rope_type == "linear" else None
        ),
        normalization="RMSNorm",
        norm_epsilon=model.layernorm_epsilon,
        apply_layernorm_1p=False,
        swiglu=True,
        squared_relu=False,
        add_bias_linear=model.add_bias_linear,
        add_qkv_bias=model.add_qkv_bias,
        qk_layernorm=model.qk_layernorm,
        untie_embeddings_and_output_weights=not model.tied,
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
        num_experts=model.num_experts,
        iteration=0,
        consumed_train_samples=0,
        consumed_valid_samples=0,
        # The random state belongs to another layout.
        no_save_rng=True,
        no_save_optim=True,
        ckpt_format="torch_dist",
        hf_architecture=model.architecture,
    )
    if model.num_experts is not None:
        args.moe_ffn_hidden_size = model.moe_ffn_hidden_size
        args.moe_router_topk = model.moe_router_topk
        args.moe_router_pre_softmax = not model.norm_topk_prob
    return args


def hf_model_from_args(args: Namespace, where: str) -> HfModel:
    """The model that a checkpoint's ``args`` describe.

    Raises:
        ValueError: an argument is missing.
        NotImplementedError: the model has no counterpart among the supported architectures.
    """
    values = vars(args)

    def need(key: str) -> Any:
        if values.get(key) is None:
            raise ValueError(
                f"{where}: args have no {key}; give the model's configuration by --hf-config DIR"
            )
        return values[key]

    required = dict(
        normalization="RMSNorm",
        swiglu=True,
        position_embedding_type="rope",
        rotary_percent=1.0,
        rotary_interleaved=False,
        apply_layernorm_1p=False,
        multi_latent_attention=False,
    )
    wrong = [
        f"{key}={values[key]!r} (must be {value!r})"
        for key, value in required.items()
        if values.get(key) is not None and values[key] != value
    ]
    if wrong:
        raise NotImplementedError(f"{where}: no supported architecture has " + "; ".join(wrong))
    heads, experts = need("num_attention_heads"), values.get("num_experts")
    bias = bool(values.get("add_bias_linear"))
    architecture = values.get("hf_architecture") or _architecture(values)
    rope_type, factor = "default", 1.0
    if values.get("use_rope_scaling"):
        rope_type, factor = "llama3", float(values.get("rope_scaling_factor") or 8.0)
    elif values.get("rotary_seq_len_interpolation_factor"):
        rope_type, factor = "linear", float(values["rotary_seq_len_interpolation_factor"])
    moe: dict[str, Any] = {}
    if experts:
        moe = dict(
            num_experts=experts,
            moe_router_topk=need("moe_router_topk"),
            moe_ffn_hidden_size=values.get("moe_ffn_hidden_size") or need("ffn_hidden_size"),
            norm_topk_prob=not values.get("moe_router_pre_softmax", False),
        )
    return HfModel(
        architecture=architecture,
        num_layers=need("num_layers"),
        hidden_size=need("hidden_size"),
        ffn_hidden_size=need("ffn_hidden_size"),
        num_attention_heads=heads,
        num_query_groups=(
            need("num_query_groups") if values.get("group_query_attention") else heads
        ),
        kv_channels=values.get("kv_channels") or need("hidden_size") // heads,
        layernorm_epsilon=values.get("norm_epsilon") or need("layernorm_epsilon"),
        vocab_size=values.get("vocab_size") or need("padded_vocab_size"),
        max_sequence_length=need("max_position_embeddings"),
        rotary_base=float(values.get("rotary_base") or 10000),
        rope_type=rope_type,
        rope_factor=factor,
        tied=not values.get("untie_embeddings_and_output_weights", False),
        add_bias_linear=bias,
        dtype=values.get("params_dtype") or torch.float32,
        **moe,
    )


def check_layout(model: HfModel, tp_size: int, pp_size: int, vpp_size: int | None = None) -> None:
    """Refuse a layout in which the model's heads, feed-forward rows or layers do not divide.

    Raises:
        ValueError: listing every size that is below 1 or does not divide, and the remedy.
    """
    heads, groups = model.num_attention_heads, model.num_query_groups
    chunks = pp_size * (vpp_size or 1)
    problems = []
    if tp_size < 1 or pp_size < 1 or (vpp_size is not None and vpp_size < 1):
        problems.append("tp, pp and vpp must be at least 1")
    elif groups % tp_size and tp_size % groups:
        problems.append(f"num_query_groups={groups} neither divides nor is a multiple of tp")
    for what, value, size, name in (
        ("num_attention_heads", heads, tp_size, "tp"),
        ("ffn_hidden_size", model.moe_ffn_hidden_size or model.ffn_hidden_size, tp_size, "tp"),
        ("num_layers", model.num_layers, chunks, "pp * vpp"),
    ):
        if size > 0 and value % size:
            problems.append(f"{what}={value} is no multiple of {name}={size}")
    if problems:
        raise ValueError(
            f"tp={tp_size}, pp={pp_size}, vpp={vpp_size} does not fit {model.architecture}: "
            + "; ".join(problems)
            + "; choose sizes that divide them"
        )


def _architecture(values: dict[str, Any]) -> str:
    if values.get("num_experts"):
        return "Qwen3MoeForCausalLM"
    if values.get("qk_layernorm"):
        return "Qwen3ForCausalLM"
    if values.get("add_qkv_bias") and not values.get("add_bias_linear"):
        return "Qwen2ForCausalLM"
    return "LlamaForCausalLM"
