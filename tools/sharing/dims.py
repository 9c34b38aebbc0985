"""Sizes of a decoder that decide what it costs and what it keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from megatron_pg.data import AttentionSizes, CostModel, LinearSizes
from megatron_pg.parallel import ModelSizes, ParallelSizes, exchanged_values
from tools.sharing.mlps import Mlps
from tools.sharing.modules import LayerModules

# What ranks divide of layers that carry a state.
_HEADS_OF_LINEAR = "linear_num_key_heads", "linear_num_value_heads"
_HEADS_OF_MAMBA = "mamba_num_groups", "mamba_num_heads"


@dataclass(frozen=True, kw_only=True)
class ModelDims:
    """Sizes that decide FLOPs and memory.

    Attributes:
        mlps: widths of MLPs.
        attention: heads and projections.
        windows: of every layer, keys that a token sees before itself; None sees all.
        linear: sizes of layers that carry a state; None if none does.
        mixers: of every layer, "attention", the rule of its state, or None.
        gated: whether the MLP has a gate.
        modules: what else a layer has or lacks.
        max_positions: longest sample that the model was made for, when it is said.
        training_refusal: why training takes no such model; None when it does or nothing is known.
    """

    num_layers: int
    hidden_size: int
    mlps: Mlps
    attention: AttentionSizes
    windows: tuple[int | None, ...]
    vocab_size: int
    gated: bool
    linear: LinearSizes | None
    mixers: tuple[str | None, ...]
    modules: LayerModules
    max_positions: int | None = field(default=None, compare=False)
    training_refusal: str | None = field(default=None, compare=False)

    @property
    def sizes(self) -> ModelSizes:
        """What parallel ranks divide."""
        widths = dict(self.mlps.divided)
        if self.linear is not None:
            is_mamba = self.linear.rule == "state_space"
            groups, heads = _HEADS_OF_MAMBA if is_mamba else _HEADS_OF_LINEAR
            widths |= {groups: self.linear.num_key_heads, heads: self.linear.num_value_heads}
        return ModelSizes(
            num_attention_heads=self.num_attention_heads,
            num_query_groups=self.num_query_groups,
            num_layers=self.num_layers,
            widths=widths,
        )

    @property
    def num_attention_heads(self) -> int:
        """Query heads."""
        return self.attention.num_heads

    @property
    def num_query_groups(self) -> int:
        """Key and value heads."""
        return self.attention.num_kv_heads

    @property
    def cost_model(self) -> CostModel:
        """Forward FLOPs."""
        model = CostModel.from_attention(
            self.attention,
            self.num_attention_layers,
            self.hidden_size,
            self._mlp_parameters(self.mlps.used),
            self.vocab_size,
        )
        seen = [w for w, mixer in zip(self.windows, self.mixers) if mixer == "attention"]
        model = model.within_windows(seen)
        if self.linear is None:
            return model
        return model.with_linear_layers(self.linear, self.num_linear_layers, self.hidden_size)

    @property
    def num_parameters(self) -> float:
        """Of all matrices but the embedding, whichever experts a token goes through."""
        products = self.cost_model.per_token + self.cost_model.per_loss_token
        if self.linear is not None:
            products -= self.num_linear_layers * self.linear.scan_flops
        idle = self._mlp_parameters(self.mlps.held) - self._mlp_parameters(self.mlps.used)
        return products / 2 + idle

    def _mlp_parameters(self, widths: Sequence[int]) -> int:
        return (3 if self.gated else 2) * self.hidden_size * sum(widths)

    @property
    def num_attention_layers(self) -> int:
        """Layers that have keys and values."""
        return self.mixers.count("attention")

    @property
    def num_linear_layers(self) -> int:
        """Layers that carry a state."""
        return 0 if self.linear is None else self.mixers.count(self.linear.rule)

    @property
    def num_parts(self) -> int:
        """Mixers and MLPs of all layers."""
        return sum(x is not None for x in self.mixers) + sum(map(bool, self.mlps.used))

    def heads_of_rank(self, sizes: ParallelSizes) -> tuple[int, int]:
        """Query heads, and key and value heads, of a tensor-parallel rank."""
        return self.num_attention_heads // sizes.tp, max(self.num_query_groups // sizes.tp, 1)

    def exchanged_values(self, sizes: ParallelSizes) -> float:
        """As ``predict_step`` takes them."""
        width = self.attention.head_dim + self.attention.value_dim
        values = exchanged_values(*self.heads_of_rank(sizes), width, sizes.cp)
        values *= self.num_attention_layers
        if self.linear is not None:
            values += self.num_linear_layers * self.linear.exchanged_values(sizes.tp, sizes.cp)
        return values / self.num_layers


def check_sizes(dims: ModelDims) -> None:
    """Raise NotImplementedError unless they are sizes, and divide each other where they must."""
    sizes = {
        "num_layers": dims.num_layers,
        "hidden_size": dims.hidden_size,
        "vocab_size": dims.vocab_size,
        "num_attention_heads": dims.num_attention_heads,
        "num_query_groups": dims.num_query_groups,
        "head size": min(dims.attention.head_dim, dims.attention.value_dim),
        **dims.mlps.divided,
    }
    if dims.linear is not None:
        sizes |= {f"linear {name}": n for name, n in asdict(dims.linear).items() if name != "rule"}
    if (experts := dims.mlps.experts) is not None:
        sizes |= {"number of experts": experts.number, "experts of a token": experts.topk}
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            raise NotImplementedError(f"{name}={size!r} must be an integer of at least 1")
    if dims.num_attention_heads % dims.num_query_groups:
        raise NotImplementedError(
            f"num_attention_heads={dims.num_attention_heads} is no multiple of "
            f"num_query_groups={dims.num_query_groups}"
        )
    if dims.linear is not None and dims.linear.num_value_heads % dims.linear.num_key_heads:
        names = _HEADS_OF_MAMBA if dims.linear.rule == "state_space" else _HEADS_OF_LINEAR
        raise NotImplementedError(
            f"{names[1]}={dims.linear.num_value_heads} is no multiple of "
            f"{names[0]}={dims.linear.num_key_heads}"
        )
    if experts is not None and experts.topk > experts.number:
        raise NotImplementedError(
            f"a token goes through {experts.topk} experts, and there are {experts.number}"
        )
