"""Decoders whose keys and values come out of a latent (multi-latent attention)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..table import Row, columns, outputs, whole
from .argument_values import ArgumentValues
from .config_values import ConfigValues
from .hf_model import HfModel
from .rope import rope_arguments
from .yarn import Yarn

# field -> key of config.json
_KEYS = dict(
    q_lora_rank="q_lora_rank",
    kv_lora_rank="kv_lora_rank",
    qk_head_dim="qk_nope_head_dim",
    qk_pos_emb_head_dim="qk_rope_head_dim",
    v_head_dim="v_head_dim",
)
# Of latents' norms in transformers, whatever a file says of layers'.
_EPSILON = 1e-6
_ARGUMENT = "hf_latent_layernorm_epsilon"
_YARN = ("original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")


@dataclass(frozen=True, kw_only=True)
class LatentModel(HfModel):
    """As ``HfModel``, with such attention in all layers.

    Attributes:
        q_lora_rank: width of the queries' own latent; None: queries have none.
        kv_lora_rank: width of the latent.
        qk_head_dim: of a head's query and key, what no position rotates.
        qk_pos_emb_head_dim: of them, what is rotated; heads share it in keys.
        v_head_dim: of a head's value.
    """

    is_latent = True
    qk_layernorm = True

    q_lora_rank: int | None = None
    kv_lora_rank: int
    qk_head_dim: int
    qk_pos_emb_head_dim: int
    v_head_dim: int

    # What config.json says, and back.

    @classmethod
    def read_config(cls, values: ConfigValues) -> dict[str, Any]:
        """See ``HfModel``."""
        fields = super().read_config(values)
        values.require("q_lora_rank")
        # Otherwise weights would stand in another order.
        values.must("rope_interleave", True)
        if fields["rope_type"] not in ("default", "yarn", "dynamic"):
            kind = fields["rope_type"]
            values.refused.append(f"rope type {kind!r} (latent attention knows yarn alone)")
        if fields["yarn"] is not None and not fields["yarn"].truncate:
            values.refused.append("truncate=False (latent attention rounds yarn's range)")
        return fields

    @classmethod
    def read_heads(cls, values: ConfigValues) -> dict[str, Any]:
        """See ``HfModel``; keys that follow from others must."""
        heads = values.size("num_attention_heads")
        sizes = {field: values.size(key) for field, key in _KEYS.items() if field != "q_lora_rank"}
        plain, rotated = sizes["qk_head_dim"], sizes["qk_pos_emb_head_dim"]
        if rotated % 2:
            values.problems.append(f"qk_rope_head_dim={rotated} must be even")
        values.must("num_key_value_heads", heads, None)
        values.must("head_dim", rotated, None)
        values.must("qk_head_dim", plain + rotated, None)
        return sizes | dict(
            hidden_size=values.size("hidden_size"),
            num_attention_heads=heads,
            num_query_groups=heads,
            kv_channels=plain,
            q_lora_rank=values.size("q_lora_rank", default=None),
        )

    def config_json(self) -> dict[str, Any]:
        """See ``HfModel``."""
        sizes = {key: getattr(self, field) for field, key in _KEYS.items()}
        rest = {key: x for key, x in super().config_json().items() if key != "head_dim"}
        return rest | sizes | dict(rope_interleave=True)

    # What Megatron-LM's arguments say, and back.

    @classmethod
    def read_arguments(cls, read: ArgumentValues) -> dict[str, Any]:
        """See ``HfModel``."""
        sizes = {field: read.size(field) for field in _KEYS if field != "q_lora_rank"}
        fields = super().read_arguments(read)
        if _EPSILON not in (fields["layernorm_epsilon"], read.get(_ARGUMENT)):
            epsilon = fields["layernorm_epsilon"]
            read.refuse("norm_epsilon", epsilon, f"{_EPSILON} (latents are normalised with it)")
        return (
            fields
            | _read_rope_arguments(read)
            | sizes
            | dict(kv_channels=sizes["qk_head_dim"], q_lora_rank=read.size("q_lora_rank", None))
        )

    def rope_arguments(self) -> dict[str, Any]:
        """See ``HfModel``."""
        kind = "dynamic" if self.rope_type == "dynamic" else "default"
        return rope_arguments(kind, self.rope_factor, self.rotary_base, None) | self._rope()

    def megatron_arguments(self) -> dict[str, Any]:
        """See ``HfModel``."""
        own = None if self.layernorm_epsilon == _EPSILON else _EPSILON
        return super().megatron_arguments() | self._sizes() | {_ARGUMENT: own}

    # What Megatron-Core builds.

    def in_megatron(self) -> dict[str, Any]:
        """See ``Decoder``; a head has several widths."""
        return {name: x for name, x in super().in_megatron().items() if name != "kv_channels"}

    def rope_config(self) -> dict[str, Any]:
        """See ``Decoder``; layers make their own positions."""
        return self._rope() | dict(rotary_base=self.rotary_base, rotary_percent=1.0)

    def transformer_config(self) -> dict[str, Any]:
        """See ``Decoder``."""
        settings = super().transformer_config() | self._sizes()
        if self.layernorm_epsilon != _EPSILON:
            settings["latent_layernorm_epsilon"] = _EPSILON
        return settings

    def _sizes(self) -> dict[str, Any]:
        return dict(multi_latent_attention=True) | {field: getattr(self, field) for field in _KEYS}

    def _rope(self) -> dict[str, Any]:
        """Positions, in words of arguments and of ``MLATransformerConfig``."""
        if self.yarn is None:
            # The factor would scale the scores all the same.
            return dict(rope_type="rope", rotary_scaling_factor=1.0, mscale=1.0, mscale_all_dim=0.0)
        settings = {name: getattr(self.yarn, name) for name in _YARN}
        return settings | dict(rope_type="yarn", rotary_scaling_factor=self.rope_factor)

    # Which weights there are.

    def attention_weights(self, ours: str, theirs: str) -> Iterator[Row]:
        """See ``Decoder``."""
        heads, hidden, latent = self.num_attention_heads, self.hidden_size, self.kv_lora_rank
        query = heads * (self.qk_head_dim + self.qk_pos_emb_head_dim)
        if self.q_lora_rank is None:
            names = f"{ours}linear_q_proj.weight", f"{theirs}q_proj.weight"
            yield outputs(*names, (query, hidden), heads)
        else:
            rank = self.q_lora_rank
            names = f"{ours}linear_q_down_proj.weight", f"{theirs}q_a_proj.weight"
            yield outputs(*names, (rank, hidden))
            norm = f"{theirs}q_a_layernorm.weight"
            yield whole(f"{ours}q_layernorm.weight", norm, (rank,))
            names = f"{ours}linear_q_up_proj.weight", f"{theirs}q_b_proj.weight"
            yield outputs(*names, (query, rank), heads)
        down = f"{theirs}kv_a_proj_with_mqa.weight"
        shape = latent + self.qk_pos_emb_head_dim, hidden
        yield outputs(f"{ours}linear_kv_down_proj.weight", down, shape)
        yield whole(f"{ours}kv_layernorm.weight", f"{theirs}kv_a_layernorm.weight", (latent,))
        up = f"{theirs}kv_b_proj.weight"
        shape = heads * (self.qk_head_dim + self.v_head_dim), latent
        yield outputs(f"{ours}linear_kv_up_proj.weight", up, shape, heads)
        shape = hidden, heads * self.v_head_dim
        yield columns(f"{ours}linear_proj.weight", f"{theirs}o_proj.weight", shape)


def _read_rope_arguments(read: ArgumentValues) -> dict[str, Any]:
    """Latent attention's own words for YaRN."""
    kind = read.get("rope_type")
    if kind not in (None, "yarn", "rope"):
        read.refuse("rope_type", kind, "rope or yarn")
    if kind == "rope":
        return {}
    scale = read.get("mscale_all_dim")
    yarn = Yarn(
        original_max_position_embeddings=read.size("original_max_position_embeddings", 4096),
        beta_fast=read.number("beta_fast", 32.0),
        beta_slow=read.number("beta_slow", 1.0),
        mscale=read.number("mscale", 1.0),
        mscale_all_dim=read.number("mscale_all_dim") if scale else 0.0,
    )
    return dict(rope_type="yarn", rope_factor=read.number("rotary_scaling_factor"), yarn=yarn)
