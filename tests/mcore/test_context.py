"""Rows that context-parallel ranks divide: the loss edge, memory and what is refused."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_pg import PrefixTree, pack_trees
from megatron_pg.mcore import Predictions, PrefixGroupedSeqParams, PrefixKV
from megatron_pg.mcore.versions import DIVIDES_LINEAR_ATTENTION, HAS_HYBRID_MODEL
from tests.mcore import cases, harness
from tests.mcore.harness import Case
from tests.ranks import Pool

pytestmark = pytest.mark.megatron


def coupled(case: Case, kept: str) -> dict[str, Any]:
    """Gradients, values and saved bytes of a loss that couples all predictions of a row."""
    with harness.on_cpu():
        harness.initialize(case)
        config = harness.make_config(case)
        chunks = harness.wrap_ddp(case, config, harness.build(case, config, packed=True))
        row = harness.make_rows(0, 4, shared_length=21)
        layout, tokens = row.layout, row.layout.pack_tokens(row.sequences)
        ids = layout.predictor_ids
        # The first one alone: all ranks but one have nothing to predict.
        first = torch.arange(len(ids)) == 0
        is_kept = {"all": ids >= 0, "late": ids >= layout.total_tokens // 2, "first": first}[kept]
        assert bool(is_kept.any())
        predictions = Predictions(
            predictor_ids=ids[is_kept],
            target_tokens=tokens[layout.target_ids][is_kept],
            temperature=torch.linspace(0.5, 2.0, len(ids))[is_kept],
            with_entropy=True,
            chunk_tokens=7,
        )
        params = PrefixGroupedSeqParams.from_layout(layout, predictions=predictions)
        saved: dict[int, int] = {}

        def note(x: Tensor) -> Tensor:
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        chunks[0].zero_grad_buffer()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            logprobs, entropy = chunks[0](
                tokens[None], params.position_ids[None], None, packed_seq_params=params
            )
        weights = {p.untyped_storage().data_ptr() for p in chunks[0].parameters()}
        loss = logprobs.mean().exp() + (logprobs * entropy).sum().square()
        loss.backward()
        chunks[0].finish_grad_sync()
        return dict(
            gradients=harness.named_gradients(chunks),
            values=torch.stack([logprobs, entropy]).detach(),
            saved=sum(n for place, n in saved.items() if place not in weights),
        )


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("kept", ["all", "late", "first"])
@pytest.mark.parametrize("case", [Case(cp=2), Case(cp=4)], ids=["cp2", "cp4"])
def test_a_loss_that_couples_predictions_of_several_ranks(
    ranks: Pool, case: Case, kept: str
) -> None:
    """Also where some ranks predict nothing; entropy and temperatures travel alike."""
    (want,) = ranks.run(1, coupled, replace(case, cp=1), kept)
    for got in ranks.run(case.cp, coupled, case, kept):
        assert torch.allclose(got["values"], want["values"], rtol=1e-12, atol=0)
        errors = {n: relative(got["gradients"][n], x) for n, x in want["gradients"].items()}
        harness.assert_within(errors, 1e-9)
        if kept == "all":
            # Activations are divided; a few values of every prediction are not.
            assert got["saved"] < 1.15 * want["saved"] / case.cp


def refusal(case: Case) -> str:
    with harness.on_cpu():
        harness.initialize(case)
        config = harness.make_config(case)
        (model,) = harness.build(case, config, packed=True)
        try:
            model(torch.zeros(1, 8, dtype=torch.long), torch.arange(8)[None], None)
        except NotImplementedError as error:
            return str(error)
        return ""


def test_an_ordinary_batch_is_refused_where_its_core_would_see_a_part(ranks: Pool) -> None:
    for message in ranks.run(2, refusal, Case(cp=2)):
        assert "ordinary batch under context parallelism" in message


def misuse(case: Case, kind: str) -> str:
    """What every rank says of a row that is fed wrongly."""
    with harness.on_cpu():
        harness.initialize(case)
        config = harness.make_config(case)
        (model,) = harness.build(case, config, packed=True)
        if kind == "stock":
            # Megatron's own model over the wrapped layers.
            model.__class__ = GPTModel
        row = harness.make_rows(0, 4)
        tokens = row.layout.pack_tokens(row.sequences)
        none = torch.empty(0, dtype=torch.int64)
        predictions = Predictions(predictor_ids=none, target_tokens=none)
        params = PrefixGroupedSeqParams.from_layout(
            row.layout, predictions=None if kind == "logits" else predictions
        )
        fed = tokens[: len(tokens) // 2] if kind == "a part" else tokens
        try:
            model(fed[None], params.position_ids[None], None, packed_seq_params=params)
        except (NotImplementedError, ValueError) as error:
            return str(error)
        return ""


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("stock", "nobody has divided under context_parallel_size=2"),
        ("logits", "give the row predictions"),
        ("a part", "feed every rank the whole row"),
    ],
)
def test_rows_that_would_be_counted_or_read_wrongly_are_refused(
    ranks: Pool, kind: str, message: str
) -> None:
    for said in ranks.run(2, misuse, Case(cp=2), kind):
        assert message in said


def length(case: Case) -> str:
    with harness.on_cpu():
        harness.initialize(case)
        (model,) = harness.build(case, harness.make_config(case), packed=True)
        row = next(
            r for r in (harness.make_rows(i, 1) for i in range(9)) if r.layout.total_tokens % 4
        )
        total = row.layout.total_tokens
        params = PrefixGroupedSeqParams.from_layout(row.layout)
        try:
            model(torch.zeros(1, total), params.position_ids[None], None, packed_seq_params=params)
        except ValueError as error:
            return str(error)
        return ""


def test_a_row_that_ranks_cannot_divide_is_refused(ranks: Pool) -> None:
    for message in ranks.run(4, length, Case(cp=4)):
        assert "must be a multiple of 4 (context_parallel_size" in message


@dataclass(frozen=True)
class Sent:
    """A step whose layers are counted, and per token what a layer's forward pass exchanges.

    Attributes:
        case: of the step.
        attention: query heads of a tensor-parallel rank, key heads as often as they are sent, and
            the channels of a key and a value together; of every layer with softmax attention.
        linear: numbers of every layer with linear attention.
        passes: of one layer, those of recomputation included.
        num_linear: layers with linear attention.
    """

    case: Case
    attention: tuple[int, int, int]
    linear: int = 0
    num_linear: int = 0
    passes: int = 2


SENT = {
    "cp2": Sent(Case(cp=2), (4, 2, 16)),
    "cp2_full": Sent(Case(cp=2, config=cases.FULL_RECOMPUTE), (4, 2, 16), passes=3),
    "cp2_selective": Sent(Case(cp=2, config=cases.SELECTIVE_RECOMPUTE), (4, 2, 16), passes=3),
    # One key head for each of the two query heads that a rank of two parts has.
    "cp2_tp2_sp": Sent(Case(cp=2, tp=2, sp=True), (2, 2, 16)),
    "cp4_mqa": Sent(Case(cp=4, num_query_groups=1), (4, 4, 16)),
    "cp2_latent": Sent(Case(cp=2, **cases.LATENT), (4, 4, 20)),
}
if DIVIDES_LINEAR_ATTENTION:
    # Queries, keys, values, their writing strengths and decays one way, values back.
    SENT["cp2_linear"] = Sent(
        Case(cp=2, **cases.LINEAR), (4, 2, 16), 2 * 2 * 6 + 4 * (5 + 1 + 1 + 5), num_linear=1
    )
if HAS_HYBRID_MODEL:
    # Inputs and steps of four heads, and what two groups of them read and write; inputs back.
    SENT["cp2_mamba"] = Sent(
        Case(cp=2, **cases.linear_hybrid("M*M")),
        (4, 2, 16),
        4 * (8 + 1 + 8) + 2 * 2 * 6,
        num_linear=2,
    )


def sent_in_a_step(case: Case) -> tuple[int, list[int], int, int, int]:
    """Tokens and predictors of a row; numbers that layers exchange, that leave this rank to be
    predicted from or as their gradients, and that it adds up with others.
    """
    exchanged, joined, moved = 0, 0, 0
    to_all, add_up = dist.all_to_all_single, dist.all_reduce

    def counted(out: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal exchanged, moved
        if args:
            moved += x[0].numel() * (len(x) - args[1][dist.get_rank(kwargs["group"])])
        else:
            exchanged += x.numel() // case.cp * (case.cp - 1)
        return to_all(out, x, *args, **kwargs)

    def counted_sum(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal joined
        is_of_row = kwargs.get("group") is parallel_state.get_context_parallel_group()
        joined += x.numel() if is_of_row else 0
        return add_up(x, *args, **kwargs)

    with harness.on_cpu(case):
        harness.initialize(case)
        config = harness.make_config(case)
        chunks = harness.wrap_ddp(case, config, harness.build(case, config, packed=True))
        rows = harness.make_dp_rows(case, 1)
        batches = harness.packed_microbatches(case, rows)
        with (
            mock.patch.object(dist, "all_to_all_single", counted),
            mock.patch.object(dist, "all_reduce", counted_sum),
        ):
            harness.run_step(case, chunks, harness.packed_step, batches)
        layout = rows[0].layout
        return layout.total_tokens, layout.predictor_ids.tolist(), exchanged, moved, joined


@pytest.mark.parametrize("name", SENT)
def test_ranks_send_what_the_readme_says_and_one_number_of_a_prediction(
    ranks: Pool, name: str
) -> None:
    """In every layer; sequence-level losses read the predictions of all ranks."""
    counted = SENT[name]
    case, (heads, sent_heads, width) = counted.case, counted.attention
    per_token = (case.num_layers - counted.num_linear) * (heads + sent_heads) * width
    per_token += counted.num_linear * counted.linear
    sent = ranks.run(case.world_size, sent_in_a_step, case)
    for tokens, predictors, exchanged, _, joined in sent:
        assert (
            exchanged == counted.passes * tokens // case.cp * (case.cp - 1) * per_token // case.cp
        )
        assert joined == len(predictors) > 0
    # In the order of the ranks, the n-th of N predictions is made by rank n x cp // N.
    makers = [
        next(i for i in range(case.cp) if n < (i + 1) * len(predictors) // case.cp)
        for n in range(len(predictors))
    ]
    owners = sorted(index // (tokens // case.cp) for index in predictors)
    leave = sum(owner != maker for owner, maker in zip(owners, makers))
    assert sum(moved for *_, moved, _ in sent) == 2 * case.tp * leave * harness.HIDDEN_SIZE
    assert leave > 0


def kept(case: Case) -> int:
    """Bytes that this rank keeps of a resident prompt."""
    with harness.on_cpu(case):
        harness.initialize(case)
        (model,) = harness.build(case, harness.make_config(case), packed=True)
        layout = pack_trees([PrefixTree.from_sequences([[5] * 24])])
        prefix_kv, none = PrefixKV(), torch.empty(0, dtype=torch.int64)
        params = PrefixGroupedSeqParams.from_layout(
            layout,
            predictions=Predictions(predictor_ids=none, target_tokens=none),
            prefix_kv=prefix_kv,
        )
        tokens = torch.full((1, 24), 5)
        with torch.no_grad():
            model(tokens, params.position_ids[None], None, packed_seq_params=params)
        return prefix_kv.num_bytes


@pytest.mark.parametrize(
    ("case", "values"),
    [
        # Keys and values of four heads of 8 channels.
        (Case(num_query_groups=4), 2 * 4 * 8),
        # Of latents, the shared key beside them.
        (Case(**cases.LATENT), 12 + 4),
    ],
    ids=["heads", "latents"],
)
def test_ranks_keep_their_share_of_a_resident_prompt(ranks: Pool, case: Case, values: int) -> None:
    for cp in (1, 2, 4):
        found = ranks.run(cp, kept, replace(case, cp=cp))
        assert found == [case.num_layers * 24 * values * 8 // cp] * cp
