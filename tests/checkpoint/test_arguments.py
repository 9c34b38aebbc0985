"""A checkpoint's ``args`` are read whole: what is set in them is known, or refused by name."""

from __future__ import annotations

import copy
import json
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_pg.checkpoint import (
    FAMILIES,
    HfModel,
    MegatronFolder,
    hf_model_from_args,
    make_megatron_args,
    megatron_to_hf,
    open_weights,
    reshard_checkpoint,
)
from megatron_pg.checkpoint.arguments import check_args
from megatron_pg.checkpoint.description import Window, Yarn
from megatron_pg.parallel import ParallelSizes, PipelineSplit

pytestmark = pytest.mark.megatron

# Of ``pretrain_gpt.py`` from 0.16 to 0.20: every argument that is neither off nor unset.
DEFAULTS = json.loads(Path(__file__).with_name("megatron_lm_defaults.json").read_text())
# What its users must set for such a model.
LLAMA = dict(
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    group_query_attention=True,
    num_query_groups=2,
    kv_channels=8,
    max_position_embeddings=128,
    seq_length=128,
    vocab_size=100,
    padded_vocab_size=128,
    norm_epsilon=1e-5,
    position_embedding_type="rope",
    normalization="RMSNorm",
    swiglu=True,
    add_bias_linear=False,
    untie_embeddings_and_output_weights=True,
    params_dtype=torch.bfloat16,
    hidden_dropout=0.1,
    attention_dropout=0.1,
)
EXPERTS = dict(
    num_experts=4,
    moe_router_topk=2,
    moe_ffn_hidden_size=16,
    qk_layernorm=True,
    moe_layer_freq=[1, 1, 1, 1],
    moe_aux_loss_coeff=1e-2,
    moe_z_loss_coeff=1e-3,
    moe_router_load_balancing_type="aux_loss",
)


def stock(**changes: Any) -> Namespace:
    return Namespace(**DEFAULTS | LLAMA | changes)


def a_model(architecture: str = "LlamaForCausalLM", **changes: Any) -> HfModel:
    sizes = dict(
        num_layers=4,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=8,
        layernorm_epsilon=1e-5,
        vocab_size=100,
        max_sequence_length=128,
    )
    return FAMILIES[architecture](**sizes | changes)


BIASED = dict(
    moe_layer_freq=(0, 1, 1, 1),
    moe_shared_expert_intermediate_size=32,
    moe_router_topk_scaling_factor=2.5,
)
LATENT = dict(
    num_query_groups=4,
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_head_dim=8,
    qk_pos_emb_head_dim=4,
    v_head_dim=12,
    layernorm_epsilon=1e-6,
)
# And latents whose norms are not those of layers.
NO_QUERY_LATENT = dict(q_lora_rank=None, layernorm_epsilon=1e-5)
LINEAR = dict(
    linear_attention=(1, 1, 0, 1),
    linear_conv_kernel_dim=3,
    linear_key_head_dim=6,
    linear_value_head_dim=10,
    linear_num_key_heads=2,
    linear_num_value_heads=6,
    rotary_percent=0.25,
)
A_FEW = dict(num_experts=4, moe_router_topk=2, moe_ffn_hidden_size=16)
MODELS = {
    "llama": a_model(),
    "tied": a_model(tied=True, num_query_groups=4),
    "bias": a_model(add_bias_linear=True),
    "llama3": a_model(rope_type="llama3", rope_factor=8.0, rotary_base=5e5),
    "linear": a_model(rope_type="linear", rope_factor=4.0),
    "dynamic": a_model(rope_type="dynamic", rope_factor=2.0),
    "yarn": a_model(
        rope_type="yarn",
        rope_factor=8.0,
        yarn=Yarn(
            original_max_position_embeddings=16,
            beta_fast=8.0,
            mscale=0.7,
            mscale_all_dim=1.5,
            truncate=False,
        ),
    ),
    "mistral": a_model(architecture="MistralForCausalLM", kv_channels=12),
    "mistral with windows": a_model(
        architecture="MistralForCausalLM", window=Window(size=5, layers=(1, 1, 1, 1))
    ),
    "smollm3": a_model(
        architecture="SmolLM3ForCausalLM",
        no_rope_freq=(0, 0, 1, 0),
        window=Window(size=8, layers=(0, 0, 1, 0)),
    ),
    "smollm3 with all": a_model(architecture="SmolLM3ForCausalLM", no_rope_freq=(0, 0, 0, 0)),
    "gemma3": a_model(
        architecture="Gemma3ForCausalLM",
        query_pre_attn_scalar=168,
        window_rotary_base=2e4,
        rotary_base=1e6,
        window=Window(size=8, layers=(1, 1, 1, 0)),
    ),
    "olmo3": a_model(
        architecture="Olmo3ForCausalLM",
        window_rotary_base=2e4,
        window=Window(size=8, layers=(1, 1, 1, 0)),
        rope_type="yarn",
        rope_factor=8.0,
        yarn=Yarn(original_max_position_embeddings=16),
    ),
    "gpt_oss": a_model(
        architecture="GptOssForCausalLM",
        add_bias_linear=True,
        num_experts=4,
        moe_router_topk=2,
        moe_ffn_hidden_size=48,
        swiglu_limit=5.5,
        window=Window(size=8, layers=(1, 0, 1, 0)),
        rope_type="yarn",
        rope_factor=32.0,
        yarn=Yarn(original_max_position_embeddings=16, truncate=False),
    ),
    "qwen2 with windows": a_model(
        architecture="Qwen2ForCausalLM", window=Window(size=1, layers=(0, 1, 1, 1))
    ),
    "qwen2": a_model(architecture="Qwen2ForCausalLM", rotary_base=1e6),
    "qwen3": a_model(architecture="Qwen3ForCausalLM"),
    "qwen3_moe": a_model("Qwen3MoeForCausalLM", **A_FEW, norm_topk_prob=False),
    "qwen3_moe_mixed": a_model("Qwen3MoeForCausalLM", **A_FEW, moe_layer_freq=(0, 1, 0, 1)),
    "qwen2_moe": a_model(
        "Qwen2MoeForCausalLM", **A_FEW, moe_shared_expert_intermediate_size=24, norm_topk_prob=False
    ),
    "qwen3_next": a_model(
        "Qwen3NextForCausalLM",
        **A_FEW | LINEAR,
        moe_layer_freq=(0, 1, 1, 1),
        moe_shared_expert_intermediate_size=24,
    ),
    "qwen3_5": a_model("Qwen3_5ForCausalLM", **LINEAR),
    "qwen3_5_moe": a_model(
        "Qwen3_5MoeForCausalLM",
        **A_FEW | LINEAR | dict(ffn_hidden_size=16),
        moe_shared_expert_intermediate_size=24,
    ),
    "glm4_moe": a_model(
        "Glm4MoeForCausalLM", **A_FEW | BIASED, use_qk_norm=True, rotary_percent=0.5
    ),
    "glm4_moe bias": a_model(
        "Glm4MoeForCausalLM", **A_FEW | BIASED, attention_bias=True, rotary_percent=0.25
    ),
    "deepseek_v3": a_model(
        "DeepseekV3ForCausalLM",
        **A_FEW | BIASED | LATENT,
        rope_type="yarn",
        rope_factor=4.0,
        yarn=Yarn(original_max_position_embeddings=32, mscale=0.7, mscale_all_dim=0.9),
        moe_router_num_groups=2,
        moe_router_group_topk=1,
    ),
    "moonlight": a_model("DeepseekV3ForCausalLM", **A_FEW | BIASED | LATENT | NO_QUERY_LATENT),
    "mixtral": a_model("MixtralForCausalLM", **A_FEW | dict(moe_ffn_hidden_size=48)),
}


@pytest.mark.parametrize("name", MODELS)
def test_arguments_that_are_written_are_read(name: str) -> None:
    model = MODELS[name]
    args = make_megatron_args(model, ParallelSizes(tp=2, pp=2))
    assert hf_model_from_args(args, "here") == model
    check_args(args, model, "here")


@pytest.mark.parametrize("stages", [4, 8])
def test_94_layers_on_stages_that_do_not_divide_them(stages: int) -> None:
    model, sizes = a_model(num_layers=94), ParallelSizes(pp=stages)
    with pytest.raises(ValueError, match=f"num_layers=94 is no multiple of .*={stages}"):
        make_megatron_args(model, sizes)
    counted = PipelineSplit(
        account_for_embedding_in_pipeline_split=True, account_for_loss_in_pipeline_split=True
    )
    args = make_megatron_args(model, sizes, counted)
    assert args.num_layers == 94 and args.account_for_loss_in_pipeline_split
    last = {4: 22, 8: 10}[stages]
    split = PipelineSplit(num_layers_in_last_pipeline_stage=last)
    assert make_megatron_args(model, sizes, split).decoder_last_pipeline_num_layers == last
    with pytest.raises(ValueError, match="num_layers_in_last_pipeline_stage"):
        make_megatron_args(model, sizes, PipelineSplit(num_layers_in_last_pipeline_stage=20))


@pytest.mark.parametrize("name", MODELS)
def test_a_family_is_known_by_its_layers(name: str) -> None:
    """Where no architecture is named; without what is their own, some are Llama's."""
    model = MODELS[name]
    args = make_megatron_args(model)
    del args.hf_architecture
    if name in ("gemma3", "olmo3"):
        # No argument of Megatron-LM names their norms or the scale of embeddings.
        with pytest.raises((ValueError, NotImplementedError), match="hf_|swiglu=False"):
            hf_model_from_args(args, "here")
        return
    if name in ("qwen3_next", "qwen3_5_moe"):
        # They differ in the names of their tensors.
        both = "Qwen3_5MoeForCausalLM or Qwen3NextForCausalLM; give the model's configuration"
        with pytest.raises(ValueError, match=both):
            hf_model_from_args(args, "here")
        return
    found = hf_model_from_args(args, "here")
    if name in ("mistral", "smollm3 with all"):
        assert found.architecture == "LlamaForCausalLM"
    else:
        assert found == model


@pytest.mark.parametrize(
    ("said", "read"),
    [
        (1, None),
        (2, (1, 0, 1, 0)),
        ([1, 1, 1, 1], None),
        ([0, 1, 1, 1], (0, 1, 1, 1)),
        *((wrong, "refused") for wrong in ([1, 1, 1], [0] * 4, [1, 2, 1, 1], 0, True, "1", 2.0)),
    ],
)
def test_layers_with_experts(said: Any, read: Any) -> None:
    """Megatron-LM's pattern; layers of one MLP need its width, others do not."""
    args = stock(**EXPERTS | dict(moe_layer_freq=said))
    if read == "refused":
        with pytest.raises(ValueError, match="here: args have moe_layer_freq="):
            hf_model_from_args(args, "here")
        return
    model = hf_model_from_args(args, "here")
    assert model.moe_layer_freq == read
    assert make_megatron_args(model).moe_layer_freq == (list(read) if read else 1)
    for other in ([0, 0, 0, 1], 4):
        with pytest.raises(ValueError, match="contradict .*moe_layer_freq="):
            check_args(stock(**EXPERTS | dict(moe_layer_freq=other)), model, "here")
    args.ffn_hidden_size = 50
    if read is None:
        check_args(args, model, "here")
    else:
        with pytest.raises(ValueError, match="ffn_hidden_size=50"):
            check_args(args, model, "here")


@pytest.mark.parametrize("changes", [{}, EXPERTS, dict(qk_layernorm=True), dict(add_qkv_bias=True)])
def test_megatron_lm_s_own_arguments_are_read(changes: dict[str, Any]) -> None:
    assert len(DEFAULTS) > 200
    model = hf_model_from_args(stock(**changes), "here")
    assert (model.num_query_groups, model.num_experts) == (2, changes.get("num_experts"))
    assert model.qk_layernorm == changes.get("qk_layernorm", False)
    assert model.add_qkv_bias == changes.get("add_qkv_bias", False)


@pytest.mark.parametrize(
    ("changes", "architecture", "window", "no_rope"),
    [
        (dict(window_size=(7, 0)), "MistralForCausalLM", (8, (1, 1, 1, 1)), None),
        (dict(window_attn_skip_freq=2), "LlamaForCausalLM", None, None),
        (dict(window_size=[7, 0], add_qkv_bias=True), "Qwen2ForCausalLM", (8, (1, 1, 1, 1)), None),
        (
            dict(window_size=(0, 0), window_attn_skip_freq=3, qk_layernorm=True),
            "Qwen3ForCausalLM",
            (1, (1, 1, 0, 1)),
            None,
        ),
        (dict(no_rope_freq=4), "SmolLM3ForCausalLM", None, (0, 0, 0, 1)),
        (dict(no_rope_freq=[1, 0, 0, 0]), "SmolLM3ForCausalLM", None, (1, 0, 0, 0)),
    ],
)
def test_patterns_over_layers(
    changes: dict[str, Any], architecture: str, window: Any, no_rope: Any
) -> None:
    model = hf_model_from_args(stock(**changes), "here")
    assert model.architecture == architecture
    assert model.window == (window and Window(size=window[0], layers=window[1]))
    assert getattr(model, "no_rope_freq", None) == no_rope


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("window_size", (128, 4)),
        ("window_size", (128, -1)),
        ("window_size", (-1, 0)),
        ("window_size", 128),
        ("window_size", (8.0, 0)),
        ("window_attn_skip_freq", [1, 0]),
        ("window_attn_skip_freq", [1, 0, 2, 1]),
        ("window_attn_skip_freq", -2),
        ("no_rope_freq", [0, 1]),
        ("no_rope_freq", "every other"),
    ],
)
def test_patterns_that_are_none(name: str, value: Any) -> None:
    args = stock(**dict(window_size=(7, 0), add_qkv_bias=True) | {name: value})
    if name == "no_rope_freq":
        args = stock(no_rope_freq=value)
    with pytest.raises(ValueError, match=f"^here: args have {name}=.*hf_config"):
        hf_model_from_args(args, "here")


# Each changes what the same weights compute, or which weights there are.
CHANGING: list[tuple[str, Any]] = [
    ("softmax_type", "learnable"),
    ("qk_clip", True),
    ("attention_output_gate", True),
    ("multi_latent_attention", True),
    ("mtp_num_layers", 1),
    ("is_hybrid_model", True),
    ("hybrid_override_pattern", "M-M*"),
    ("hybrid_layer_pattern", "M-M*"),
    ("hybrid_attention_ratio", 0.25),
    ("heterogeneous_layers_config_path", "layers.json"),
    ("heterogeneous_layers_config_encoded_json", "{}"),
    ("apply_residual_connection_post_layernorm", True),
    ("apply_layernorm_1p", True),
    ("layernorm_zero_centered_gamma", True),
    ("normalization", "LayerNorm"),
    ("position_embedding_type", "learned_absolute"),
    ("position_embedding_type", "mrope"),
    ("rotary_percent", 0.5),
    ("rotary_interleaved", True),
    ("swiglu", False),
    ("squared_relu", True),
    ("quick_geglu", True),
    ("glu_linear_offset", 1.0),
    ("activation_func_clamp_value", 7.0),
    ("qk_l2_norm", True),
    ("softmax_scale", 0.5),
    ("mrope_section", [4, 2, 2]),
    ("experimental_attention_variant", "dsa"),
    ("use_mup", True),
    ("use_legacy_models", True),
    ("enable_mhc_connections", True),
    ("retro_add_retriever", True),
    ("spec", ["some.package", "its_layers"]),
    ("yaml_cfg", "model.yaml"),
    ("of_a_framework", "something"),
    ("of_tomorrow", 3),
    ("of_tomorrow", [0.5]),
]
CHANGING_EXPERTS: list[tuple[str, Any]] = [
    ("moe_router_score_function", "sigmoid"),
    ("moe_router_topk_scaling_factor", 2.5),
    ("moe_router_enable_expert_bias", True),
    ("moe_router_num_groups", 2),
    ("moe_router_group_topk", 1),
    ("moe_router_load_balancing_type", "sinkhorn"),
    ("moe_router_load_balancing_type", "quantile_balancing"),
    ("moe_shared_expert_intermediate_size", 16),
    ("moe_latent_size", 8),
    ("moe_apply_probs_on_input", True),
    ("moe_expert_capacity_factor", 1.0),
    ("qk_layernorm", False),
]
ALL_CHANGING = [({}, *case) for case in CHANGING] + [(EXPERTS, *c) for c in CHANGING_EXPERTS]
# Each is another family's.
OTHERS = [
    ({}, "window_size", (128, 0)),
    ({}, "no_rope_freq", [0, 1, 0, 1]),
    ({}, "no_rope_freq", 2),
    ({}, "position_embedding_type", "yarn"),
    (dict(window_size=(7, 0), add_qkv_bias=True), "window_size", (8, 0)),
    (dict(window_size=(7, 0), add_qkv_bias=True), "window_attn_skip_freq", 2),
    (dict(window_size=(7, 0), add_qkv_bias=True), "window_attn_skip_freq", [0, 1, 1, 1]),
]


@pytest.mark.parametrize(("base", "name", "value"), ALL_CHANGING)
def test_an_argument_that_changes_the_model_is_refused_by_name(
    base: dict[str, Any], name: str, value: Any
) -> None:
    hf_model_from_args(stock(**base), "here")
    with pytest.raises(NotImplementedError) as error:
        hf_model_from_args(stock(**base | {name: value}), "here")
    message = str(error.value)
    assert message.startswith("here: ") and f"{name}={value!r} (" in message
    assert "give the model's configuration by hf_config=DIR" in message


# A framework's own, and where a model is described elsewhere, say nothing against a config.json.
_SILENT = {"spec", "yaml_cfg", "of_a_framework", "of_tomorrow"}


@pytest.mark.parametrize(("base", "name", "value"), ALL_CHANGING + OTHERS)
def test_a_configuration_that_is_given_must_not_contradict(
    base: dict[str, Any], name: str, value: Any
) -> None:
    model = hf_model_from_args(stock(**base), "here")
    args = stock(**base | {name: value})
    if name in _SILENT:
        check_args(args, model, "here")
        return
    with pytest.raises(ValueError) as error:
        check_args(args, model, "here")
    number = {"no_rope_freq": [0, 1, 0, 1], "window_attn_skip_freq": [1, 0, 1, 0]}
    value = number.get(name, value) if value == 2 else value
    assert f"{name}={value!r} (" in str(error.value)
    assert "Give the config.json of the model that was trained" in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_layers", 2),
        ("hidden_size", 64),
        ("ffn_hidden_size", 64),
        ("num_attention_heads", 2),
        ("num_query_groups", 1),
        ("group_query_attention", False),
        ("kv_channels", 16),
        ("norm_epsilon", 1e-6),
        ("rotary_base", 500000),
        ("use_rope_scaling", True),
        ("rotary_seq_len_interpolation_factor", 4),
        ("untie_embeddings_and_output_weights", False),
        ("add_bias_linear", True),
        ("add_qkv_bias", True),
        ("qk_layernorm", True),
        ("num_experts", 4),
    ],
)
def test_every_size_must_agree_with_the_configuration(name: str, value: Any) -> None:
    model = hf_model_from_args(stock(), "here")
    check_args(stock(), model, "here")
    with pytest.raises(ValueError, match="contradict the configuration") as error:
        check_args(stock(**{name: value}), model, "here")
    assert f"{name.removeprefix('group_')}={value!r} (must be" in str(error.value) or (
        name == "group_query_attention" and "num_query_groups=4 (must be 2)" in str(error.value)
    )


def test_what_is_off_or_trains_the_model_passes() -> None:
    off = dict(of_tomorrow=None, of_a_framework=False, its_list=[], its_name="", its_map={})
    run = dict(fp8="hybrid", cuda_graph_impl="local", tp_comm_overlap=True, context_parallel_size=8)
    run |= dict(recompute_granularity="full", overlap_grad_reduce=True, lr=1e-4, seed=3, save="x")
    ours = dict(spec=["megatron_pg.mcore.te_specs", "prefix_grouped_layer_spec"])
    model = hf_model_from_args(stock(**off, **run, **ours), "here")
    assert model == hf_model_from_args(stock(), "here")
    dense = dict(moe_router_score_function="sigmoid", moe_layer_freq=[0, 1], moe_router_topk=8)
    assert hf_model_from_args(stock(**dense), "here") == model


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_layers", "four"),
        ("num_layers", 4.0),
        ("num_layers", True),
        ("hidden_size", 0),
        ("num_attention_heads", -4),
        ("num_query_groups", 3),
        ("norm_epsilon", float("nan")),
        ("rotary_base", -1e4),
        ("rotary_base", float("inf")),
        ("params_dtype", "bfloat16"),
        ("params_dtype", torch.int8),
        ("hf_architecture", "GPT2LMHeadModel"),
        ("hf_architecture", ["LlamaForCausalLM"]),
        ("max_position_embeddings", 12.5),
    ],
)
def test_values_of_another_kind_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^here: args have .*{name}=.*hf_config"):
        hf_model_from_args(stock(**{name: value}), "here")


@pytest.mark.parametrize("name", ["num_layers", "hidden_size", "ffn_hidden_size"])
def test_missing_arguments_are_named(name: str) -> None:
    args = stock()
    delattr(args, name)
    with pytest.raises(ValueError, match=r"^here: args have no \w+; give the model's config"):
        hf_model_from_args(args, "here")


def test_args_that_are_none() -> None:
    for args in ({"num_layers": 4}, None, [1]):
        with pytest.raises(ValueError, match="not a Namespace"):
            hf_model_from_args(args, "here")  # type: ignore[arg-type]


def test_all_problems_are_in_one_error() -> None:
    with pytest.raises(NotImplementedError) as error:
        hf_model_from_args(stock(squared_relu=True, qk_clip=True, of_tomorrow=1), "here")
    assert all(name in str(error.value) for name in ("squared_relu", "qk_clip", "of_tomorrow"))
    before = copy.deepcopy(vars(stock()))
    hf_model_from_args(stock(), "here")
    assert vars(stock()) == before


@pytest.mark.parametrize("with_configuration", [False, True])
def test_whatever_opens_a_checkpoint_reads_its_args(
    models: Path, tmp_path: Path, with_configuration: bool
) -> None:
    """Conversion, reshard, verification and training."""
    path = tmp_path / "in"
    shutil.copytree(models / "qwen3_moe-megatron", path)
    if not with_configuration:
        shutil.rmtree(path / "huggingface")
    actions = (
        MegatronFolder,
        open_weights,
        lambda p: megatron_to_hf(p, tmp_path / "hf", dry_run=True),
        lambda p: reshard_checkpoint(p, tmp_path / "resharded", tp_size=1, pp_size=1, dry_run=True),
    )
    for action in actions:
        action(path)
    common = torch.load(path / "release/common.pt", weights_only=True)
    common["args"].moe_router_score_function = "sigmoid"
    torch.save(common, path / "release/common.pt")
    (path / "release/manifest.json").unlink()
    for action in actions:
        with pytest.raises((ValueError, NotImplementedError)) as error:
            action(path)
        assert "moe_router_score_function='sigmoid' (must be 'softmax')" in str(error.value)
        assert str(path / "release") in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
