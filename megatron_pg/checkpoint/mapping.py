"""One table: which rows of which Hugging Face tensors make up a shard of a Megatron parameter.

Reading, exporting and merging shards all follow from it, at any tensor-parallel size::

    linear_qkv    q rows of group 0 | k rows of group 0 | v rows of group 0 | q rows of group 1 ...
    linear_fc1    this rank's gate rows | this rank's up rows
    embedding     this rank's rows of the vocabulary | zeros where it is padded
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property

from ..parallel import ModelSizes, ParallelSizes
from .hf_config import HfModel

# Norms that Transformer Engine fuses into the linear layer behind them, in local-spec names.
FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


@dataclass(frozen=True)
class Piece:
    """Rows (or columns) ``[start, stop)`` of a Hugging Face tensor."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Shard:
    """One rank's part of a Megatron parameter: pieces joined along ``dim``, then zeros.

    Attributes:
        shape: of the shard.
        dim: axis along which the pieces are joined.
        pieces: in order.
        padding: rows of zeros after the pieces (padded vocabulary).
    """

    shape: tuple[int, ...]
    dim: int
    pieces: tuple[Piece, ...]
    padding: int = 0


class Mapping:
    """The table of one model.

    Args:
        model: the architecture.
        padded_vocab_size: rows of Megatron's embedding over all ranks; None: not padded.
    """

    def __init__(self, model: HfModel, padded_vocab_size: int | None = None) -> None:
        self.model = model
        self.padded_vocab_size = padded_vocab_size or model.vocab_size

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the Hugging Face folder, in the order in which it is written."""
        m = self.model
        shapes: dict[str, tuple[int, ...]] = {}
        hidden, q = m.hidden_size, m.num_attention_heads * m.kv_channels
        kv = m.num_query_groups * m.kv_channels
        shapes["model.embed_tokens.weight"] = (m.vocab_size, hidden)

        def linear(name: str, rows: int, columns: int, bias: bool) -> None:
            shapes[f"{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{name}.bias"] = (rows,)

        def mlp(name: str, ffn: int) -> None:
            linear(f"{name}.gate_proj", ffn, hidden, m.add_bias_linear)
            linear(f"{name}.up_proj", ffn, hidden, m.add_bias_linear)
            linear(f"{name}.down_proj", hidden, ffn, m.add_bias_linear)

        for layer in range(m.num_layers):
            prefix = f"model.layers.{layer}"
            shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
            linear(f"{prefix}.self_attn.q_proj", q, hidden, m.add_qkv_bias)
            linear(f"{prefix}.self_attn.k_proj", kv, hidden, m.add_qkv_bias)
            linear(f"{prefix}.self_attn.v_proj", kv, hidden, m.add_qkv_bias)
            linear(f"{prefix}.self_attn.o_proj", hidden, q, m.add_bias_linear)
            if m.qk_layernorm:
                shapes[f"{prefix}.self_attn.q_norm.weight"] = (m.kv_channels,)
                shapes[f"{prefix}.self_attn.k_norm.weight"] = (m.kv_channels,)
            shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
            if m.num_experts is None:
                mlp(f"{prefix}.mlp", m.ffn_hidden_size)
            else:
                shapes[f"{prefix}.mlp.gate.weight"] = (m.num_experts, hidden)
                for expert in range(m.num_experts):
                    mlp(f"{prefix}.mlp.experts.{expert}", m.moe_ffn_hidden_size or 0)
        shapes["model.norm.weight"] = (hidden,)
        if not m.tied:
            shapes["lm_head.weight"] = (m.vocab_size, hidden)
        return shapes

    def megatron_names(self) -> list[str]:
        """Every parameter of the whole ``GPTModel``, in local-spec names and model order."""
        m, names = self.model, ["embedding.word_embeddings.weight"]
        for layer in range(m.num_layers):
            prefix = f"decoder.layers.{layer}."
            leaves = ["input_layernorm.weight", "self_attention.linear_proj.weight"]
            leaves += ["self_attention.linear_proj.bias"] * m.add_bias_linear
            leaves += ["self_attention.linear_qkv.weight"]
            leaves += ["self_attention.linear_qkv.bias"] * m.add_qkv_bias
            if m.qk_layernorm:
                leaves += ["self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"]
            leaves += ["pre_mlp_layernorm.weight"]
            mlps = ["mlp."]
            if m.num_experts is not None:
                leaves += ["mlp.router.weight"]
                mlps = [f"mlp.experts.local_experts.{e}." for e in range(m.num_experts)]
            for mlp in mlps:
                for linear in ("linear_fc1", "linear_fc2"):
                    leaves += [f"{mlp}{linear}.weight"]
                    leaves += [f"{mlp}{linear}.bias"] * m.add_bias_linear
            names += [prefix + leaf for leaf in leaves]
        names += ["decoder.final_layernorm.weight"]
        return names + ["output_layer.weight"] * (not m.tied)

    def shard(self, name: str, tp_rank: int = 0, tp_size: int = 1) -> Shard:
        """The shard of a parameter (local-spec name, layer and expert numbered globally).

        Raises:
            ValueError: a parameter that this architecture does not have, or sizes that
                ``tp_size`` does not divide.
        """
        m = self.model
        if name not in self:
            raise ValueError(f"this {m.architecture} has no parameter {name}")
        # Experts are divided under sequence parallelism only, which no parameter tells.
        ParallelSizes(tp=tp_size, sp=tp_size > 1).check(self._sizes)
        if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            untied_head = name == "output_layer.weight" and not m.tied
            return self._vocab("lm_head" if untied_head else "model.embed_tokens", tp_rank, tp_size)
        if name == "decoder.final_layernorm.weight":
            return self._whole("model.norm.weight", (m.hidden_size,))
        _, _, layer, leaf = name.split(".", 3)
        return self._layer(f"model.layers.{layer}.", leaf, tp_rank, tp_size)

    def __contains__(self, name: str) -> bool:
        """Whether the model has a parameter; a tied output layer is the embedding again."""
        return name in self._names

    @cached_property
    def _sizes(self) -> ModelSizes:
        sizes = self.model.sizes
        widths = {**sizes.widths, "padded_vocab_size": self.padded_vocab_size}
        return replace(sizes, num_layers=None, widths=widths)

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset([*self.megatron_names(), "output_layer.weight"])

    def _layer(self, hf: str, leaf: str, rank: int, size: int) -> Shard:
        m = self.model
        norms = {
            "input_layernorm.weight": ("input_layernorm.weight", m.hidden_size),
            "pre_mlp_layernorm.weight": ("post_attention_layernorm.weight", m.hidden_size),
            "self_attention.q_layernorm.weight": ("self_attn.q_norm.weight", m.kv_channels),
            "self_attention.k_layernorm.weight": ("self_attn.k_norm.weight", m.kv_channels),
        }
        if leaf in norms:
            target, width = norms[leaf]
            return self._whole(hf + target, (width,))
        if leaf == "mlp.router.weight":
            return self._whole(hf + "mlp.gate.weight", (m.num_experts or 0, m.hidden_size))
        module, _, kind = leaf.rpartition(".")
        if module == "self_attention.linear_qkv":
            return self._qkv(hf + "self_attn.", kind, rank, size)
        if module == "self_attention.linear_proj":
            width = m.num_attention_heads * m.kv_channels
            return self._columns(hf + "self_attn.o_proj.", kind, width, rank, size)
        expert = re.fullmatch(r"mlp\.experts\.local_experts\.(\d+)\.(.+)", module)
        if expert:
            mlp, linear, ffn = f"mlp.experts.{expert[1]}.", expert[2], m.moe_ffn_hidden_size or 0
        else:
            mlp, linear, ffn = "mlp.", module.removeprefix("mlp."), m.ffn_hidden_size
        if linear == "linear_fc1":
            return self._gate_up(hf + mlp, kind, ffn, rank, size)
        return self._columns(hf + mlp + "down_proj.", kind, ffn, rank, size)

    def _whole(self, name: str, shape: tuple[int, ...]) -> Shard:
        return Shard(shape, 0, (Piece(name, 0, shape[0]),))

    def _vocab(self, module: str, rank: int, size: int) -> Shard:
        rows = self.padded_vocab_size // size
        vocab = self.model.vocab_size
        start, stop = min(rank * rows, vocab), min((rank + 1) * rows, vocab)
        pieces = (Piece(f"{module}.weight", start, stop),) if stop > start else ()
        return Shard((rows, self.model.hidden_size), 0, pieces, rows - (stop - start))

    def _columns(self, module: str, kind: str, width: int, rank: int, size: int) -> Shard:
        hidden = self.model.hidden_size
        if kind == "bias":
            return self._whole(f"{module}bias", (hidden,))
        columns = width // size
        piece = Piece(f"{module}weight", rank * columns, (rank + 1) * columns)
        return Shard((hidden, columns), 1, (piece,))

    def _gate_up(self, mlp: str, kind: str, ffn: int, rank: int, size: int) -> Shard:
        rows = ffn // size
        pieces = tuple(
            Piece(f"{mlp}{half}.{kind}", rank * rows, (rank + 1) * rows)
            for half in ("gate_proj", "up_proj")
        )
        return self._rows(pieces, kind)

    def _qkv(self, attention: str, kind: str, rank: int, size: int) -> Shard:
        """Megatron cuts the interleaved rows evenly, through a group where groups < size."""
        m = self.model
        q_rows = m.num_attention_heads // m.num_query_groups * m.kv_channels
        block = q_rows + 2 * m.kv_channels
        rows = m.num_query_groups * block // size
        first, last = rank * rows, (rank + 1) * rows
        pieces = []
        for group in range(first // block, -(-last // block)):
            start = group * block
            for part, width in (("q", q_rows), ("k", m.kv_channels), ("v", m.kv_channels)):
                low, high = max(first, start), min(last, start + width)
                if low < high:
                    shift = group * width - start
                    name = f"{attention}{part}_proj.{kind}"
                    pieces.append(Piece(name, low + shift, high + shift))
                start += width
        return self._rows(tuple(pieces), kind)

    def _rows(self, pieces: tuple[Piece, ...], kind: str) -> Shard:
        rows = sum(piece.stop - piece.start for piece in pieces)
        return Shard((rows,) if kind == "bias" else (rows, self.model.hidden_size), 0, pieces)
