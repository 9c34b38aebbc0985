"""MLPs of every layer, experts among them: what a token goes through, and what is held."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_pg.data import ExpertSizes, LayerKind, RouteShape
from tools.sharing.hybrids import hf_pattern, hybrid_kinds, megatron_pattern
from tools.sharing.layers import checked_pattern, refuse

_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True, kw_only=True)
class Mlps:
    """Widths of a model's MLPs.

    Attributes:
        used: of every layer, what one token goes through: all its experts together, shared ones
            included; 0 without an MLP.
        held: of every layer, all experts together.
        shared: of every layer, what every token goes through: shared experts where it has experts.
        experts: of the layers that have some; None without.
        divided: what tensor parallelism divides, by name.
    """

    used: tuple[int, ...]
    held: tuple[int, ...]
    shared: tuple[int, ...]
    experts: ExpertSizes | None
    divided: dict[str, int]

    @classmethod
    def dense(cls, width: int, num_layers: int) -> Mlps:
        """One MLP in every layer."""
        each = (width,) * num_layers
        widths = {"ffn_hidden_size": width}
        return cls(used=each, held=each, shared=each, experts=None, divided=widths)

    @property
    def routes(self) -> RouteShape | None:
        """Of a token; None without experts."""
        if self.experts is None:
            return None
        has_experts = tuple(map(self.has_experts, range(len(self.used))))
        return RouteShape(self.experts.number, self.experts.topk, has_experts)

    def has_experts(self, layer: int) -> bool:
        """Whether a layer has some."""
        return self.used[layer] > self.shared[layer]


@dataclass(frozen=True)
class _Experts:
    """How many there are and how many a token goes through; widths of one and of shared ones."""

    num: int
    topk: int
    width: int
    shared: int


def hf_mlps(values: Mapping[str, Any]) -> Mlps:
    """Of a Hugging Face config.

    Raises:
        NotImplementedError: naming a key of experts that are not counted.
    """
    num_layers, topk = values["num_hidden_layers"], values.get("num_experts_per_tok")
    if (pattern := hf_pattern(values)) is not None:
        experts = _Experts(
            values.get("n_routed_experts") or 0,
            topk or 0,
            values.get("moe_intermediate_size") or 0,
            values.get("moe_shared_expert_intermediate_size") or 0,
        )
        of_layers = hybrid_kinds(pattern, num_layers)
        names = ("moe_intermediate_size", "num_experts_per_tok", "n_routed_experts")
        return _hybrid_mlps(of_layers, values.get("intermediate_size"), experts, names)
    known = {"shared_expert_intermediate_size", "shared_intermediate_size", "n_shared_experts"}
    unknown = [k for k in values if "shared_exp" in k and values[k] and k not in known]
    counts = [key for key in _EXPERT_COUNTS if (values.get(key) or 0) > 1]
    refuse(unknown + (counts if not topk else []), values)
    if not (counts and topk):
        return Mlps.dense(values["intermediate_size"], num_layers)
    expert = values.get("moe_intermediate_size") or values["intermediate_size"]
    shared = (
        values.get("shared_expert_intermediate_size")
        or values.get("shared_intermediate_size")
        or (values.get("n_shared_experts") or 0) * expert
    )
    dense_layers = values.get("mlp_only_layers") or []
    first, step = values.get("first_k_dense_replace") or 0, values.get("decoder_sparse_step") or 1
    has_experts = [
        is_named and i >= first and i not in dense_layers and (i + 1) % step == 0
        for i, is_named in enumerate(_named_layers(values, num_layers))
    ]
    if kinds := values.get("mlp_layer_types"):
        if not isinstance(kinds, list) or len(kinds) != num_layers:
            raise ValueError(
                f"mlp_layer_types={str(kinds)[:80]} must name each of {num_layers} layers; "
                "correct it"
            )
        has_experts = [kind == "sparse" for kind in kinds]
    experts = _Experts(values[counts[0]], topk, expert, shared)
    return _mlps(has_experts, values.get("intermediate_size"), experts)


def megatron_mlps(values: Mapping[str, Any], dense: int) -> Mlps:
    """As ``hf_mlps``, of Megatron-LM's arguments; ``dense`` is the width of an MLP."""
    num_layers = values["num_layers"]
    experts = _Experts(
        values.get("num_experts") or 0,
        values.get("moe_router_topk", 2),
        values.get("moe_ffn_hidden_size") or dense,
        values.get("moe_shared_expert_intermediate_size") or 0,
    )
    if (pattern := megatron_pattern(values)) is not None:
        names = ("moe_ffn_hidden_size", "moe_router_topk", "num_experts")
        return _hybrid_mlps(hybrid_kinds(pattern, num_layers), dense, experts, names)
    if not experts.num:
        return Mlps.dense(dense, num_layers)
    return _mlps(_named_layers(values, num_layers), dense, experts)


def _named_layers(values: Mapping[str, Any], num_layers: int) -> list[bool]:
    """Layers that ``moe_layer_freq`` gives experts; all without it."""
    if values.get("moe_layer_freq") is None:
        return [True] * num_layers
    named = checked_pattern(values, "moe_layer_freq", num_layers)
    if isinstance(named, int):
        return [layer % named == 0 for layer in range(num_layers)]
    return [bool(has_experts) for has_experts in named]


def _hybrid_mlps(
    kinds: list[LayerKind], dense: int | None, experts: _Experts, names: tuple[str, str, str]
) -> Mlps:
    """As ``_mlps``, of layers with an MLP; ``names`` of width, topk and number for messages."""
    with_mlp = [kind.has_experts for kind in kinds if kind.mlp is not None]
    given = experts.width, experts.topk, experts.num
    if any(with_mlp) and not all(given):
        raise KeyError(next(name for name, value in zip(names, given) if not value))
    found = _mlps(with_mlp, dense, experts)
    divided = found.divided
    if not any(with_mlp):
        divided = {"ffn_hidden_size": dense or 0} if with_mlp else {}

    def each(of_mlps: tuple[int, ...]) -> tuple[int, ...]:
        widths = iter(of_mlps)
        return tuple(0 if kind.mlp is None else next(widths) for kind in kinds)

    return replace(
        found,
        used=each(found.used),
        held=each(found.held),
        shared=each(found.shared),
        divided=divided,
    )


def _mlps(has_experts: list[bool], dense: int | None, experts: _Experts) -> Mlps:
    widths = {"moe_ffn_hidden_size": experts.width}
    if experts.shared:
        widths["moe_shared_expert_intermediate_size"] = experts.shared
    if not all(has_experts):
        if not dense:
            raise KeyError("intermediate_size")
        widths["ffn_hidden_size"] = dense

    def each(num: int) -> tuple[int, ...]:
        sparse = num * experts.width + experts.shared
        return tuple(sparse if has else dense or 0 for has in has_experts)

    sizes = ExpertSizes(number=experts.num, topk=experts.topk, ffn_hidden_size=experts.width)
    return Mlps(
        used=each(experts.topk),
        held=each(experts.num),
        shared=each(0),
        experts=sizes if any(has_experts) else None,
        divided=widths,
    )
