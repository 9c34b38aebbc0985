"""What the generation checks share: models, the stock sampler, the trainer's logprobs."""

from __future__ import annotations

import re
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_pg import PrefixTree, pack_trees
from megatron_pg.mcore import (
    GeneratedResponse,
    Predictions,
    PrefixGroupedSeqParams,
    generate,
)
from megatron_pg.mcore.generation import Sampler, sample_uniforms
from megatron_pg.mcore.versions import DIVIDES_LINEAR_ATTENTION, HAS_HYBRID_MODEL
from tests.mcore import cases, harness
from tests.utils import assert_close

VOCAB = harness.VOCAB - 4  # the model's last columns are padding
STOP_TOKENS = [7, 23, 41]
# What everything here is sampled with.
TEMPERATURE, SEED, NUM_GENERATIONS = 0.8, 5, 4
# Replicas that share experts, and a replica that has all of them on its own ranks.
EXPERTS = {
    "moe_tp2_sp_etp1_allgather": harness.Case(
        tp=2, sp=True, ep=2, etp=1, **cases.moe(**cases.ALLGATHER)
    ),
    "moe_ep2_latent": harness.Case(
        dp=2, ep=2, **cases.MOE | cases.latent(dict(num_experts=4), **cases.MOE["config"])
    ),
    "moe_ep2_window": harness.Case(
        dp=2, ep=2, **cases.moe(window_size=(3, 0), window_attn_skip_freq=[1, 0])
    ),
    "moe_ep2_statistics": harness.Case(
        dp=2, ep=2, **cases.moe(**cases.AUX | cases.Z | cases.BIAS | cases.DEEPSEEK)
    ),
    "moe_ep2_pp2_vpp2": harness.Case(dp=2, ep=2, pp=2, vpp=2, num_layers=4, **cases.MOE),
    "moe_ep2_tp2_sp": harness.Case(tp=2, sp=True, dp=2, ep=2, **cases.MOE),
    "moe_ep4_tp2_sp_etp1": harness.Case(tp=2, sp=True, dp=2, ep=4, etp=1, **cases.MOE),
    "moe_ep2_etp2": harness.Case(dp=4, ep=2, etp=2, **cases.MOE),
}
if HAS_HYBRID_MODEL:
    EXPERTS["moe_ep2_mamba"] = harness.Case(
        dp=2, ep=2, **cases.linear_hybrid("M*ME", **cases.MOE["config"])
    )
CASES = (
    cases.EQUIVALENCE | {f"hybrid_{name}": case for name, case in cases.HYBRID.items()} | EXPERTS
)
# Names of them: models on one rank, and layouts of several.
MODELS: tuple[str, ...] = (
    "plain",
    "tied",
    "mqa",
    "mha",
    "qk_layernorm",
    "layernorm_bias",
    "softmax_scale",
    "learned_absolute",
    "no_positions",
    "rotary_percent",
    "rotary_interleaved",
    "rope_scaling",
    "moe",
    "latent",
    "full",
    "output_gate",
    "linear",
    "linear_alone",
    "window",
    "window_none",
    "window_wide",
    "window_selective",
)
LAYOUTS: tuple[str, ...] = (
    "tp2",
    "tp2_sp",
    "tp2_sp_tied",
    "tp2_mqa",
    "pp2",
    "pp2_tied",
    "pp2_loss_alone",
    "pp2_vpp2",
    "pp2_vpp2_window",
    "tp2_sp_window",
    "latent_tp2_sp",
    "linear_tp2_sp",
    "linear_pp2_vpp2",
    "latent_pp2_vpp2_window",
    "dp2",
    "tp4_sp",
    "tp2_sp_pp2",
    "tp2_sp_pp2_vpp2",
    "pp2_dp2",
    "moe_tp2_sp_etp1",
    "moe_ep2",
    "cp2_moe_ep2",
    "cp2_dp2_moe_ep4",
    *EXPERTS,
)
if DIVIDES_LINEAR_ATTENTION:
    LAYOUTS += ("linear_cp2",)
if HAS_HYBRID_MODEL:
    MODELS += ("hybrid_learned_positions", "hybrid_mamba_full", "hybrid_mamba_groups")
    LAYOUTS += (
        "hybrid_mamba_tp2_sp",
        "hybrid_mamba_pp2_vpp2",
        "hybrid_mamba_cp2",
        "hybrid_gdn_pp2",
    )
Groups = list[tuple[GeneratedResponse, ...]]


def make_prompts(lens: tuple[int, ...] = (9, 1, 5, 14)) -> list[Tensor]:
    g = torch.Generator().manual_seed(3)
    return [torch.randint(0, VOCAB, (n,), generator=g) for n in lens]


def make_model(case: harness.Case) -> list[Any]:
    harness.initialize(case)
    chunks = harness.build(case, harness.make_config(case), packed=True)
    harness.make_states_reach_far(chunks)
    return chunks


def make_stock(case: harness.Case, chunks: list[Any]) -> Any:
    (stock,) = harness.build(case, harness.make_config(case), packed=False)
    stock.load_state_dict(chunks[0].state_dict())
    return stock


def sample(chunks: list[Any], prompts: list[Tensor] | None = None, **changes: Any) -> Groups:
    settings: dict[str, Any] = dict(
        num_generations=NUM_GENERATIONS,
        max_response_tokens=12,
        seed=SEED,
        temperature=TEMPERATURE,
        stop_token_ids=STOP_TOKENS,
        vocab_size=VOCAB,
    )
    return generate(chunks, make_prompts() if prompts is None else prompts, **settings | changes)


def lengths(groups: Groups) -> list[int]:
    return [len(response.response_ids) for group in groups for response in group]


def assert_same(got: Groups, want: Groups, bound: float = 1e-10) -> None:
    assert [len(group) for group in got] == [len(group) for group in want]
    for got_group, want_group in zip(got, want):
        for ours, theirs in zip(got_group, want_group):
            assert ours.response_ids.tolist() == theirs.response_ids.tolist()
            assert ours.is_finished == theirs.is_finished
            assert_close("logprobs", ours.logprobs, theirs.logprobs, bound)


def stock_logits(stock: Any, tokens: Tensor) -> Tensor:
    n = len(tokens)
    mask = torch.triu(torch.ones(n, n, dtype=torch.bool), 1)[None, None]
    with torch.no_grad():
        return stock(tokens[None], torch.arange(n)[None], mask)[0, :, :VOCAB]


def stock_greedy(stock: Any, prompt: Tensor, stop_tokens: list[int]) -> GeneratedResponse:
    """Every step runs the stock model on the whole written-out sequence."""
    tokens, logprobs = prompt, []
    while len(logprobs) < 12:
        scores = stock_logits(stock, tokens)[-1].log_softmax(-1)
        chosen = scores.argmax()
        logprobs.append(scores[chosen])
        tokens = torch.cat([tokens, chosen[None]])
        if int(chosen) in stop_tokens:
            break
    return GeneratedResponse(
        response_ids=tokens[len(prompt) :],
        logprobs=torch.stack(logprobs).double(),
        is_finished=int(tokens[-1]) in stop_tokens,
    )


def assert_drawn(stock: Any, prompts: list[Tensor], groups: Groups, bound: float) -> None:
    """Every sampled token is what the stock model, on all that is before it, would have drawn."""
    sampler = Sampler(temperature=TEMPERATURE, top_k=0, top_p=1.0, vocab_size=VOCAB)
    longest = max(lengths(groups))
    uniforms = sample_uniforms(SEED, range(len(prompts)), NUM_GENERATIONS, longest)
    for prompt, group, of_group in zip(prompts, groups, uniforms, strict=True):
        for response, drawn in zip(group, of_group, strict=True):
            ids = response.response_ids
            logits = stock_logits(stock, torch.cat([prompt, ids]))[len(prompt) - 1 : -1]
            tokens, logprobs = sampler(logits, drawn[: len(ids), None])
            assert tokens.flatten().tolist() == ids.tolist()
            assert_close("logprobs", response.logprobs, logprobs.flatten(), bound)


def packed_logprobs(chunk: Any, prompt: Tensor, group: Any) -> list[Tensor]:
    """What the trainer computes for the responses of one group."""
    responses = [response.response_ids for response in group]
    layout = pack_trees([PrefixTree.from_group(len(prompt), [len(r) for r in responses])])
    tokens = layout.pack_tokens([torch.cat([prompt, response]) for response in responses])
    predictions = Predictions(
        predictor_ids=layout.predictor_ids,
        target_tokens=tokens[layout.target_ids],
        temperature=TEMPERATURE,
        vocab_size=VOCAB,
    )
    params = PrefixGroupedSeqParams.from_layout(layout, predictions=predictions)
    with torch.no_grad():
        logprobs, _ = chunk(tokens[None], params.position_ids[None], None, packed_seq_params=params)
    places = [layout.sample_indices(i)[len(prompt) :] for i in range(len(responses))]
    return [logprobs[torch.searchsorted(layout.target_ids, place)] for place in places]


def load_full_state(chunks: list[Any], full: dict[str, Tensor]) -> None:
    """Give the chunks of this rank their part of a one-rank model's weights."""
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    ep_rank = parallel_state.get_expert_model_parallel_rank()

    def part(x: Tensor, shape: torch.Size) -> Tensor:
        dim = next(d for d in range(x.dim()) if x.shape[d] != shape[d])
        return x.chunk(x.shape[dim] // shape[dim], dim)[rank]

    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            layer = re.match(r"decoder\.layers\.(\d+)\.(.*)", name)
            if layer:
                number = chunk.decoder.layers[int(layer[1])].layer_number - 1
                name = f"decoder.layers.{number}.{layer[2]}"
            expert, rank = re.search(r"local_experts\.(\d+)", name), tp_rank
            if expert:
                num_local = chunk.config.num_moe_experts // chunk.config.expert_model_parallel_size
                number = int(expert[1]) + num_local * ep_rank
                name = name.replace(expert[0], f"local_experts.{number}")
                rank = parallel_state.get_expert_tensor_parallel_rank()
            if name == "output_layer.weight" and chunk.share_embeddings_and_output_weights:
                name = "embedding.word_embeddings.weight"
            value = full[name]
            if value.shape != parameter.shape and "linear_fc1" in name:
                # Gate and up projection are split each by itself.
                half = torch.Size([parameter.shape[0] // 2, *parameter.shape[1:]])
                value = torch.cat([part(x, half) for x in value.chunk(2)])
            elif value.shape != parameter.shape and re.search("in_proj|conv1d", name):
                # So is every kind of heads.
                value = torch.cat(
                    [x.chunk(tp_size)[tp_rank] for x in value.split(_sections(chunk, name))]
                )
            elif value.shape != parameter.shape:
                value = part(value, parameter.shape)
            parameter.data.copy_(value)


def _sections(chunk: Any, name: str) -> list[int]:
    """Rows of the parts of a weight that are divided each by its heads."""
    config = chunk.config
    if ".mixer." in name:  # gates, inputs, what is written and read by groups, steps
        inner = config.mamba_num_heads * config.mamba_head_dim
        state = config.mamba_num_groups * config.mamba_state_dim
        convolved = [inner, state, state]
        return [inner, *convolved, config.mamba_num_heads] if "in_proj" in name else convolved
    # Queries, keys, values, gates and two numbers a head.
    heads = config.linear_num_value_heads
    key, value = (
        config.linear_num_key_heads * config.linear_key_head_dim,
        heads * config.linear_value_head_dim,
    )
    return [key, key, value, value, heads, heads] if "in_proj" in name else [key, key, value]


REFUSED: dict[str, dict[str, Any]] = {
    "num_generations=0": dict(num_generations=0),
    "max_response_tokens=0": dict(max_response_tokens=0),
    "seed=-1": dict(seed=-1),
    "temperature=-1": dict(temperature=-1.0),
    "temperature=nan": dict(temperature=float("nan")),
    "temperature=inf": dict(temperature=float("inf")),
    "top_k=-1": dict(top_k=-1),
    "top_p=0": dict(top_p=0.0),
    "top_p=1.5": dict(top_p=1.5),
    "stop_token_ids \\[60\\]": dict(stop_token_ids=[3, 60]),
    "vocab_size=65": dict(vocab_size=65),
    "vocab_size=0": dict(vocab_size=0),
    "max_batch_samples=3 must": dict(max_batch_samples=3),
    "prompt_numbers has 1 entries": dict(prompt_numbers=[1]),
    "the least is -1": dict(prompt_numbers=[-1, 0, 1, 2]),
    r"prompts\[1\] must be": dict(prompts=[torch.tensor([1]), torch.tensor([], dtype=torch.int64)]),
    r"prompts\[0\] must be": dict(prompts=[torch.tensor([1.0])]),
    r"prompts\[0\] has tokens outside \[0, 60\)": dict(prompts=[torch.tensor([60])]),
    "learned positions end at max_sequence_length=128": dict(max_response_tokens=115),
}
