"""Decoders with experts: their routing, in which layers they are, and their weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from ...parallel import ModelSizes
from ..table import Row, gated_mlp, whole
from .argument_values import NEED, ArgumentValues
from .config_values import ConfigValues
from .hf_model import MAX_EXPERTS, HfModel
from .layer_patterns import read_pattern
from .layer_symbols import pattern_of_arguments

# What TransformerConfig and Megatron-LM's arguments call alike.
_SHARED = (
    *("moe_ffn_hidden_size", "moe_router_topk", "moe_router_score_function"),
    *("moe_router_enable_expert_bias", "moe_router_num_groups", "moe_router_group_topk"),
    *("moe_router_topk_scaling_factor", "moe_shared_expert_intermediate_size"),
    "moe_shared_expert_gate",
)
_ONE_WEIGHT = "Megatron-Core leaves one weight as it is"


@dataclass(frozen=True)
class ExpertNames:
    """Names of tensors within a layer.

    Attributes:
        block: of everything that a layer has in the place of an MLP.
        bias: of what is added to the scores by which experts are chosen, within the block.
        mlp: an expert's gate, what it multiplies, and the way down; of shared ones as well.
        shared: of the shared experts, which are one MLP.
    """

    block: str = "mlp."
    bias: str = "gate.e_score_correction_bias"
    mlp: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared: str = "shared_experts."


@dataclass(frozen=True, kw_only=True)
class ExpertsModel(HfModel):
    """As ``HfModel``, with experts in all of its layers or in some.

    Attributes:
        names: of the experts' tensors.
        keys: of a ``config.json`` for the number of experts, how many of them a token goes
            through, and their width.
        moe_router_score_function: of which scores of experts come, ``softmax`` or ``sigmoid``.
        moe_router_enable_expert_bias: whether experts are chosen by biased scores.
        moe_shared_expert_gate: whether a gate of its own weighs the shared experts.
        moe_ffn_hidden_size: width of an expert.
        moe_router_topk: experts that a token goes through.
        moe_layer_freq: for every layer 1 with experts, 0 with one MLP; None: all have experts.
        norm_topk_prob: whether the weights of the chosen experts add up to one.
        moe_router_num_groups: groups of experts, of which a token goes through some; None: all.
        moe_router_group_topk: how many of the groups.
        moe_router_topk_scaling_factor: of the weights of the chosen experts.
        moe_shared_expert_intermediate_size: width of the experts that every token goes through.
    """

    names: ClassVar[ExpertNames] = ExpertNames()
    keys: ClassVar[tuple[str, str, str]] = (
        *("num_experts", "num_experts_per_tok"),
        "moe_intermediate_size",
    )
    moe_router_score_function: ClassVar[str] = "softmax"
    moe_router_enable_expert_bias: ClassVar[bool] = False
    moe_shared_expert_gate: ClassVar[bool] = False

    num_experts: int = field()
    moe_ffn_hidden_size: int = field()
    moe_router_topk: int = field()
    moe_layer_freq: tuple[int, ...] | None = None
    norm_topk_prob: bool = True
    moe_router_num_groups: int | None = None
    moe_router_group_topk: int | None = None
    moe_router_topk_scaling_factor: float | None = None
    moe_shared_expert_intermediate_size: int | None = None

    @property
    def is_homogeneous(self) -> bool:
        """See ``Decoder``."""
        return self.moe_layer_freq is None

    def has_experts(self, layer: int) -> bool:
        """See ``Decoder``."""
        return self.moe_layer_freq is None or bool(self.moe_layer_freq[layer])

    # What config.json says, and back.

    @classmethod
    def read_config(cls, values: ConfigValues) -> dict[str, Any]:
        """See ``HfModel``."""
        fields = super().read_config(values)
        count, topk, width = cls.keys
        one, other = values.get(count), values.get("num_local_experts")
        if None not in (one, other) and one != other:
            values.problems.append(f"{count}={one!r} and num_local_experts={other!r} differ")
        num_experts = values.size(count if other is None else "num_local_experts", MAX_EXPERTS)
        chosen, is_normalised = values.size(topk, num_experts), cls.read_normalisation(values)
        if chosen == 1 and is_normalised:
            values.refused.append(f"{topk}=1 with weights that add up to one ({_ONE_WEIGHT})")
        return fields | dict(
            num_experts=num_experts,
            moe_router_topk=chosen,
            norm_topk_prob=is_normalised,
            moe_ffn_hidden_size=values.size(width),
            moe_layer_freq=cls.checked_pattern(
                cls.read_pattern(values, fields["num_layers"]), values
            ),
        )

    @classmethod
    def read_normalisation(cls, values: ConfigValues) -> bool:
        """Whether the weights of the chosen experts add up to one."""
        return True

    @classmethod
    def read_pattern(cls, values: ConfigValues, num_layers: int) -> tuple[int, ...]:
        """Of every layer whether it has experts."""
        return (1,) * num_layers

    @staticmethod
    def checked_pattern(pattern: tuple[int, ...], values: ConfigValues) -> tuple[int, ...] | None:
        """As ``moe_layer_freq`` holds it; a model without experts is left in ``values``."""
        if 1 not in pattern:
            values.refused.append("experts in no layer (at least one must have them)")
        return None if 0 not in pattern else pattern

    def config_json(self) -> dict[str, Any]:
        """See ``HfModel``."""
        sizes = self.num_experts, self.moe_router_topk, self.moe_ffn_hidden_size
        return super().config_json() | dict(zip(self.keys, sizes, strict=True))

    # What Megatron-LM's arguments say, and back.

    @classmethod
    def read_arguments(cls, read: ArgumentValues) -> dict[str, Any]:
        """See ``HfModel``."""
        count, topk = read.size("num_experts", high=MAX_EXPERTS), read.size("moe_router_topk")
        if topk > count:
            raise ValueError(
                f"{read.where}: args have moe_router_topk={topk} of num_experts={count}; {NEED}"
            )
        fields = super().read_arguments(read)
        is_normalised = not read.get("moe_router_pre_softmax")
        if topk == 1 and is_normalised:
            read.refuse("moe_router_topk", topk, f"above 1 without pre-softmax ({_ONE_WEIGHT})")
        width = read.size("moe_ffn_hidden_size", None) or read.size("ffn_hidden_size")
        return fields | dict(
            num_experts=count,
            moe_router_topk=topk,
            moe_ffn_hidden_size=width,
            moe_layer_freq=_pattern_of_arguments(read, fields["num_layers"]),
            norm_topk_prob=is_normalised,
        )

    def megatron_arguments(self) -> dict[str, Any]:
        """See ``HfModel``."""
        return super().megatron_arguments() | self._routing()

    # What Megatron-Core builds.

    @property
    def sizes(self) -> ModelSizes:
        """See ``Decoder``."""
        base = super().sizes
        widths = {} if self.moe_layer_freq is None else dict(base.widths)
        if self.moe_shared_expert_intermediate_size:
            name = "moe_shared_expert_intermediate_size"
            widths[name] = self.moe_shared_expert_intermediate_size
        return replace(
            base,
            widths=widths,
            expert_widths={"moe_ffn_hidden_size": self.moe_ffn_hidden_size},
            num_moe_experts=self.num_experts,
        )

    def transformer_config(self) -> dict[str, Any]:
        """See ``Decoder``."""
        settings = dict(
            num_moe_experts=self.num_experts,
            moe_router_load_balancing_type="none",
            moe_token_dispatcher_type="alltoall",
            moe_grouped_gemm=False,
        )
        if self.moe_router_enable_expert_bias:
            # A policy's bias stays as it is: rollouts are made with it.
            settings["moe_router_bias_update_rate"] = 0.0
        if self.moe_router_score_function == "sigmoid":
            # As transformers computes the scores.
            settings["moe_router_dtype"] = "fp32"
        return super().transformer_config() | self._routing() | settings

    def _routing(self) -> dict[str, Any]:
        """What arguments and configuration have one name for."""
        is_softmax = self.moe_router_score_function == "softmax"
        return {name: getattr(self, name) for name in _SHARED} | dict(
            # Softmax over all experts and no renormalisation, or softmax over the chosen.
            moe_router_pre_softmax=is_softmax and not self.norm_topk_prob,
            moe_layer_freq=1 if self.moe_layer_freq is None else list(self.moe_layer_freq),
        )

    # Which weights there are.

    def mlp_weights(self, layer: int, ours: str, theirs: str) -> Iterator[Row]:
        """See ``Decoder``."""
        if not self.has_experts(layer):
            yield from super().mlp_weights(layer, ours, theirs)
            return
        ours, theirs, hidden = f"{ours}mlp.", f"{theirs}{self.names.block}", self.hidden_size
        count = self.num_experts
        yield whole(f"{ours}router.weight", f"{theirs}gate.weight", (count, hidden))
        if self.moe_router_enable_expert_bias:
            bias = f"{theirs}{self.names.bias}"
            yield whole(f"{ours}router.expert_bias", bias, (count,), dtype=torch.float32)
        for expert in range(count):
            names = f"{ours}experts.local_experts.{expert}.", f"{theirs}experts.{expert}."
            yield from self.expert_weights(*names, self.moe_ffn_hidden_size)
        if self.moe_shared_expert_intermediate_size:
            names = f"{ours}shared_experts.", f"{theirs}{self.names.shared}"
            yield from self.expert_weights(*names, self.moe_shared_expert_intermediate_size)
        if self.moe_shared_expert_gate:
            gate = f"{theirs}shared_expert_gate.weight"
            yield whole(f"{ours}shared_experts.gate_weight", gate, (1, hidden))

    def expert_weights(self, ours: str, theirs: str, width: int) -> Iterator[Row]:
        """Rows of one expert of this width, or of those that every token takes."""
        return gated_mlp(ours, theirs, self.hidden_size, width, names=self.names.mlp)


def pattern_of_sparse_step(values: ConfigValues, num_layers: int) -> tuple[int, ...]:
    """The pattern that ``decoder_sparse_step`` and ``mlp_only_layers`` describe."""
    step = values.size("decoder_sparse_step", default=1)
    dense = values.get("mlp_only_layers") or []
    if not (isinstance(dense, list) and all(type(layer) is int for layer in dense)):
        values.problems.append(f"mlp_only_layers={dense!r:.40} must be numbers of layers")
        dense = []
    return tuple(int(i not in dense and (i + 1) % step == 0) for i in range(num_layers))


def sparse_step_json(model: ExpertsModel) -> dict[str, Any]:
    """The same keys for a ``config.json``."""
    dense = [i for i in range(model.num_layers) if not model.has_experts(i)]
    return dict(decoder_sparse_step=1, mlp_only_layers=dense)


def kind_of_experts(read: ArgumentValues) -> str | None:
    """Whose experts Megatron-LM's arguments describe; families know them by these words.

    Returns:
        ``hybrid`` in a pattern of layers, ``linear`` beside linear attention, ``latent`` beside
        latent attention, ``biased`` where scores are, ``sinks`` beside attention with them,
        ``gated`` where a gate weighs shared experts, ``plain`` for experts as wide as an MLP in
        layers of nothing else, ``own`` for all others, and None without experts.
    """
    if not read.get("num_experts"):
        return None
    if pattern_of_arguments(read):
        return "hybrid"
    if read.get("experimental_attention_variant") == "gated_delta_net":
        return "linear"
    if read.get("multi_latent_attention"):
        return "latent"
    if read.get("softmax_type") == "learnable":
        return "sinks"
    is_sigmoid = read.get("moe_router_score_function") == "sigmoid"
    if is_sigmoid and read.get("moe_router_enable_expert_bias"):
        return "biased"
    if read.get("softmax_type") not in (None, "vanilla"):
        return "sinks"
    if read.get("moe_shared_expert_gate"):
        return "gated"
    beyond = ("qk_layernorm", "add_qkv_bias", "add_bias_linear", "moe_router_pre_softmax")
    is_wide = read.get("moe_ffn_hidden_size") in (None, read.get("ffn_hidden_size"))
    return "plain" if is_wide and not any(map(read.get, beyond)) else "own"


def _pattern_of_arguments(read: ArgumentValues, num_layers: int) -> tuple[int, ...] | None:
    pattern = read_pattern(read, "moe_layer_freq", num_layers) or (1,) * num_layers
    if 1 not in pattern:
        read.refuse("moe_layer_freq", list(pattern), "1 for some layer")
    return None if 0 not in pattern else pattern
