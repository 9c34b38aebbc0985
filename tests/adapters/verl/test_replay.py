"""verl's router replay: its stock engine on written-out rows against ours on packed ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("verl", reason="verl is installed in its own lane")

from verl.utils import tensordict_utils as tu  # noqa: E402

from megatron_pg.adapters.verl.replay import Replay  # noqa: E402
from megatron_pg.data import RouteShape  # noqa: E402
from tests.adapters.verl.batches import make_batch, ragged  # noqa: E402
from tests.adapters.verl.harness import (  # noqa: E402
    STOCK,
    VerlCase,
    compare,
    engines,
    gradients,
    loss_function,
    make_data,
    rollout_routes,
)
from tests.mcore.harness import on_cpu  # noqa: E402
from tests.ranks import Pool  # noqa: E402

pytestmark = pytest.mark.verl

# Relative, in fp32; without the routes gradients are off by more than a twentieth.
BOUND = 5e-5
MIXED = VerlCase(experts=(0, 1, 1), replay="R3", data=dict(uids=True, max_token_len_per_gpu=110))
CASES = {
    "mixed_layers": MIXED,
    "turns": replace(MIXED, batch="turns"),
    "pp2": replace(MIXED, pp=2, experts=(0, 1, 1, 1)),
    "cp2": replace(MIXED, cp=2, data=dict(uids=True, max_token_len_per_gpu=55)),
    "resident": replace(
        MIXED,
        data=dict(max_token_len_per_gpu=60),
        prefix_group=dict(prefix_resident="always", min_shared=1),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_rollout_routes_are_replayed_as_by_the_stock_engine(ranks: Pool, name: str) -> None:
    case = CASES[name]
    for own in ranks.run(case.world_size, compare, case):
        assert own.smallest > 1e-6, "every gradient was compared with something"
        beyond = {n: e for n, e in own.gradients.items() if not e <= BOUND}
        assert not beyond
        if own.losses is not None:
            stock, ours = own.losses
            assert ours == pytest.approx(stock, abs=1e-6, rel=1e-6) and abs(stock) > 1e-3
            assert own.values["log_probs"] <= 1e-5
            assert own.metrics["split_tokens"] > 10 and own.metrics["reuse_ratio"] > 1
            if name == "resident":
                assert own.metrics["resident_groups"] > 0


@dataclass(frozen=True)
class Recorded:
    """R2 on one rank: both engines record, and train with what they recorded.

    Attributes:
        routes: of every sample, stock and ours; empty before the last stage.
        gradients: relative differences after an update of the routers.
        others: the same without replay.
    """

    routes: dict[str, list[Tensor]]
    gradients: dict[str, float]
    others: dict[str, float]


def record_and_train(case: VerlCase) -> Recorded:
    with on_cpu():
        routes: dict[str, list[Tensor]] = {}
        found: dict[str, dict[str, Tensor]] = {}
        for name, engine in engines(case):
            settings = {} if name == "ours" else STOCK
            with torch.no_grad():
                output = engine.forward_backward_batch(make_data(case, **settings), None, True)
            given = output["model_output"]["routed_experts"] if output else None
            routes[name] = [] if given is None else list(given.unbind())
            if case.pp > 1:
                # The trainer hands every stage what the last one returned.
                parts: list[Any] = [None, None]
                torch.distributed.all_gather_object(parts, routes[name])
                given = torch.nested.as_nested_tensor(parts[-1], layout=torch.jagged)
            change_routers(engine)
            data = make_data(case, **settings)
            data["routed_experts"] = given
            found[name] = trained(engine, data)
            if name == "ours":
                data = make_data(case)
                tu.assign_non_tensor(data, enable_routing_replay=False)
                found["without"] = trained(engine, data)

        def differences(name: str) -> dict[str, float]:
            return {
                n: float((found[name][n] - g).norm() / g.norm().clamp(min=1e-30))
                for n, g in found["stock"].items()
            }

        return Recorded(routes, differences("ours"), differences("without"))


def change_routers(engine: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for chunk in engine.module:
            for own, parameter in sorted(chunk.named_parameters()):
                if "router" in own:
                    parameter.add_(torch.randn(parameter.shape, generator=generator))


def trained(engine: Any, data: Any) -> dict[str, Tensor]:
    for chunk in engine.module:
        chunk.zero_grad_buffer()
    engine.forward_backward_batch(data, loss_function(), False)
    return gradients(engine)


@pytest.mark.parametrize("name", ["mixed_layers", "pp2", "cp2", "resident"])
def test_routes_are_recorded_and_replayed_as_by_the_stock_engine(ranks: Pool, name: str) -> None:
    case = replace(CASES[name], replay="R2")
    if name == "pp2":
        # The stock engine records nothing on a stage without experts.
        case = replace(case, experts=(1, 1, 0, 1))
    for own in ranks.run(case.world_size, record_and_train, case):
        assert len(own.routes["stock"]) == len(own.routes["ours"])
        for stock, ours in zip(own.routes["stock"], own.routes["ours"]):
            assert stock.shape == ours.shape and stock.shape[1] == sum(case.experts)
            assert torch.equal(stock.cpu(), ours)
        assert all(error <= BOUND for error in own.gradients.values()), own.gradients
        assert max(own.others.values()) > 0.05


SHAPE = RouteShape(4, 2, (False, True, True))


def batch_of(mode: str, **changes: Any) -> Any:
    data = make_batch(ragged(0), 8, 0, enable_routing_replay=True)
    data["routed_experts"] = rollout_routes(ragged(0), replace(MIXED, replay=mode), 0)
    for name, value in changes.items():
        data[name] = value
    return data


def test_a_sample_without_response_and_a_last_token_keep_their_own_routes() -> None:
    data = batch_of("R3")
    masks = list(data["response_mask"].unbind())
    masks[2] = torch.zeros_like(masks[2])
    data["response_mask"] = torch.nested.as_nested_tensor(masks, layout=torch.jagged)
    routes = Replay.of(data, "R3", SHAPE, forward_only=True).routes
    assert routes is not None
    for sample, own in enumerate(routes):
        known = (own[:, 1:] >= 0).flatten(1).all(1)
        assert known.sum() == (0 if sample == 2 else len(own) - 1) and not known[-1]


def test_routes_that_stop_with_the_last_generation_leave_the_rest_to_the_routers() -> None:
    """verl fills up what a tool said last with zeros, which are no routes."""
    data = batch_of("R3")
    parts = [own.clone() for own in data["routed_experts"].unbind()]
    parts[0][-4:] = 0
    data["routed_experts"] = torch.nested.as_nested_tensor(parts, layout=torch.jagged)
    routes = Replay.of(data, "R3", SHAPE, forward_only=False).routes
    assert routes is not None
    assert ((routes[0][:, 1:] >= 0).flatten(1).all(1)).sum() == len(parts[0]) - 4


def test_nothing_is_replayed_where_verl_replays_nothing() -> None:
    data = batch_of("R3")
    assert Replay.of(data, "disabled", SHAPE, forward_only=False).routes is None
    tu.assign_non_tensor(data, enable_routing_replay=False)
    assert Replay.of(data, "R3", SHAPE, forward_only=False).routes is None


@pytest.mark.parametrize(
    ("mode", "change", "message"),
    [
        ("R3", "none", "enable_rollout_routing_replay=True"),
        ("R2", "none", "let the actor's compute_log_prob record them"),
        ("R3", "short", "sample 0 of the batch: routed_experts has"),
        ("R3", "beyond", "must be different experts in [0, 4)"),
        ("R3", "width", "the model has 3 layers, 2 of them with experts"),
        ("R3", "dense", "router_replay.mode='R3' for a model without experts"),
    ],
)
def test_routes_that_cannot_be_replayed_are_refused(mode: str, change: str, message: str) -> None:
    data = batch_of(mode)
    parts = [own.clone() for own in data["routed_experts"].unbind()]
    if change == "short":
        parts[0] = parts[0][:-2]
    if change == "beyond":
        parts[0][1, 1, 0] = 4
    if change == "width":
        parts = [own[:, :1] for own in parts]
    data["routed_experts"] = torch.nested.as_nested_tensor(parts, layout=torch.jagged)
    if change == "none":
        del data["routed_experts"]
    with pytest.raises(ValueError) as error:
        Replay.of(data, mode, None if change == "dense" else SHAPE, forward_only=False)
    assert message in str(error.value)
