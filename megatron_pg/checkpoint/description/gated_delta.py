"""Decoders of Gated DeltaNet layers, and of attention with an output gate in some."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...parallel import ModelSizes
from ..table import Piece, Row, columns, gated_qkv, outputs, whole
from .argument_values import ArgumentValues
from .config_values import ConfigValues
from .hf_model import HfModel
from .layer_patterns import read_pattern
from .window import NoWindows, Window

# What config.json, TransformerConfig and Megatron-LM's arguments call alike.
_KERNEL = "linear_conv_kernel_dim"
_SIZES = (
    *(_KERNEL, "linear_key_head_dim", "linear_value_head_dim"),
    *("linear_num_key_heads", "linear_num_value_heads"),
)
_KINDS = ("full_attention", "linear_attention")
# Every so many layers there is one of full attention, in files that name no layers.
_INTERVAL = 4


class _NoWindowsBesideLinear(NoWindows):
    """``layer_types`` is read for what it says of linear layers."""

    def read(self, values: ConfigValues, num_layers: int) -> Window | None:
        """See ``NoWindows``."""
        values.must("use_sliding_window", False, None)
        values.must("sliding_window", None)
        return None


@dataclass(frozen=True, kw_only=True)
class GatedDeltaModel(HfModel):
    """As ``HfModel``; its norms multiply by one plus their weight, but those of linear layers.

    Attributes:
        linear_attention: 1 for a layer with linear attention, 0 for one that attends.
        linear_conv_kernel_dim: tokens that the convolution before a state sees.
        linear_key_head_dim: of a head's query and key.
        linear_value_head_dim: of a head's value.
        linear_num_key_heads: of queries and keys.
        linear_num_value_heads: of values, and so of states.
    """

    own_defaults = ("num_key_value_heads", "head_dim")
    own_rotary_percent = 0.25
    qk_layernorm = True
    windows = _NoWindowsBesideLinear()

    linear_attention: tuple[int, ...]
    linear_conv_kernel_dim: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_num_key_heads: int
    linear_num_value_heads: int

    @property
    def is_homogeneous(self) -> bool:
        """See ``Decoder``; Megatron-Core stacks no layers of such a model."""
        return False

    def has_linear_attention(self, layer: int) -> bool:
        """See ``Decoder``."""
        return bool(self.linear_attention[layer])

    @property
    def may_carry(self) -> bool:
        """See ``HfModel``: no ``config.json`` need say that there are further layers."""
        return True

    def goes_along(self, name: str) -> bool:
        """See ``HfModel``."""
        return name.startswith("mtp.")

    # What config.json says, and back.

    @classmethod
    def read_config(cls, values: ConfigValues) -> dict[str, Any]:
        """See ``HfModel``."""
        fields = super().read_config(values)
        # A convolution over one token is none, and no model is built with it.
        sizes = {name: values.size(name, low=1 + (name == _KERNEL)) for name in _SIZES}
        keys, heads = sizes["linear_num_key_heads"], sizes["linear_num_value_heads"]
        if heads % keys:
            values.problems.append(
                f"linear_num_value_heads={heads} is no multiple of linear_num_key_heads={keys}"
            )
        layers = _read_layers(values, fields["num_layers"])
        return fields | sizes | dict(linear_attention=layers)

    def config_json(self) -> dict[str, Any]:
        """See ``HfModel``."""
        return super().config_json() | dict(
            **{name: getattr(self, name) for name in _SIZES},
            layer_types=[_KINDS[layer] for layer in self.linear_attention],
            partial_rotary_factor=self.rotary_percent,
        )

    # What Megatron-LM's arguments say, and back.

    @classmethod
    def read_arguments(cls, read: ArgumentValues) -> dict[str, Any]:
        """See ``HfModel``."""
        fields = super().read_arguments(read)
        name, count = "linear_attention_freq", fields["num_layers"]
        layers = read_pattern(read, name, count)
        if layers is None or 1 not in layers:
            read.refuse(name, read.get(name), "1 for some layer")
        return fields | dict(
            linear_attention=layers,
            rotary_percent=read.number("rotary_percent", 1.0),
            **{name: read.size(name) for name in _SIZES},
        )

    def megatron_arguments(self) -> dict[str, Any]:
        """See ``HfModel``."""
        return super().megatron_arguments() | self._own() | dict(apply_layernorm_1p=True)

    # What Megatron-Core builds.

    @property
    def sizes(self) -> ModelSizes:
        """See ``Decoder``."""
        heads = {name: getattr(self, name) for name in _SIZES if "num" in name}
        return replace(super().sizes, widths={**super().sizes.widths, **heads})

    def transformer_config(self) -> dict[str, Any]:
        """See ``Decoder``."""
        own = self._own() | dict(layernorm_zero_centered_gamma=True)
        return super().transformer_config() | own

    def _own(self) -> dict[str, Any]:
        """What arguments and configuration have one name for."""
        return dict(
            attention_output_gate=True,
            experimental_attention_variant="gated_delta_net",
            linear_attention_freq=list(self.linear_attention),
            **{name: getattr(self, name) for name in _SIZES},
        )

    # Which weights there are.

    def layer_weights(self, layer: int, ours: str, theirs: str) -> Iterator[Row]:
        """See ``Decoder``."""
        if not self.has_linear_attention(layer):
            yield from super().layer_weights(layer, ours, theirs)
            return
        for name, tensor in self.layer_norms.items():
            yield whole(f"{ours}{name}.weight", f"{theirs}{tensor}.weight", (self.hidden_size,))
        yield from self.linear_weights(f"{ours}self_attention.", f"{theirs}linear_attn.")
        yield from self.mlp_weights(layer, ours, theirs)

    def attention_weights(self, ours: str, theirs: str) -> Iterator[Row]:
        """See ``Decoder``; a head's gate lies behind its query."""
        heads, width, hidden = self.num_attention_heads, self.kv_channels, self.hidden_size
        sizes = dict(num_heads=heads, num_groups=self.num_query_groups, width=width)
        tensors = [f"{theirs}{part}_proj.weight" for part in "qkv"]
        yield gated_qkv(f"{ours}linear_qkv.weight", tensors, **sizes, rest=(hidden,))
        out = f"{ours}linear_proj.weight", f"{theirs}o_proj.weight"
        yield columns(*out, (hidden, heads * width))
        for part in "qk":
            norm = f"{ours}{part}_layernorm.weight", f"{theirs}{part}_norm.weight"
            yield whole(*norm, (width,))

    def linear_weights(self, ours: str, theirs: str) -> Iterator[Row]:
        """Rows of one layer's linear attention."""
        heads, key, value = self.linear_num_value_heads, self.key_width, self.value_width
        yield self.linear_input(f"{ours}in_proj.weight", theirs)
        conv, kernel = f"{theirs}conv1d.weight", self.linear_conv_kernel_dim
        blocks = cut_blocks(conv, (key, key, value))
        yield Row(f"{ours}conv1d.weight", {conv: (2 * key + value, 1, kernel)}, blocks)
        for name in ("A_log", "dt_bias"):
            yield outputs(f"{ours}{name}", f"{theirs}{name}", (heads,))
        # The only norm whose weight there is the factor, and here one less.
        norm = f"{ours}out_norm.weight", f"{theirs}norm.weight", (self.linear_value_head_dim,)
        yield whole(*norm, shift=-1.0)
        out = f"{ours}out_proj.weight", f"{theirs}out_proj.weight"
        yield columns(*out, (self.hidden_size, value))

    @abstractmethod
    def linear_input(self, ours: str, theirs: str) -> Row:
        """Of its first projection: queries, keys, values, gates, and two numbers a value head.

        Args:
            ours: name of the parameter.
            theirs: prefix of the tensors.
        """

    @property
    def key_width(self) -> int:
        """Of all queries of a linear layer, and of all keys."""
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def value_width(self) -> int:
        """Of all values of a linear layer, and of all gates."""
        return self.linear_num_value_heads * self.linear_value_head_dim


def cut_blocks(tensor: str, lengths: Sequence[int]) -> tuple[tuple[Piece, ...], ...]:
    """A tensor's rows in blocks of these lengths, one after the other."""
    stops = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return tuple((Piece(tensor, stop - n, stop),) for n, stop in zip(lengths, stops))


def _read_layers(values: ConfigValues, num_layers: int) -> tuple[int, ...]:
    """By name, or full attention every so many layers."""
    interval = values.size("full_attention_interval", default=_INTERVAL)
    layers = tuple(int((layer + 1) % interval != 0) for layer in range(num_layers))
    types = values.get("layer_types")
    if types is not None:
        is_list = isinstance(types, list) and len(types) == num_layers
        if not is_list or any(kind not in _KINDS for kind in types):
            values.problems.append(
                f"layer_types={types!r:.80} must name {' or '.join(_KINDS)} for all {num_layers} "
                "layers"
            )
            return layers
        layers = tuple(map(_KINDS.index, types))
    if 1 not in layers:
        values.refused.append("linear attention in no layer (at least one must have it)")
    return layers
