"""What a NemotronH's config.json and Megatron-LM's arguments may say."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from megatron.core.activations import squared_relu

from megatron_pg.checkpoint import (
    HfFolder,
    MegatronFolder,
    TorchDistReader,
    compare_weights,
    hf_to_megatron,
    make_megatron_args,
    megatron_to_hf,
    parse_hf_config,
    read_hf_config,
    reshard_checkpoint,
)
from megatron_pg.checkpoint.arguments import hf_model_from_args
from megatron_pg.mcore.versions import HAS_HYBRID_MODEL
from tests.checkpoint import test_sharded, tiny
from tests.checkpoint.folders import assert_same_bits, make_config, read_weights
from tests.checkpoint.tiny import FAMILIES, Layout, save_hf
from tests.hostile import refused
from tests.ranks import Pool

pytestmark = pytest.mark.megatron


def config(**changes: Any) -> dict[str, Any]:
    made = make_config("NemotronHForCausalLM") | changes
    return {key: value for key, value in made.items() if value is not None}


OF_THREE = dict(num_hidden_layers=3)


def test_layers_by_name_and_by_pattern() -> None:
    named = parse_hf_config(config(layers_block_type=["mamba", "attention", "mlp"], **OF_THREE))
    by_pattern = parse_hf_config(
        config(layers_block_type=None, hybrid_override_pattern="M*-", **OF_THREE)
    )
    assert named == by_pattern and named.gpt_model()["hybrid_layer_pattern"] == "M*-"
    assert parse_hf_config(named.config_json()) == named


def test_arguments_there_and_back() -> None:
    model = parse_hf_config(config())
    args = make_megatron_args(model)
    assert args.hybrid_layer_pattern == "M-" and not args.use_rotary_position_embeddings
    assert hf_model_from_args(args, "here") == model
    # As Megatron-LM's training writes them: of stages, by an older name, without an architecture.
    del args.hf_architecture
    args.spec = ["megatron.core.models.mamba.mamba_layer_specs", "mamba_stack_spec"]
    for pattern, older in (("M-", None), ("M|-", None), ("M-", "M-"), (None, "M|-")):
        args.hybrid_layer_pattern, args.hybrid_override_pattern = pattern, older
        assert hf_model_from_args(args, "here") == model
    args.hybrid_layer_pattern = "M-"
    with pytest.raises(NotImplementedError, match=r"hybrid_override_pattern='M\|-' \(must be None"):
        hf_model_from_args(args, "here")
    args.hybrid_override_pattern, args.norm_epsilon = None, 1e-6
    with pytest.raises(ValueError, match="norm_epsilon='1e-06', which must be 1e-05"):
        hf_model_from_args(args, "here")
    args.norm_epsilon, args.hf_architecture = 1e-5, "NemotronHForCausalLM"
    args.hybrid_layer_pattern = "MD"
    with pytest.raises(ValueError, match="hybrid_layer_pattern='MD', which must be made of"):
        hf_model_from_args(args, "here")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(layer_norm_epsilon=1e-6), "layer_norm_epsilon=1e-06 (must be 1e-05)"),
        (dict(conv_kernel=3), "conv_kernel=3 (must be 4)"),
        (dict(use_bias=True), "use_bias=True (must be False)"),
        (dict(mlp_hidden_act="silu"), "mlp_hidden_act='silu' (must be 'relu2')"),
        (dict(num_nextn_predict_layers=1), "num_nextn_predict_layers=1 (must be 0)"),
        (dict(state_of_another="x"), "unknown key state_of_another"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    with refused(message):
        parse_hf_config(config(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(layers_block_type=["mamba"]), "num_hidden_layers=2 contradicts 1 named layers"),
        (dict(layers_block_type=["mamba", "lstm"]), "name linear_attention, mamba"),
        (dict(hybrid_override_pattern="MM"), "contradicts layers_block_type"),
        (dict(n_groups=3), "mamba_num_heads=4 is no multiple of n_groups=3"),
    ],
)
def test_contradictions(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        parse_hf_config(config(**changes))
    assert message in str(error.value)


EXPERTS = dict(
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=4,
    n_shared_experts=1,
    moe_shared_expert_intermediate_size=6,
    n_group=1,
    topk_group=1,
    routed_scaling_factor=2.5,
    norm_topk_prob=True,
)


def with_experts(**changes: Any) -> dict[str, Any]:
    layers = dict(layers_block_type=["mamba", "moe", "mlp"], num_hidden_layers=3)
    return config(**layers | EXPERTS | changes)


def test_layers_with_experts() -> None:
    model = parse_hf_config(with_experts(routed_scaling_factor=1))
    assert [model.has_experts(layer) for layer in range(3)] == [False, True, False]
    said = model.transformer_config()
    assert said["moe_layer_freq"] == [0, 1, 0] and said["num_moe_experts"] == 4
    assert not said["gated_linear_unit"] and said["activation_func"] is squared_relu
    assert said["moe_router_bias_update_rate"] == 0 and said["moe_router_dtype"] == "fp32"
    assert parse_hf_config(model.config_json()) == model
    by_pattern = with_experts(layers_block_type=None, hybrid_override_pattern="ME-")
    assert parse_hf_config(by_pattern | dict(routed_scaling_factor=1)) == model
    # Experts that no layer has are none.
    plain = parse_hf_config(with_experts(layers_block_type=["mamba", "attention", "mlp"]))
    assert plain.num_experts is None and "num_moe_experts" not in plain.transformer_config()


def test_what_is_made_of_arguments_names_layers_as_all_readers_do() -> None:
    """Names of layers differ between versions of transformers, and engines read a pattern alone."""
    transformers = pytest.importorskip("transformers")
    model = parse_hf_config(with_experts(layers_block_type=["linear_attention", "moe", "mlp"]))
    said = model.config_json()
    assert said["hybrid_override_pattern"] == "ME-" and said["num_hidden_layers"] == 3
    assert "layers_block_type" not in said
    read = transformers.AutoConfig.for_model(**said)
    kinds = {"mamba": "linear_attention"}
    assert [kinds.get(name, name) for name in read.layers_block_type] == [
        *("linear_attention", "moe", "mlp")
    ]


def test_arguments_with_experts_there_and_back() -> None:
    model = parse_hf_config(with_experts())
    args = make_megatron_args(model)
    assert args.hybrid_layer_pattern == "ME-" and args.num_experts == 4
    assert hf_model_from_args(args, "here") == model
    # As Megatron-LM's training writes them: the pattern alone says where experts are.
    args.moe_layer_freq = 1
    del args.hf_architecture
    assert hf_model_from_args(args, "here") == model
    for name, value, message in (
        ("moe_layer_freq", [1, 0, 0], r"moe_layer_freq=\[1, 0, 0\] \(must be \[0, 1, 0\]\)"),
        ("moe_router_score_function", "softmax", "moe_router_score_function='softmax'"),
        ("moe_latent_size", 4, "moe_latent_size=4"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            hf_model_from_args(Namespace(**vars(args) | {name: value}), "here")
    args.moe_router_num_groups, args.moe_router_group_topk = 3, 1
    with pytest.raises(ValueError, match="moe_router_num_groups=3 and .* for 2 experts of 4"):
        hf_model_from_args(args, "here")
    args.moe_shared_expert_intermediate_size = None
    with pytest.raises(ValueError, match="no moe_shared_expert_intermediate_size"):
        hf_model_from_args(args, "here")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(moe_latent_size=4), "moe_latent_size=4 (Megatron-Core has experts behind a latent"),
        (dict(n_shared_experts=2), "n_shared_experts=2 (must be 1)"),
        (dict(norm_topk_prob=False), "norm_topk_prob=False (must be True)"),
        (dict(num_experts_per_tok=1), "num_experts_per_tok=1 with weights that add up to one"),
        (dict(n_group=2, num_experts_per_tok=1), "topk_group=1 with num_experts_per_tok=1"),
        (dict(num_nextn_predict_layers=1), "num_nextn_predict_layers=1 (must be 0)"),
    ],
)
def test_refusals_of_experts(changes: dict[str, Any], message: str) -> None:
    with refused(message):
        parse_hf_config(with_experts(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(n_routed_experts=None), "key 'n_routed_experts' is missing"),
        (dict(moe_shared_expert_intermediate_size=None), "intermediate_size' is missing"),
        (dict(num_experts_per_tok=5), "num_experts_per_tok=5 must be a whole number from 1 to 4"),
        (dict(n_group=3), "n_group=3 groups of at least 2 of 4 experts"),
    ],
)
def test_contradictions_of_experts(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        parse_hf_config(with_experts(**changes))
    assert message in str(error.value)


def test_checkpoints_with_experts_are_laid_out_anew(tmp_path: Path) -> None:
    """There, onto other ranks, and back bit by bit; described by arguments alone at the end."""
    hf, there, other = (tmp_path / name for name in ("hf", "there", "other"))
    save_hf(FAMILIES["nemotron_h_moe"], hf, num_layers=4)
    hf_to_megatron(hf, there, tp_size=2)
    reshard_checkpoint(there, other, tp_size=1, pp_size=2, ep_size=2, etp_size=1)
    assert not list(compare_weights(HfFolder(hf), MegatronFolder(other)))
    (other / "huggingface/config.json").unlink()
    megatron_to_hf(other, tmp_path / "back")
    assert_same_bits(read_weights(tmp_path / "back"), read_weights(hf))
    with pytest.raises(ValueError, match="num_moe_experts=8 is no multiple"):
        reshard_checkpoint(there, tmp_path / "none", tp_size=1, pp_size=1, ep_size=3)


def keys_of_experts(folder: Path) -> tuple[set[str], set[str]]:
    """Of a layer with experts: as the stock model saves it, and as it was converted."""
    with tiny.on_layout(Layout()):
        (chunk,) = tiny.build(read_hf_config(folder / "hf"), Layout(), packed=False)
        stock = {part.key for part in chunk.sharded_state_dict().values()}
    converted = TorchDistReader(MegatronFolder(folder / "megatron").path).tensors
    stock, own = ({key for key in of if ".layers.1." in key} for of in (stock, set(converted)))
    return stock, own


def test_keys_of_experts_are_those_of_the_stock_model(ranks: Pool, tmp_path: Path) -> None:
    if not HAS_HYBRID_MODEL:
        pytest.skip("HybridModel came with megatron-core 0.18")
    save_hf(FAMILIES["nemotron_h_moe"], tmp_path / "hf", num_layers=2)
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    ((stock, own),) = ranks.run(1, keys_of_experts, tmp_path)
    assert own == {key for key in stock if not key.endswith("_extra_state")} and len(own) == 7


HYBRIDS = [name for name, family in FAMILIES.items() if family.is_hybrid]
CASES = [(what, Layout(tp=2, pp=2, sp=True), HYBRIDS) for what in test_sharded.WHAT]
CASES += [
    (what, Layout(tp=2, ep=4, etp=1, sp=True), ["nemotron_h_moe"]) for what in test_sharded.WHAT
]


@pytest.mark.parametrize(
    ("what", "layout", "names"),
    CASES,
    ids=lambda value: None if isinstance(value, list) else str(value),
)
def test_what_is_shown_of_every_family(
    ranks: Pool, models: Path, what: str, layout: Layout, names: list[str]
) -> None:
    """Where there is a HybridModel: other families are shown by older Megatron-Cores, too."""
    if not HAS_HYBRID_MODEL:
        pytest.skip("HybridModel came with megatron-core 0.18")
    case = what, models, layout, names
    counts = ranks.run(test_sharded.NUM_RANKS, test_sharded.check, *case, timeout=300)
    for name in names:
        compared = sum(count[name] > 0 for count in counts)
        assert compared == (4 // layout.pp if what == "logits" else 1), name
