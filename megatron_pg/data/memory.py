"""What a token keeps in a decoder layer until the backward pass, and what a resident one adds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryModel:
    """Bytes of one token in one decoder layer of one rank.

    As fused kernels leave them (Transformer Engine); the local modules keep about half as much
    again.

    Attributes:
        activations: inputs of two norms and of the four matrix products, q, k and v before and
            after rotary, and what the activation function reads; the log-sum-exp (one a head) is
            left out. Only the layer's input if layers are recomputed.
        kv: keys and values.
        kept: what stays of a resident token: keys and values, or what latent attention makes them
            of. The activations hold it too, unless layers are recomputed.
        kept_grads: its gradients, to which other rows add, fp32 for 16-bit types.
        recompute_layers: whether the backward pass runs every layer once more.
    """

    activations: int
    kv: int
    kept: int
    kept_grads: int
    recompute_layers: bool = False

    @classmethod
    def from_model_dims(
        cls,
        *,
        hidden_size: int,
        ffn_hidden_size: int,
        num_attention_heads: int,
        num_query_groups: int,
        kv_channels: int,
        gated_linear_unit: bool,
        value_bytes: int,
        tp_size: int = 1,
        sequence_parallel: bool = False,
        recompute_layers: bool = False,
        value_channels: int | None = None,
        latent_channels: int = 0,
        kept_channels: int | None = None,
    ) -> MemoryModel:
        """Of a decoder.

        Args:
            hidden_size: width of the residual stream.
            ffn_hidden_size: width of the MLP that one token goes through: of all its experts.
            num_attention_heads: query heads.
            num_query_groups: key and value heads.
            kv_channels: width of a head.
            gated_linear_unit: whether the MLP has a gate.
            value_bytes: of an activation, 2 for bf16.
            tp_size: ranks that share heads and MLP.
            sequence_parallel: whether they share the rest too.
            recompute_layers: see the class.
            value_channels: width of a value's head; ``kv_channels`` when None.
            latent_channels: what latent attention holds between its projections.
            kept_channels: what a rank keeps of a resident token; its keys and values when None.
        """
        value_channels = kv_channels if value_channels is None else value_channels
        # A rank has at least one head for keys and values.
        groups = max(num_query_groups // tp_size, 1)
        k, kv = groups * kv_channels, groups * (kv_channels + value_channels)
        hidden = hidden_size // (tp_size if sequence_parallel else 1)
        q = num_attention_heads * kv_channels // tp_size
        out = num_attention_heads * value_channels // tp_size
        mlp = (3 if gated_linear_unit else 2) * ffn_hidden_size // tp_size
        elements = 4 * hidden + 2 * q + out + kv + k + latent_channels + mlp
        elements = hidden if recompute_layers else elements
        kept = kv if kept_channels is None else kept_channels
        return cls(
            activations=elements * value_bytes,
            kv=kv * value_bytes,
            kept=kept * value_bytes,
            kept_grads=kept * max(value_bytes, 4),
            recompute_layers=recompute_layers,
        )

    def resident(self, mode: Literal["retain", "recompute"], kept: float = 1) -> float:
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
