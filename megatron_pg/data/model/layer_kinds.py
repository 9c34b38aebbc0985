"""What every layer of a model is made of, whichever way its model says so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

LinearRule = Literal["gated_delta", "state_space"]
_NAMES = {
    "attention": "attention",
    "gated_delta": "Gated DeltaNet",
    "state_space": "Mamba-2",
    "dense": "an MLP",
    "experts": "experts",
}


@dataclass(frozen=True, slots=True)
class LayerKind:
    """What tells a layer of a model from others of it.

    Attributes:
        mixer: what brings tokens together: "attention", or the rule by which a state is carried
            along in its place; None in a layer that has an MLP alone.
        mlp: "dense", or "experts" in its place; None in a layer that has a mixer alone.
    """

    mixer: Literal["attention"] | LinearRule | None = "attention"
    mlp: Literal["dense", "experts"] | None = "dense"

    def __str__(self) -> str:
        """Its parts by their names."""
        return " and ".join(_NAMES[part] for part in (self.mixer, self.mlp) if part is not None)

    @property
    def attends(self) -> bool:
        """Whether it has keys and values."""
        return self.mixer == "attention"

    @property
    def is_linear(self) -> bool:
        """Whether it has a state."""
        return self.rule is not None

    @property
    def rule(self) -> LinearRule | None:
        """Of its state; None without one."""
        return None if self.mixer == "attention" else self.mixer

    @property
    def has_experts(self) -> bool:
        """Whether it has experts."""
        return self.mlp == "experts"


# What a ``config.json`` calls layers of a hybrid, and their symbols in a ``HybridModel``'s pattern.
HYBRID_SYMBOLS = {
    "linear_attention": "M",
    "mamba": "M",
    "full_attention": "*",
    "attention": "*",
    "mlp": "-",
    "moe": "E",
}
_OF_HYBRIDS = {
    "*": LayerKind(mlp=None),
    "G": LayerKind("gated_delta", mlp=None),
    "M": LayerKind("state_space", mlp=None),
    "-": LayerKind(mixer=None),
    "E": LayerKind(mixer=None, mlp="experts"),
}


def layer_kinds(config: Any, hybrid_layer_pattern: str | None = None) -> list[LayerKind]:
    """Of every layer of a model.

    Args:
        config: ``TransformerConfig``.
        hybrid_layer_pattern: of a ``HybridModel``; None for a ``GPTModel``.

    Raises:
        NotImplementedError: on a symbol of the pattern that is no layer of packed rows.
    """
    if hybrid_layer_pattern is not None:
        layers = hybrid_layer_pattern.replace("|", "")
        if unknown := sorted(set(layers) - _OF_HYBRIDS.keys()):
            raise NotImplementedError(
                f"hybrid_layer_pattern={hybrid_layer_pattern!r}: layers {', '.join(unknown)} are "
                f"not known; make it of {', '.join(_OF_HYBRIDS)}"
            )
        return [_OF_HYBRIDS[symbol] for symbol in layers]
    number: int = config.num_layers
    experts = expert_pattern(config)
    linear = [False] * number
    if getattr(config, "experimental_attention_variant", None) == "gated_delta_net":
        linear = linear_pattern(config.linear_attention_freq, number)
    return [
        LayerKind("gated_delta" if is_linear else "attention", "experts" if has_them else "dense")
        for is_linear, has_them in zip(linear, experts)
    ]


def linear_pattern(pattern: int | list[int], num_layers: int) -> list[bool]:
    """What ``linear_attention_freq`` says: 1 for every such layer, or every so many attend."""
    if isinstance(pattern, int):
        return [(layer + 1) % pattern != 0 for layer in range(num_layers)]
    return [bool(is_linear) for is_linear in pattern]


def expert_pattern(config: Any) -> list[bool]:
    """Of every layer of a ``GPTModel`` whether it has experts, as ``moe_layer_freq`` says."""
    number: int = config.num_layers
    if not config.num_moe_experts:
        return [False] * number
    pattern = config.moe_layer_freq
    if isinstance(pattern, int):
        return [layer % pattern == 0 for layer in range(number)]
    return [bool(has_them) for has_them in pattern]


def active_ffn_hidden_size(config: Any, kind: LayerKind) -> int:
    """Width of the MLP that one token goes through in a layer: of all its experts together.

    Shared ones are among them.

    Args:
        config: ``TransformerConfig``.
        kind: of the layer.
    """
    if kind.mlp is None:
        return 0
    if kind.mlp == "dense":
        return int(config.ffn_hidden_size)
    experts = config.moe_router_topk * (config.moe_ffn_hidden_size or config.ffn_hidden_size)
    return int(experts + (config.moe_shared_expert_intermediate_size or 0))
