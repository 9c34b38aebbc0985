"""``model.transformer``, the layout and the positions of a model: refused by name, or built so."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import tanh

pytest.importorskip("megatron.core")

from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from megatron_pg.data import Group, Sample  # noqa: E402
from megatron_pg.mcore import layer_windows, layers_per_stage  # noqa: E402
from megatron_pg.train import TrainConfig, dry_run, load_config  # noqa: E402
from megatron_pg.train.config import ModelConfig, ParallelConfig  # noqa: E402
from megatron_pg.train.model import plan as model_plan  # noqa: E402
from megatron_pg.train.model.plan import check_attention, plan_model  # noqa: E402
from megatron_pg.train.model.transformer_settings import transformer_settings  # noqa: E402
from megatron_pg.train.rollouts import open_sampling  # noqa: E402
from tests.train import tiny  # noqa: E402

SIZES = dict(num_layers=4, hidden_size=32, num_attention_heads=4, ffn_hidden_size=48)
EXPERTS = SIZES | dict(
    num_moe_experts=4,
    moe_ffn_hidden_size=16,
    moe_router_load_balancing_type="none",
    add_bias_linear=False,
)
COUNTED = dict(
    account_for_embedding_in_pipeline_split=True, account_for_loss_in_pipeline_split=True
)
# Fields that belong to other sections, that runs decide themselves or do not look at.
ELSEWHERE = {
    "tensor_model_parallel_size": (2, "set by parallel.tensor_model_parallel_size"),
    "pipeline_model_parallel_size": (2, "set by parallel.pipeline_model_parallel_size"),
    "virtual_pipeline_model_parallel_size": (2, "parallel.virtual_pipeline_model_parallel_size"),
    "expert_model_parallel_size": (2, "set by parallel.expert_model_parallel_size"),
    "sequence_parallel": (True, "set by parallel.sequence_parallel"),
    "expert_tensor_parallel_size": (1, "set by parallel.expert_tensor_parallel_size"),
    "context_parallel_size": (2, "set by parallel.context_parallel_size"),
    "hierarchical_context_parallel_sizes": ([1, 2], "needs process groups"),
    "hybrid_context_parallel": (True, "needs process groups"),
    "pipeline_model_parallel_comm_backend": ("ucc", "needs process groups"),
    "gtp_weight_remat_size": (1, "needs process groups"),
    "expert_gtp_weight_remat_size": (2, "needs process groups"),
    "tensor_parallel_num_weight_shards": (2, "needs process groups"),
    "fp16": (True, "use params_dtype: bfloat16"),
    "bf16": (True, "follows model.transformer.params_dtype"),
    "pipeline_dtype": ("float32", "follows model.transformer.params_dtype"),
    "overlap_p2p_comm": (True, "follows parallel.virtual_pipeline_model_parallel_size"),
    "batch_p2p_comm": (False, "follows parallel.virtual_pipeline_model_parallel_size"),
    "microbatch_group_size_per_vp_stage": (2, "follows parallel.virtual_pipeline_model"),
    "attention_backend": ("flash", "set prefix_group.attention_backend"),
    "flash_attention_version": (3, "set prefix_group.attention_backend"),
    "transformer_impl": ("local", "set by model.transformer_impl"),
    "calculate_per_token_loss": (True, "must stay true"),
    "variable_seq_lengths": (False, "must stay true"),
    "cross_entropy_loss_fusion": (True, "would be ignored"),
    "apply_residual_connection_post_layernorm": (True, "would be ignored"),
    "fp32_residual_connection": (True, "hands fp32 to linear layers"),
    "use_te_activation_func": (True, "needs a layer spec that no run makes"),
    "moe_use_legacy_grouped_gemm": (True, "as no folder does"),
    "perform_initialization": (False, "break the start"),
    "init_model_with_meta_device": (True, "break the start"),
    "finalize_model_grads_func": ("print", "is set by the run"),
    "no_sync_func": (None, "is set by the run"),
    # Only beside a setting that is off.
    "cp_comm_type": ("a2a", "set by parallel.cp_comm_type"),
    "tp_comm_overlap_ag": (False, "would be ignored: what it qualifies is off"),
    "fp8_recipe": ("mxfp8", "would be ignored"),
    "mamba_state_dim": (64, "would be ignored"),
    "qk_clip_alpha": (0.25, "would be ignored"),
    "inference_sampling_seed": (1, "would be ignored"),
    # Not to be had from a file.
    "init_method": ("xavier", "must be null"),
}
INSTALLED = {field.name for field in dataclasses.fields(TransformerConfig)}


def plan(transformer: dict[str, Any], **parallel: Any) -> TransformerConfig:
    model = ModelConfig(vocab_size=50, transformer=transformer)
    return plan_model(model, ParallelConfig(**parallel)).config


def test_a_squared_relu_is_given_by_its_name() -> None:
    activation = plan(SIZES | dict(activation_func="squared_relu")).activation_func
    assert activation(torch.tensor([-2.0, 3.0])).tolist() == [0.0, 9.0]


@pytest.mark.parametrize(
    ("kept", "shown"), [("silu", "'silu'"), ("squared_relu", "'squared_relu'"), (tanh, "'tanh'")]
)
def test_what_a_folder_says_is_shown_as_a_file_would_say_it(kept: Any, shown: str) -> None:
    named = plan(SIZES | dict(activation_func=kept)).activation_func if kept is not tanh else tanh
    with pytest.raises(ValueError, match=f"contradicts model.hf, which says {shown}; remove it"):
        transformer_settings({"activation_func": "relu"}, {"activation_func": named})


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_is_not_set_here_says_where(name: str) -> None:
    if name not in INSTALLED:
        pytest.skip("no field of this Megatron-Core")
    value, where = ELSEWHERE[name]
    plan(SIZES)
    with pytest.raises(ValueError, match=r"^1 problem\(s\) in model.transformer:") as error:
        plan(SIZES | {name: value})
    assert f"model.transformer.{name}" in str(error.value) and where in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("num_layers", "four", "must be an integer"),
        ("num_layers", 4.0, "must be an integer"),
        ("num_layers", True, "must be an integer"),
        ("ffn_hidden_size", 0, "must be at least 1"),
        ("hidden_size", -32, "must be at least 1"),
        ("layernorm_epsilon", None, "must be a number"),
        ("num_query_groups", [2], "must be an integer or null"),
        ("layernorm_epsilon", "small", "must be a number"),
        ("layernorm_epsilon", float("nan"), "must be finite"),
        ("layernorm_epsilon", 0, "must be above 0"),
        ("softmax_scale", float("inf"), "must be finite"),
        ("softmax_scale", -1.0, "must be above 0"),
        ("add_bias_linear", "no", "must be true or false"),
        ("add_bias_linear", 0, "must be true or false"),
        ("normalization", "BatchNorm", "must be one of 'LayerNorm', 'RMSNorm'"),
        ("recompute_granularity", "some", "must be one of 'full', 'selective' or null"),
        ("recompute_modules", "core_attn", "must be a list of text or null"),
        ("recompute_modules", [1], "must be a list of text or null"),
        ("activation_func", "swish", "must be one of gelu, silu, relu, squared_relu"),
        ("activation_func", ["silu"], "must be one of gelu, silu, relu, squared_relu"),
        ("params_dtype", "fp8", "must be one of bfloat16, float32, float64"),
        ("params_dtype", {}, "must be one of bfloat16, float32, float64"),
        ("num_layer", 4, "did you mean 'num_layers'?"),
        ("__class__", 4, "is unknown"),
        ("_cpu_offloading_context", 4, "must be"),
    ],
)
def test_values_are_of_their_fields_types(name: str, value: Any, rule: str) -> None:
    with pytest.raises(ValueError) as error:
        plan(SIZES | {name: value})
    assert f"model.transformer.{name}" in str(error.value) and rule in str(error.value)


def test_all_problems_of_a_model_are_in_one_error() -> None:
    with pytest.raises(ValueError, match=r"^3 problem\(s\) in model.transformer:"):
        plan(SIZES | dict(num_layer=1, fp16=True, hidden_size="wide"))


@pytest.mark.parametrize(
    ("changes", "parallel", "message"),
    [
        ({}, dict(tensor_model_parallel_size=2), "set sequence_parallel=true"),
        ({}, dict(expert_model_parallel_size=3), "is no multiple of expert_model"),
        (dict(moe_router_topk=5), {}, "moe_router_topk=5 must not exceed num_moe_experts=4"),
        (
            dict(moe_ffn_hidden_size=15),
            dict(tensor_model_parallel_size=2, sequence_parallel=True),
            "moe_ffn_hidden_size=15 is no multiple of tensor_model_parallel_size=2",
        ),
        (
            dict(moe_shared_expert_intermediate_size=7),
            dict(tensor_model_parallel_size=2, sequence_parallel=True),
            "moe_shared_expert_intermediate_size=7 is no multiple",
        ),
        (dict(moe_router_num_groups=3, moe_router_group_topk=1), {}, "moe_router_num_groups (3)"),
        (dict(moe_router_num_groups=2), {}, "must be given together"),
        (
            dict(moe_router_num_groups=4, moe_router_group_topk=1),
            {},
            "takes more than the 1 experts of each",
        ),
        (dict(moe_enable_deepep=True), {}, "deepep"),
        (dict(moe_grouped_gemm=True), {}, "moe_grouped_gemm=True needs Transformer Engine"),
        (dict(moe_layer_freq=[0, 1]), {}, "moe_layer_freq=[0, 1] must be a whole number"),
        (dict(moe_layer_freq=[0, 0, 0, 0]), {}, "with a 1 among them"),
        (dict(moe_layer_freq=[0, 1, 2, 0]), {}, "or a 1 (experts) or 0"),
        (dict(moe_aux_loss_coeff=0.01), {}, "moe_aux_loss_coeff=0.01 would be ignored"),
        (dict(moe_router_bias_update_rate=0.1), {}, "bias_update_rate=0.1 would be ignored"),
        (
            dict(moe_router_load_balancing_type="seq_aux_loss"),
            {},
            "'seq_aux_loss' would be ignored: moe_aux_loss_coeff is 0",
        ),
        (dict(fp8="hybrid"), {}, "scaling factors of a packed row differ"),
        (dict(moe_z_loss_coeff=-0.1), {}, "moe_z_loss_coeff=-0.1 must be at least 0"),
        (
            dict(moe_router_load_balancing_type=["aux_loss"], moe_aux_loss_coeff=[-0.1]),
            {},
            "moe_aux_loss_coeff=[-0.1] must be at least 0",
        ),
        (
            dict(moe_router_enable_expert_bias=True),
            {},
            "expert bias",
        ),
        (
            dict(moe_router_load_balancing_type=["aux_loss"], moe_aux_loss_coeff=[]),
            {},
            "moe_aux_loss_coeff",
        ),
        (dict(moe_layer_freq=0), {}, "a whole number from 1"),
        (
            dict(moe_layer_freq=[0, 0, 1, 1]),
            dict(pipeline_model_parallel_size=2),
            "leaves pipeline stages without experts ([0, 2] layers",
        ),
        (dict(num_moe_experts=None), dict(expert_model_parallel_size=2), "expert"),
        (
            dict(num_moe_experts=None, moe_ffn_hidden_size=None, moe_router_topk=3),
            {},
            "moe_router_topk=3 would be ignored: the model has no experts",
        ),
        (dict(moe_apply_probs_on_input=True), {}, "needs moe_router_topk=1, got 2"),
        (dict(moe_token_dispatcher_type="flex"), {}, "flex' needs expert or tensor parallelism"),
    ],
)
def test_experts_that_megatron_would_refuse(
    changes: dict[str, Any], parallel: dict[str, Any], message: str
) -> None:
    plan(EXPERTS, tensor_model_parallel_size=2, sequence_parallel=True)
    with pytest.raises(ValueError) as error:
        plan(EXPERTS | changes, **parallel)
    assert message.lower() in str(error.value).lower()


@pytest.mark.parametrize(
    ("changes", "parallel", "message"),
    [
        (dict(num_layers=5), dict(pipeline_model_parallel_size=2), "num_layers=5 is no multiple"),
        (
            dict(ffn_hidden_size=45),
            dict(tensor_model_parallel_size=2),
            "ffn_hidden_size=45 is no multiple of tensor_model_parallel_size=2",
        ),
        (
            dict(num_layers_in_first_pipeline_stage=4),
            dict(pipeline_model_parallel_size=2),
            "of model.transformer num_layers, ",
        ),
        (
            dict(num_layers_in_first_pipeline_stage=1, num_layers_in_last_pipeline_stage=1),
            dict(pipeline_model_parallel_size=2),
            "num_layers_in_first_pipeline_stage",
        ),
        (
            dict(num_layers_in_first_pipeline_stage=1),
            dict(pipeline_model_parallel_size=3),
            "num_layers_in_first_pipeline_stage",
        ),
        (
            dict(pipeline_model_parallel_layout="Ett||t|tL"),
            dict(pipeline_model_parallel_size=4),
            "pipeline stages of [2, 0, 1, 1] layers; give every chunk between",
        ),
        (
            dict(pipeline_model_parallel_layout="Et|tttL"),
            dict(pipeline_model_parallel_size=4),
            "Megatron-Core refuses the model settings",
        ),
        (dict(num_attention_heads=3), dict(tensor_model_parallel_size=2), "num_attention_heads"),
        (
            dict(num_moe_experts=4, add_bias_linear=True),
            dict(tensor_model_parallel_size=2),
            "set parallel.expert_tensor_parallel_size=1 and spread the experts by "
            "parallel.expert_model_parallel_size=2, or another size above 1",
        ),
        (
            dict(pipeline_model_parallel_layout="Et|t|t|tL"),
            dict(pipeline_model_parallel_size=2),
            "set parallel.virtual_pipeline_model_parallel_size=2, got None",
        ),
        (
            dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=3),
            {},
            "does not divide the 4 layers of a stage",
        ),
        (
            dict(
                num_layers=5,
                recompute_granularity="full",
                recompute_method="uniform",
                recompute_num_layers=1,
            ),
            dict(pipeline_model_parallel_size=2),
            "num_layers=5 is no multiple",
        ),
    ],
)
def test_stages_and_widths_that_do_not_fit(
    changes: dict[str, Any], parallel: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as error:
        plan(SIZES | changes, **parallel)
    assert message in str(error.value)


def test_windows_and_sinks() -> None:
    """A file has no pairs."""
    asked = dict(window_size=[8, 0], window_attn_skip_freq=[1, 0, 0, 1], softmax_type="learnable")
    config = plan(SIZES | asked)
    assert config.window_size == (8, 0) and config.softmax_type == "learnable"
    assert layer_windows(config) == [8, None, None, 8]
    assert layer_windows(plan(SIZES)) == [None] * 4
    for changes, message in (
        (dict(window_size=8), "window_size=8 must be a list of an integer and an integer"),
        (dict(window_size=[8]), "window_size=[8] must be a list"),
        (dict(window_size=None, window_attn_skip_freq=2), "would be ignored: no layer"),
        (dict(softmax_type="sink"), "softmax_type='sink' must be one of"),
    ):
        with pytest.raises(ValueError) as error:
            plan(SIZES | asked | changes)
        assert message in str(error.value)


def test_the_backend_must_take_every_kind_of_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(model_plan, "select_backend", lambda inputs, name: seen.append(inputs.kind))
    asked = dict(window_size=[8, 0], window_attn_skip_freq=[1, 0, 0, 1], softmax_type="off-by-one")
    model = ModelConfig(vocab_size=50, transformer=SIZES | asked)
    check_attention(plan_model(model, ParallelConfig()), "auto", torch.device("cpu"))
    assert [(kind.window, kind.has_sink) for kind in seen] == [(8, True), (None, True)]


@pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is not None or torch.cuda.is_available(),
    reason="this machine may have the kernels",
)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(gradient_accumulation_fusion=True), "gradient_accumulation_fusion=True needs Apex's"),
        (dict(moe_router_fusion=True), "moe_router_fusion needs Transformer Engine"),
        (
            dict(recompute_granularity="selective", recompute_modules=["layernorm"]),
            "recompute_modules='layernorm' needs Transformer Engine",
        ),
    ],
)
def test_kernels_that_are_not_there(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        plan(EXPERTS | changes)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "stages", "layers"),
    [
        ({}, 2, [2, 2]),
        (dict(num_layers_in_first_pipeline_stage=1), 2, [1, 3]),
        (dict(num_layers_in_last_pipeline_stage=1), 2, [3, 1]),
        (dict(pipeline_model_parallel_layout="Et|tttL"), 2, [1, 3]),
        # A stage of the loss alone.
        (dict(pipeline_model_parallel_layout="Et|ttt|L"), 3, [1, 3, 0]),
        (dict(num_layers=94, **COUNTED), 4, [23, 24, 24, 23]),
        (dict(num_layers=94, **COUNTED), 8, [11, *[12] * 6, 11]),
        (dict(num_layers=94, num_layers_in_last_pipeline_stage=10), 8, [*[12] * 7, 10]),
        (
            dict(num_layers=94, pipeline_model_parallel_layout="Et*23|(t*24|)*2t*23L"),
            *(4, [23, 24, 24, 23]),
        ),
        (
            dict(num_layers=6, **COUNTED),
            *(4, [1, 2, 2, 1]),
        ),
    ],
)
def test_layers_of_every_stage(changes: dict[str, Any], stages: int, layers: list[int]) -> None:
    config = plan(SIZES | changes, pipeline_model_parallel_size=stages)
    assert layers_per_stage(config) == layers


def test_what_is_asked_for_is_built() -> None:
    asked = EXPERTS | dict(
        layernorm_epsilon="1e-6",
        init_method_std=1,
        activation_func="silu",
        gated_linear_unit=True,
        qk_l2_norm=True,
        params_dtype="bfloat16",
        recompute_granularity="full",
        recompute_method="uniform",
        recompute_num_layers=1,
        moe_shared_expert_intermediate_size=8,
    )
    model = plan_model(ModelConfig(vocab_size=50, transformer=asked), ParallelConfig())
    config = model.config
    named = dict(
        layernorm_epsilon=1e-6,
        init_method_std=1.0,
        activation_func=torch.nn.functional.silu,
        params_dtype=torch.bfloat16,
    )
    assert {name: getattr(config, name) for name in asked} == asked | named
    assert config.bf16 and config.pipeline_dtype == torch.bfloat16


def test_a_token_s_experts_decide_what_a_row_costs() -> None:
    def per_token(transformer: dict[str, Any]) -> float:
        model = ModelConfig(vocab_size=50, transformer=transformer)
        config = TrainConfig(model=model)
        return plan_model(model, ParallelConfig()).packing(config.prefix_group).cost_model.per_token

    shared = EXPERTS | dict(moe_router_topk=2, moe_shared_expert_intermediate_size=7)
    weights = 4 * 32 * 32 + 2 * 32 * (2 * 16 + 7)
    assert per_token(shared) == 2 * 4 * weights
    assert per_token(SIZES) == 2 * 4 * (4 * 32 * 32 + 2 * 32 * 48)


@pytest.fixture
def sections(tmp_path: Path) -> dict[str, dict[str, Any]]:
    return tiny.run_sections(tmp_path)


def load(folder: Path, sections: dict[str, Any], *overrides: str) -> Any:
    return load_config(tiny.write_config(folder / "config.yaml", sections), overrides)


@pytest.mark.parametrize(
    "override",
    [
        "num_layers=1",
        "hidden_size=64",
        "normalization=LayerNorm",
        "layernorm_epsilon=1e-3",
        "qk_layernorm=true",
        "gated_linear_unit=false",
        "activation_func=gelu",
    ],
)
def test_a_folder_says_what_its_model_is(
    tmp_path: Path, sections: dict[str, Any], override: str
) -> None:
    with pytest.raises(ValueError, match="would stop this run") as error:
        dry_run(load(tmp_path, sections, f"model.transformer.{override}"), 1)
    assert f"model.transformer.{override.split('=')[0]}=" in str(error.value)
    assert "contradicts model.hf, which says" in str(error.value)
    # Also what it says by having nothing of it.
    with pytest.raises(ValueError, match="softmax_type=.* makes another model of the weights"):
        dry_run(load(tmp_path, sections, "model.transformer.softmax_type=off-by-one"), 1)
    # The same again is no contradiction.
    dry_run(load(tmp_path, sections, "model.transformer.num_layers=4"), 1)


def test_experts_under_tensor_parallelism_are_refused_before_the_run(
    tmp_path: Path, sections: dict[str, Any]
) -> None:
    sections["model"] = dict(vocab_size=tiny.VOCAB, transformer=EXPERTS)
    tp = "parallel.tensor_model_parallel_size=2"
    with pytest.raises(ValueError, match="under tensor parallelism with sequence parallelism only"):
        dry_run(load(tmp_path, sections, tp), 2)
    told = dry_run(load(tmp_path, sections, tp, "parallel.sequence_parallel=true"), 2)
    assert told.lines[0] == "2 ranks: tp 2 with sp x pp 1 (vpp 1) x dp 1"
    spread = dry_run(load(tmp_path, sections, "parallel.expert_model_parallel_size=2"), 2)
    assert spread.lines[0] == "2 ranks: tp 1 x pp 1 (vpp 1) x dp 2; experts: ep 2 x etp 1"
    # Norms with weight and bias.
    attention, router, norms, last_norm = 4 * 32 * 32, 4 * 32, 2 * 64, 64
    experts = 4 * 2 * 32 * 16
    embedding = -(-tiny.VOCAB // 2) * 32
    layer = (attention + experts) // 2 + router + norms
    assert told.parameters_per_rank == 4 * layer + last_norm + embedding


def long_group(tokens: int) -> Group:
    prompt = torch.arange(2, 10)
    response = torch.arange(tokens - len(prompt)) % (tiny.VOCAB - 2) + 2
    mask = torch.ones(len(response), dtype=torch.bool)
    samples = [
        Sample(
            prompt_ids=prompt,
            response_ids=response,
            reward=float(i),
            loss_mask=mask,
            status="completed",
        )
        for i in range(2)
    ]
    return Group("long", tuple(samples))


@pytest.mark.parametrize("tokens", [128, 129])
def test_recorded_samples_stay_within_the_model_s_positions(tmp_path: Path, tokens: int) -> None:
    sections = tiny.run_sections(tmp_path, [*tiny.make_groups(3), long_group(tokens)])
    room = "prefix_group.max_tokens_per_microbatch=512"
    if tokens == 128:
        dry_run(load(tmp_path, sections, room), 1)
        return
    with pytest.raises(ValueError, match="group 'long' has a sample of 129 tokens") as error:
        dry_run(load(tmp_path, sections, room), 1)
    assert "max_position_embeddings=128" in str(error.value)
    assert "1 of 4 groups" in str(error.value)
    dry_run(load(tmp_path, sections, room, "model.max_position_embeddings=129"), 1)


@pytest.mark.parametrize(
    ("kind", "refused"), [("rope", True), ("learned_absolute", True), ("none", False)]
)
def test_positions_of_a_model_from_scratch(tmp_path: Path, kind: str, refused: bool) -> None:
    sections = tiny.run_sections(tmp_path, [long_group(40)])
    sections["model"] = dict(
        vocab_size=tiny.VOCAB,
        transformer=SIZES,
        position_embedding_type=kind,
        max_position_embeddings=39,
    )
    config = load(tmp_path, sections, "prefix_group.max_tokens_per_microbatch=512")
    if not refused:
        dry_run(config, 1)
        return
    with pytest.raises(ValueError, match="a sample of 40 tokens.*max_position_embeddings=39"):
        dry_run(config, 1)


def test_sampled_prompts_leave_room_for_their_responses(
    tmp_path: Path, sections: dict[str, Any]
) -> None:
    pytest.importorskip("reasoning_gym")
    tiny.save_tokenizer(tmp_path / "model")
    sampled = (
        "rollout.source=model",
        "rollout.files=[]",
        "prefix_group.max_tokens_per_microbatch=512",
    )
    config = load(tmp_path, sections, *sampled, "rollout.max_response_tokens=20")
    dry_run(config, 1)
    task = open_sampling(config, 128).task
    longest = max(len(prompt.prompt_ids) for prompt in task.prompts(0, 20)) + 20
    within = open_sampling(config, longest).task
    assert len(within.prompts(0, 20)) == 20
    below = open_sampling(config, None).task
    assert len(below.held_out().prompts(0, 5)) == 5
    with pytest.raises(
        ValueError, match=r"prompt 'chain_sum/train/\d+' of \d+ tokens with rollout"
    ):
        open_sampling(config, longest - 1).task.prompts(0, 20)
    config = load(tmp_path, sections, *sampled, "rollout.max_response_tokens=128")
    with pytest.raises(ValueError, match="made for max_position_embeddings=128; leave it out"):
        dry_run(config, 1)
    dry_run(load(tmp_path, sections, *sampled, "model.max_position_embeddings=256"), 1)
