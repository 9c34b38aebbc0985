"""Routes are recorded and replayed bit for bit, and refused where nothing would take them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from torch import Tensor

from megatron_pg.mcore import PrefixGroupedSeqParams, RouteRecorder, with_prefix_grouped_attention
from megatron_pg.mcore.routers.row import RouterRow, as_mask, from_digits, to_digits
from tests.mcore import cases, harness, probes
from tests.mcore.router_steps import RouterCase, make_router_rows, make_routes, routers
from tests.ranks import Pool

pytestmark = pytest.mark.megatron

CASES = {
    "softmax": cases.router(cases.AUX),
    "sigmoid_groups": cases.router(
        cases.BIAS,
        cases.DEEPSEEK,
        dict(moe_router_pre_softmax=False, moe_router_bias_update_rate=0.0),
    ),
    "mixed_layers": cases.router(dict(moe_layer_freq=[0, 1])),
    "moe": cases.router(cases.AUX, cases.MOE_RECOMPUTE),
    "full": cases.router(cases.Z, cases.FULL_RECOMPUTE),
    "tp2_sp": cases.router(cases.AUX, tp=2, sp=True),
    "cp2": cases.router(cases.AUX, cp=2),
    "cp2_tp2_sp": cases.router(cases.AUX, cp=2, tp=2, sp=True),
    "pp2_vpp2": cases.router(cases.MOE_RECOMPUTE, pp=2, vpp=2, num_layers=4),
}


def passes(case: RouterCase) -> dict[str, Any]:
    """A pass that records, one that replays what was recorded, and one that replays others."""
    with harness.on_cpu():
        harness.initialize(case)
        config = harness.make_config(case)
        chunks = harness.wrap_ddp(case, config, harness.build(case, config, packed=True))
        for router in routers(chunks):
            if router.enable_expert_bias:
                router.expert_bias.copy_(torch.linspace(-0.02, 0.02, 4))
        rows = [make_router_rows(case, seed) for seed in (0, 1)]

        def run(**own: list[Any]) -> tuple[float | None, dict[str, Tensor]]:
            batches = harness.packed_microbatches(case, rows)
            for i, batch in enumerate(batches):
                params = batch["params"]
                batch["params"] = PrefixGroupedSeqParams.from_layout(
                    params.layout,
                    predictions=params.predictions,
                    config=config,
                    **{name: values[i] for name, values in own.items()},
                )
            loss = harness.run_step(case, chunks, harness.packed_step, batches)
            return loss, harness.named_gradients(chunks)

        recorders = [RouteRecorder() for _ in rows]
        plain = run()
        recorded = run(record_routes=recorders)
        found = [recorder.routed_experts() for recorder in recorders]
        numbers = [list(recorder.layer_numbers) for recorder in recorders]
        routes = []
        for row, own in zip(rows, found):
            whole = make_routes(row, case.num_layers, 7)
            # What other stages have chosen is theirs to replay.
            whole[:, [number - 1 for number in numbers[0]]] = own.long()
            routes.append(whole)
        again = [RouteRecorder() for _ in rows]
        replayed = run(routed_experts=routes, record_routes=again)
        other = run(routed_experts=[make_routes(r, case.num_layers, 8) for r in rows])
        # Every third token as it was, the others by the router itself.
        for whole in routes:
            whole[torch.arange(len(whole)) % 3 > 0] = -1
        partly = run(routed_experts=routes)
        return dict(
            layers=numbers,
            shapes=[tuple(own.shape) for own in found],
            rows=[row.layout.total_tokens for row in rows],
            same=_equal(plain, recorded) and _equal(recorded, replayed),
            same_routes=all(torch.equal(a, b.routed_experts()) for a, b in zip(found, again)),
            others_differ=not _equal(replayed, other),
            partly=_equal(replayed, partly),
            descends=all(bool((own.diff(dim=-1) > 0).any()) for own in found),
        )


def _equal(a: tuple[float | None, dict[str, Tensor]], b: Any) -> bool:
    return a[0] == b[0] and all(torch.equal(a[1][name], b[1][name]) for name in a[1])


@pytest.mark.parametrize("name", CASES)
def test_record_then_replay_is_bit_equal(ranks: Pool, name: str) -> None:
    case = CASES[name]
    all_layers = []
    for found in ranks.run(case.world_size, passes, case):
        assert found["same"] and found["same_routes"] and found["others_differ"]
        assert found["partly"], "-1 is not the router's own choice"
        assert found["descends"], "ids in the order of experts: the order of top-k is lost"
        one, other = found["layers"]
        assert one == other
        assert found["shapes"] == [(total, len(one), 2) for total in found["rows"]]
        all_layers += one
    expected = {2} if name == "mixed_layers" else set(range(1, case.num_layers + 1))
    assert set(all_layers) == expected


def test_digits_of_any_number_come_back() -> None:
    for largest in (0, 1, 2, 3, 4, 255, 256, 40000):
        values = torch.randint(0, largest + 1, (3, 50))
        assert torch.equal(from_digits(to_digits(values, largest)), values)


@pytest.mark.parametrize("num_experts", [1, 2, 5, 8, 257])
@pytest.mark.parametrize("is_one_sequence", [False, True])
@pytest.mark.parametrize("topk", [None, 1, 3])
def test_a_mask_says_all_of_a_row(num_experts: int, is_one_sequence: bool, topk: Any) -> None:
    row = make_router_rows(RouterCase(), 0)
    params = PrefixGroupedSeqParams.from_layout(row.layout)
    routes = None
    if topk is not None:
        routes = torch.randint(-1, num_experts, (row.layout.total_tokens, topk))
    mask = as_mask(
        samples=None if is_one_sequence else params.row_mask,
        multiplicity_digits=params.multiplicity_digits,
        routes=routes,
        num_experts=num_experts,
    )
    # As MoELayer does, and as a hook on saved tensors would.
    read = RouterRow.from_mask(mask.transpose(0, 1).bool().clone(), topk or 2, num_experts)
    assert torch.equal(read.multiplicity, row.layout.multiplicity)
    assert len(read.weights) == (1 if is_one_sequence else row.layout.num_samples)
    if not is_one_sequence:
        assert torch.equal(read.weights.bool()[..., None], probes.membership(row.layout))
    assert (read.routes is None) == (routes is None)
    if routes is not None:
        assert torch.equal(read.routes, routes)


def _given(case: RouterCase, routes: Tensor, **changes: Any) -> Any:
    config = harness.make_config(case)
    for name, value in changes.items():
        setattr(config, name, value)
    row = make_router_rows(case, 0)
    return PrefixGroupedSeqParams.from_layout(row.layout, config=config, routed_experts=routes)


def twice(routes: Tensor) -> Tensor:
    routes = routes.clone()
    routes[4, 1] = 1
    return routes


ROUTES = make_routes(make_router_rows(RouterCase(), 0), 2, 0)


@pytest.mark.parametrize(
    ("routes", "changes", "message"),
    [
        (ROUTES[1:], {}, "must hold integers"),
        (ROUTES[0], {}, "must hold integers"),
        (ROUTES.float(), {}, "must hold integers"),
        (ROUTES.bool(), {}, "must hold integers"),
        (ROUTES[:, :1], {}, "has 1 layers and 2 experts a token"),
        (ROUTES[..., :1], {}, "has 2 layers and 1 experts a token"),
        (ROUTES + 1, {}, r"must be different experts in \[0, 4\), or all -1"),
        (ROUTES - 1, {}, "must be different experts"),
        (ROUTES - 2, {}, "must be different experts"),
        (twice(ROUTES), {}, r"of token 4 in layer 1 are \[1, 1\], must be different experts"),
        (twice(ROUTES).to(torch.uint8), {}, r"of token 4 in layer 1 are \[1, 1\]"),
        (ROUTES, dict(num_moe_experts=None), "a model without experts"),
    ],
)
def test_routes_that_no_model_has_are_refused(
    routes: Tensor, changes: dict[str, Any], message: str
) -> None:
    _given(CASES["softmax"], ROUTES)
    with pytest.raises(ValueError, match=message):
        _given(CASES["softmax"], routes, **changes)


def test_what_dense_layers_are_given_is_not_read() -> None:
    params = _given(CASES["softmax"], twice(ROUTES), moe_layer_freq=[1, 0])
    assert torch.equal(params.routed_experts, twice(ROUTES))
    with pytest.raises(ValueError, match="in layer 1 are"):
        _given(CASES["softmax"], twice(ROUTES), moe_layer_freq=[0, 1])


def test_a_fused_router_replays_and_records_nothing(one_rank: None) -> None:
    case = CASES["softmax"]
    with pytest.raises(NotImplementedError, match="moe_router_fusion=True takes top-k in one"):
        _given(case, ROUTES, moe_router_fusion=True)
    config = harness.make_config(case)
    (model,) = harness.build(case, config, packed=True)
    config.moe_router_fusion = True
    row = make_router_rows(case, 0)
    for own in (dict(record_routes=RouteRecorder()), dict(routed_experts=ROUTES)):
        params = PrefixGroupedSeqParams.from_layout(row.layout, **own)
        tokens = row.layout.pack_tokens(row.sequences)
        with pytest.raises(NotImplementedError, match="neither replays nor records"):
            model(tokens[None], params.position_ids[None], None, packed_seq_params=params)


def test_a_router_of_ones_own_gets_no_routes(one_rank: None) -> None:
    case = replace(CASES["softmax"], config=cases.MOE["config"])
    with probes.probed_layers([]):
        (model,) = harness.build(case, harness.make_config(case), packed=True)
    row = make_router_rows(case, 0)
    params = PrefixGroupedSeqParams.from_layout(row.layout, routed_experts=ROUTES)
    tokens = row.layout.pack_tokens(row.sequences)
    with pytest.raises(NotImplementedError, match="ProbingRouter neither replays nor records"):
        model(tokens[None], params.position_ids[None], None, packed_seq_params=params)


def test_an_unknown_router_is_refused_by_name() -> None:
    spec = probes.with_probe(get_gpt_layer_local_spec(num_experts=4, moe_grouped_gemm=False), [])
    with_prefix_grouped_attention(spec)
    mlp: Any = spec.submodules.mlp
    parts = mlp.submodules if hasattr(mlp, "submodules") else mlp.keywords["submodules"]
    parts.router = type("OtherRouter", (parts.router,), dict(reads_row_mask=False))
    with pytest.raises(NotImplementedError, match="router is OtherRouter; .* TopKRouter"):
        with_prefix_grouped_attention(spec)


def test_no_layer_has_recorded_anything() -> None:
    with pytest.raises(ValueError, match="no routes were recorded"):
        RouteRecorder().routed_experts()


@pytest.mark.parametrize("counts", [(), (1, 2, 3), (1, 1, 1, 1, -1, 1, 1, 1)])
def test_counts_are_one_for_each_sample(counts: tuple[int, ...]) -> None:
    layout = make_router_rows(RouterCase(), 0).layout
    assert layout.num_samples == 8
    with pytest.raises(ValueError, match="sample_counts="):
        PrefixGroupedSeqParams.from_layout(layout, sample_counts=counts)
