"""Every tensor of a source is consumed or named in a refusal: in files, by every way out."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_pg.checkpoint import (
    HfFolder,
    MegatronFolder,
    compare_logits,
    compare_weights,
    export_hf,
    hf_to_megatron,
    load_weights,
    make_megatron_args,
    megatron_to_hf,
    open_weights,
    parse_hf_config,
    reshard_checkpoint,
)
from megatron_pg.checkpoint.one_rank import build_gpt, one_rank
from megatron_pg.checkpoint.table import WeightTable, make_shard
from megatron_pg.parallel import ParallelSizes
from tests.checkpoint.folders import (
    assert_same_bits,
    make_config,
    make_weights,
    read_weights,
    write_folder,
)
from tests.hostile import refused

pytestmark = pytest.mark.megatron

# What Megatron's model has that no supported architecture has, and the tensor that would be lost.
BEYOND: dict[str, tuple[str, dict[str, Any], str]] = {
    "biases beside norms": (
        "Qwen3ForCausalLM",
        dict(add_qkv_bias=True),
        "decoder.layers.self_attention.linear_qkv.bias",
    ),
    "shared experts": (
        "Qwen3MoeForCausalLM",
        dict(moe_shared_expert_intermediate_size=4),
        "decoder.layers.mlp.shared_experts.linear_fc1.weight",
    ),
    "expert bias": (
        "Qwen3MoeForCausalLM",
        dict(moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True),
        "decoder.layers.mlp.router.expert_bias",
    ),
}


def build_beyond(case: str) -> tuple[Any, Any]:
    """Megatron's own model, and the nearest that the table describes."""
    architecture, extra, _ = BEYOND[case]
    model = parse_hf_config(make_config(architecture))
    config = TransformerConfig(
        **model.transformer_config() | extra, use_cpu_initialization=True, params_dtype=torch.float
    )
    block = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    return GPTModel(config, block, **model.gpt_model()), model


@pytest.fixture(scope="module")
def beyond(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints as Megatron-Core saves them, described by arguments alone."""
    root = tmp_path_factory.mktemp("beyond")
    for case, (architecture, _, _) in BEYOND.items():
        with one_rank():
            gpt_model, model = build_beyond(case)
            args = make_megatron_args(model, make_vocab_size_divisible_by=1)
            state = {"model": gpt_model.sharded_state_dict(), "args": args, "iteration": 3}
            folder = root / case / "iter_0000003"
            folder.mkdir(parents=True)
            dist_checkpointing.save(state, str(folder))
            (root / case / "latest_checkpointed_iteration.txt").write_text("3")
        config = make_config(architecture)
        write_folder(root / f"{case} hf", config, make_weights(config))
    return root


def pretrained(checkpoint: Path, out: Path) -> None:
    """As the recipe's ``pretrained_checkpoint``."""
    with one_rank() as device:
        source = open_weights(checkpoint)
        load_weights([build_gpt(source.model, torch.float32, device)], source)


WAYS: dict[str, Callable[[Path, Path], Any]] = {
    "megatron_to_hf": megatron_to_hf,
    "dry run": lambda checkpoint, out: megatron_to_hf(checkpoint, out, dry_run=True),
    "reshard": lambda checkpoint, out: reshard_checkpoint(checkpoint, out, tp_size=1, pp_size=2),
    "pretrained": pretrained,
    "verify": lambda checkpoint, out: list(
        compare_weights(
            open_weights(checkpoint), open_weights(checkpoint.with_name(f"{checkpoint.name} hf"))
        )
    ),
    "logits": lambda checkpoint, out: compare_logits(
        open_weights(checkpoint.with_name(f"{checkpoint.name} hf")), open_weights(checkpoint)
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", BEYOND)
def test_model_beyond_the_table(case: str, way: str, beyond: Path, tmp_path: Path) -> None:
    with refused(str(beyond / case), BEYOND[case][2], "hf_config="):
        WAYS[way](beyond / case, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("case", BEYOND)
def test_running_model_beyond_the_table(case: str, tmp_path: Path) -> None:
    """Not loaded in part and not exported in part; buffers count as parameters do."""
    config = make_config(BEYOND[case][0])
    write_folder(tmp_path / "hf", config, make_weights(config))
    with one_rank():
        gpt_model, _ = build_beyond(case)
        # Only the tensors tell them apart.
        for key in BEYOND[case][1]:
            setattr(gpt_model.config, key, getattr(TransformerConfig, key))
        before = [parameter.clone() for parameter in gpt_model.parameters()]
        lost = BEYOND[case][2].replace("layers.", "layers.0.")
        with refused(str(tmp_path / "hf"), lost):
            load_weights([gpt_model], HfFolder(tmp_path / "hf"))
        assert all(torch.equal(a, b) for a, b in zip(before, gpt_model.parameters(), strict=True))
        with refused(str(tmp_path / "hf"), lost):
            export_hf([gpt_model], tmp_path / "out", tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


# Legacy: rank (tp, pp) -> content of its file.
Ranks = dict[tuple[int, int], dict[str, Any]]
NORM = "decoder.layers.0.input_layernorm.weight"


def legacy_ranks(hf: Path, tp_size: int = 2, pp_size: int = 2, chunks: int = 1) -> Ranks:
    """As Megatron-LM's --ckpt-format torch cuts a model of ``pp_size * chunks`` equal parts."""
    source = HfFolder(hf)
    table = source.model.weight_table(source.model.padded_vocab_size(tp_size, 8))
    args = make_megatron_args(
        source.model, ParallelSizes(tp=tp_size), make_vocab_size_divisible_by=8
    )
    layers = source.model.num_layers // (pp_size * chunks)
    ranks: Ranks = {}
    for tp in range(tp_size):
        for pp in range(pp_size):
            ranks[tp, pp] = dict(args=args, checkpoint_version=3.0, iteration=5)
            for chunk in range(chunks):
                part = chunk * pp_size + pp
                key = f"model{chunk}" if chunks > 1 else "model"
                ranks[tp, pp][key] = {
                    local: make_shard(table.shard(name, tp, tp_size), source.read, dtype, name)
                    for name, local in _of_part(table, part, layers, pp_size * chunks)
                    for dtype in [source.dtypes[table.shard(name).pieces[0].name]]
                }
    return ranks


def _of_part(table: WeightTable, part: int, layers: int, count: int) -> Iterator[tuple[str, str]]:
    """Name over the whole model, and within its part."""
    for name in table.megatron_names():
        if name.startswith("decoder.layers."):
            _, _, layer, leaf = name.split(".", 3)
            if int(layer) // layers == part:
                yield name, f"decoder.layers.{int(layer) % layers}.{leaf}"
        elif part == (0 if name.startswith("embedding") else count - 1):
            yield name, name


def write_legacy(root: Path, ranks: Ranks) -> Path:
    for (tp, pp), state in ranks.items():
        folder = root / "iter_0000005" / f"mp_rank_{tp:02d}_{pp:03d}"
        folder.mkdir(parents=True)
        torch.save(state, folder / "model_optim_rng.pt")
    (root / "latest_checkpointed_iteration.txt").write_text("5")
    return root


def put(tp: int, pp: int, name: str, value: Any, key: str = "model") -> Callable[[Ranks], Any]:
    return lambda ranks: ranks[tp, pp].setdefault(key, {}).update({name: value})


def change(tp: int, pp: int, name: str, of: Callable[[Any], Any]) -> Callable[[Ranks], Any]:
    return lambda ranks: ranks[tp, pp]["model"].update({name: of(ranks[tp, pp]["model"][name])})


STATE = "decoder.layers.0.mlp.linear_fc1._extra_state"
LEGACY: dict[str, tuple[Callable[[Ranks], Any], tuple[str, ...]]] = {
    "extra on every rank": (
        lambda ranks: [
            put(tp, 1, "decoder.layers.0.mlp.router.expert_bias", torch.ones(2))(ranks)
            for tp in (0, 1)
        ],
        ("decoder.layers.1.mlp.router.expert_bias",),
    ),
    "extra on one rank": (put(1, 0, "decoder.extra", torch.ones(2)), ("decoder.extra", "mp_rank")),
    "missing on one rank": (
        lambda ranks: ranks[1, 0]["model"].pop(NORM),
        (NORM, "mp_rank_01_000"),
    ),
    "shape of one rank": (change(1, 0, NORM, lambda x: x[:-1]), (NORM, "mp_rank_01_000")),
    "dtype of one rank": (change(1, 0, NORM, lambda x: x.double()), (NORM, "mp_rank_01_000")),
    "value of one rank": (change(1, 0, NORM, lambda x: x + 1), (NORM, "not the same on every")),
    "norm under both names": (
        put(0, 0, "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight", torch.ones(8)),
        ("layer_norm_weight", "not as on"),
    ),
    "norm under both names everywhere": (
        lambda ranks: [
            put(
                tp, 0, "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight", torch.ones(8)
            )(ranks)
            for tp in (0, 1)
        ],
        (NORM, "second time"),
    ),
    "another layer": (
        lambda ranks: [
            put(tp, 1, "decoder.layers.1.x.weight", torch.ones(2))(ranks) for tp in (0, 1)
        ],
        ("decoder.layers.2.x.weight",),
    ),
    "scales": (put(1, 1, STATE, torch.ones(3)), (STATE,)),
    "scales in a buffer": (put(0, 0, STATE, io.BytesIO(b"scales")), (STATE,)),
    "another copy": (put(1, 1, "x", torch.ones(3), key="ema"), ("ema.x",)),
    "not finite": (
        lambda ranks: [change(tp, 0, NORM, lambda x: x * torch.nan)(ranks) for tp in (0, 1)],
        (NORM,),
    ),
}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    config = make_config("Qwen3ForCausalLM", num_key_value_heads=2)
    write_folder(tmp_path / "hf", config, make_weights(config))
    return tmp_path / "hf"


@pytest.mark.parametrize("case", LEGACY)
def test_legacy(case: str, small: Path, tmp_path: Path) -> None:
    damage, named = LEGACY[case]
    ranks = legacy_ranks(small)
    damage(ranks)
    checkpoint = write_legacy(tmp_path / "in", ranks)
    with refused(str(checkpoint), *named):
        megatron_to_hf(checkpoint, tmp_path / "out", trust_pickle=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "in"]


def test_legacy_with_empty_states(small: Path, tmp_path: Path) -> None:
    ranks = legacy_ranks(small)
    for state, empty in zip(ranks.values(), (None, torch.empty(0), io.BytesIO(), None)):
        state["model"][STATE] = empty
        state |= {"optimizer": {"exp_avg": torch.ones(3)}, "rng_state": [{"cpu": torch.ones(2)}]}
    checkpoint = write_legacy(tmp_path / "in", ranks)
    megatron_to_hf(checkpoint, tmp_path / "out", trust_pickle=True)
    assert_same_bits(read_weights(tmp_path / "out"), read_weights(small))


def test_legacy_chunks_beyond_ten(tmp_path: Path) -> None:
    """model10 follows model9, and every tensor keeps a dtype of its own."""
    config = make_config("Qwen3MoeForCausalLM", num_hidden_layers=12)
    weights = make_weights(config)
    weights = {k: v if ".mlp.gate." in k else v.bfloat16() for k, v in weights.items()}
    write_folder(tmp_path / "hf", config | dict(torch_dtype="bfloat16"), weights)
    ranks = legacy_ranks(tmp_path / "hf", tp_size=1, pp_size=1, chunks=12)
    assert "model11" in ranks[0, 0]
    checkpoint = write_legacy(tmp_path / "in", ranks)
    megatron_to_hf(checkpoint, tmp_path / "out", trust_pickle=True)
    assert_same_bits(read_weights(tmp_path / "out"), weights)


@pytest.mark.parametrize("is_equal", [True, False])
def test_legacy_tied_head(is_equal: bool, tmp_path: Path) -> None:
    """The last stage's copy of the embedding is the embedding, or the checkpoint is refused."""
    config = make_config("LlamaForCausalLM", tie_word_embeddings=True)
    write_folder(tmp_path / "hf", config, make_weights(config))
    ranks = legacy_ranks(tmp_path / "hf", tp_size=1)
    head = ranks[0, 0]["model"]["embedding.word_embeddings.weight"].clone()
    head[4, 2] += not is_equal
    ranks[0, 1]["model"]["output_layer.weight"] = head
    checkpoint = write_legacy(tmp_path / "in", ranks)
    if not is_equal:
        with refused("mp_rank_00_001", "output_layer.weight", "tie_word_embeddings"):
            MegatronFolder(checkpoint, trust_pickle=True)
        return
    megatron_to_hf(checkpoint, tmp_path / "out", trust_pickle=True)
    assert_same_bits(read_weights(tmp_path / "out"), read_weights(tmp_path / "hf"))


def test_values_beyond_the_dtype(small: Path, tmp_path: Path) -> None:
    """A value that becomes infinite is refused whichever way it goes; otherwise it is rounded."""
    weights = read_weights(small)
    weights["model.layers.1.mlp.up_proj.weight"][3, 2] = 1e5
    write_folder(small, make_config("Qwen3ForCausalLM", num_key_value_heads=2), weights)
    name = "model.layers.1.mlp.up_proj.weight"
    with refused(name, "float16", "1 of 96 values"):
        hf_to_megatron(small, tmp_path / "out", dtype=torch.float16)
    hf_to_megatron(small, tmp_path / "megatron")
    with refused(name, "float16", "1 of 96 values"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "out", dtype=torch.float16)
    assert not (tmp_path / "out").exists()
    megatron_to_hf(tmp_path / "megatron", tmp_path / "out", dtype=torch.bfloat16)
    want = {key: tensor.bfloat16() for key, tensor in weights.items()}
    assert_same_bits(read_weights(tmp_path / "out"), want)


def test_vocabulary_that_the_configuration_cuts(small: Path, tmp_path: Path) -> None:
    """Rows that pad the vocabulary may go; rows that the arguments use may not."""
    hf_to_megatron(small, tmp_path / "a", make_vocab_size_divisible_by=8)
    path = tmp_path / "a/release/common.pt"
    common = torch.load(path)
    common["args"].vocab_size = 12
    torch.save(common, path)
    (path.parent / "manifest.json").unlink()
    with refused(str(tmp_path / "a"), "16 rows, 12 of them used", "vocabulary of 11"):
        MegatronFolder(tmp_path / "a")


def test_zero_and_negative_zero(small: Path, tmp_path: Path) -> None:
    """They are equal numbers and other bits."""
    weights = read_weights(small)
    for number, zero in enumerate((0.0, -0.0)):
        weights["model.norm.weight"][1] = zero
        config = make_config("Qwen3ForCausalLM", num_key_value_heads=2)
        write_folder(tmp_path / str(number), config, weights)
    found = list(compare_weights(HfFolder(tmp_path / "0"), HfFolder(tmp_path / "1")))
    assert len(found) == 1 and "model.norm.weight: 1 of 8 values differ" in found[0]
