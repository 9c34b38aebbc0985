"""The ``args`` of a Megatron-LM checkpoint: made from a model, and a model made from them."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch

from ..parallel import ParallelSizes
from .argument_checks import check_arguments
from .files import NAMED_DTYPES
from .hf_config import ARCHITECTURES, HfModel
from .hf_parse import MAX_EXPERTS, MAX_LAYERS
from .hf_values import MAX_SIZE


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
        ValueError: an argument is missing, or no value of its kind.
        NotImplementedError: the model has no counterpart among the supported architectures, or an
            argument is set of which nothing is known.
    """
    read = _Reader(_values(args, where), where)
    heads, experts = read.size("num_attention_heads"), read.size("num_experts", None, MAX_EXPERTS)
    groups = read.size("num_query_groups") if read.get("group_query_attention") else heads
    if heads % groups:
        raise ValueError(
            f"{where}: args have num_attention_heads={heads}, no multiple of num_query_groups="
            f"{groups}; {_NEED}"
        )
    rope_type, factor = "default", 1.0
    if read.get("use_rope_scaling"):
        rope_type, factor = "llama3", read.number("rope_scaling_factor", 8.0)
    elif read.get("rotary_seq_len_interpolation_factor"):
        rope_type, factor = "linear", read.number("rotary_seq_len_interpolation_factor")
    moe: dict[str, Any] = {}
    if experts:
        moe = dict(
            num_experts=experts,
            moe_router_topk=read.size("moe_router_topk"),
            moe_ffn_hidden_size=read.size("moe_ffn_hidden_size", None)
            or read.size("ffn_hidden_size"),
            norm_topk_prob=not read.get("moe_router_pre_softmax"),
        )
        if moe["moe_router_topk"] > experts:
            raise ValueError(
                f"{where}: args have moe_router_topk={moe['moe_router_topk']} of num_experts="
                f"{experts}; {_NEED}"
            )
    model = HfModel(
        architecture=read.architecture(),
        num_layers=read.size("num_layers", high=MAX_LAYERS),
        hidden_size=read.size("hidden_size"),
        ffn_hidden_size=read.size("ffn_hidden_size"),
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=read.size("kv_channels", None) or read.size("hidden_size") // heads,
        layernorm_epsilon=read.number("norm_epsilon", None) or read.number("layernorm_epsilon"),
        vocab_size=read.size("vocab_size", None) or read.size("padded_vocab_size"),
        max_sequence_length=read.size("max_position_embeddings"),
        rotary_base=read.number("rotary_base", 10000.0),
        rope_type=rope_type,
        rope_factor=factor,
        tied=not read.get("untie_embeddings_and_output_weights"),
        add_bias_linear=bool(read.get("add_bias_linear")),
        dtype=read.dtype(),
        **moe,
    )
    check_arguments(args, model, make_megatron_args(model), where, by_configuration=False)
    return model


def check_args(args: Namespace, model: HfModel, where: str) -> None:
    """Refuse a checkpoint whose ``args`` contradict the model that a ``config.json`` describes.

    Raises:
        ValueError: listing every argument under which the weights are another model's.
    """
    _values(args, where)
    check_arguments(args, model, make_megatron_args(model), where, by_configuration=True)


def check_layout(model: HfModel, tp_size: int, pp_size: int, vpp_size: int | None = None) -> None:
    """Refuse a layout in which the model's heads, feed-forward rows or layers do not divide.

    Raises:
        ValueError: listing every size that is below 1 or does not divide, and the remedy.
    """
    # Sequence parallelism leaves no trace in a checkpoint, and experts need it.
    sizes = ParallelSizes(tp=tp_size, sp=tp_size > 1, pp=pp_size, vpp=vpp_size)
    sizes.check(model.sizes)


_NEED = "give the model's configuration by hf_config=DIR"
_UNSET: Any = object()


def _values(args: Any, where: str) -> dict[str, Any]:
    if not isinstance(args, Namespace):
        raise ValueError(f"{where}: args are {type(args).__name__}, not a Namespace; {_NEED}")
    for name, value in vars(args).items():
        # Neither true nor false, and equal to nothing.
        if hasattr(value, "__array__"):
            raise ValueError(f"{where}: args hold {type(value).__name__} as {name}; {_NEED}")
    return vars(args)


class _Reader:
    """Arguments by name, each of its kind or refused."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def get(self, name: str) -> Any:
        return self.values.get(name)

    def size(self, name: str, default: Any = _UNSET, high: int = MAX_SIZE) -> Any:
        """An integer from 1 to ``high``."""
        value = self._given(name, default)
        if value is not default and not (type(value) is int and 1 <= value <= high):
            self._refuse(name, value, f"an integer from 1 to {high}")
        return value

    def number(self, name: str, default: Any = _UNSET) -> Any:
        """A finite number above 0."""
        value = self._given(name, default)
        if value is default:
            return value
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            self._refuse(name, value, "finite and above 0")
        return float(value)

    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        value = self._given("params_dtype", torch.float32)
        if value not in list(NAMED_DTYPES.values()):
            self._refuse("params_dtype", value, f"one of {', '.join(NAMED_DTYPES)}")
        return value  # type: ignore[no-any-return]

    def architecture(self) -> str:
        """The recorded one, or the one with such layers."""
        given = self.get("hf_architecture")
        if given is not None:
            if not isinstance(given, str) or given not in ARCHITECTURES:
                self._refuse("hf_architecture", given, f"one of {', '.join(ARCHITECTURES)}")
            return str(given)
        if self.get("num_experts"):
            return "Qwen3MoeForCausalLM"
        if self.get("qk_layernorm"):
            return "Qwen3ForCausalLM"
        if self.get("add_qkv_bias") and not self.get("add_bias_linear"):
            return "Qwen2ForCausalLM"
        return "LlamaForCausalLM"

    def _given(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is not None:
            return value
        if default is _UNSET:
            raise ValueError(f"{self.where}: args have no {name}; {_NEED}")
        return default

    def _refuse(self, name: str, value: Any, rule: str) -> None:
        raise ValueError(
            f"{self.where}: args have {name}={str(value)[:80]!r}, which must be {rule}; {_NEED}"
        )
