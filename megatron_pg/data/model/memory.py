"""What a token keeps in a decoder layer until the backward pass, and what a resident one adds."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from .attention_memory import RankHeads, attention_bytes, freed_of_attention, resident_values
from .heads import AttentionSizes
from .layer_sizes import ExpertSizes, LayerSizes, RankShare
from .linear_memory import linear_gradient_values, linear_values
from .linear_sizes import LinearSizes

ResidentMode = Literal["retain", "recompute"]
"""How a prefix stays: with its graph, or encoded once more in the backward pass."""
# Recomputing everything, beside Megatron's names of modules.
FULL = "full"


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryModel:
    """Bytes of one token in one decoder layer of one rank.

    Attributes:
        kept_without_recompute: inputs of norms and of matrix products, q, k and v before and after
            rotary, what attention returned, and what activation function and router read.
        freed: of it, what recomputing frees: by Megatron's names of ``recompute_modules``, and by
            ``FULL`` all but the layer's input.
        activations: what is kept with the recompute of this run.
        recomputed: what the backward pass of a layer holds of it again.
        gradients: what it holds beside that: those of attention's inputs, or of the MLP's inner
            products, whichever is more; what they are made of is freed step by step.
        kv: keys and values.
        kept: what stays of a resident token: keys and values, or what latent attention makes them
            of. The activations hold it too, unless layers are recomputed.
        kept_grads: its gradients, to which other rows add, fp32 for 16-bit types.
        state: of a segment instead, in a layer with linear attention: what it leaves to others.
        state_grads: its gradients.
        recompute_layers: whether the backward pass runs every layer once more.
    """

    kept_without_recompute: int
    freed: Mapping[str, int]
    activations: int
    recomputed: int
    gradients: int
    kv: int
    kept: int
    kept_grads: int
    state: int = 0
    state_grads: int = 0
    recompute_layers: bool = False

    @classmethod
    def of_layer(
        cls, layer: LayerSizes, share: RankShare, recompute: Collection[str] = ()
    ) -> MemoryModel:
        """Of one layer.

        Args:
            layer: its widths.
            share: of the rank.
            recompute: what the backward pass runs once more, by the keys of ``freed``; a module
                that the layer does not have frees nothing.
        """
        width = layer.value_bytes
        parts = {
            "norms": _norm_values(layer, share) * width,
            "mixer": _mixer_bytes(layer, share),
            "mlp": _mlp_values(layer, share) * width,
            "experts": _expert_values(layer, share) * width + _router_bytes(layer, share),
        }
        whole = sum(parts.values())
        freed = {FULL: whole - layer.hidden_size // share.token_shards * width}
        freed |= _freed(layer, share, parts)
        again = freed[FULL] if FULL in recompute else sum(freed.get(name, 0) for name in recompute)
        kv, kept, state, state_grads = _resident(layer, share)
        return cls(
            kept_without_recompute=whole,
            freed=freed,
            activations=whole - again,
            recomputed=again,
            gradients=_gradient_values(layer, share) * width,
            kv=kv * width,
            kept=kept * width,
            kept_grads=kept * max(width, 4),
            state=state,
            state_grads=state_grads,
            recompute_layers=FULL in recompute,
        )

    def resident(self, mode: ResidentMode, kept: float = 1) -> float:
        """Bytes of a resident token in one layer while microbatches of its wave run.

        "retain" keeps its activations, and with them what is kept of it. "recompute" keeps that
        alone: its activations come and go with the prefix rows in flight, when those of the
        microbatches are gone.

        Args:
            mode: how it stays.
            kept: share of the tokens whose keys and values a layer with a window keeps, in copies
                of their own where it is less than 1.
        """
        if mode == "recompute":
            return kept * (self.kept + self.kept_grads)
        copies = self.kept if self.recompute_layers or kept < 1 else 0
        return self.activations + kept * (copies + self.kept_grads)


def _resident(layer: LayerSizes, share: RankShare) -> tuple[int, int, int, int]:
    """Keys and values, what stays of a resident token of them; of a segment a state, its gradients.

    The first two in numbers, the others in bytes.
    """
    mixer, shards = layer.mixer, share.tp_size * share.cp_size
    if mixer is None:
        return 0, 0, 0, 0
    if isinstance(mixer, LinearSizes):
        width = layer.value_bytes
        return 0, 0, mixer.state_bytes(width, shards), mixer.state_grad_bytes(width, shards)
    return *resident_values(mixer, share), 0, 0


def _norm_values(layer: LayerSizes, share: RankShare) -> int:
    """Of the residual stream: what norms read and return, which projections read."""
    scaled = 0 if layer.modules.has_fused_norms else 1
    before = 2 + scaled if layer.has_norms_before else 1
    behind = 1 + scaled if layer.has_norms_behind else 0
    return layer.num_parts * (before + behind) * layer.hidden_size // share.token_shards


def _mixer_bytes(layer: LayerSizes, share: RankShare) -> int:
    if layer.mixer is None:
        return 0
    if isinstance(layer.mixer, LinearSizes):
        return linear_values(layer.mixer, share, layer.modules) * layer.value_bytes
    return attention_bytes(layer, layer.mixer, share)


def _mlp_values(layer: LayerSizes, share: RankShare) -> int:
    return _kept_widths(layer) * layer.ffn_hidden_size // share.tp_size


def _kept_widths(layer: LayerSizes) -> int:
    """What the activation function reads, and the second product: in widths of the MLP."""
    if not layer.gated_linear_unit:
        return 2
    return 3 if layer.modules.has_fused_activation else 5


def _expert_values(layer: LayerSizes, share: RankShare) -> int:
    """Of a token's copies, one for each of its experts, on the mean of the ranks."""
    if layer.experts is None:
        return 0
    # What returns is weighted by the router's probability, which the gate's kernel does as well.
    is_fused = layer.gated_linear_unit and layer.modules.has_fused_activation
    return _copies(layer, layer.experts, share, _kept_widths(layer) + (0 if is_fused else 1))


def _copies(layer: LayerSizes, experts: ExpertSizes, share: RankShare, widths: int) -> int:
    """What experts read, and some of their widths: ranks that divide these read the same tokens."""
    expert_tp = share.tp_size if share.expert_tp_size is None else share.expert_tp_size
    copy = expert_tp * layer.hidden_size + widths * experts.ffn_hidden_size
    return experts.topk * copy // share.token_shards


def _router_bytes(layer: LayerSizes, share: RankShare) -> int:
    """Probabilities and a mask of all experts; weight and place of each that is chosen."""
    if layer.experts is None:
        return 0
    return (5 * layer.experts.number + 24 * layer.experts.topk) // share.token_shards


def _gradient_values(layer: LayerSizes, share: RankShare) -> int:
    products = 2 if layer.gated_linear_unit else 1
    mlp = products * layer.ffn_hidden_size // share.tp_size
    if layer.experts is not None:
        mlp += _copies(layer, layer.experts, share, products)
    if layer.mixer is None:
        return mlp
    if isinstance(layer.mixer, LinearSizes):
        return max(linear_gradient_values(layer.mixer, share), mlp)
    return max(RankHeads.of(layer.mixer, share).total, mlp)


def _freed(layer: LayerSizes, share: RankShare, parts: Mapping[str, int]) -> dict[str, int]:
    freed: dict[str, int] = {}
    if isinstance(layer.mixer, AttentionSizes):
        freed = freed_of_attention(layer, layer.mixer, share)
    if layer.experts is not None:
        freed["moe"] = parts["mlp"] + parts["experts"]
        freed["shared_experts"] = parts["mlp"]
    elif layer.ffn_hidden_size:
        freed["mlp"] = parts["mlp"]
    return freed
