"""On ranks: steps that replay routes, and the stock model with Megatron's own replay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.router_replay import RouterReplayAction
from torch import Tensor

from megatron_pg.data import Group, Sample
from megatron_pg.grpo import GrpoConfig, GrpoStep, PrefixGroupConfig, RouteRecord, StepBatch
from tests.grpo.forest_steps import written_out_step
from tests.mcore import harness

NUM_EXPERTS = 4
SHAPE = (4, 2)
MODEL: dict[str, Any] = dict(
    num_moe_experts=NUM_EXPERTS,
    moe_router_topk=SHAPE[1],
    moe_layer_freq=[0, 1, 1, 1],
    moe_router_load_balancing_type="none",
    moe_ffn_hidden_size=16,
)


def replay_case(**settings: Any) -> harness.Case:
    """A model whose first of four layers is dense."""
    own = settings.pop("config", {})
    return harness.Case(num_layers=SHAPE[0], config=MODEL | own, bound=1e-6, **settings)


@dataclass(frozen=True)
class Replayed:
    """One step on one rank.

    Attributes:
        errors: of gradients, relative to those of the written-out rows.
        unrouted: the same of a step whose routers decide.
        least: the smallest norm of a gradient.
        split: tokens that stand once more for their routes.
        resident_groups: groups whose prompt is resident.
        taken: whether known routes were taken, and other experts where they are not known.
        unknown: tokens without a route, over all rows.
    """

    errors: dict[str, float]
    unrouted: dict[str, float]
    least: float
    split: int
    resident_groups: int
    taken: bool
    unknown: int


def replay_step(
    case: harness.Case,
    settings: PrefixGroupConfig,
    groups: Sequence[Group],
    truth: Sequence[tuple[Sample, float]],
) -> Replayed:
    """A step on ``groups``, dealt to replicas, and one on ``truth`` with a route for every token.

    Where others divide a row, the stock model has replicas.
    """
    with harness.on_cpu(case):
        harness.initialize(case)
        config = harness.make_config(case)
        built = harness.build(case, config, packed=True)
        harness.make_experts_differ(built)
        chunks = harness.wrap_ddp(case, config, built)
        found = []
        for mode in ("R3", "disabled"):
            algorithm = GrpoConfig(router_replay=mode)
            step = GrpoStep(
                chunks, vocab_size=harness.VOCAB, algorithm=algorithm, settings=settings
            )
            batch = step.prepare(groups[step.ranks.dp_rank :: case.dp])
            step.backward(batch)
            found.append((batch.tokens, harness.named_gradients(chunks)))
            if mode == "R3":
                places = moe_layers(chunks)
                pairs = [
                    (given, own)
                    for given, own in zip(routes_of(batch), routes_of(passed(step, batch)))
                    if given is not None
                ]
                taken = all(is_taken(given[:, places], own[:, places]) for given, own in pairs)
                unknown = sum(int((given[:, -1, 0] < 0).sum()) for given, _ in pairs)
        want = stock_gradients(case, chunks, truth)
        norms = {name: float(want[name].norm()) for name in want}
        (tokens, routed), (_, unrouted) = found

        def errors(got: dict[str, Tensor]) -> dict[str, float]:
            return {n: float((got[n] - want[n]).norm()) / norms[n] for n in want}

        return Replayed(
            errors=errors(routed),
            unrouted=errors(unrouted),
            least=min(norms.values()),
            split=tokens.split,
            resident_groups=tokens.resident_groups,
            taken=taken,
            unknown=unknown,
        )


def stock_gradients(
    case: harness.Case, chunks: Sequence[Any], truth: Sequence[tuple[Sample, float]]
) -> dict[str, Tensor]:
    """Of the stock model with the weights of ``chunks``, every sample written out."""
    settings = {k: v for k, v in case.config.items() if not k.startswith("recompute")}
    # Megatron's own replay counts on one forward pass for each backward pass.
    case = replace(case.without_context, config=settings | dict(moe_enable_routing_replay=True))
    harness.initialize(case)
    config = harness.make_config(case)
    control = harness.wrap_ddp(case, config, harness.build(case, config, packed=False))
    for ours, theirs in zip(chunks, control):
        theirs.load_state_dict(ours.state_dict())
    # As many on every replica: their experts wait for each other.
    rows = [*truth, *[(truth[0][0], 0.0)] * (-len(truth) % case.dp)]
    mine = rows[parallel_state.get_data_parallel_rank() :: case.dp]
    harness.run_step(case, control, routed_step, mine)
    return harness.named_gradients(control)


def moe_layers(chunks: Sequence[Any]) -> list[int]:
    """Places of this rank's layers with experts among all layers."""
    return sorted(
        module.layer_number - 1
        for chunk in chunks
        for module in chunk.module.modules()
        if hasattr(module, "router")
    )


def is_taken(given: Tensor, own: Tensor) -> bool:
    """Whether ``own`` routes are the given ones, and two different experts where none is given."""
    known = given >= 0
    differ = own[..., 0] != own[..., 1]
    return torch.equal(own[known], given[known]) and bool((own >= 0).all() and differ.all())


def routed_step(rows: Iterator[tuple[Sample, float]], model: Any) -> Any:
    """``written_out_step`` with the sample's routes, by Megatron's own replay."""
    sample, weight = next(rows)
    routes = sample.routed_experts
    assert routes is not None
    routes = torch.cat([routes, routes[-1:]])[: len(routes) + len(routes) % 2].long()
    sequence_parallel = model.config.sequence_parallel
    if sequence_parallel:
        rank = parallel_state.get_tensor_model_parallel_rank()
        size = parallel_state.get_tensor_model_parallel_world_size()
        routes = routes.chunk(size)[rank]
    for module in model.modules():
        replayed = getattr(module, "router_replay", None)
        if replayed is not None:
            replayed.set_target_indices(routes[:, module.layer_number - 1])
            replayed.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    return written_out_step(iter([(sample, weight)]), model)


@dataclass(frozen=True)
class Recorded:
    """What a rank's routers decided, as routes of this rank's layers in the rows of a step.

    Attributes:
        recorded: by the pass of the old logprobs, which training replays.
        replayed: taken by a pass over the same rows with other weights.
        own: what routers with those weights decide.
        layers: places of this rank's layers with experts.
        same_gradients: whether the first update is to the last bit that of a step without replay.
    """

    recorded: list[Tensor]
    replayed: list[Tensor]
    own: list[Tensor]
    layers: list[int]
    same_gradients: bool


def recorded_step(
    case: harness.Case, settings: PrefixGroupConfig, groups: Sequence[Group]
) -> Recorded:
    """A step that records, trains, and goes over its rows once more with other weights."""
    with harness.on_cpu(case):
        harness.initialize(case)
        config = harness.make_config(case)
        chunks = harness.wrap_ddp(case, config, harness.build(case, config, packed=True))
        recording, plain = (
            GrpoStep(
                chunks,
                vocab_size=harness.VOCAB,
                algorithm=GrpoConfig(router_replay=mode, ppo_epochs=2),
                settings=settings,
            )
            for mode in ("R2", "disabled")
        )
        batch, other = recording.prepare(groups), plain.prepare(groups)
        recording.backward(batch)
        gradients = harness.named_gradients(chunks)
        plain.backward(other)
        without = harness.named_gradients(chunks)
        same = all(torch.equal(gradients[n], without[n]) for n in without)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for name, parameter in sorted(chunks[0].module.named_parameters()):
                if "router" in name:
                    parameter.add_(torch.randn(parameter.shape, generator=generator))
        return Recorded(
            recorded=routes_of(batch),
            replayed=routes_of(passed(recording, batch)),
            own=routes_of(passed(plain, other)),
            layers=moe_layers(chunks),
            same_gradients=same,
        )


def routes_alone_and_together(
    case: harness.Case, settings: PrefixGroupConfig, groups: Sequence[Group]
) -> list[list[Tensor]]:
    """Routes of all layers of a rank, recorded over samples that stand alone, and over groups."""
    with harness.on_cpu(case):
        harness.initialize(case)
        config = harness.make_config(case)
        chunks = harness.wrap_ddp(case, config, harness.build(case, config, packed=True))
        step = GrpoStep(chunks, vocab_size=harness.VOCAB, settings=settings)
        return [written_out_routes(step, of) for of in (one_by_one(groups), groups)]


def passed(step: GrpoStep, batch: StepBatch) -> StepBatch:
    """The batch with the routes that a pass over it takes."""
    record = RouteRecord()
    step.logprobs(batch, record=record)
    assert step.route_shape is not None
    return record.onto(batch, step.route_shape)


def routes_of(batch: StepBatch) -> list[Any]:
    """Of every row, padding left out; None of one that fills up, and has none."""
    rows: list[Any] = [
        row
        for part in batch.minibatches
        for wave in part.waves
        for row in (*wave.prefix_rows, *wave.microbatches)
    ]
    return [
        None if row.routed_experts is None else row.routed_experts[: row.layout.unique_tokens]
        for row in rows
    ]


def one_by_one(groups: Sequence[Group]) -> list[Group]:
    """Every sample as a group of its own: nothing is shared."""
    return [
        Group(f"{group.group_id}/{i}", (sample,))
        for group in groups
        for i, sample in enumerate(group.samples)
    ]


def written_out_routes(step: GrpoStep, groups: Sequence[Group]) -> list[Tensor]:
    """Routes of every sample's tokens, in the order of the samples."""
    batch = passed(step, step.pack(step.place(groups)))
    found: dict[int, Tensor] = {}
    for row in (row for part in batch.minibatches for row in part.rows):
        assert row.routed_experts is not None
        for place, number in enumerate(row.sample_numbers.tolist()):
            found[number] = row.routed_experts[row.layout.sample_indices(place)]
    return [found[number] for number in sorted(found)]
