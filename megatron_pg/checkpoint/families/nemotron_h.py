"""Nemotron-H: Mamba-2, attention without positions, MLPs of squared ReLU, experts of the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from megatron.core.activations import squared_relu

from ..description import (
    ArgumentValues,
    BiasedExpertsModel,
    ConfigValues,
    ExpertNames,
    HfModel,
    MambaModel,
    checked_symbols,
    group_problems,
    pattern_of_arguments,
    register,
    symbols_json,
    symbols_of_arguments,
    symbols_of_config,
)
from ..table import Row, columns, outputs, whole

# What Megatron-Core has in Mamba-2 layers whatever its configuration says.
_EPSILON = 1e-5
_ONE_EPSILON = "Megatron-Core's of gated norms, and a config.json has one for all norms"
# Of experts, which need not be in any layer.
_OF_EXPERTS = (
    *("n_routed_experts", "n_shared_experts", "moe_intermediate_size", "moe_latent_size"),
    *("moe_shared_expert_intermediate_size", "moe_shared_expert_overlap", "num_experts_per_tok"),
    *("n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor"),
)
# Of kernels, of weights that begin, and of positions, which no layer has.
_IDLE = (
    *("chunk_size", "expand", "mamba_ssm_cache_dtype", "use_mamba_kernels", "num_logits_to_keep"),
    *("time_step_min", "time_step_max", "time_step_floor", "time_step_limit", "time_step_rank"),
    *("rescale_prenorm_residual", "mtp_layers_block_type", "mtp_hybrid_override_pattern"),
    *("rope_theta", "partial_rotary_factor"),
)
_SHARED = "moe_shared_expert_intermediate_size"


@register("NemotronHForCausalLM", "nemotron_h")
@dataclass(frozen=True, kw_only=True)
class NemotronH(MambaModel):
    """A layer has a Mamba-2 mixer, or attention, or an MLP, by a pattern.

    Attributes:
        pattern: "M", "*" or "-" of every layer, or "E" of those with experts.
    """

    has_positions: ClassVar[bool] = False
    embedding: ClassVar[str] = "backbone.embeddings.weight"
    layers: ClassVar[str] = "backbone.layers."
    last_norm: ClassVar[tuple[str, str]] = "decoder.final_norm.weight", "backbone.norm_f.weight"
    symbols: ClassVar[str] = "M*-"

    pattern: str

    @property
    def is_homogeneous(self) -> bool:
        """See ``Decoder``."""
        return False

    @property
    def is_hybrid(self) -> bool:
        """See ``Decoder``."""
        return True

    # What config.json says, and back.

    @classmethod
    def of_config(cls, values: ConfigValues) -> type[HfModel]:
        """See ``HfModel``."""
        return NemotronHMoe if "E" in symbols_of_config(values) else NemotronH

    @classmethod
    def read_config(cls, values: ConfigValues) -> dict[str, Any]:
        """See ``HfModel``."""
        pattern = checked_symbols(values)
        values.take_as("head_dim", older="attention_head_dim")
        values.require("num_key_value_heads", "head_dim")
        values.must("mlp_hidden_act", "relu2")
        values.must("layer_norm_epsilon", _EPSILON)
        for key in ("norm_eps", "rms_norm_eps"):
            values.must(key, _EPSILON, None)
        values.must("num_nextn_predict_layers", 0, None)
        values.must("sliding_window", None)
        values.must("hidden_dropout", 0.0, 0, None)
        for key in ("attention_bias", "mlp_bias", "use_bias"):
            values.must(key, False, None)
        values.must("residual_in_fp32", False, None)
        for key in (*_IDLE, *_OF_EXPERTS):
            values.get(key)
        return dict(
            pattern=pattern,
            num_layers=len(pattern),
            ffn_hidden_size=values.size(cls.ffn_key),
            layernorm_epsilon=_EPSILON,
            vocab_size=values.size("vocab_size"),
            max_sequence_length=values.size("max_position_embeddings"),
            tied=values.flag("tie_word_embeddings"),
            **cls.read_heads(values),
            **cls.read_mamba(values),
        )

    def config_json(self) -> dict[str, Any]:
        """See ``HfModel``."""
        return dict(
            architectures=[self.architecture],
            model_type=self.model_type,
            **symbols_json(self.pattern),
            hidden_size=self.hidden_size,
            intermediate_size=self.ffn_hidden_size,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_query_groups,
            head_dim=self.kv_channels,
            layer_norm_epsilon=self.layernorm_epsilon,
            vocab_size=self.vocab_size,
            max_position_embeddings=self.max_sequence_length,
            tie_word_embeddings=self.tied,
            torch_dtype=str(self.dtype).removeprefix("torch."),
            **self.mamba_json(),
        )

    # What Megatron-LM's arguments say, and back.

    @classmethod
    def is_of_arguments(cls, read: ArgumentValues) -> bool:
        """See ``HfModel``: any pattern over such MLPs; other kinds of layers are refused then."""
        return bool(pattern_of_arguments(read) and read.get("squared_relu"))

    @classmethod
    def of_arguments(cls, read: ArgumentValues) -> type[HfModel]:
        """See ``HfModel``."""
        return NemotronHMoe if "E" in str(pattern_of_arguments(read)) else NemotronH

    @classmethod
    def read_arguments(cls, read: ArgumentValues) -> dict[str, Any]:
        """See ``HfModel``."""
        pattern = symbols_of_arguments(read, cls.symbols)
        heads = read.size("num_attention_heads")
        groups = read.size("num_query_groups") if read.get("group_query_attention") else heads
        epsilon = read.number("norm_epsilon", None) or read.number("layernorm_epsilon")
        if epsilon != _EPSILON:
            read.refuse("norm_epsilon", epsilon, f"{_EPSILON} ({_ONE_EPSILON})")
        return dict(
            pattern=pattern,
            num_layers=len(pattern),
            hidden_size=read.size("hidden_size"),
            ffn_hidden_size=read.size("ffn_hidden_size"),
            num_attention_heads=heads,
            num_query_groups=groups,
            kv_channels=read.size("kv_channels", None) or read.size("hidden_size") // heads,
            layernorm_epsilon=epsilon,
            vocab_size=read.size("vocab_size", None) or read.size("padded_vocab_size"),
            max_sequence_length=read.size("max_position_embeddings"),
            tied=not read.get("untie_embeddings_and_output_weights"),
            **cls.read_mamba_arguments(read),
        )

    def megatron_arguments(self) -> dict[str, Any]:
        """See ``HfModel``."""
        return dict(
            **self.in_megatron(),
            **self.mamba_sizes(),
            is_hybrid_model=True,
            hybrid_layer_pattern=self.pattern,
            normalization="RMSNorm",
            norm_epsilon=self.layernorm_epsilon,
            apply_layernorm_1p=False,
            swiglu=False,
            squared_relu=True,
            untie_embeddings_and_output_weights=not self.tied,
            num_experts=self.num_experts,
            position_embedding_type="none",
        )

    # What Megatron-Core builds.

    def transformer_config(self) -> dict[str, Any]:
        """See ``Decoder``."""
        mlp = dict(gated_linear_unit=False, activation_func=squared_relu)
        own = dict(is_hybrid_model=True, **self.mamba_sizes())
        return super().transformer_config() | mlp | own

    def gpt_model(
        self, *, tp_size: int = 1, make_vocab_size_divisible_by: int = 1
    ) -> dict[str, Any]:
        """See ``Decoder``; of ``HybridModel``."""
        return dict(
            vocab_size=self.padded_vocab_size(tp_size, make_vocab_size_divisible_by),
            max_sequence_length=self.max_sequence_length,
            position_embedding_type="none",
            share_embeddings_and_output_weights=self.tied,
            hybrid_layer_pattern=self.pattern,
        )

    # Which weights there are.

    def layer_weights(self, layer: int, ours: str, theirs: str) -> Iterator[Row]:
        """See ``Decoder``; one norm, and what follows it."""
        symbol, mixer = self.pattern[layer], f"{theirs}mixer."
        norm = {"M": "norm", "*": "input_layernorm"}.get(symbol, "pre_mlp_layernorm")
        yield whole(f"{ours}{norm}.weight", f"{theirs}norm.weight", (self.hidden_size,))
        if symbol == "M":
            yield from self.mamba_weights(f"{ours}mixer.", mixer)
        elif symbol == "*":
            yield from self.attention_weights(f"{ours}self_attention.", mixer)
        else:
            yield from self.mlp_weights(layer, ours, theirs)

    def mlp_weights(self, layer: int, ours: str, theirs: str) -> Iterator[Row]:
        """See ``Decoder``."""
        return _mlp(f"{ours}mlp.", f"{theirs}mixer.", self.hidden_size, self.ffn_hidden_size)


@dataclass(frozen=True, kw_only=True)
class NemotronHMoe(BiasedExpertsModel, NemotronH):
    """As ``NemotronH``, with experts in the place of some MLPs, one of which every token takes.

    The pattern says which layers have them; Megatron's ``moe_layer_freq`` says it once more, for
    what counts them.
    """

    names = ExpertNames(block="mixer.")
    symbols: ClassVar[str] = "M*-E"

    @property
    def is_homogeneous(self) -> bool:
        """See ``Decoder``."""
        return False

    @classmethod
    def read_config(cls, values: ConfigValues) -> dict[str, Any]:
        """See ``HfModel``."""
        if (size := values.get("moe_latent_size")) is not None:
            values.refused.append(
                f"moe_latent_size={size!r} (Megatron-Core has experts behind a latent with "
                "Transformer Engine alone, where it is not proven what packed rows become of them)"
            )
        values.must("n_shared_experts", 1)
        return super().read_config(values) | {_SHARED: values.size(_SHARED)}

    @classmethod
    def read_pattern(cls, values: ConfigValues, num_layers: int) -> tuple[int, ...]:
        """See ``ExpertsModel``."""
        return _has_experts(symbols_of_config(values))

    def config_json(self) -> dict[str, Any]:
        """See ``HfModel``."""
        said = super().config_json()
        del said["first_k_dense_replace"]
        return said | {"n_shared_experts": 1, _SHARED: self.moe_shared_expert_intermediate_size}

    @classmethod
    def read_arguments(cls, read: ArgumentValues) -> dict[str, Any]:
        """See ``HfModel``."""
        read.size(_SHARED)
        fields = super().read_arguments(read)
        layers = _has_experts(fields["pattern"])
        return fields | dict(moe_layer_freq=layers if 0 in layers else None)

    @classmethod
    def inexpressible(cls, fields: dict[str, Any]) -> Iterator[str]:
        """See ``BiasedExpertsModel``; widths and layers are free."""
        return group_problems(fields)

    def expert_weights(self, ours: str, theirs: str, width: int) -> Iterator[Row]:
        """See ``ExpertsModel``."""
        return _mlp(ours, theirs, self.hidden_size, width)


def _mlp(ours: str, theirs: str, hidden: int, width: int) -> Iterator[Row]:
    """Rows of an MLP, or of one expert, without a gate."""
    shape = width, hidden
    yield outputs(f"{ours}linear_fc1.weight", f"{theirs}up_proj.weight", shape)
    yield columns(f"{ours}linear_fc2.weight", f"{theirs}down_proj.weight", shape[::-1])


def _has_experts(symbols: str) -> tuple[int, ...]:
    return tuple(int(symbol == "E") for symbol in symbols)
