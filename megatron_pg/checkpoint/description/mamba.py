"""Decoders with Mamba-2 layers: their sizes, and the weights of a mixer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ...parallel import ModelSizes
from ..table import Row, columns, outputs
from .argument_values import ArgumentValues
from .config_values import ConfigValues
from .gated_delta import cut_blocks
from .hf_model import HfModel

# What config.json, TransformerConfig and Megatron-LM's arguments call the sizes of such layers.
_SIZES = {
    "mamba_num_heads": "mamba_num_heads",
    "mamba_head_dim": "mamba_head_dim",
    "n_groups": "mamba_num_groups",
    "ssm_state_size": "mamba_state_dim",
}
# What Megatron-Core has in Mamba-2 layers whatever its configuration says.
_KERNEL = 4


@dataclass(frozen=True, kw_only=True)
class MambaModel(HfModel):
    """As ``HfModel``, with such layers.

    Steps of the state are taken as they are, as Megatron-Core and inference engines take them;
    transformers raises them to ``time_step_min``.

    Attributes:
        mamba_num_heads: of a state.
        mamba_head_dim: channels of each.
        mamba_num_groups: of heads that write and read by the same projections.
        mamba_state_dim: numbers that a channel keeps.
    """

    mamba_num_heads: int
    mamba_head_dim: int
    mamba_num_groups: int
    mamba_state_dim: int

    @classmethod
    def read_mamba(cls, values: ConfigValues) -> dict[str, int]:
        """These fields from a ``config.json``."""
        values.must("mamba_hidden_act", "silu")
        values.must("use_conv_bias", True)
        values.must("conv_kernel", _KERNEL)
        values.must("mamba_proj_bias", False, None)
        sizes = {ours: values.size(theirs) for theirs, ours in _SIZES.items()}
        if sizes["mamba_num_heads"] % sizes["mamba_num_groups"]:
            values.problems.append(
                f"mamba_num_heads={sizes['mamba_num_heads']} is no multiple of n_groups="
                f"{sizes['mamba_num_groups']}"
            )
        return sizes

    def mamba_json(self) -> dict[str, int]:
        """The same keys for a ``config.json``."""
        return {theirs: getattr(self, ours) for theirs, ours in _SIZES.items()}

    @classmethod
    def read_mamba_arguments(cls, read: ArgumentValues) -> dict[str, int]:
        """These fields from Megatron-LM's arguments."""
        return {ours: read.size(ours) for ours in _SIZES.values()}

    def mamba_sizes(self) -> dict[str, int]:
        """What arguments and configuration have one name for."""
        return {ours: getattr(self, ours) for ours in _SIZES.values()}

    @property
    def sizes(self) -> ModelSizes:
        """See ``Decoder``."""
        heads = {name: getattr(self, name) for name in ("mamba_num_heads", "mamba_num_groups")}
        return replace(super().sizes, widths={**super().sizes.widths, **heads})

    def mamba_weights(self, ours: str, theirs: str) -> Iterator[Row]:
        """Rows of one mixer."""
        heads, states = self.mamba_num_heads, self.mamba_num_groups * self.mamba_state_dim
        inner, hidden = heads * self.mamba_head_dim, self.hidden_size
        for name, lengths, rest in (
            ("in_proj.weight", (inner, inner, states, states, heads), (hidden,)),
            ("conv1d.weight", (inner, states, states), (1, _KERNEL)),
            ("conv1d.bias", (inner, states, states), ()),
        ):
            blocks = cut_blocks(f"{theirs}{name}", lengths)
            yield Row(f"{ours}{name}", {f"{theirs}{name}": (sum(lengths), *rest)}, blocks)
        for name in ("A_log", "D", "dt_bias"):
            yield outputs(f"{ours}{name}", f"{theirs}{name}", (heads,))
        yield outputs(f"{ours}norm.weight", f"{theirs}norm.weight", (inner,))
        yield columns(f"{ours}out_proj.weight", f"{theirs}out_proj.weight", (hidden, inner))
