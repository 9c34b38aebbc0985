"""What a run would hold, said beforehand: against real modules, real schedules and by hand."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")

from megatron_pg.data import CARDS, Group, Sample, write_rollouts  # noqa: E402
from megatron_pg.grpo import PrefixGroupConfig  # noqa: E402
from megatron_pg.mcore.versions import HAS_HYBRID_MODEL  # noqa: E402
from megatron_pg.train import TrainConfig, dry_run, load_config  # noqa: E402
from megatron_pg.train.config import ParallelConfig  # noqa: E402
from megatron_pg.train.dry_run.in_flight import passes_in_flight  # noqa: E402
from megatron_pg.train.dry_run.memory import RunMemory  # noqa: E402
from megatron_pg.train.dry_run.parameters import ModelModules  # noqa: E402
from megatron_pg.train.model import plan_model  # noqa: E402
from tests.ranks import Pool  # noqa: E402
from tests.train import tiny  # noqa: E402
from tests.train.layouts import NUM_RANKS, with_layout  # noqa: E402
from tests.train.rank_counts import (  # noqa: E402
    OF_EXPERTS,
    SIZES,
    counted,
    first_step,
    hybrid_of,
    live_passes,
    model_of,
)

EXPERTS = SIZES | {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 20,
    "moe_shared_expert_intermediate_size": 12,
    "add_bias_linear": False,
    "gated_linear_unit": True,
    "activation_func": "silu",
}
LATENT = {
    "multi_latent_attention": True,
    "q_lora_rank": 12,
    "kv_lora_rank": 20,
    "qk_head_dim": 10,
    "qk_pos_emb_head_dim": 6,
    "v_head_dim": 14,
    "qk_layernorm": True,
}
needs_hybrids = pytest.mark.skipif(
    not HAS_HYBRID_MODEL, reason="HybridModel came with megatron-core 0.18"
)
MODELS: dict[str, dict[str, Any]] = {
    "biases": SIZES | {"position_embedding_type": "learned_absolute", "add_qkv_bias": True},
    "untied": SIZES
    | {
        "untie_embeddings_and_output_weights": True,
        "normalization": "RMSNorm",
        "qk_layernorm": True,
        "softmax_type": "learnable",
    },
    "gated": SIZES | {"attention_output_gate": True},
    "latent": {**EXPERTS, **LATENT, "num_query_groups": 4, "moe_layer_freq": [0, 1, 1, 1]},
    "linear": EXPERTS
    | {
        "experimental_attention_variant": "gated_delta_net",
        "linear_attention_freq": [1, 0, 1, 1],
        "linear_conv_kernel_dim": 3,
        "linear_key_head_dim": 6,
        "linear_value_head_dim": 10,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "normalization": "RMSNorm",
    },
    "experts": EXPERTS,
    # Of four layers one has none, and stages have as many as they are given.
    "uneven": EXPERTS | {"moe_layer_freq": [1, 1, 0, 1], "num_layers_in_first_pipeline_stage": 1},
}
LAYOUTS: dict[str, tuple[int, dict[str, Any], list[str]]] = {
    "one": (1, {}, ["biases", "untied", "gated", "latent", "linear"]),
    "tp2": (2, dict(tensor_model_parallel_size=2), ["biases", "untied", "gated"]),
    "pp2": (
        2,
        dict(pipeline_model_parallel_size=2),
        ["biases", "untied", "latent", "uneven", "linear"],
    ),
    "pp2_vpp2": (
        2,
        dict(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
        ["biases", "latent"],
    ),
    "tp2_sp_ep2_etp1": (
        2,
        dict(
            tensor_model_parallel_size=2,
            sequence_parallel=True,
            expert_model_parallel_size=2,
            expert_tensor_parallel_size=1,
        ),
        ["latent", "experts", "linear"],
    ),
}


@pytest.fixture(scope="module")
def on_ranks(ranks: Pool) -> Callable[[str], list[dict[str, tuple[int, int, int]]]]:
    """What ranks of a layout count in the models of that layout, all at once."""

    @cache
    def of_layout(layout: str) -> list[dict[str, tuple[int, int, int]]]:
        size, parallel, names = LAYOUTS[layout]
        models = {name: MODELS[name] for name in names}
        return ranks.run(size, counted, models, ParallelConfig(**parallel))

    return of_layout


@pytest.mark.parametrize(
    ("layout", "model"), [(layout, name) for layout, of in LAYOUTS.items() for name in of[2]]
)
def test_parameters_are_those_of_every_rank(on_ranks, layout: str, model: str) -> None:
    plan = plan_model(model_of(MODELS[model]), ParallelConfig(**LAYOUTS[layout][1]))
    said = ModelModules.of_plan(plan).stage_parameters(plan)
    found = [rank[model] for rank in on_ranks(layout)]
    assert {stage for stage, _, _ in found} == set(range(len(said)))
    for stage, shared, experts in found:
        assert (said[stage].shared, said[stage].experts) == (shared, experts)
    assert bool(said[-1].experts) == ("num_moe_experts" in MODELS[model])


HYBRID: dict[str, Any] = dict(
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    mamba_num_heads=8,
    mamba_head_dim=6,
    n_groups=2,
    ssm_state_size=5,
    **OF_EXPERTS,
)


@needs_hybrids
@pytest.mark.parametrize(
    ("pattern", "layout"), [("M*MM--", "one"), ("M*MM--", "pp2_tp2_sp"), ("ME*E-E", "pp2_ep2")]
)
def test_parameters_of_a_hybrid_are_those_of_every_rank(
    ranks: Pool, tmp_path: Path, pattern: str, layout: str
) -> None:
    """Stages of three layers, the first of which has no MLP."""
    model = hybrid_of(tmp_path, pattern, **HYBRID)
    parallel = ParallelConfig(
        **{
            "one": {},
            "pp2_tp2_sp": dict(
                pipeline_model_parallel_size=2, tensor_model_parallel_size=2, sequence_parallel=True
            ),
            "pp2_ep2": dict(pipeline_model_parallel_size=2, expert_model_parallel_size=2),
        }[layout]
    )
    plan = plan_model(model, parallel)
    said = ModelModules.of_plan(plan).stage_parameters(plan)
    found = ranks.run(1 if layout == "one" else 4, counted, {"it": model}, parallel)
    assert {rank["it"] for rank in found} == {(n, s.shared, s.experts) for n, s in enumerate(said)}
    assert bool(said[0].experts) == ("E" in pattern)


@pytest.mark.parametrize(
    ("pp", "vpp", "num_groups"), [(2, None, 6), (2, 2, 6), (4, 2, 12), (2, None, 1)]
)
def test_passes_in_flight_are_those_of_megatrons_schedule(
    ranks: Pool, pp: int, vpp: int | None, num_groups: int
) -> None:
    parallel = ParallelConfig(
        pipeline_model_parallel_size=pp, virtual_pipeline_model_parallel_size=vpp
    )
    found = ranks.run(pp, live_passes, parallel, num_groups)
    for stage, (peak, num_rows) in enumerate(found):
        assert passes_in_flight(stage, pp, vpp or 1, num_rows) == peak
        assert sum(peak) > 1 or stage == pp - 1 or num_rows == 1
    is_filled = num_groups > 1
    assert (passes_in_flight(0, pp, vpp or 1, None) == found[0][0]) == is_filled


STEPS: dict[str, tuple[str, list[str]]] = {
    "plain": ("one", []),
    "minibatches": ("one", ["algorithm.num_minibatches=3"]),
    "skipped": (
        "one",
        ["algorithm.num_minibatches=3", "algorithm.skip_groups_without_spread=true"],
    ),
    "filtered": ("one", ["algorithm.filter_groups.enable=true", "run.groups_per_step=6"]),
    "at_the_limit": (
        "one",
        ["algorithm.filter_groups={enable: true, max_num_gen_batches: 1}"],
    ),
    "masked": ("one", ["run.groups_per_step=9", "algorithm.num_minibatches=9"]),
    "dp2": ("dp2", ["algorithm.num_minibatches=3", "algorithm.skip_groups_without_spread=true"]),
    "pp2_vpp2_resident": (
        "pp2_vpp2",
        [
            "prefix_group.max_tokens_per_microbatch=28",
            "prefix_group.prefix_resident=always",
            "algorithm.num_minibatches=3",
        ],
    ),
    "cp2": ("cp2", ["rollout.shuffle=false", "algorithm.skip_groups_without_spread=true"]),
}


def some_groups() -> list[Group]:
    """Of seven one has no spread and one a single sample, and now one is aborted, one masked."""
    groups = tiny.make_groups()
    groups[5] = Group("g5", tuple(replace(s, status="aborted") for s in groups[5].samples))
    first, *others = groups[0].samples
    groups[0] = Group("g0", (replace(first, status="aborted"), *others))
    masked = (replace(s, loss_mask=torch.zeros_like(s.loss_mask)) for s in groups[6].samples)
    groups[6] = Group("g6", tuple(masked))
    return groups


@pytest.mark.parametrize("case", STEPS)
def test_the_first_step_is_the_one_that_a_run_trains(
    ranks: Pool, tmp_path: Path, case: str
) -> None:
    layout, overrides = STEPS[case]
    sections = tiny.run_sections(tmp_path, some_groups())
    config = load_config(tiny.write_config(tmp_path / "run.yaml", sections), overrides)
    size = NUM_RANKS[layout]
    config = with_layout(config, layout)
    (line,) = (x for x in dry_run(config, size).lines if x.startswith("first step"))
    got = ranks.run(size, first_step, config, timeout=300)[0]
    counts = re.search(r": ([\d,]+) logical tokens, ([\d,]+) encoded", line)
    assert counts is not None
    told = [int(count.replace(",", "")) for count in counts.groups()]
    assert told == [got["tokens/logical"], got["tokens/unique"]]
    resident = re.search(r"prompts of (\d+) groups \(([\d,]+) tokens\)", line)
    assert (resident is not None) == ("resident" in case)
    if resident is not None:
        assert int(resident[1]) == got["packing/resident_groups"]
        assert int(resident[2]) == got["tokens/resident"]
        # A minibatch whose groups all fit into rows has a wave without prompts that stay.
        waves = re.search(r"in (\d+) wave", line)
        assert waves is not None and 0 < int(waves[1]) <= int(resident[1]) < 3
        assert "in 3 minibatches" in line
    else:
        dp = 2 if layout == "dp2" else 1
        assert f" {int(got['packing/microbatches'] / dp)} microbatches a rank" in line


def test_a_first_step_may_train_nothing(tmp_path: Path) -> None:
    overrides = ["rollout.shuffle=false", "run.groups_per_step=1"]
    groups = some_groups()
    sections = tiny.run_sections(tmp_path, [groups[5], *groups[:5]])
    file = tiny.write_config(tmp_path / "run.yaml", sections)
    lines = dry_run(load_config(file, overrides), 1, "h100").lines
    assert "first step of 1 of 6 groups trains nothing (status, masks or rewards" in lines[1]
    assert lines[1].endswith("memory is that of full rows")
    assert not any("predicted" in line for line in lines)


def test_a_first_step_that_ends_the_run_is_refused(tmp_path: Path) -> None:
    sections = tiny.run_sections(tmp_path, some_groups())
    limit = "algorithm.filter_groups={enable: true, max_num_gen_batches: 1, at_limit: raise}"
    config = load_config(tiny.write_config(tmp_path / "run.yaml", sections), [limit])
    with pytest.raises(ValueError, match="max_num_gen_batches=1: of 5 groups . have spread"):
        dry_run(config, 1)


def make_config(tmp_path: Path, *overrides: str, **model: Any) -> TrainConfig:
    """A dense model of 3.2e9 parameters without weights, and prompts that are not known yet."""
    sections = tiny.run_sections(tmp_path) | {
        "model": {
            "vocab_size": 32000,
            "transformer": {
                "num_layers": 32,
                "hidden_size": 2560,
                "ffn_hidden_size": 8192,
                "num_attention_heads": 32,
                "num_query_groups": 8,
                "add_bias_linear": False,
                "gated_linear_unit": True,
                "activation_func": "silu",
                "normalization": "RMSNorm",
                **model,
            },
        },
        "prefix_group": {"max_tokens_per_microbatch": 16384},
    }
    file = tiny.write_config(tmp_path / "config.yaml", sections)
    return load_config(file, overrides)


def test_a_run_is_planned_for_cards_wherever_it_is_looked_at(tmp_path: Path) -> None:
    here, told = (dry_run(make_config(tmp_path), 8, card) for card in (None, "h100"))
    assert "planned for machines like this one: float32, layers of local" in here.lines[2]
    assert here.lines[2].endswith("balanced as on h100 cards, none of which is known here")
    assert here.fits is None and sum("h100" in line for line in here.lines) == 1
    line = "planned for h100 cards: bfloat16, layers of transformer_engine"
    assert told.lines[2].startswith(line) and "must be installed there" in told.lines[2]
    # Of weights 2 bytes and not 4; kernels in the place of several operations.
    terms, of_cards = here.stages[0].terms, told.stages[0].terms
    assert terms["weights"] == 2 * of_cards["weights"]
    assert terms["gradients"] == of_cards["gradients"]
    assert 2.3 < terms["activations"] / of_cards["activations"] < 3.2


def test_what_a_run_sets_itself_is_planned(tmp_path: Path) -> None:
    local = dry_run(make_config(tmp_path, "model.transformer_impl=local"), 8, "h100")
    assert "bfloat16, layers of local" in local.lines[2]
    wide = dry_run(make_config(tmp_path, params_dtype="float32"), 8, "h100")
    assert "float32, layers of transformer_engine" in wide.lines[2]
    plain = dry_run(make_config(tmp_path), 8, "h100")
    apart = dry_run(make_config(tmp_path, bias_activation_fusion=False), 8, "h100")
    assert apart.stages[0].terms["activations"] > plain.stages[0].terms["activations"]


def test_fused_kernels_are_planned_where_they_are_not_installed(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    planned = plan_model(config.model, config.parallel, card="h100")
    assert planned.use_te and planned.config.apply_rope_fusion and planned.config.bf16
    assert planned.config.bias_activation_fusion
    here = plan_model(config.model, config.parallel)
    assert not (here.use_te or here.config.apply_rope_fusion or here.config.bf16)


def test_terms_by_hand(tmp_path: Path) -> None:
    """Of 16 ranks: tp 2 x pp 2 x cp 2 x dp 2, experts over ep 4 x etp 1 and so on 2 replicas."""
    parallel = (
        *("tensor_model_parallel_size=2", "sequence_parallel=true", "context_parallel_size=2"),
        *("pipeline_model_parallel_size=2", "expert_model_parallel_size=4"),
        *("expert_tensor_parallel_size=1", "use_distributed_optimizer=true"),
    )
    experts = dict(num_moe_experts=8, moe_router_topk=2, moe_ffn_hidden_size=1024)
    overrides = [f"parallel.{setting}" for setting in parallel]
    told = dry_run(make_config(tmp_path, *overrides, "run.save_interval=1", **experts), 16, "h100")
    hidden, ffn = 2560, 1024
    attention = hidden * (32 + 2 * 8 + 32) * 80 // 2 + 2 * hidden
    # Two of eight experts on a rank, whole.
    in_experts = 16 * 2 * 3 * hidden * ffn
    shared = 16 * (attention + 8 * hidden) + 32000 * hidden // 2
    first, last = told.stages
    assert (first.parameters.shared, first.parameters.experts) == (shared, in_experts)
    assert (last.parameters.shared, last.parameters.experts) == (shared + hidden, in_experts)
    total = first.parameters.total
    assert (first.terms["weights"], first.terms["gradients"]) == (2 * total, 4 * total)
    # Two moments and fp32 weights: over dp x cp = 4 ranks, of experts over 16 / (2 x 4) = 2.
    assert first.terms["optimizer"] == 12 * (shared // 4 + in_experts // 2)
    assert first.checkpoint == 14 * (shared // 4 + in_experts // 2)
    # The one row of the first step, of which a rank has at most 8192 tokens; tp 2 with sp.
    norms = 4 * hidden // 2
    heads = (32 + 8 + 8 + 32 + 32) * 80 // 2
    routed = 2 * (hidden + 3 * ffn) // 2
    per_token = 2 * (norms + heads + routed) + 4 * 16 + (5 * 8 + 24 * 2) // 2
    assert first.terms["activations"] == 8192 * 16 * per_token
    # The last norm reads and returns 1280 values.
    assert last.terms["activations"] == 8192 * (16 * per_token + 2 * 2 * hidden // 2)
    # Logits of 4096 tokens and half the vocabulary, a gradient of its weights, of the rows in fp32.
    logits = 4096 * 16000 * 2 + 16000 * hidden * 2 + 8192 * hidden * 4
    assert last.terms["logits or a layer's backward pass"] == logits
    assert first.terms["logits or a layer's backward pass"] < logits
    # To and from one neighbour; what is sent is freed.
    assert first.terms["pipeline buffers"] == last.terms["pipeline buffers"] == 2 * 8192 * hidden
    assert told.bytes_per_rank == max(stage.total for stage in told.stages)


@pytest.mark.parametrize("offload", [False, True])
def test_a_reference_stands_beside_the_policy(tmp_path: Path, offload: bool) -> None:
    plain = dry_run(make_config(tmp_path), 1, "h100").stages[0]
    more = ("algorithm.policy.kl_loss_coef=0.1", f"algorithm.ref_offload={offload}")
    more += (f"algorithm.ref_hf={tmp_path / 'model'}",)
    told = dry_run(make_config(tmp_path, *more), 1, "h100").stages[0]
    # Offloaded it is gone before activations take its place, which are more.
    held = 0 if offload else plain.terms["weights"]
    assert told.total - plain.total == held == told.terms.get("reference", 0)


@pytest.mark.parametrize(("method", "number"), [("uniform", 1), ("uniform", 4), ("block", 6)])
def test_recomputed_layers_come_back_in_turn(tmp_path: Path, method: str, number: int) -> None:
    settings = dict(
        recompute_granularity="full", recompute_method=method, recompute_num_layers=number
    )
    plain, again = (
        dry_run(make_config(tmp_path, **more), 1, "h100").stages[0] for more in ({}, settings)
    )
    tokens, value = 16384, 2 * 2560
    last_norm = 2 * value
    layer = (plain.terms["activations"] // tokens - last_norm) // 32
    kept = {"uniform": 32 // number * value, "block": number * value + (32 - number) * layer}
    assert again.terms["activations"] == tokens * (kept[method] + last_norm)
    at_once = number if method == "uniform" else 1
    gradients = 2 * 2 * 8192
    held = tokens * (at_once * (layer - value) + gradients)
    assert again.terms["logits or a layer's backward pass"] == max(
        held, plain.terms["logits or a layer's backward pass"]
    )
    assert number == 1 or held > 0


def test_a_rank_that_fits_is_told(tmp_path: Path) -> None:
    told = dry_run(
        make_config(
            tmp_path,
            recompute_granularity="full",
            recompute_method="uniform",
            recompute_num_layers=1,
        ),
        8,
        "h100",
    )
    size = f"{told.bytes_per_rank / 2**30:.1f}"
    assert told.fits and told.lines[-1] == f"fits h100 (80 GB): yes, {size} of 79.1 GiB"
    assert told.bytes_per_rank < CARDS["h100"].capacity_bytes


def test_every_remedy_of_one_that_does_not_makes_it_fit(tmp_path: Path) -> None:
    told = dry_run(make_config(tmp_path), 8, "h100")
    assert told.fits is False and told.bytes_per_rank > CARDS["h100"].capacity_bytes
    line = told.lines[-1]
    assert line.startswith("fits h100 (80 GB): no, ")
    remedies = line.split("What would fit: ")[1].split("; or ")
    assert len(remedies) >= 5 and any("recompute" in remedy for remedy in remedies)
    for name in ("tensor_model", "context", "pipeline_model"):
        assert sum(f"parallel.{name}_parallel_size" in remedy for remedy in remedies) == 1
    for remedy in remedies:
        changed = dry_run(make_config(tmp_path, *remedy.split()), 8, "h100")
        assert changed.fits, remedy
    # The next longer row would not.
    (rows,) = (remedy for remedy in remedies if "max_tokens" in remedy)
    longer = int(rows.split("=")[1]) + 1
    more = f"prefix_group.max_tokens_per_microbatch={longer}"
    assert dry_run(make_config(tmp_path, more), 8, "h100").fits is False
    # On a larger card it does.
    assert dry_run(make_config(tmp_path), 8, "h200").fits


def remedies_of(config: TrainConfig, world_size: int) -> list[str]:
    line = dry_run(config, world_size, "h100").lines[-1]
    assert line.startswith("fits h100 (80 GB): no, ")
    return line.split("What would fit: ")[1].split("; or ")


@pytest.mark.parametrize("longest", [3000, 16000])
def test_no_remedy_has_rows_that_are_shorter_than_what_was_recorded(
    tmp_path: Path, longest: int
) -> None:
    make_config(tmp_path)
    prompt = torch.zeros(longest - 10).long()
    samples = tuple(
        Sample(
            prompt_ids=prompt,
            response_ids=torch.full((10,), i),
            reward=float(i),
            loss_mask=torch.ones(10, dtype=torch.bool),
        )
        for i in range(2)
    )
    write_rollouts([*tiny.make_groups(), Group("long", samples)], tmp_path / "rollouts.jsonl")
    config = load_config(tmp_path / "config.yaml", ["model.max_position_embeddings=16384"])
    remedies = remedies_of(config, 8)
    assert any("max_tokens" in remedy for remedy in remedies) == (longest < 10000)
    assert any("context_parallel" in remedy for remedy in remedies)
    for remedy in remedies:
        more = ["model.max_position_embeddings=16384", *remedy.split()]
        assert dry_run(load_config(tmp_path / "config.yaml", more), 8, "h100").fits, remedy


def sampling_config(tmp_path: Path, *overrides: str) -> TrainConfig:
    """A model of 2.5e9 parameters in experts that samples responses of up to 15,000 tokens."""
    from transformers import Qwen3MoeConfig

    tmp_path.mkdir(exist_ok=True)
    folder = tmp_path / "experts"
    Qwen3MoeConfig(
        **dict(vocab_size=tiny.VOCAB, hidden_size=2048, moe_intermediate_size=768),
        **dict(num_hidden_layers=24, num_experts=16, num_experts_per_tok=4),
        **dict(num_attention_heads=32, num_key_value_heads=4, head_dim=128),
        architectures=["Qwen3MoeForCausalLM"],
    ).save_pretrained(folder)
    tiny.save_tokenizer(folder)
    sampling = f"""
model: {{hf: {folder}}}
rollout: {{source: model, max_response_tokens: 15000}}
prefix_group: {{max_tokens_per_microbatch: 16384}}
run: {{out: {tmp_path / "out"}, num_steps: 1, groups_per_step: 8}}
"""
    (tmp_path / "sampling.yaml").write_text(sampling)
    return load_config(tmp_path / "sampling.yaml", overrides)


def test_no_remedy_is_one_that_a_run_that_samples_refuses(tmp_path: Path) -> None:
    remedies = remedies_of(sampling_config(tmp_path), 8)
    assert remedies
    for remedy in remedies:
        assert dry_run(sampling_config(tmp_path, *remedy.split()), 8, "h100").fits, remedy


def test_prompts_that_are_never_resident_take_nothing(tmp_path: Path) -> None:
    """A router's loss of every sample keeps samples whole, whatever the settings allow."""
    kinds = ("aux_loss", "seq_aux_loss")
    found = []
    for kind in kinds:
        settings = f"{{moe_router_load_balancing_type: {kind}, moe_aux_loss_coeff: 0.01}}"
        config = sampling_config(tmp_path, f"model.transformer={settings}")
        found.append(dry_run(config, 8, "h100"))
    assert found[0].resident_bytes_per_rank > 0 == found[1].resident_bytes_per_rank


def test_a_stage_may_have_the_embedding_alone(tmp_path: Path) -> None:
    layout = "E|t*16|t*16|L"
    config = make_config(
        tmp_path,
        "parallel.pipeline_model_parallel_size=4",
        pipeline_model_parallel_layout=layout,
    )
    first, *_, last = dry_run(config, 4, "h100").stages
    assert (first.num_layers, last.num_layers) == (0, 0)
    assert first.parameters.total == 32000 * 2560
    assert first.terms["weights"] == 2 * 32000 * 2560
    assert not {"activations", "logits or a layer's backward pass"} & first.terms.keys()
    assert last.terms["logits or a layer's backward pass"] > 0


def test_two_changes_where_one_is_too_little(tmp_path: Path) -> None:
    wide = dict(hidden_size=8192, ffn_hidden_size=28672, num_attention_heads=64, num_layers=78)
    told = dry_run(
        make_config(
            tmp_path,
            "parallel.tensor_model_parallel_size=8",
            "parallel.sequence_parallel=true",
            **wide,
        ),
        16,
        "h100",
    )
    assert told.fits is False
    remedies = told.lines[-1].split("What would fit: ")[1].split("; or ")
    both = [remedy for remedy in remedies if "recompute" in remedy and "parallel" in remedy]
    assert both and remedies == both
    for remedy in both:
        config = make_config(
            tmp_path,
            "parallel.tensor_model_parallel_size=8",
            "parallel.sequence_parallel=true",
            *remedy.split(),
            **wide,
        )
        assert dry_run(config, 16, "h100").fits, remedy


def test_nothing_is_said_to_fit_where_nothing_does(tmp_path: Path) -> None:
    told = dry_run(make_config(tmp_path, num_layers=2000), 1, "h100")
    assert told.lines[-1].endswith("What would fit: nothing alone; take more ranks for the model")


def test_ranks_are_not_gone_through_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is that of a stage, whatever number of ranks has it."""
    looked_at = []
    stage = RunMemory._stage
    monkeypatch.setattr(
        RunMemory, "_stage", lambda *args: looked_at.append(args[1]) or stage(*args)
    )
    sizes = ("parallel.pipeline_model_parallel_size=4", "parallel.tensor_model_parallel_size=2")
    counts = []
    for world_size in (8, 1024):
        looked_at.clear()
        dry_run(make_config(tmp_path, *sizes), world_size, "h200")
        counts.append(len(looked_at))
        assert set(looked_at) == set(range(4))
    assert counts[0] == counts[1]


def test_the_command_ends_with_1_where_a_rank_does_not_fit(tmp_path: Path, commands: Path) -> None:
    make_config(tmp_path)
    command = [str(tmp_path / "config.yaml"), "--dry-run", "--world-size", "8"]
    for more, code in (([], 1), (["--card", "h200"], 0), (["--card", "here"], 0)):
        told = tiny.launch([*command, *more], commands=commands)
        assert told.returncode == code, told.stderr
        assert told.stdout.startswith("8 ranks") and told.stdout.count("\n") < 12
        assert ("fits h" in told.stdout) == (more[1:] != ["here"])


@pytest.mark.parametrize("mode", ["retain", "recompute"])
def test_layers_with_a_state_keep_one_for_every_resident_prompt(tmp_path: Path, mode: str) -> None:
    settings = ("max_tokens_per_microbatch=24", "prefix_resident=always")
    overrides = [f"prefix_group.{x}" for x in (*settings, f"prefix_resident_mode={mode}")]

    def told(**transformer: Any) -> tuple[int, int]:
        """Bytes that resident prompts keep, and tokens that are resident."""
        sections = tiny.run_sections(tmp_path)
        sections["model"] = {"vocab_size": tiny.VOCAB, "transformer": transformer}
        file = tiny.write_config(tmp_path / "config.yaml", sections)
        run = dry_run(load_config(file, overrides), 1)
        (line,) = (line for line in run.lines if line.startswith("of it resident prompts"))
        return run.resident_bytes_per_rank, int(line.split(": ")[1].split(" ")[0])

    one, tokens = told(**MODELS["linear"])
    other, same_tokens = told(**MODELS["linear"] | {"linear_conv_kernel_dim": 4})
    assert tokens == same_tokens > 0
    # One input more of 2 x 2 x 6 + 4 x 10 channels in each of three layers, and its gradient.
    prompts, rest = divmod(other - one, 3 * (2 * 12 + 40) * (4 + 4))
    assert 0 < prompts <= tokens and rest == 0
    # States of 4 heads alone are more.
    assert one > prompts * 3 * 4 * 6 * 10 * (4 + 4)


def hybrid_config(tmp_path: Path, pattern: str, *overrides: str, **sizes: Any) -> TrainConfig:
    """As ``make_config`` for a hybrid of 64 heads of 64 channels, in groups of 8."""
    wide = dict(
        hidden_size=2048,
        intermediate_size=8192,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=128,
        mamba_num_heads=64,
        mamba_head_dim=64,
        n_groups=8,
        ssm_state_size=128,
        vocab_size=32000,
    )
    model = hybrid_of(tmp_path / "hybrid", pattern, **wide | sizes)
    sections = tiny.run_sections(tmp_path) | {
        "model": {"hf": model.hf},
        "prefix_group": {"max_tokens_per_microbatch": 16384},
    }
    return load_config(tiny.write_config(tmp_path / "config.yaml", sections), overrides)


@needs_hybrids
def test_terms_of_a_hybrid_by_hand(tmp_path: Path) -> None:
    """tp 2 with sp, pp 2: a stage with two states and an MLP, and one that attends."""
    sizes = ("tensor_model_parallel_size=2", "pipeline_model_parallel_size=2")
    overrides = [f"parallel.{x}" for x in (*sizes, "sequence_parallel=true")]
    told = dry_run(hybrid_config(tmp_path, "MM-*--", *overrides), 4, "h100")
    hidden, inner, state = 2048, 64 * 64, 2 * 8 * 128
    mamba = hidden * (3 * inner + state + 64) + 5 * (inner + state) + 3 * 64 + inner
    attention, mlp = hidden * (2 * 16 + 2 * 4) * 128, 2 * hidden * 8192
    first, last = told.stages
    vocabulary = 32000 * hidden
    assert first.parameters.total == (2 * mamba + mlp + vocabulary) // 2 + 3 * hidden
    assert last.parameters.total == (attention + 2 * mlp + vocabulary) // 2 + 4 * hidden
    # Half of a row's tokens between the parts, and half of the heads in them.
    norms, convolved = 2 * hidden // 2, (inner + state) // 2
    between = (inner * 2 + state + 64) // 2 + 2 * convolved + (3 * 64 + 3 * inner) // 2
    of_mlp = norms + 2 * 8192 // 2
    (rows,) = {told.stages[0].terms["activations"]}
    segments = rows - 16384 * 2 * (2 * (norms + between) + of_mlp)
    # Every segment begins from 32 heads of 64 x 128 in fp32, and 3 inputs of the convolution.
    of_segment = 2 * (4 * 32 * 64 * 128 + 2 * 3 * convolved)
    assert segments % of_segment == 0 and 3 < segments // of_segment < 100
    of_attention = norms + (16 * 3 + 2 * 4) * 128 // 2
    kept = 2 * (of_attention + 2 * of_mlp + hidden) + 4 * 16 // 2
    assert last.terms["activations"] == 16384 * kept
    assert told.lines[-1].startswith("fits h100 (80 GB): yes")
    kept = [line for line in told.lines if line.startswith("a token keeps")]
    assert [line.split(" in a layer")[1].split(";")[0] for line in kept] == [
        *(" with an MLP (3 of 6)", " with Mamba-2 (2 of 6)", " with attention (1 of 6)"),
    ]
    assert f"about {2 * (norms + between):,} bytes" in kept[1] and "mlp" not in kept[1]
    assert not any("linear attention" in line for line in told.lines)


@needs_hybrids
def test_rows_of_a_hybrid_are_balanced_by_what_its_layers_cost(tmp_path: Path) -> None:
    plan = plan_model(hybrid_of(tmp_path, "M*MM--", **HYBRID), ParallelConfig())
    costs = plan.packing(PrefixGroupConfig(max_tokens_per_microbatch=64)).cost_model
    card, hidden, inner = CARDS["h100"], 32, 8 * 6
    mamba = hidden * (3 * inner + 2 * 2 * 5 + 8) + 4 * (inner + 2 * 2 * 5)
    # In runs of 128: queries with keys of two groups; with values; what is added and read.
    scan = 2 * (2 * 128 * 5) + 8 * (2 * 128 * 6 + 4 * 5 * 6)
    attention, mlp = hidden * (2 * 4 + 2 * 2) * 8, 2 * hidden * 48
    assert costs.per_token == 2 * (3 * mamba + attention + 2 * mlp) + 3 * scan
    slower = card.product_flops / card.attention_flops * 3.5 / 3
    assert costs.per_attention_pair == pytest.approx(2 * 4 * 2 * 8 * slower)


@needs_hybrids
@pytest.mark.parametrize(
    ("pattern", "overrides", "rule"),
    [
        ("MM-*", ["pipeline_model_parallel_size=3"], "num_layers=4: .*=3; choose other pipeline"),
        ("MM-*", ["tensor_model_parallel_size=16"], "mamba_num_groups=8 is no multiple of tensor"),
        ("MM-*", ["context_parallel_size=128"], "the largest context_parallel_size .* fits is 16"),
        ("MM-*", ["expert_model_parallel_size=2"], "num_moe_experts must be non None"),
    ],
)
def test_sizes_that_do_not_fit_a_hybrid_are_refused(
    tmp_path: Path, pattern: str, overrides: list[str], rule: str
) -> None:
    (size,) = (int(override.split("=")[1]) for override in overrides)
    config = hybrid_config(tmp_path, pattern, *(f"parallel.{override}" for override in overrides))
    with pytest.raises(ValueError, match=rule):
        dry_run(config, size, "h100")


@needs_hybrids
def test_a_hybrid_that_does_not_fit_is_told_what_would(tmp_path: Path) -> None:
    pattern = "M-M*M-" * 12
    told = dry_run(hybrid_config(tmp_path, pattern), 8, "h100")
    assert told.fits is False
    remedies = told.lines[-1].split("What would fit: ")[1].split("; or ")
    assert any("recompute" in remedy for remedy in remedies)
    for remedy in remedies:
        changed = dry_run(hybrid_config(tmp_path, pattern, *remedy.split()), 8, "h100")
        assert changed.fits, remedy
