"""Seeded configurations: refused by the key that is wrong, or built with exactly what they say."""

from __future__ import annotations

import dataclasses
import math
import random
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("megatron.core")

from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from megatron_pg.mcore import validate_config  # noqa: E402
from megatron_pg.train import TrainConfig, dry_run, load_config  # noqa: E402
from megatron_pg.train.model.plan import plan_model  # noqa: E402
from tests.hostile import assert_both_occur, seeds  # noqa: E402
from tests.train import tiny  # noqa: E402

pytestmark = pytest.mark.megatron

TRANSFORMER = dict(
    num_layers=4,
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=48,
    add_bias_linear=False,
)
EXPERTS = dict(num_moe_experts=4, moe_ffn_hidden_size=16, moe_router_load_balancing_type="none")
JUNK: list[Any] = [
    *(None, True, False, -1, 0, 1, 2, 3, 10**30, -0.5, 2.5, 1e-6, math.nan, math.inf),
    *("", "nowhere", "1e-6", "1_000", "null", "-1", [], [1], [0.5], ["nowhere"], [None], {}),
    {"nowhere": 1},
]
# What a careful user would write: accepted, alone or together.
FINE: dict[str, list[Any]] = {
    "optimizer.lr": [1e-6, "1e-6", 0, 3],
    "optimizer.clip_grad": [0, 1.5],
    "run.num_steps": [1, 7, 10**6],
    "run.seed": [0, 99],
    "prefix_group.prefix_resident": ["auto", "always", "never"],
    "algorithm.adv_estimator": ["grpo", "rloo"],
    "algorithm.policy.clip_ratio_high": [0.2, 0.5],
    "algorithm.filter_groups.enable": [True, False],
    "algorithm.filter_groups.max_num_gen_batches": [1, 50],
    "algorithm.filter_groups.at_limit": ["train", "raise"],
    "run.log_generations": [0, 5],
    "rollout.temperature": [0.5, 1, "1e0"],
    "prefix_group.min_shared": [1, 8, None],
    "model.max_position_embeddings": [64, 4096],
    "model.position_embedding_type": ["rope", "learned_absolute", "none"],
    "model.transformer.layernorm_epsilon": [1e-6, "1e-6"],
    "model.transformer.normalization": ["RMSNorm", "LayerNorm"],
    "model.transformer.qk_layernorm": [True, False],
    "model.transformer.num_query_groups": [1, 2, 4],
    "model.transformer.kv_channels": [8, 12],
    "model.transformer.activation_func": ["silu", "relu"],
    "model.transformer.params_dtype": ["float32", "bfloat16"],
    "model.transformer.rotary_interleaved": [True, False],
    "model.transformer.attention_output_gate": [True],
    "model.transformer.recompute_granularity": ["selective"],
}
PARALLEL = {
    "parallel.tensor_model_parallel_size": [1, 2, 3, 4],
    "parallel.pipeline_model_parallel_size": [1, 2, 3, 4],
    "parallel.virtual_pipeline_model_parallel_size": [None, 2],
    "parallel.expert_model_parallel_size": [1, 2, 3],
    "parallel.sequence_parallel": [True, False],
    "model.transformer.num_layers": [2, 4, 8],
    "model.transformer.num_moe_experts": [None, 4],
    "model.transformer.num_layers_in_first_pipeline_stage": [1, 2, 3],
    "model.transformer.moe_router_topk": [1, 2, 8],
    "model.transformer.ffn_hidden_size": [48, 50],
}


def paths(cls: type, prefix: str = "") -> Iterator[str]:
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            yield from paths(typing.cast(type, hint), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


# Files and folders are other families' business.
SECTIONS = sorted(set(paths(TrainConfig)) - {"model.transformer", "run.out", "rollout.files"})
FIELDS = sorted(field.name for field in dataclasses.fields(TransformerConfig))


def mutate(rng: random.Random) -> tuple[str, Any, str]:
    """A key, its value, and whether it is "fine", "wrong" or for arithmetic to say."""
    kind = rng.choice(["fine", "fine", "parallel", "section", "transformer", "transformer", "typo"])
    if kind == "fine":
        key = rng.choice(list(FINE))
        return key, rng.choice(FINE[key]), "fine"
    if kind == "parallel":
        key = rng.choice(list(PARALLEL))
        return key, rng.choice(PARALLEL[key]), "any"
    if kind == "section":
        return rng.choice(SECTIONS), rng.choice(JUNK), "any"
    if kind == "transformer":
        return f"model.transformer.{rng.choice(FIELDS)}", rng.choice(JUNK), "any"
    key = rng.choice([*SECTIONS, *(f"model.transformer.{name}" for name in FIELDS)])
    return f"{key}_", rng.choice(JUNK), "wrong"


def put(content: dict[str, Any], key: str, value: Any) -> None:
    *folders, leaf = key.split(".")
    for name in folders:
        content = content.setdefault(name, {})
    content[leaf] = value


def found(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = config[name] if isinstance(config, dict) else getattr(config, name)
    return config


def said(got: Any, given: Any) -> bool:
    """Whether a value is the one that was written, numbers of text included."""
    if isinstance(got, float) and type(given) in (int, float, str):
        try:
            return got == float(given)
        except ValueError:
            return False
    return type(got) is type(given) and got == given


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("hostile")
    return str(tiny.run_sections(folder)["rollout"]["files"][0])


def outcome(seed: int, rollouts: str, folder: Path) -> bool:
    """Whether the input of a seed was accepted; asserts that it was right either way."""
    rng = random.Random(seed)
    transformer = TRANSFORMER | (EXPERTS if rng.random() < 0.3 else {})
    content: dict[str, Any] = dict(
        model=dict(vocab_size=tiny.VOCAB, transformer=dict(transformer)),
        rollout=dict(files=[rollouts]),
        prefix_group=dict(max_tokens_per_microbatch=256),
        run=dict(groups_per_step=5),
    )
    changes: dict[str, Any] = {}
    kinds = []
    for _ in range(rng.choice([1, 1, 2, 3])):
        key, value, kind = mutate(rng)
        changes[key] = value
        kinds.append(kind)
        put(content, key, value)
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(content))
    world_size = rng.choice([1, 2, 4, 8])
    try:
        config = load_config(file)
        told = dry_run(config, world_size)
    except (ValueError, NotImplementedError, ImportError) as error:
        message = str(error).replace(str(file), "")
        leaves = {key.rpartition(".")[2] for key in changes} | {str(world_size)}
        # What is of no use as a whole is named as a whole.
        sections = {key.rpartition(".")[0] for key in changes if key.count(".") > 1}
        leaves |= sections - {"model.transformer"}
        # Prose of the losses has a blank where the key has none.
        leaves |= {leaf.replace("_", " ") for leaf in leaves}
        assert any(leaf in message for leaf in leaves), (changes, message)
        # Layout, estimator and dtype may not suit each other; alone each is fine.
        assert len(kinds) > 1 or kinds != ["fine"], (changes, message)
        return False
    assert "wrong" not in kinds, changes
    plan = plan_model(config.model, config.parallel)
    validate_config(plan.config)
    named = {"silu", "relu", "gelu", "float32", "bfloat16", "float64"}
    for key, given in changes.items():
        name = key.removeprefix("model.transformer.")
        if name == key:
            assert said(found(config, key), given), (key, given)
        elif given in named if isinstance(given, str) else False:
            assert str(given) in str(getattr(plan.config, name)), (key, given)
        else:
            assert said(getattr(plan.config, name), given), (key, given)
    assert told.parameters_per_rank > 0 and math.isfinite(told.bytes_per_rank)
    return True


@pytest.mark.parametrize("seed", seeds())
def test_hostile_configurations(seed: int, rollouts: str, tmp_path: Path) -> None:
    outcome(seed, rollouts, tmp_path)


def test_both_outcomes_occur(rollouts: str, tmp_path: Path) -> None:
    assert_both_occur([outcome(seed, rollouts, tmp_path) for seed in range(40)])


@pytest.mark.parametrize("seed", seeds(cost=2))
def test_hostile_overrides(seed: int, rollouts: str, tmp_path: Path) -> None:
    """As text on a command line, where YAML decides what a value is."""
    rng = random.Random(seed)
    content = dict(
        model=dict(vocab_size=tiny.VOCAB, transformer=dict(TRANSFORMER)),
        rollout=dict(files=[rollouts]),
    )
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(content))
    key = rng.choice([*SECTIONS, *(f"model.transformer.{name}" for name in FIELDS), *FINE])
    text = rng.choice(
        ["1", "-1", "0", "1e-6", ".nan", "true", "null", "", "[]", "[1,2]", "{a: 1}", "x=y", "'"]
        + ["${run.seed}", "${nothing}", "*", "&a", "!!python/object:os.system", "[", "nowhere"]
    )
    override = rng.choice([f"{key}={text}"] * 8 + [f"{key}.{text}", f"={text}", f".{key}={text}"])
    try:
        config = load_config(file, [override])
        dry_run(config, 1)
    except (ValueError, NotImplementedError, ImportError) as error:
        leaf = key.rpartition(".")[2]
        assert leaf in str(error) or override in str(error) or str(file) in str(error)
        return
    value = yaml.safe_load(text) if text != "${run.seed}" else 1234
    if key.startswith("model.transformer."):
        # As Megatron-Core holds it, dtypes and functions by their names.
        got = getattr(plan_model(config.model, config.parallel).config, key.rpartition(".")[2])
    else:
        got = found(config, key)
    assert said(got, value) or said(got, text), (override, got)
