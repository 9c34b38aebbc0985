"""What a token keeps in attention until the backward pass, and what stays of a resident one."""

from __future__ import annotations

from dataclasses import dataclass

from .heads import AttentionSizes
from .layer_sizes import LayerSizes, RankShare


@dataclass(frozen=True, slots=True)
class RankHeads:
    """Values of queries, keys, values and outputs of one token in the heads of a rank.

    Keys and values as often as context-parallel ranks need them; of the whole row, of which such a
    rank has a share of the heads, as many.
    """

    q: int
    k: int
    v: int
    out: int
    projected: int
    is_copied: bool

    @classmethod
    def of(cls, attention: AttentionSizes, share: RankShare) -> RankHeads:
        """Of a layer."""
        tp = share.tp_size
        # A rank has at least one head for keys and values.
        groups = max(attention.num_kv_heads // tp, 1)
        q = attention.num_heads * attention.head_dim // tp
        k, v = groups * attention.head_dim, groups * attention.value_dim
        return cls(
            q=q,
            k=k * share.kv_head_copies,
            v=v * share.kv_head_copies,
            out=attention.num_heads * attention.value_dim // tp,
            projected=q * (2 if attention.has_output_gate else 1) + k + v,
            is_copied=1 < groups < attention.num_heads // tp,
        )

    @property
    def total(self) -> int:
        """All of them."""
        return self.q + self.k + self.v + self.out


def resident_values(attention: AttentionSizes, share: RankShare) -> tuple[int, int]:
    """Keys and values, and what stays of those of a resident token."""
    heads = RankHeads.of(attention, share)
    kept = attention.kept_dim(share.tp_size, share.sequence_parallel)
    copies = 1 if attention.kv_lora_rank else share.kv_head_copies
    return heads.k + heads.v, kept * copies


def attention_bytes(layer: LayerSizes, attention: AttentionSizes, share: RankShare) -> int:
    """Between the projections, with a log-sum-exp of every head in fp32."""
    values = _values(layer, attention, share)
    return values * layer.value_bytes + 4 * attention.num_heads // share.tp_size


def freed_of_attention(
    layer: LayerSizes, attention: AttentionSizes, share: RankShare
) -> dict[str, int]:
    """Of these bytes, what recomputing frees, by Megatron's names of modules."""
    width = layer.value_bytes
    again = _values(layer, attention, share, recomputed=True) * width
    freed = {"core_attn": attention_bytes(layer, attention, share) - again}
    if attention.kv_lora_rank:
        heads = RankHeads.of(attention, share)
        # What ranks have exchanged is not what is projected again.
        read = 0 if share.cp_size > 1 else heads.q + heads.k + heads.v
        turned = 3 * attention.rotary_dim if layer.modules.gathers_latents else 0
        freed["mla_up_proj"] = (read + turned) * width
    return freed


def _values(
    layer: LayerSizes, attention: AttentionSizes, share: RankShare, *, recomputed: bool = False
) -> int:
    """As projections return them, as attention reads them, and what it returns.

    Ranks that exchange tokens for heads have values of their own, and what attention returned
    twice. Recomputed, attention starts from what the projections returned.
    """
    heads, is_divided = RankHeads.of(attention, share), share.cp_size > 1
    if attention.kv_lora_rank:
        read, before = heads.q + heads.k + heads.v, _latent_values(layer, attention, share)
    else:
        read, before = _plain_values(layer, attention, share, recomputed=recomputed)
    gated = heads.out if attention.has_output_gate else 0
    return before + read + gated + heads.out * (2 if is_divided and not recomputed else 1)


def _plain_values(
    layer: LayerSizes, attention: AttentionSizes, share: RankShare, *, recomputed: bool
) -> tuple[int, int]:
    """Read by attention, and kept by what stands between it and the projection.

    Keys and values are views of what the projection returned, which stays for them as a whole.
    Queries and their gates are views of it, too, where a rank has one key head, or as many as
    query heads; copies elsewhere.
    """
    heads, is_divided = RankHeads.of(attention, share), share.cp_size > 1
    own_k, before = heads.k // share.kv_head_copies, 0
    if layer.has_qk_norms:
        before += heads.q if heads.is_copied else 0
        before += 0 if layer.modules.has_fused_norms else heads.q + own_k
    if attention.has_output_gate and heads.is_copied:
        before += heads.q
    has_views = layer.has_qk_norms or (attention.has_output_gate and not heads.is_copied)
    if has_views or recomputed or not is_divided:
        before += heads.projected
    if not recomputed and (is_divided or layer.has_rotary):
        return heads.q + heads.k + (heads.v if is_divided else 0), before
    # What stands before the turn, or is read without one.
    if layer.has_qk_norms:
        return heads.q + own_k, before
    return heads.q if heads.is_copied else 0, before


def _latent_values(layer: LayerSizes, attention: AttentionSizes, share: RankShare) -> int:
    modules = layer.modules
    q_lora, kv_lora = attention.q_lora_rank or 0, attention.kv_lora_rank or 0
    scaled = 0 if modules.has_fused_norms else 1
    normalised = (1 + scaled if layer.has_qk_norms else 0) * (q_lora + kv_lora)
    projected = normalised + kv_lora + (0 if modules.gathers_latents else q_lora)
    values = projected // share.token_shards + (q_lora if modules.gathers_latents else 0)
    # The part of a key that heads share lies beside the latent, and is turned in four steps where
    # no kernel does it.
    turned = (share.token_shards == 1) + (4 if modules.gathers_latents else 0)
    return values + turned * attention.rotary_dim
