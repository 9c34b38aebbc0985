"""Every size of a parallel layout in one value, and every rule that it must keep."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Self

from .model_sizes import ModelSizes

# What Megatron's configurations and arguments call the fields of ``ParallelSizes``; a name that
# holds another one stands before it.
MEGATRON_NAMES = {
    "vpp": "virtual_pipeline_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
    "tp": "tensor_model_parallel_size",
    "sp": "sequence_parallel",
    "pp": "pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelSizes:
    """How a model and its rows are laid over ranks.

    Attributes:
        tp: ranks that divide a layer's heads and widths.
        sp: whether they divide the tokens between those layers too.
        pp: pipeline ranks.
        vpp: model chunks of each under the interleaved schedule; None without it.
        cp: ranks that divide the tokens of a row.
        ep: ranks that divide the experts.
        etp: ranks that divide an expert's widths; None: ``tp``.
        dp: replicas of the model.
    """

    tp: int = 1
    sp: bool = False
    pp: int = 1
    vpp: int | None = None
    cp: int = 1
    ep: int = 1
    etp: int | None = None
    dp: int = 1

    @classmethod
    def from_config(cls, config: Any, world_size: int | None = None) -> Self:
        """The sizes that an object states under Megatron's names; what it does not state is 1.

        Args:
            config: a ``TransformerConfig``, Megatron-LM's arguments, the recipe's ``parallel``.
            world_size: ranks of the job, which decide ``dp``.

        Raises:
            ValueError: if these ranks cannot hold whole replicas.
        """
        found = {f: getattr(config, name, None) for f, name in MEGATRON_NAMES.items()}
        sizes = cls(**{f: value for f, value in found.items() if value is not None})
        if world_size is None:
            return sizes
        sizes.check(world_size=world_size)
        return replace(sizes, dp=world_size // sizes.model_size)

    def group_arguments(self) -> dict[str, int | None]:
        """What ``initialize_model_parallel`` and a ``TransformerConfig`` are both told."""
        return {name: getattr(self, f) for f, name in MEGATRON_NAMES.items() if f != "sp"}

    @property
    def model_size(self) -> int:
        """Ranks that hold one replica of the model."""
        return self.tp * self.cp * self.pp

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return self.model_size * self.dp

    @property
    def expert_tp(self) -> int:
        """Ranks that divide an expert's widths."""
        return self.tp if self.etp is None else self.etp

    @property
    def shares_experts(self) -> bool:
        """Whether ranks that run other rows exchange tokens with this one's experts."""
        return self.tp % (self.ep * self.expert_tp) > 0

    @property
    def num_chunks(self) -> int:
        """Model chunks over all pipeline ranks."""
        return self.pp * (self.vpp or 1)

    @property
    def sp_size(self) -> int:
        """Ranks among which sequence parallelism divides the tokens that one model rank is fed."""
        return self.tp if self.sp else 1

    @property
    def row_multiple(self) -> int:
        """What the length of a row must be a multiple of."""
        return self.cp * self.sp_size

    @property
    def microbatch_multiple(self) -> int:
        """What the number of microbatches of a step must be a multiple of."""
        return 1 if self.vpp is None else self.pp

    def check(self, model: ModelSizes | None = None, world_size: int | None = None) -> None:
        """Refuse sizes that break a rule.

        Args:
            model: what is divided, where it is known.
            world_size: ranks of the job, where they are known.

        Raises:
            ValueError: listing every broken rule, its values and the remedy.
        """
        problems = self.problems()
        if world_size is not None:
            problems += self.launch_problems(world_size)
        if model is not None:
            problems += self.model_problems(model)
        if problems:
            listed = "; also ".join(problems)
            raise ValueError(f"{len(problems)} problem(s) with the parallel sizes: {listed}")

    def problems(self) -> list[str]:
        """Every rule that the sizes break, whatever the model and the machine."""
        problems, sizes = list(self._range_problems()), self._in_range()
        if self.sp and self.tp == 1:
            problems.append(
                "sequence_parallel=True needs tensor_model_parallel_size above 1; turn it off"
            )
        if sizes.vpp is not None and self.pp == 1:
            problems.append(
                f"virtual_pipeline_model_parallel_size={self.vpp} needs "
                "pipeline_model_parallel_size above 1; leave it out"
            )
        return problems

    def launch_problems(self, world_size: int) -> list[str]:
        """What keeps ``world_size`` ranks from holding whole replicas."""
        s = self._in_range()
        if world_size < 1 or world_size % s.model_size:
            factors = _product(tp=s.tp, cp=s.cp, pp=s.pp)
            return [
                f"{world_size} ranks hold no whole replica of {factors}; launch a multiple of "
                f"{s.model_size}"
            ]
        expert_ranks = s.expert_tp * s.ep * s.pp
        if world_size % expert_ranks:
            factors = _product(**s._expert_axis, ep=s.ep, pp=s.pp)
            return [
                f"{world_size} ranks hold no whole set of experts of {factors}; launch a multiple "
                f"of {expert_ranks}"
            ]
        return []

    def model_problems(self, model: ModelSizes) -> list[str]:
        """What of a model the sizes do not divide, and what its experts need of them."""
        s = self._in_range()
        heads, groups = model.num_attention_heads, model.num_query_groups
        problems = list(_remainders({"num_attention_heads": heads, **model.widths}, tp=s.tp))
        if s.cp > 1 and heads % (s.tp * s.cp):
            largest = math.gcd(heads // s.tp, s.cp) if heads % s.tp == 0 else 1
            problems.append(
                f"num_attention_heads={heads} is no multiple of {_product(tp=s.tp, cp=s.cp)}, and "
                "attention of packed rows is divided by heads; the largest context_parallel_size "
                f"below that fits is {largest}"
            )
        if heads % groups:
            problems.append(
                f"num_attention_heads={heads} is no multiple of num_query_groups={groups}; choose "
                "a num_query_groups that divides it"
            )
        if groups % s.tp and s.tp % groups:
            problems.append(
                f"num_query_groups={groups} neither divides nor is a multiple of "
                f"{_product(tp=s.tp)}; choose a tensor_model_parallel_size that fits"
            )
        if model.num_layers is not None:
            stages = _remainders({"num_layers": model.num_layers}, pp=s.pp, vpp=s.vpp or 1)
            own = (
                "or give stages unequal numbers (num_layers_in_first_pipeline_stage, "
                "num_layers_in_last_pipeline_stage, pipeline_model_parallel_layout; or count the "
                "embedding and the loss as layers: account_for_embedding_in_pipeline_split, "
                "account_for_loss_in_pipeline_split)"
            )
            problems += [f"{problem}, {own}" for problem in stages]
        return [*problems, *s._expert_problems(model)]

    def training_problems(self, model: ModelSizes) -> list[str]:
        """What keeps a model that can be built and loaded so from being trained so."""
        if not model.num_moe_experts or self.tp == 1 or self.sp:
            return []
        return [
            f"num_moe_experts={model.num_moe_experts} with tensor_model_parallel_size={self.tp}: "
            "Megatron-Core trains experts under tensor parallelism with sequence parallelism only; "
            "set sequence_parallel=True"
        ]

    def _expert_problems(self, model: ModelSizes) -> Iterator[str]:
        experts = model.num_moe_experts
        if not experts:
            if self.ep > 1:
                yield (
                    f"expert_model_parallel_size={self.ep} needs a model with experts; set it to 1"
                )
            return
        yield from _remainders({"num_moe_experts": experts}, ep=self.ep)
        yield from _remainders(model.expert_widths, **self._expert_axis)
        if self.ep == 1 and self.expert_tp != self.tp:
            # Megatron-Core 0.16 takes such experts for weights that every rank holds.
            yield (
                f"expert_tensor_parallel_size={self.etp} with expert_model_parallel_size=1: "
                "gradients are not summed over an expert's replicas; set "
                "expert_tensor_parallel_size=None, or spread experts by "
                "expert_model_parallel_size"
            )

    @property
    def _expert_axis(self) -> dict[str, int]:
        """What divides an expert's widths, by the name under which it was set."""
        return {"tp" if self.expert_tp == self.tp else "etp": self.expert_tp}

    def _range_problems(self) -> Iterator[str]:
        for name in self._out_of_range():
            remedy = "; set it to None to have one chunk a rank" if name == "vpp" else ""
            yield (
                f"{MEGATRON_NAMES.get(name, 'data_parallel_size')}={getattr(self, name)!r} must "
                f"be at least {_LEAST[name]}{remedy}"
            )

    def _out_of_range(self) -> list[str]:
        given = ((name, getattr(self, name), least) for name, least in _LEAST.items())
        return [
            name
            for name, size, least in given
            if not (type(size) is int and size >= least or size is _DEFAULTS[name])
        ]

    def _in_range(self) -> Self:
        """These sizes without those of which no other rule can be asked."""
        return replace(self, **{name: _DEFAULTS[name] for name in self._out_of_range()})


_LEAST = {"tp": 1, "pp": 1, "vpp": 2, "cp": 1, "ep": 1, "etp": 1, "dp": 1}
_DEFAULTS: dict[str, Any] = {f.name: f.default for f in fields(ParallelSizes)}


def _remainders(values: Mapping[str, int], **sizes: int) -> Iterator[str]:
    """Those of ``values`` that the product of ``sizes`` does not divide."""
    for name, value in values.items():
        if value % math.prod(sizes.values()):
            yield (
                f"{name}={value} is no multiple of {_product(**sizes)}; choose sizes that divide it"
            )


def _product(**sizes: int) -> str:
    """``tensor_model_parallel_size=2 x pipeline_model_parallel_size=4``, without factors of 1."""
    return " x ".join(f"{MEGATRON_NAMES[n]}={size}" for n, size in sizes.items() if size > 1)
