"""A decoder in Hugging Face's terms and in those of Megatron-LM's arguments."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

from ..table import WeightTable
from .argument_values import NEED, ArgumentValues
from .config_values import ConfigValues
from .decoder import Decoder
from .rope import (
    check_rotated,
    read_rope,
    read_rope_arguments,
    read_rotary_percent,
    rope_arguments,
    rope_json,
)
from .window import NoWindows, window_arguments

# Beyond every model of these architectures; they keep a damaged number from filling memory.
MAX_LAYERS, MAX_EXPERTS = 1000, 1000
# field -> key of config.json
_CONFIG_KEYS = dict(
    num_layers="num_hidden_layers",
    hidden_size="hidden_size",
    num_attention_heads="num_attention_heads",
    num_query_groups="num_key_value_heads",
    kv_channels="head_dim",
    layernorm_epsilon="rms_norm_eps",
    vocab_size="vocab_size",
    max_sequence_length="max_position_embeddings",
    tied="tie_word_embeddings",
)
# How transformers dequantises while it loads: quant_method -> its class.
_DEQUANTISE = dict(fp8="FineGrainedFP8Config", mxfp4="Mxfp4Config")


@dataclass(frozen=True, kw_only=True)
class HfModel(Decoder):
    """A decoder-only model that Hugging Face's ``config.json`` and ``GPTModel`` both describe.

    Equals the model of ``transformers``: building ``GPTModel`` from ``transformer_config()``,
    ``gpt_model()`` and loading the folder's weights gives the same logits.

    A family is a subclass, registered by its architecture.

    Attributes:
        architecture: Hugging Face's name, by which ``register`` knows the family.
        model_type: transformers' word for it.
        other_types: words for it of files that bring code of their own.
        default_rotary_base: what transformers takes where there is no ``rope_theta``.
        hidden_act: key and name of the activation.
        windows: how a ``config.json`` says which layers have one.
        own_defaults: keys for which transformers has a default that is no other key's value.
        own_rotary_percent: ``partial_rotary_factor`` where a file has none; None where a family
            rotates whole heads.
        own_tied: ``tie_word_embeddings`` where a file has none.
        ffn_key: of the width of an MLP.
        symbols: of layers in the pattern of a hybrid; empty in families that have none.
        mtp_num_layers: layers that predict further tokens; they are not built, and their tensors
            go along as they are.
    """

    architecture: ClassVar[str]
    model_type: ClassVar[str]
    other_types: ClassVar[tuple[str, ...]] = ()
    default_rotary_base: ClassVar[float] = 10000.0
    hidden_act: ClassVar[tuple[str, str]] = ("hidden_act", "silu")
    windows: ClassVar[NoWindows] = NoWindows()
    own_defaults: ClassVar[tuple[str, ...]] = ("num_key_value_heads",)
    own_rotary_percent: ClassVar[float | None] = None
    own_tied: ClassVar[bool] = False
    ffn_key: ClassVar[str] = "intermediate_size"
    symbols: ClassVar[str] = ""

    mtp_num_layers: int = 0

    @property
    def may_carry(self) -> bool:
        """Whether there may be tensors that go along."""
        return bool(self.mtp_num_layers)

    def goes_along(self, name: str) -> bool:
        """Whether a tensor is of a layer that is not built."""
        match = re.match(r"model\.layers\.(\d{1,9})\.", name)
        layer = int(match[1]) - self.num_layers if match else -1
        return 0 <= layer < self.mtp_num_layers

    def weight_table(self, padded_vocab_size: int | None = None) -> WeightTable:
        """Which rows of which tensors make up which parameter.

        Args:
            padded_vocab_size: rows of Megatron's embedding over all ranks; None: not padded.
        """
        return WeightTable(self.weights(padded_vocab_size or self.vocab_size), self.architecture)

    # What config.json says, and back.

    @classmethod
    def of_config(cls, values: ConfigValues) -> type[HfModel]:
        """The class of the model that a ``config.json`` describes, of those that a family has."""
        return cls

    @classmethod
    def read_config(cls, values: ConfigValues) -> dict[str, Any]:
        """Fields (but the dtype) from a ``config.json``; what is wrong is left in ``values``.

        Raises:
            ValueError: of ``read_rope``.
            NotImplementedError: likewise.
        """
        fields = dict(
            num_layers=values.size("num_hidden_layers", MAX_LAYERS),
            ffn_hidden_size=values.size(cls.ffn_key),
            layernorm_epsilon=values.number("rms_norm_eps", 1e-20, 1.0),
            vocab_size=values.size("vocab_size"),
            max_sequence_length=values.size("max_position_embeddings"),
            tied=values.flag("tie_word_embeddings", cls.own_tied),
            add_bias_linear=cls.read_bias(values),
            **cls.read_heads(values),
        )
        values.require(*cls.own_defaults)
        values.must(*cls.hidden_act)
        if quantised := values.section("quantization_config"):
            values.refused.append(_about_quantised(quantised))
        fields["window"] = cls.windows.read(values, fields["num_layers"])
        percent = read_rotary_percent(values, cls.own_rotary_percent)
        check_rotated(fields["kv_channels"], percent, values)
        return fields | cls.read_positions(values) | dict(rotary_percent=percent)

    @classmethod
    def read_positions(cls, values: ConfigValues) -> dict[str, Any]:
        """Fields of rotary positions from a ``config.json``.

        Raises:
            ValueError: of ``read_rope``.
            NotImplementedError: likewise.
        """
        return read_rope(values, cls.default_rotary_base)

    @classmethod
    def read_heads(cls, values: ConfigValues) -> dict[str, Any]:
        """Fields of the model's width and of its heads."""
        heads, hidden = values.size("num_attention_heads"), values.size("hidden_size")
        groups = values.size("num_key_value_heads", default=heads)
        width = values.size("head_dim", default=None)
        if heads % groups:
            values.problems.append(
                f"num_attention_heads={heads} is no multiple of num_key_value_heads={groups}"
            )
        if width is None and hidden % heads:
            values.problems.append(
                f"hidden_size={hidden} is no multiple of num_attention_heads={heads}, and there is "
                "no head_dim"
            )
        return dict(
            hidden_size=hidden,
            num_attention_heads=heads,
            num_query_groups=groups,
            kv_channels=width or hidden // heads,
        )

    @classmethod
    def read_bias(cls, values: ConfigValues) -> bool:
        """Whether all linear layers have biases: Megatron-Core's only other way is qkv alone."""
        for key in ("attention_bias", "mlp_bias"):
            if values.flag(key):
                values.refused.append(f"{key}=True (must be false for {cls.architecture})")
        return False

    def config_json(self) -> dict[str, Any]:
        """A ``config.json`` for this model."""
        return dict(
            architectures=[self.architecture],
            model_type=self.model_type,
            **dict([self.hidden_act]),
            **{key: getattr(self, field) for field, key in _CONFIG_KEYS.items()},
            **{self.ffn_key: self.ffn_hidden_size},
            torch_dtype=str(self.dtype).removeprefix("torch."),
            **self.windows.config_json(self.window, self.num_layers),
            **rope_json(self.rope_type, self.rope_factor, self.rotary_base, self.yarn),
        )

    # What Megatron-LM's arguments say, and back.

    @classmethod
    def is_of_arguments(cls, read: ArgumentValues) -> bool:
        """Whether layers are such as these arguments describe, where they name no architecture."""
        return False

    @classmethod
    def of_arguments(cls, read: ArgumentValues) -> type[HfModel]:
        """As ``of_config``, of the model that these arguments describe."""
        return cls

    @classmethod
    def read_arguments(cls, read: ArgumentValues) -> dict[str, Any]:
        """Fields (but the dtype) from Megatron-LM's arguments.

        Raises:
            ValueError: an argument is missing, or no value of its kind.
        """
        # Held against the model afterwards, for families without experts too.
        read.size("num_experts", None, MAX_EXPERTS)
        num_layers = read.size("num_layers", high=MAX_LAYERS)
        heads = read.size("num_attention_heads")
        groups = read.size("num_query_groups") if read.get("group_query_attention") else heads
        if heads % groups:
            raise ValueError(
                f"{read.where}: args have num_attention_heads={heads}, no multiple of "
                f"num_query_groups={groups}; {NEED}"
            )
        return dict(
            num_layers=num_layers,
            hidden_size=read.size("hidden_size"),
            ffn_hidden_size=read.size("ffn_hidden_size"),
            num_attention_heads=heads,
            num_query_groups=groups,
            kv_channels=read.size("kv_channels", None) or read.size("hidden_size") // heads,
            layernorm_epsilon=read.number("norm_epsilon", None) or read.number("layernorm_epsilon"),
            vocab_size=read.size("vocab_size", None) or read.size("padded_vocab_size"),
            max_sequence_length=read.size("max_position_embeddings"),
            tied=not read.get("untie_embeddings_and_output_weights"),
            add_bias_linear=bool(read.get("add_bias_linear")),
            window=cls.windows.read_arguments(read, num_layers),
            **read_rope_arguments(read),
        )

    def megatron_arguments(self) -> dict[str, Any]:
        """Megatron-LM's arguments for it: those that decide what the same weights compute."""
        return dict(
            **self.in_megatron(),
            normalization="RMSNorm",
            norm_epsilon=self.layernorm_epsilon,
            apply_layernorm_1p=False,
            swiglu=True,
            squared_relu=False,
            untie_embeddings_and_output_weights=not self.tied,
            num_experts=self.num_experts,
            rotary_percent=self.rotary_percent,
            **window_arguments(self.window),
            **self.rope_arguments(),
        )

    def rope_arguments(self) -> dict[str, Any]:
        """Those of them that are of rotary positions."""
        return rope_arguments(self.rope_type, self.rope_factor, self.rotary_base, self.yarn)


def _about_quantised(section: dict[str, Any]) -> str:
    """Why such weights are refused, and how they become what is read."""
    method = section.get("quant_method")
    told = (
        f"quantization_config of {method!r}: weights are read in bfloat16, float16 or float32; "
        "dequantise the model first"
    )
    name = _DEQUANTISE.get(method) if isinstance(method, str) else None
    if name is None:
        return told
    return told + (
        f": from_pretrained(..., dtype='bfloat16', quantization_config={name}(dequantize=True)) of "
        "transformers, then save_pretrained"
    )
