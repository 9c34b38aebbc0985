"""What is found in ordinary rows, and what they cannot hold."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_pg.mcore import (
    PrefixGroupedSeqParams,
    PrefixSharingGPTModel,
    SharedTokens,
    count_attention_calls,
    count_shared_tokens,
    with_sequence_parallel_norms,
)
from megatron_pg.mcore.sharing import write_out as write_out_module
from megatron_pg.mcore.sharing.parts import places_of_parts
from megatron_pg.mcore.sharing.rows import OrdinaryRow, find_shared
from megatron_pg.mcore.sharing.write_out import write_out
from tests.mcore import harness
from tests.mcore.sharing_rows import Variant, build
from tests.ranks import Pool, process_group
from tests.test_synchronisation import DEVICE, CopiesToDevice

pytestmark = pytest.mark.megatron


def thd(lens: list[int], **more: Any) -> PackedSeqParams:
    bounds = torch.tensor([0, *lens]).cumsum(0).int()
    longest = max(lens, default=0)
    made = dict(cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
    made |= dict(max_seqlen_q=longest, max_seqlen_kv=longest)
    return PackedSeqParams(qkv_format="thd", **made | more)


def row_of(sequences: list[list[int]], tail: int = 0) -> OrdinaryRow:
    tokens = torch.tensor([t for s in sequences for t in s] + [0] * tail)
    return OrdinaryRow.from_batch(tokens[None], thd([len(s) for s in sequences]))


def find(row: OrdinaryRow, min_shared: int = 1, group_sizes: Any = None, multiple: int = 1) -> Any:
    return find_shared(
        row, min_shared=min_shared, group_sizes=group_sizes, pad_to_multiple=multiple
    )


def unique_by_prefixes(sequences: list[list[int]]) -> int:
    """Tokens that differ in what stands before them: the definition, for runs of any length."""
    return len({tuple(s[: i + 1]) for s in sequences for i in range(len(s))})


@pytest.mark.parametrize("seed", range(20))
def test_shared_runs_are_those_of_the_definition(seed: int) -> None:
    g = np.random.default_rng(seed)
    sequences = [g.integers(0, 2, g.integers(0, 9)).tolist() for _ in range(int(g.integers(1, 12)))]
    sequences += [[1]]
    row = row_of(sequences)
    layout = find(row)
    assert layout.unique_tokens == unique_by_prefixes(sequences)
    assert layout.logical_tokens == row.num_tokens
    assert torch.equal(layout.token_ids[layout.logical_to_packed], torch.from_numpy(row.tokens))
    positions = torch.cat([torch.arange(len(s)) for s in sequences])
    assert torch.equal(layout.position_ids[layout.logical_to_packed], positions)


@pytest.mark.parametrize("seed", range(20))
def test_a_row_is_packed_in_another_order_only_where_it_shares(seed: int) -> None:
    """Equal sequences that are shorter than the least run stand where they stood."""
    g = np.random.default_rng(seed)
    num_whole = 0
    for least in (2, 3, 4, 5):
        sequences = [[1, 2], [2, 1, 1, 2, 2], [1, 2]]
        sequences += [g.integers(0, 4, g.integers(0, 7)).tolist() for _ in range(3)]
        row = row_of(sequences)
        layout = find(row, least)
        heads = [tuple(s[:least]) for s in sequences if len(s) >= least]
        shares = len(set(heads)) < len(heads)
        assert (layout.unique_tokens < row.num_tokens) == shares
        index = layout.logical_to_packed
        assert torch.equal(layout.token_ids[index], torch.from_numpy(row.tokens))
        if not shares:
            num_whole += 1
            assert index.tolist() == list(range(row.num_tokens))
    assert num_whole > 0


def test_short_runs_are_written_out() -> None:
    sequences = [[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 6]]
    assert [find(row_of(sequences), n).unique_tokens for n in (1, 2, 3, 4)] == [6, 7, 8, 11]


def test_sequences_need_not_stand_side_by_side() -> None:
    sequences = [[1, 2, 3], [7, 8, 9], [1, 2, 4], [7, 8, 6]]
    layout = find(row_of(sequences))
    assert layout.unique_tokens == 8
    packed = layout.token_ids[layout.logical_to_packed]
    assert packed.tolist() == [t for s in sequences for t in s]


def test_groups_share_nothing_with_each_other() -> None:
    sequences = [[1, 2, 3], [1, 2, 4], [1, 2, 5], [1, 2, 3], [1, 2, 3]]
    row = row_of(sequences)
    assert find(row).unique_tokens == 5
    assert find(row, group_sizes=[2, 3]).unique_tokens == 4 + 4
    # What follows the last group stands alone.
    assert find(row, group_sizes=[2]).unique_tokens == 4 + 3 * 3
    assert find(row, group_sizes=[1] * 5).unique_tokens == 15
    for sizes in ([], [0, 5], [3, 3], [-1]):
        with pytest.raises(ValueError, match="at most 5 together"):
            find(row, group_sizes=sizes)
    # The padding that follows is no sequence that the caller has named.
    with pytest.raises(ValueError, match="at most 5 together"):
        find(row_of(sequences, tail=3), group_sizes=[6])


def test_rows_that_share_nothing_stay_as_they_came() -> None:
    layout = find(row_of([[3, 1], [], [2, 1, 1]], tail=2), multiple=1)
    assert layout.total_tokens == layout.unique_tokens == layout.logical_tokens == 7
    assert layout.logical_to_packed.tolist() == list(range(7))
    assert layout.token_ids.tolist() == [3, 1, 2, 1, 1, 0, 0]
    assert layout.position_ids.tolist() == [0, 1, 0, 1, 2, 0, 1]


def test_padded_places_and_what_follows_the_last_belong_to_the_row() -> None:
    padded = torch.tensor([0, 4, 8], dtype=torch.int32)
    params = thd([3, 2], cu_seqlens_q_padded=padded, cu_seqlens_kv_padded=padded.clone())
    row = OrdinaryRow.from_batch(torch.tensor([[1, 2, 3, 0, 1, 2, 0, 0, 9, 9]]), params)
    assert row.bounds.tolist() == [0, 4, 8, 10] and row.num_given == 2
    assert find(row).unique_tokens == 4 + 2 + 2


BAD_ROWS: dict[str, tuple[Any, Any, str]] = {
    "none": (None, thd([3]), "input_ids=None: every pipeline stage"),
    "batch": (torch.ones(2, 3).long(), thd([3]), r"shape \(2, 3\), a packed row is \[1, T\]"),
    "flat": (torch.ones(3).long(), thd([3]), r"shape \(3,\), a packed row"),
    "empty": (torch.ones(1, 0).long(), thd([]), r"shape \(1, 0\), a packed row"),
    "floats": (torch.ones(1, 3), thd([3]), "input_ids must be a tensor of integers, got torch.fl"),
    "bools": (torch.ones(1, 3).bool(), thd([3]), "tensor of integers, got torch.bool"),
    "list": ([[1, 2, 3]], thd([3]), "tensor of integers, got list"),
    "no_bounds": (torch.ones(1, 3).long(), thd([3], cu_seqlens_q=None), "cu_seqlens_q=None"),
    "list_bounds": (torch.ones(1, 3).long(), thd([3], cu_seqlens_q=[0, 3]), "integers, got list"),
    "too_long": (torch.ones(1, 3).long(), thd([4]), r"cu_seqlens_q=\[0, 4\] must ascend from 0 to"),
    "descending": (torch.ones(1, 3).long(), thd([3, -1]), r"\[0, 3, 2\] must ascend"),
    "late": (
        torch.ones(1, 3).long(),
        thd([3], cu_seqlens_q=torch.tensor([1, 3]), cu_seqlens_kv=None),
        r"\[1, 3\] must ascend from 0",
    ),
    "no_entries": (
        torch.ones(1, 3).long(),
        thd([3], cu_seqlens_q=torch.tensor([]).long(), cu_seqlens_kv=None),
        r"\[\] must ascend",
    ),
    "sides": (
        torch.ones(1, 3).long(),
        thd([3], cu_seqlens_kv=torch.tensor([0, 2, 3])),
        "cu_seqlens_q and cu_seqlens_kv .* differ",
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_refused(name: str) -> None:
    input_ids, params, message = BAD_ROWS[name]
    with pytest.raises(ValueError, match=message):
        OrdinaryRow.from_batch(input_ids, params)


def test_ranks_that_divide_the_row_of_one_rank_are_refused() -> None:
    for other in (dict(local_cp_size=2), dict(cp_group=Ranks(2))):
        with pytest.raises(NotImplementedError, match="leave it out"):
            OrdinaryRow.from_batch(torch.ones(1, 3).long(), thd([3], **other))
    OrdinaryRow.from_batch(torch.ones(1, 3).long(), thd([3], local_cp_size=1, cp_group=Ranks(1)))


class Ranks:
    """A process group of which only the size is asked."""

    def __init__(self, size: int) -> None:
        self.size = lambda: size


def parts_by_chunks(lens: list[int], num_ranks: int) -> list[list[int]]:
    """As trainers cut rows up: one sequence after another, by slices of its chunks."""
    parts: list[list[int]] = [[] for _ in range(num_ranks)]
    start = 0
    for n in lens:
        size = n // (2 * num_ranks)
        for rank, part in enumerate(parts):
            for chunk in (rank, 2 * num_ranks - 1 - rank):
                part += range(start + chunk * size, start + (chunk + 1) * size)
        start += n
    return parts


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_a_rank_is_fed_a_chunk_from_either_end_of_every_sequence(num_ranks: int) -> None:
    lens = [2 * num_ranks * n for n in (3, 0, 1, 5)]
    bounds = np.array([0, *np.cumsum(lens)])
    places = places_of_parts(bounds, num_ranks, "zigzag")
    assert places.tolist() == parts_by_chunks(lens, num_ranks)
    # Not so in runs of the whole row.
    runs = places_of_parts(bounds, num_ranks, "contiguous")
    assert runs.reshape(-1).tolist() == list(range(bounds[-1]))
    lens[2] -= num_ranks
    with pytest.raises(ValueError, match=f"each must be a multiple of {2 * num_ranks}"):
        places_of_parts(np.array([0, *np.cumsum(lens)]), num_ranks, "zigzag")
    with pytest.raises(ValueError, match=f"a row of 3 tokens is no multiple of {num_ranks}"):
        places_of_parts(np.array([0, 3]), num_ranks, "contiguous")


def sharing_model(case: harness.Case | None = None, **more: Any) -> PrefixSharingGPTModel:
    variant = Variant(case=case or harness.Case(), **more)
    (model,) = build(variant, harness.make_config(variant.case), ours=True)
    return model


TOKENS = [[5, 6, 7, 8, 9], [5, 6, 7, 8, 3, 2], [5, 6, 7, 8], [4, 4, 1]]


def call(model: Any, tokens: list[list[int]] = TOKENS, tail: int = 0, **more: Any) -> Tensor:
    row = torch.tensor([t for s in tokens for t in s] + [0] * tail)
    params = more.pop("packed_seq_params", None) or thd([len(s) for s in tokens])
    return model(row[None], packed_seq_params=params, **more)


@pytest.mark.parametrize("tail", [0, 3])
def test_logits_and_gradients_equal_each_sequence_alone(one_rank, tail: int) -> None:
    """The stock spec on one sequence after another, without any packing."""
    model, config = sharing_model(), harness.make_config(harness.Case())
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    stock = GPTModel(
        config, with_sequence_parallel_norms(layer, config), harness.VOCAB, harness.MAX_LEN,
        position_embedding_type="rope",
    ).double()  # fmt: skip
    stock.load_state_dict(model.state_dict())
    logits = call(model, tail=tail)
    alone = []
    for sequence in TOKENS:
        n = len(sequence)
        mask = torch.triu(torch.ones(n, n, dtype=torch.bool), 1)[None, None]
        alone.append(stock(torch.tensor([sequence]), torch.arange(n)[None], mask))
    want = torch.cat(alone, 1)
    real = want.shape[1]
    assert logits.shape == (1, real + tail, harness.VOCAB) and logits.isfinite().all()
    torch.testing.assert_close(logits[:, :real], want, rtol=1e-9, atol=1e-9)
    cotangent = torch.randn(want.shape, dtype=torch.float64)
    logits[:, :real].backward(cotangent)
    want.backward(cotangent)
    for (name, got), control in zip(model.named_parameters(), stock.parameters()):
        assert control.grad.norm() > 0, name
        torch.testing.assert_close(got.grad, control.grad, rtol=1e-9, atol=1e-9, msg=name)
    assert count_shared_tokens(model) == SharedTokens(unique=10 + tail, logical=18 + tail)
    assert count_shared_tokens(model).reuse_ratio == (18 + tail) / (10 + tail)


def test_what_the_caller_gave_reaches_the_head(one_rank) -> None:
    """Another output layer, as of a critic, and the loss from labels."""
    model = sharing_model()
    assert count_shared_tokens(model).reuse_ratio == 1.0
    labels = torch.randint(0, harness.VOCAB, (1, 18))
    logits = call(model)
    want = torch.nn.functional.cross_entropy(logits[0], labels[0], reduction="none")
    # Megatron's cross entropy is fp32 whatever the model's dtype.
    torch.testing.assert_close(call(model, labels=labels)[0], want.float())
    seen = []

    class Head(torch.nn.Linear):
        def forward(self, x: Tensor, weight: Any = None, runtime_gather_output: Any = None) -> Any:
            seen.append(x.shape)
            return super().forward(x), None

    model.output_layer = Head(32, 1, dtype=torch.float64)
    assert call(model).shape == (1, 18, 1) and seen == [(10, 1, 32)]


def test_hidden_states_are_written_out_where_the_head_is_turned_off(one_rank) -> None:
    model = sharing_model()
    want = call(model)
    model.post_process = False
    hidden = call(model)
    assert hidden.shape == (18, 1, 32)
    logits, _ = model.output_layer(hidden)
    torch.testing.assert_close(logits.transpose(0, 1), want)


def test_an_output_processor_sees_the_row_as_it_came(one_rank) -> None:
    from inspect import signature

    if "output_processor" not in signature(GPTModel.forward).parameters:
        pytest.skip("this Megatron-Core has no output_processor")
    model, params = sharing_model(), thd([len(s) for s in TOKENS])
    seen: dict[str, Any] = {}

    def processor(**given: Any) -> Tensor:
        seen.update(given)
        return given["hidden_states"]

    call(model, packed_seq_params=params, output_processor=processor, output_processor_context=3)
    assert seen["hidden_states"].shape == (18, 1, 32) and seen["context"] == 3
    assert seen["packed_seq_params"] is params and seen["input_ids"].shape == (1, 18)


def test_other_batches_run_as_in_the_base_class(one_rank) -> None:
    model = sharing_model()
    row = harness.make_rows(1, 1)
    params = PrefixGroupedSeqParams.from_layout(row.layout)
    tokens = row.layout.pack_tokens(row.sequences)
    packed = model(tokens[None], params.position_ids[None], None, packed_seq_params=params)
    assert packed.shape[1] == row.layout.total_tokens
    mask = torch.triu(torch.ones(6, 6, dtype=torch.bool), 1)[None, None]
    batch = model(torch.tensor([[5, 6, 7, 8, 9, 9]]), torch.arange(6)[None], mask)
    torch.testing.assert_close(batch[:, :5], call(model)[:, :5], rtol=1e-9, atol=1e-9)
    assert count_shared_tokens(model).logical == 18
    with pytest.raises(ValueError, match=r"group_sizes=\[2\] belong to a 'thd' row"):
        model(torch.tensor([[5, 6]]), torch.arange(2)[None], mask[..., :2, :2], group_sizes=[2])


REFUSED: dict[str, Any] = {
    "attention_mask": torch.ones(1, 18),
    "decoder_input": torch.ones(18, 1, 32),
    "inference_context": object(),
    "inference_params": object(),
    "extra_block_kwargs": {"visual": torch.ones(3)},
    "padding_mask": torch.zeros(1, 18, dtype=torch.bool),
}


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_that_a_row_cannot_have(one_rank, name: str) -> None:
    with pytest.raises(NotImplementedError, match=f"{name} with a 'thd' row: .*{name}=None"):
        call(sharing_model(), **{name: REFUSED[name]})


def test_it_lies_over_a_model_class_of_the_callers(one_rank) -> None:
    """As trainers derive from ``GPTModel``; a model that is built already takes the class too."""

    class Theirs(GPTModel):
        def forward(self, *args: Any, scale: float = 1.0, **kwargs: Any) -> Any:
            return scale * super().forward(*args, **kwargs)

    class Both(PrefixSharingGPTModel, Theirs):
        pass

    model = sharing_model()
    want = call(model)
    model.__class__ = Both
    torch.testing.assert_close(call(model, scale=2.0), 2.0 * want)
    assert count_shared_tokens(model) == (20, 36)


def test_unknown_arguments_are_refused(one_rank) -> None:
    with pytest.raises(TypeError, match="mtp_kwargs"):
        call(sharing_model(), mtp_kwargs={})


def test_multimodal_positions_are_refused(one_rank) -> None:
    model = sharing_model()
    model.position_embedding_type = "mrope"
    with pytest.raises(NotImplementedError, match="'mrope' is not supported with a 'thd' row"):
        call(model)


def test_learned_positions_must_agree_where_tokens_are_shared(one_rank) -> None:
    model = sharing_model(harness.Case(position_embedding_type="learned_absolute"))
    with pytest.raises(ValueError, match="position_ids differ where sequences share"):
        call(model, position_ids=torch.arange(18)[None])
    with pytest.raises(ValueError, match=r"position_ids has shape \(1, 17\), the row has 18"):
        call(model, position_ids=torch.arange(17)[None])
    # Alike on every copy, though not from 0: they are read as they are.
    shifted = torch.cat([torch.arange(len(s)) for s in TOKENS])[None] + 3
    assert not torch.allclose(call(model, position_ids=shifted), call(model))


def test_rotary_positions_are_the_sequences_own_whatever_is_given(one_rank) -> None:
    model = sharing_model()
    assert torch.equal(call(model, position_ids=torch.arange(18)[None]), call(model))


def test_the_default_leaves_short_runs_alone(one_rank) -> None:
    model = sharing_model()
    del model.min_shared
    assert model.min_shared == PrefixSharingGPTModel.min_shared > 16
    call(model)
    assert count_shared_tokens(model) == (18, 18)
    model.min_shared = 0
    with pytest.raises(ValueError, match="min_shared=0 must be at least 1"):
        call(model)


def test_the_model_keeps_to_the_groups_that_it_is_told(one_rank) -> None:
    model = sharing_model()
    want = call(model)
    counts = []
    for sizes in ([4], [2, 2], [1, 2], [1, 1, 1, 1]):
        before = count_shared_tokens(model).unique
        got = call(model, group_sizes=sizes)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
        counts.append(count_shared_tokens(model).unique - before)
    assert counts == [10, 14, 14, 18]


def test_finding_can_be_turned_off(one_rank) -> None:
    model = sharing_model(takes_thd=True)
    want = call(model)
    model.min_shared = None
    calls, counted = count_attention_calls(model), count_shared_tokens(model)
    torch.testing.assert_close(call(model), want, rtol=1e-9, atol=1e-9)
    assert count_attention_calls(model).ordinary == calls.ordinary + 2
    assert count_shared_tokens(model) == counted
    with pytest.raises(ValueError, match=r"group_sizes=\[4\] belong .*\(min_shared=None\)"):
        call(model, group_sizes=[4])


def test_rows_that_sequence_parallelism_cannot_split(one_rank) -> None:
    model = sharing_model()
    model.config.sequence_parallel, model.config.tensor_model_parallel_size = True, 4
    with pytest.raises(ValueError, match="input_ids has 18 tokens, it must be a multiple of 4"):
        call(model)


def test_attention_that_runs_rows_is_given_what_shares_nothing(one_rank) -> None:
    for takes_thd, ordinary in ((True, 2), (False, 0)):
        model = sharing_model(takes_thd=takes_thd)
        call(model, [[1, 2, 3, 4, 5], [2, 1, 3, 4, 5]])
        assert count_attention_calls(model) == (2 - ordinary, ordinary)
        call(model)
        assert count_attention_calls(model) == (4 - ordinary, ordinary)


def written_out_on_ranks(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """This rank's slices: rows, and the gradient of the packed hidden states."""
    # 5 of 16 columns at once.
    write_out_module._SCRATCH_ELEMENTS = 8 * 5
    with process_group():
        rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        hidden, ids, cotangent = write_out_case(dtype)
        mine = hidden.chunk(size)[rank].clone().requires_grad_()
        own = ids.chunk(size)[rank]
        rows = write_out(mine, own, split_over=torch.distributed.group.WORLD)
        rows.backward(cotangent.chunk(size)[rank])
        return rows.detach(), mine.grad


def write_out_case(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 6, (64,), generator=g)
    hidden, cotangent = (torch.randn(n, 1, 16, generator=g).to(dtype) for n in (8, 64))
    return hidden, ids, cotangent


def test_gradients_of_wide_rows_are_summed_a_part_at_a_time(monkeypatch) -> None:
    hidden, ids, cotangent = write_out_case(torch.float64)
    want = torch.zeros(8, 1, 16, dtype=torch.float64).index_add(0, ids, cotangent)
    for columns in (1, 3, 16, 99):
        monkeypatch.setattr(write_out_module, "_SCRATCH_ELEMENTS", 8 * columns)
        hidden.grad = None
        write_out(hidden.requires_grad_(), ids).backward(cotangent)
        torch.testing.assert_close(hidden.grad, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_rows_and_their_gradients_across_ranks(ranks: Pool, num_ranks: int, dtype: Any) -> None:
    hidden, ids, cotangent = write_out_case(dtype)
    parts = ranks.run(num_ranks, written_out_on_ranks, dtype)
    rows, grad = (torch.cat(pieces) for pieces in zip(*parts))
    assert torch.equal(rows, hidden[ids])
    want = torch.zeros(8, 1, 16, dtype=torch.float64).index_add(0, ids, cotangent.double())
    if dtype == torch.bfloat16:
        # Rounded once: copies are summed in fp32 within ranks and across them.
        error = (grad.double() - want).abs()
        assert (error <= 1e-5 + 2**-8 * want.abs()).all()
    else:
        torch.testing.assert_close(grad, want, rtol=1e-12, atol=1e-12)
    assert (want[6:] == 0).all() and ids.bincount().max() > 8


def test_the_host_waits_for_no_device_when_it_has_the_tokens() -> None:
    row = OrdinaryRow.from_batch(torch.tensor([[1, 2, 3, 1, 2, 4]]), thd([3, 3]))
    layout = find(row)
    with CopiesToDevice() as watch:
        params = PrefixGroupedSeqParams.from_layout(layout, DEVICE)
        layout.token_ids.to(DEVICE, non_blocking=True)
        hidden = torch.randn(4, 1, 8, device=DEVICE).requires_grad_()
        rows = write_out(hidden, layout.logical_to_packed)
        rows.backward(torch.ones_like(rows))
    assert watch.waits == [] and watch.num_copies == 3
    assert len(params.position_ids) == 4 and hidden.grad.shape == hidden.shape


def test_what_lies_on_a_device_is_fetched_in_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A subclass stands for tensors of a device."""
    copies = []

    class OnDevice(Tensor):
        @property
        def device(self) -> torch.device:
            return torch.device("cuda")

        def cpu(self) -> Tensor:
            copies.append(self.shape)
            return self.as_subclass(Tensor)

    def there(x: Tensor) -> Tensor:
        return x.as_subclass(OnDevice)

    bounds = thd([3, 3]).cu_seqlens_q
    params = replace(thd([3, 3]), cu_seqlens_q=there(bounds), cu_seqlens_kv=there(bounds.clone()))
    row = OrdinaryRow.from_batch(there(torch.tensor([[1, 2, 3, 1, 2, 4]])), params)
    assert copies == [(6 + 3 + 3,)]
    assert row.tokens.tolist() == [1, 2, 3, 1, 2, 4]
    assert list(pairwise(row.bounds.tolist())) == [(0, 3), (3, 6)]
    # The tokens' host copy is enough where the bounds have one too.
    OrdinaryRow.from_batch(torch.tensor([[1, 2, 3, 1, 2, 4]]), thd([3, 3]))
    assert len(copies) == 1
