"""On one rank: ``generate`` equals sampling with the stock model, however it is split.

Each check runs on every rank of its case and raises AssertionError.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.router import TopKRouter

from megatron_pg import PrefixTree, pack_trees
from megatron_pg.mcore import PrefixGroupedSeqParams, count_attention_calls
from megatron_pg.mcore.generation.cache import GenerationCache
from megatron_pg.parallel import PipelineSplit
from tests.mcore import cases, harness
from tests.mcore.generate_harness import (
    CASES,
    REFUSED,
    STOP_TOKENS,
    VOCAB,
    Groups,
    assert_drawn,
    assert_same,
    lengths,
    load_full_state,
    make_model,
    make_prompts,
    make_stock,
    packed_logprobs,
    sample,
    stock_greedy,
    stock_logits,
)
from tests.utils import assert_close


def check_model(case: harness.Case) -> None:
    """Tokens are the stock model's on written-out sequences; logprobs are the trainer's too."""
    chunks = make_model(case)
    stock = make_stock(case, chunks)
    # A state begins within the convolution, at its width, and behind the first chunk of a scan.
    prompts = make_prompts((2, 1, 70, 4, 3) if case.is_linear else (9, 1, 5, 14))
    bound = 1e-10 if case.bound == harness.Case.bound else case.bound
    free = [stock_greedy(stock, prompt, []) for prompt in prompts]
    ids = [response.response_ids.tolist() for response in free]
    stop_tokens = [next(t for t in ids[0][2:] if not all(t in tokens for tokens in ids))]
    want = [stock_greedy(stock, prompt, stop_tokens) for prompt in prompts]
    assert {response.is_finished for response in want} == {True, False}
    got = sample(chunks, prompts, temperature=0.0, stop_token_ids=stop_tokens)
    assert_same(got, [(response,) * 4 for response in want], bound)
    assert len({tuple(response.response_ids.tolist()) for response in want}) > 1

    sampled = sample(chunks, prompts, max_response_tokens=20)
    assert len(set(lengths(sampled))) > 3, "samples must end at different steps"
    assert_drawn(stock, prompts, sampled, bound)
    assert_same(sample(chunks, prompts, max_response_tokens=20, max_batch_samples=8), sampled)
    for prompt, group in zip(prompts, sampled):
        recomputed = packed_logprobs(chunks[0], prompt, group)
        for response, logprobs in zip(group, recomputed):
            assert_close("logprobs", response.logprobs, logprobs, bound)


def check_rows_and_cache(window: int | None = None) -> None:
    """Prompts are encoded and kept once; then each step runs the live samples only.

    Of two layers the first has the window.
    """
    case = harness.Case()
    if window is not None:
        case = harness.Case(**cases.window(window, window_attn_skip_freq=[1, 0]))
    chunks = make_model(case)
    prompts, row_lens, caches = make_prompts(), [], []
    prompt_lens = [len(prompt) for prompt in prompts]

    class SpiedCache(GenerationCache):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            caches.append(self)

        def advance(self) -> Any:
            position_ids = super().advance()
            for layer, reach in zip(self.layers.values(), (window, None), strict=True):
                reach = 1000 if reach is None else reach
                kept = min(max(prompt_lens), reach)
                assert layer.prompt_key.shape == (len(prompts), 2, kept, 8)
                assert layer.prompt_value.shape == layer.prompt_key.shape
                assert layer.own_key.shape[:2] == (4 * len(prompts), 2) or self.own_len > 64
                capacity = min(64 if self.own_len <= 64 else 99, reach + 1)
                assert layer.own_key.shape[2] == layer.own_value.shape[2] == capacity
            return position_ids

    hook = chunks[0].register_forward_pre_hook(lambda _, args: row_lens.append(args[0].shape[1]))
    module = sys.modules["megatron_pg.mcore.generation.generate"]
    with mock.patch.object(module, "GenerationCache", SpiedCache):
        groups = sample(chunks, max_response_tokens=100, stop_token_ids=[23, 41])
    hook.remove()
    lens = lengths(groups)
    assert len(set(lens)) > 8 and max(lens) > 66, f"the cache must shrink and grow: {lens}"
    assert min(max(lengths([group])) for group in groups) < max(lens) // 2, "a prompt must end"
    live = [sum(length > step for length in lens) for step in range(1, max(lens))]
    assert row_lens == [sum(prompt_lens), *live]
    assert len(caches) == 1 and len(caches[0].layers) == 2
    calls = count_attention_calls(chunks[0])
    assert calls.prefix_grouped == 2 * len(row_lens) and calls.ordinary == 0
    for prompt, group in zip(prompts, groups):
        for response, logprobs in zip(group, packed_logprobs(chunks[0], prompt, group)):
            assert_close("logprobs", response.logprobs, logprobs, 1e-10)


def check_invariance() -> None:
    """Batches and the order of prompts change nothing; seeds, numbers and places do."""
    chunks = make_model(harness.Case())
    prompts = make_prompts()
    want = sample(chunks)
    assert len({tuple(r.response_ids.tolist()) for r in want[0]}) == 4
    for max_batch_samples in (4, 11, 100):
        assert_same(sample(chunks, max_batch_samples=max_batch_samples), want)
    order = [2, 0, 3, 1]
    shuffled = [prompts[i] for i in order]
    got = sample(chunks, shuffled, prompt_numbers=order, max_batch_samples=8)
    assert_same(got, [want[i] for i in order])
    more = sample(chunks, num_generations=6)
    assert_same([group[:4] for group in more], want)
    other = sample(chunks, seed=6)
    assert any(
        a.response_ids.tolist() != b.response_ids.tolist() for a, b in zip(other[0], want[0])
    )
    equal_prompts = sample(chunks, [prompts[0], prompts[0]])
    assert_same(equal_prompts[:1], want[:1])
    ids = [[r.response_ids.tolist() for r in group] for group in equal_prompts]
    assert ids[0] != ids[1]


def check_truncation() -> None:
    """``top_k=1`` is greedy, truncation does not change logprobs, stop tokens end a sample."""
    chunks = make_model(harness.Case())
    greedy = sample(chunks, temperature=0)
    top_1 = sample(chunks, temperature=1, top_k=1)
    assert_same(top_1, greedy)
    assert_same(sample(chunks, temperature=1, top_p=1e-9), greedy)
    for prompt, group in zip(make_prompts(), sample(chunks, top_k=5, top_p=0.7)):
        for response, logprobs in zip(group, packed_logprobs(chunks[0], prompt, group)):
            assert_close("logprobs", response.logprobs, logprobs, 1e-10)
    groups = sample(chunks, max_response_tokens=9)
    for response in (response for group in groups for response in group):
        stops = [token in STOP_TOKENS for token in response.response_ids.tolist()]
        assert stops[-1] == response.is_finished and not any(stops[:-1])
        assert response.is_finished or len(stops) == 9
    assert {response.is_finished for group in groups for response in group} == {True, False}
    one = sample(chunks, max_response_tokens=1)
    assert lengths(one) == [1] * 16
    assert_same(one, sample(chunks, max_response_tokens=1, stop_token_ids=[], max_batch_samples=4))


def check_distribution() -> None:
    """Sampled first tokens follow the stock model's softmax."""
    case = harness.Case()
    chunks = make_model(case)
    # A small standard deviation of the logits, so that every token is likely enough to count.
    with torch.no_grad():
        chunks[0].output_layer.weight.mul_(0.15)
    (prompt,) = make_prompts((6,))
    num = 6000
    (group,) = sample(chunks, [prompt], num_generations=num, max_response_tokens=1)
    counts = torch.bincount(torch.cat([r.response_ids for r in group]), minlength=VOCAB)
    logits = stock_logits(make_stock(case, chunks), prompt)[-1]
    expected = (logits / 0.8).softmax(-1) * num
    assert expected.min() > 5 and expected.max() > 3 * expected.min()
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    # 59 degrees of freedom: mean 59, standard deviation 11.
    assert 25 < chi_square < 110, chi_square


def check_bf16() -> None:
    """Decoding in bf16 is as close to the truth as the packed forward in bf16."""
    case = harness.Case(dtype=torch.bfloat16)
    chunks = make_model(case)
    (exact,) = make_model(replace(case, dtype=torch.float64))
    exact.load_state_dict(chunks[0].state_dict())
    got, control, truth = [], [], []
    for prompt, group in zip(make_prompts(), sample(chunks, max_response_tokens=30)):
        got += [response.logprobs for response in group]
        control += packed_logprobs(chunks[0], prompt, group)
        truth += packed_logprobs(exact, prompt, group)
    got, control, truth = (torch.cat(x).double() for x in (got, control, truth))
    assert len(got) > 150
    for moment in (1, 2):  # mean and mean square of the error
        error = float((got - truth).abs().pow(moment).mean())
        yardstick = float((control - truth).abs().pow(moment).mean())
        assert 0 < error <= 1.3 * yardstick, (error, yardstick)


def check_modes() -> None:
    """Modes are put back, and training goes on with what Megatron cached meanwhile."""
    chunks = make_model(harness.Case())
    frozen = chunks[0].decoder.layers[1]
    frozen.eval()
    modes = [module.training for module in chunks[0].modules()]
    assert len(set(modes)) == 2
    prompts = make_prompts()
    want = sample(chunks)
    assert [module.training for module in chunks[0].modules()] == modes
    layout = pack_trees([PrefixTree.from_sequences([prompt]) for prompt in prompts])
    params = PrefixGroupedSeqParams.from_layout(layout)
    row = layout.token_ids[None]
    logits = chunks[0](row, params.position_ids[None], None, packed_seq_params=params)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in chunks[0].parameters())
    with pytest.raises(ValueError, match="seed=-1"):
        sample(chunks, seed=-1)
    assert [module.training for module in chunks[0].modules()] == modes
    wrapped = harness.wrap_ddp(harness.Case(), chunks[0].config, chunks)
    assert wrapped[0] is not chunks[0]
    assert_same(sample(wrapped), want)


def check_refusals() -> None:
    case = harness.Case(position_embedding_type="learned_absolute")
    chunks = make_model(case)
    for message, changes in REFUSED.items():
        with pytest.raises(ValueError, match=message):
            sample(chunks, **changes)
    assert max(lengths(sample(chunks, max_response_tokens=114, stop_token_ids=[]))) == 114
    with pytest.raises(ValueError, match="model_chunks is empty"):
        sample([])
    with pytest.raises(ValueError, match="needs PrefixGroupedGPTModel"):
        sample([make_stock(case, chunks)])


def check_parallel(case: harness.Case) -> None:
    """Every rank of a split model gets the tokens of the one-rank model."""
    world = dist.get_world_size()
    of_stages = {field.name for field in fields(PipelineSplit)}
    config = {name: value for name, value in case.config.items() if name not in of_stages}
    pattern = case.pattern and case.pattern.replace("|", "")
    alone: dict[str, Any] = dict(tp=1, sp=False, cp=1, pp=1, vpp=None, dp=world, ep=1, etp=None)
    single = replace(case, **alone, config=config, pattern=pattern)
    chunks = make_model(single)
    want = sample(chunks, max_response_tokens=20)
    greedy = sample(chunks, temperature=0, num_generations=1)
    full = dict(chunks[0].named_parameters())
    chunks = make_model(case)
    load_full_state(chunks, full)
    # Ranks that would divide a row sample each by itself.
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    mine = range(replica, len(want), case.dp * case.cp)
    prompts = [make_prompts()[i] for i in mine]
    # A CPU rounds some of fp32's sigmoids by how many are computed at once.
    bound = 1e-6 if case.config.get("moe_router_score_function") == "sigmoid" else 1e-10
    got = sample(chunks, prompts, prompt_numbers=mine, max_response_tokens=20)
    assert_same(got, [want[i] for i in mine], bound)
    assert_same(
        sample(chunks, prompts, temperature=0, num_generations=1, max_batch_samples=2),
        [greedy[i] for i in mine],
        bound,
    )
    check_uneven_replicas(case, chunks, replica, want, bound)
    assert len(set(lengths(want))) > 3, "samples must end at different steps"
    assert any(n % 2 for n in (sum(length > s for length in lengths(want)) for s in range(20)))
    assert all(chunk.decoder.input_tensor is None for chunk in chunks if not chunk.pre_process)


def check_uneven_replicas(
    case: harness.Case, chunks: list[Any], replica: int, want: Groups, bound: float
) -> None:
    """The first replica has a wrong prompt, and then all prompts, in two batches."""
    shares_experts = case.ep * (case.tp if case.etp is None else case.etp) > case.tp
    wrong = torch.tensor([3, VOCAB])
    if replica == 0 or shares_experts:
        with pytest.raises(ValueError, match=r"prompts\[0\] has tokens outside"):
            sample(chunks, [wrong] if replica == 0 else make_prompts())
    own = slice(2 if replica == 0 else 0)
    got = sample(chunks, make_prompts()[own], max_batch_samples=4, max_response_tokens=20)
    assert_same(got, want[own], bound)
    routers = [m for c in chunks for m in c.modules() if isinstance(m, TopKRouter)]
    assert bool(routers) == (case.config.get("num_moe_experts") is not None)
    if case.config.get("moe_router_enable_expert_bias"):
        assert not any(router.local_tokens_per_expert.any() for router in routers)


CHECKS: dict[str, Callable[[], None]] = {
    "rows_and_cache": check_rows_and_cache,
    # Fewer tokens than a prompt has, and more than the cache has room for at first.
    "window_of_5": partial(check_rows_and_cache, 5),
    "window_of_70": partial(check_rows_and_cache, 70),
    "invariance": check_invariance,
    "truncation": check_truncation,
    "distribution": check_distribution,
    "bf16": check_bf16,
    "modes": check_modes,
    "refusals": check_refusals,
}


def run(name: str) -> None:
    """The check of that name, or the one of a model or layout in ``CASES``."""
    with harness.on_cpu(CASES.get(name)):
        if name in CHECKS:
            CHECKS[name]()
        elif CASES[name].world_size == 1:
            check_model(CASES[name])
        else:
            check_parallel(CASES[name])
