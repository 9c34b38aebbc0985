"""Sizes of linear attention: heads that carry a state along the row instead of keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from .layer_kinds import LinearRule

# Tokens that kernels take at once: those of Megatron-Core and FLA, and those of mamba_ssm as
# Megatron-Core calls them.
_CHUNK_TOKENS = {"gated_delta": 64, "state_space": 128}
# Megatron-Core asks for no other in Mamba-2 layers.
_MAMBA_KERNEL = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearSizes:
    """A Gated DeltaNet or Mamba-2 layer.

    Attributes:
        num_key_heads: of queries and keys; Mamba-2's groups, of ``c`` and ``b``.
        num_value_heads: of values, gates and states; a multiple of ``num_key_heads``.
        key_dim: of a query and a key; what Mamba-2 calls its state's size.
        value_dim: of a value.
        conv_kernel: tokens that a convolution over queries, keys and values sees.
        rule: "gated_delta", or "state_space" of Mamba-2.
    """

    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    conv_kernel: int
    rule: LinearRule = "gated_delta"

    @classmethod
    def from_config(cls, config: Any, rule: LinearRule) -> Self:
        """Of the layers of a ``TransformerConfig`` that have this rule."""
        if rule == "gated_delta":
            return cls(
                num_key_heads=config.linear_num_key_heads,
                num_value_heads=config.linear_num_value_heads,
                key_dim=config.linear_key_head_dim,
                value_dim=config.linear_value_head_dim,
                conv_kernel=config.linear_conv_kernel_dim,
            )
        width = config.mamba_head_dim
        return cls(
            num_key_heads=config.mamba_num_groups,
            # Megatron-Core's inner width is twice the model's where no number is given.
            num_value_heads=config.mamba_num_heads or 2 * config.hidden_size // width,
            key_dim=config.mamba_state_dim,
            value_dim=width,
            conv_kernel=_MAMBA_KERNEL,
            rule=rule,
        )

    @property
    def conv_dim(self) -> int:
        """Channels of queries, keys and values, which are convolved."""
        return 2 * self.num_key_heads * self.key_dim + self.out_dim

    @property
    def out_dim(self) -> int:
        """Channels of values, of the output gate and of what the scan returns."""
        return self.num_value_heads * self.value_dim

    @property
    def head_values(self) -> int:
        """Numbers of a token for every head's state: decay and strength, which Mamba-2 has as one.

        In this way a step of its size both decays and writes.
        """
        return 1 if self.rule == "state_space" else 2

    @property
    def in_dim(self) -> int:
        """Channels that are projected: also a gate, and ``head_values``."""
        return self.conv_dim + self.out_dim + self.head_values * self.num_value_heads

    def exchanged_values(self, tp_size: int, cp_size: int) -> float:
        """Numbers that a context-parallel rank sends for each token of a row, both ways.

        What is projected, but for the gate, and what the scan returns; of Mamba-2 without copies of
        groups that are fewer than the ranks.
        """
        return self.in_dim / tp_size * (cp_size - 1) / cp_size**2

    @property
    def chunk_tokens(self) -> int:
        """Tokens that kernels take at once."""
        return _CHUNK_TOKENS[self.rule]

    def parameters(self, hidden_size: int) -> int:
        """Of the projections and the convolution of one layer."""
        projections = hidden_size * (self.in_dim + self.out_dim)
        return projections + self.conv_kernel * self.conv_dim

    @property
    def scan_flops(self) -> float:
        """Of a token in the scan of one layer, forward; the same wherever it stands.

        In chunks of C tokens with heads of K and V channels: keys with keys, the inverse of that
        triangle and its products with keys and values, queries with keys and those with values;
        and three products with the state: what is taken from the values, read, and added. Of
        Mamba-2: queries with keys, once for the heads of a group, those with values, and two
        products with the state.
        """
        k, v, chunk = self.key_dim, self.value_dim, self.chunk_tokens
        if self.rule == "state_space":
            of_heads = self.num_value_heads * (2 * chunk * v + 2 * 2 * k * v)
            return self.num_key_heads * 2 * chunk * k + of_heads
        inside = 2 * chunk * (3 * k + 2 * v) + 2 * chunk**2 / 3
        return self.num_value_heads * (inside + 3 * 2 * k * v)

    def state_bytes(self, value_bytes: int, tp_size: int = 1) -> int:
        """What one layer of a rank keeps of a resident prefix of any length.

        The state in fp32, and what the convolution of the next token sees.
        """
        state = 4 * self.num_value_heads * self.key_dim * self.value_dim
        return (state + value_bytes * (self.conv_kernel - 1) * self.conv_dim) // tp_size

    def state_grad_bytes(self, value_bytes: int, tp_size: int = 1) -> int:
        """Of its gradients, to which all rows that go on from it add, fp32 for 16-bit types."""
        return self.state_bytes(max(value_bytes, 4), tp_size)
