"""Sizes of a parallel layout: every rule raised and passed, and Megatron-Core's own beside them."""

from __future__ import annotations

import warnings
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from megatron_pg.parallel import MEGATRON_NAMES, ModelSizes, ParallelSizes

DENSE = ModelSizes(
    num_attention_heads=8, num_query_groups=4, num_layers=12, widths={"ffn_hidden_size": 24}
)
EXPERTS = ModelSizes(
    num_attention_heads=8,
    num_query_groups=4,
    num_layers=12,
    expert_widths={"moe_ffn_hidden_size": 24},
    num_moe_experts=6,
)
# sizes, what is in the one problem, the sizes that its remedy names
BROKEN_ALONE: dict[str, tuple[ParallelSizes, str, ParallelSizes]] = {
    **{
        f"{name}=0": (
            ParallelSizes(**{name: 0}),
            f"{MEGATRON_NAMES.get(name, 'data_parallel_size')}=0 must be at least 1",
            ParallelSizes(),
        )
        for name in ("tp", "pp", "cp", "ep", "etp", "dp")
    },
    "no integer": (ParallelSizes(tp=2.0), "size=2.0 must be at least 1", ParallelSizes(tp=2)),  # type: ignore[arg-type]
    "one chunk": (ParallelSizes(pp=2, vpp=1), "=1 must be at least 2", ParallelSizes(pp=2)),
    "sp": (ParallelSizes(sp=True), "sequence_parallel=True needs", ParallelSizes()),
    "vpp": (ParallelSizes(vpp=2), "virtual_pipeline_model_parallel_size=2 needs", ParallelSizes()),
}
BROKEN_OF_A_MODEL: dict[str, tuple[ModelSizes, ParallelSizes, str, ParallelSizes]] = {
    "heads of a context": (
        DENSE,
        ParallelSizes(tp=2, cp=8),
        "the largest context_parallel_size below that fits is 4",
        ParallelSizes(tp=2, cp=4),
    ),
    "heads": (
        replace(DENSE, num_query_groups=1),
        ParallelSizes(tp=3),
        "num_attention_heads=8 is no multiple of tensor_model_parallel_size=3",
        ParallelSizes(tp=2),
    ),
    "groups of heads": (
        replace(DENSE, num_query_groups=3),
        ParallelSizes(),
        "num_attention_heads=8 is no multiple of num_query_groups=3",
        ParallelSizes(),
    ),
    "groups": (
        replace(DENSE, num_attention_heads=12, num_query_groups=6),
        ParallelSizes(tp=4),
        "num_query_groups=6 neither divides nor is a multiple of tensor_model_parallel_size=4",
        ParallelSizes(tp=12),
    ),
    "widths": (
        replace(DENSE, widths={"ffn_hidden_size": 25}),
        ParallelSizes(tp=2),
        "ffn_hidden_size=25 is no multiple of tensor_model_parallel_size=2",
        ParallelSizes(),
    ),
    "layers": (
        DENSE,
        ParallelSizes(pp=5),
        "or give stages unequal numbers (num_layers_in_first_pipeline_stage, num_layers_in_last_",
        ParallelSizes(pp=4),
    ),
    "chunks": (
        DENSE,
        ParallelSizes(pp=4, vpp=2),
        "pipeline_model_parallel_size=4 x virtual_pipeline_model_parallel_size=2",
        ParallelSizes(pp=4, vpp=3),
    ),
    "no experts": (
        DENSE,
        ParallelSizes(ep=2),
        "expert_model_parallel_size=2 needs a model with experts",
        ParallelSizes(),
    ),
    "experts": (
        EXPERTS,
        ParallelSizes(ep=4),
        "num_moe_experts=6 is no multiple of expert_model_parallel_size=4",
        ParallelSizes(ep=3),
    ),
    "expert widths": (
        EXPERTS,
        ParallelSizes(ep=2, etp=5),
        "moe_ffn_hidden_size=24 is no multiple of expert_tensor_parallel_size=5",
        ParallelSizes(ep=2, etp=4),
    ),
    "expert tp alone": (
        EXPERTS,
        ParallelSizes(tp=2, sp=True, etp=1),
        "expert_tensor_parallel_size=1 with expert_model_parallel_size=1",
        ParallelSizes(tp=2, sp=True, etp=1, ep=2),
    ),
    "expert widths under tp": (
        replace(EXPERTS, expert_widths={"moe_ffn_hidden_size": 25}),
        ParallelSizes(tp=2, sp=True, etp=2),
        "moe_ffn_hidden_size=25 is no multiple of tensor_model_parallel_size=2",
        ParallelSizes(),
    ),
}


@pytest.mark.parametrize("case", BROKEN_ALONE)
def test_a_broken_rule_is_the_only_problem(case: str) -> None:
    sizes, message, remedy = BROKEN_ALONE[case]
    (problem,) = sizes.problems()
    assert message in problem
    assert remedy.problems() == []
    with pytest.raises(ValueError, match="1 problem.s. with the parallel sizes"):
        sizes.check()


def test_experts_that_can_be_loaded_but_not_trained_are_refused_in_training() -> None:
    (problem,) = ParallelSizes(tp=2).training_problems(EXPERTS)
    assert "set sequence_parallel=True" in problem
    assert ParallelSizes(tp=2).model_problems(EXPERTS) == []
    for sizes, model in (
        (ParallelSizes(tp=2, sp=True), EXPERTS),
        (ParallelSizes(ep=2), EXPERTS),
        (ParallelSizes(tp=2), DENSE),
    ):
        assert sizes.training_problems(model) == []


@pytest.mark.parametrize("case", BROKEN_OF_A_MODEL)
def test_a_model_that_is_not_divided_is_refused(case: str) -> None:
    model, sizes, message, remedy = BROKEN_OF_A_MODEL[case]
    (problem,) = sizes.model_problems(model)
    assert message in problem
    if case != "groups of heads":  # of the model alone
        assert remedy.model_problems(model) == []
    with pytest.raises(ValueError, match="with the parallel sizes"):
        sizes.check(model)


@pytest.mark.parametrize(
    ("sizes", "world_size", "message"),
    [
        (ParallelSizes(tp=2, pp=2), 6, "tensor_model_parallel_size=2 x pipeline_model"),
        (ParallelSizes(tp=2, pp=2), 0, "launch a multiple of 4"),
        (ParallelSizes(ep=4), 2, "no whole set of experts of expert_model_parallel_size=4"),
        (ParallelSizes(tp=2, ep=2, etp=4), 4, "launch a multiple of 8"),
    ],
)
def test_ranks_that_hold_no_whole_replica_are_refused(
    sizes: ParallelSizes, world_size: int, message: str
) -> None:
    (problem,) = sizes.launch_problems(world_size)
    assert f"{world_size} ranks hold no whole" in problem and message in problem
    assert sizes.launch_problems(16) == []
    with pytest.raises(ValueError, match="hold no whole"):
        ParallelSizes.from_config(megatron_arguments(sizes), world_size)


def test_all_problems_are_told_at_once() -> None:
    sizes = ParallelSizes(tp=3, pp=0, cp=2)
    with pytest.raises(ValueError) as error:
        sizes.check(replace(DENSE, num_query_groups=1), world_size=4)
    assert str(error.value).startswith("4 problem(s)")
    for part in ("pipeline_model_parallel_size=0", "context_parallel", "4 ranks", "heads=8"):
        assert part in str(error.value)


def megatron_arguments(sizes: ParallelSizes) -> Namespace:
    return Namespace(**{name: getattr(sizes, field) for field, name in MEGATRON_NAMES.items()})


def test_derived_sizes() -> None:
    sizes = ParallelSizes(tp=2, sp=True, pp=3, vpp=2, dp=5)
    assert (sizes.model_size, sizes.world_size, sizes.num_chunks) == (6, 30, 6)
    assert (sizes.row_multiple, sizes.sp_size, sizes.microbatch_multiple) == (2, 2, 3)
    assert (sizes.expert_tp, replace(sizes, etp=1).expert_tp) == (2, 1)
    plain = replace(sizes, sp=False, vpp=None)
    assert (plain.row_multiple, plain.microbatch_multiple, plain.num_chunks) == (1, 1, 3)
    assert (replace(sizes, cp=4).row_multiple, replace(sizes, cp=4).model_size) == (8, 24)


@pytest.mark.parametrize("ep", [1, 2, 3, 4])
@pytest.mark.parametrize("tp", [1, 2, 3, 4, 6])
def test_who_shares_experts(tp: int, ep: int) -> None:
    """By hand: whether a set of experts lies on ranks of more than one model rank's row."""
    found = []
    for etp in (None, 1, 2):
        num_experts_ranks = ep * (etp or tp)
        places = range(tp * num_experts_ranks)
        rows = {(place // num_experts_ranks, place // tp) for place in places}
        shares = len(rows) > len({expert_set for expert_set, _ in rows})
        assert ParallelSizes(tp=tp, ep=ep, etp=etp).shares_experts == shares
        found.append(shares)
    assert found[0] == (ep > 1)


def test_sizes_are_read_under_megatrons_names() -> None:
    sizes = ParallelSizes(tp=2, sp=True, pp=3, vpp=2, cp=1, ep=2, etp=1)
    assert ParallelSizes.from_config(megatron_arguments(sizes)) == sizes
    assert ParallelSizes.from_config(megatron_arguments(sizes), 30) == replace(sizes, dp=5)
    assert ParallelSizes.from_config(Namespace()) == ParallelSizes()
    assert sizes.group_arguments() == {
        name: value
        for name, value in vars(megatron_arguments(sizes)).items()
        if name != "sequence_parallel"
    }


def configuration(**changes: Any) -> Namespace:
    settings = dict(
        num_layers=12,
        num_attention_heads=8,
        num_query_groups=4,
        ffn_hidden_size=24,
        num_moe_experts=None,
        moe_ffn_hidden_size=None,
        moe_layer_freq=1,
        moe_shared_expert_intermediate_size=None,
    )
    return Namespace(**settings | changes)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, DENSE),
        ({"num_query_groups": None}, replace(DENSE, num_query_groups=8)),
        ({"num_layers_in_first_pipeline_stage": 2}, replace(DENSE, num_layers=None)),
        ({"pipeline_model_parallel_layout": "Et|tL"}, replace(DENSE, num_layers=None)),
        ({"num_moe_experts": 6}, EXPERTS),
        (
            {"num_moe_experts": 6, "moe_ffn_hidden_size": 10, "moe_layer_freq": [0, 1]},
            replace(EXPERTS, widths=DENSE.widths, expert_widths={"moe_ffn_hidden_size": 10}),
        ),
        (
            {"num_moe_experts": 6, "moe_shared_expert_intermediate_size": 9},
            replace(EXPERTS, widths={"moe_shared_expert_intermediate_size": 9}),
        ),
    ],
)
def test_what_a_configuration_divides(changes: dict[str, Any], expected: ModelSizes) -> None:
    assert ModelSizes.from_config(configuration(**changes)) == expected


@pytest.fixture(scope="module")
def num_refused() -> Iterator[list[int]]:
    """How many of the tried layouts are refused, and how many are not."""
    counts = [0, 0]
    yield counts
    assert all(counts), counts


@pytest.mark.megatron
@given(
    tp=st.integers(1, 4),
    pp=st.integers(1, 4),
    vpp=st.sampled_from([None, 2]),
    ep=st.integers(1, 4),
    etp=st.sampled_from([None, 1, 2]),
    world_size=st.integers(1, 16),
)
def test_a_launch_is_refused_where_megatron_refuses_it(
    num_refused: list[int], world_size: int, **sizes: Any
) -> None:
    ours = ParallelSizes(**sizes)
    refused = bool(ours.problems() or ours.launch_problems(world_size))
    assert refused == (not megatron_launches(ours, world_size))
    num_refused[refused] += 1


def megatron_launches(sizes: ParallelSizes, world_size: int) -> bool:
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        parallel_state.initialize_model_parallel(
            **sizes.group_arguments(), create_gloo_process_groups=False
        )
    except RuntimeError:
        return False
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    return True


@pytest.mark.megatron
@given(
    tp=st.integers(1, 6),
    sp=st.booleans(),
    pp=st.integers(1, 3),
    ep=st.integers(1, 3),
    heads=st.sampled_from([2, 4, 6, 12]),
    groups=st.sampled_from([None, 2, 3, 4]),
    layers=st.integers(1, 6),
    experts=st.sampled_from([None, 2, 4]),
)
def test_a_configuration_that_megatron_refuses_is_refused(
    num_refused: list[int],
    heads: int,
    groups: int | None,
    layers: int,
    experts: int | None,
    **sizes: Any,
) -> None:
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_config import TransformerConfig

    ours = ParallelSizes(**sizes)
    settings = dict(
        num_layers=layers,
        hidden_size=heads * 12,
        num_attention_heads=heads,
        num_query_groups=groups,
        num_moe_experts=experts,
        pipeline_dtype=float,
        moe_token_dispatcher_type="alltoall",
        add_bias_linear=False,
        **vars(megatron_arguments(ours)),
    )
    model = ModelSizes(
        num_attention_heads=heads,
        num_query_groups=groups or heads,
        num_layers=layers,
        widths={"ffn_hidden_size": heads * 48},
        num_moe_experts=experts,
    )
    refused = bool(ours.problems() or ours.model_problems(model))
    num_refused[refused] += 1
    try:
        with warnings.catch_warnings(action="ignore"):
            config = TransformerConfig(**settings)
        get_num_layers_to_build(config, pp_rank=0)
    except (ValueError, AssertionError):
        assert refused
    else:
        assert ParallelSizes.from_config(config) == replace(ours, etp=ours.tp)
        assert ours.model_problems(ModelSizes.from_config(config)) == ours.model_problems(model)
