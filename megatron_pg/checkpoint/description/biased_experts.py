"""Experts as DeepSeek-V3 has them: chosen by biased sigmoid scores, in groups, some for all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .argument_values import NEED, ArgumentValues
from .config_values import ConfigValues
from .experts import ExpertsModel
from .hf_model import MAX_LAYERS

# Experts of a group whose scores add up to the group's, in transformers.
_OF_A_GROUP = 2


@dataclass(frozen=True, kw_only=True)
class BiasedExpertsModel(ExpertsModel):
    """As ``ExpertsModel``, with such experts.

    Layers for further tokens (multi-token prediction) are no part of the model that is built.
    """

    keys = ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")
    moe_router_score_function = "sigmoid"
    moe_router_enable_expert_bias = True

    # What config.json says, and back.

    @classmethod
    def read_config(cls, values: ConfigValues) -> dict[str, Any]:
        """See ``HfModel``."""
        fields = super().read_config(values)
        shared = values.size("n_shared_experts", default=None)
        factor = values.number("routed_scaling_factor", 1e-6, 1e6)
        values.must("norm_topk_prob", True)
        values.require("norm_topk_prob", "n_shared_experts")
        values.must("scoring_func", "sigmoid")
        values.must("topk_method", "noaux_tc")
        values.must("moe_layer_freq", 1)
        # Of training and of other programs.
        values.known |= {"aux_loss_alpha", "seq_aux", "ep_size"}
        return fields | dict(
            moe_shared_expert_intermediate_size=shared and shared * fields["moe_ffn_hidden_size"],
            moe_router_topk_scaling_factor=None if factor == 1 else factor,
            mtp_num_layers=values.size("num_nextn_predict_layers", MAX_LAYERS, default=0, low=0),
            **_read_groups(values, fields["num_experts"], fields["moe_router_topk"]),
        )

    @classmethod
    def read_pattern(cls, values: ConfigValues, num_layers: int) -> tuple[int, ...]:
        """See ``ExpertsModel``."""
        first = values.size("first_k_dense_replace", low=0)
        return tuple(int(layer >= first) for layer in range(num_layers))

    def config_json(self) -> dict[str, Any]:
        """See ``HfModel``."""
        shared = self.moe_shared_expert_intermediate_size or 0
        return super().config_json() | dict(
            n_shared_experts=shared // self.moe_ffn_hidden_size or None,
            n_group=self.moe_router_num_groups or 1,
            topk_group=self.moe_router_group_topk or 1,
            routed_scaling_factor=self.moe_router_topk_scaling_factor or 1.0,
            norm_topk_prob=True,
            first_k_dense_replace=self.num_dense_layers,
            num_nextn_predict_layers=self.mtp_num_layers,
        )

    @property
    def num_dense_layers(self) -> int:
        """Layers before the first with experts."""
        return sum(not self.has_experts(layer) for layer in range(self.num_layers))

    # What Megatron-LM's arguments say.

    @classmethod
    def read_arguments(cls, read: ArgumentValues) -> dict[str, Any]:
        """See ``HfModel``."""
        fields = super().read_arguments(read)
        shared = read.size("moe_shared_expert_intermediate_size", None)
        factor = read.number("moe_router_topk_scaling_factor", None)
        groups, chosen = (
            read.size(name, None) for name in ("moe_router_num_groups", "moe_router_group_topk")
        )
        found = dict(
            fields,
            moe_shared_expert_intermediate_size=shared,
            moe_router_topk_scaling_factor=None if factor == 1 else factor,
            **_groups(groups or 1, chosen or 1),
        )
        for problem in cls.inexpressible(found):
            raise ValueError(f"{read.where}: args have {problem}; {NEED}")
        return found

    @classmethod
    def inexpressible(cls, fields: dict[str, Any]) -> Iterator[str]:
        """What of Megatron's experts a ``config.json`` cannot say."""
        shared, width = fields["moe_shared_expert_intermediate_size"], fields["moe_ffn_hidden_size"]
        if shared and shared % width:
            yield (
                f"moe_shared_expert_intermediate_size={shared}, no multiple of "
                f"moe_ffn_hidden_size={width}"
            )
        pattern = fields["moe_layer_freq"]
        if pattern and tuple(sorted(pattern)) != pattern:
            yield f"moe_layer_freq={list(pattern)}, where experts do not begin at one layer"
        yield from group_problems(fields)


def _read_groups(values: ConfigValues, num_experts: int, topk: int) -> dict[str, int | None]:
    groups, chosen = (values.size(key) for key in ("n_group", "topk_group"))
    if num_experts % groups or num_experts < _OF_A_GROUP * groups:
        values.problems.append(
            f"n_group={groups} groups of at least {_OF_A_GROUP} of {num_experts} experts"
        )
    elif not topk * groups / num_experts <= chosen <= groups:
        values.problems.append(
            f"topk_group={chosen} of n_group={groups} groups, for {topk} experts of {num_experts}"
        )
    elif groups > chosen and topk // chosen != _OF_A_GROUP:
        values.refused.append(
            f"topk_group={chosen} with num_experts_per_tok={topk} (groups are chosen by their best "
            f"{_OF_A_GROUP} experts in transformers, by num_experts_per_tok / topk_group of them "
            "in Megatron-Core)"
        )
    return _groups(groups, chosen)


def _groups(groups: int, chosen: int) -> dict[str, int | None]:
    """Where all groups are chosen there are none."""
    pair = (groups, chosen) if groups > chosen else (None, None)
    return dict(zip(("moe_router_num_groups", "moe_router_group_topk"), pair))


def group_problems(fields: dict[str, Any]) -> Iterator[str]:
    """Of these fields, groups that cannot be, or that transformers would choose otherwise."""
    count, groups = fields["num_experts"], fields["moe_router_num_groups"]
    topk, chosen = fields["moe_router_topk"], fields["moe_router_group_topk"]
    if groups is None:
        return
    if count % groups or count < _OF_A_GROUP * groups or topk * groups > chosen * count:
        yield (
            f"moe_router_num_groups={groups} and moe_router_group_topk={chosen} for {topk} experts "
            f"of {count}"
        )
    elif topk // chosen != _OF_A_GROUP:
        yield f"moe_router_topk={topk} with moe_router_group_topk={chosen}"
