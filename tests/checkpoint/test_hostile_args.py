"""Seeded ``args``: refused by the name of what is wrong, or read as exactly the model they say."""

from __future__ import annotations

import random
from argparse import Namespace
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_pg.checkpoint import HfModel, hf_model_from_args, make_megatron_args
from megatron_pg.checkpoint.arguments import check_args
from megatron_pg.parallel import ParallelSizes
from tests.checkpoint.test_arguments import (
    CHANGING,
    CHANGING_EXPERTS,
    DEFAULTS,
    EXPERTS,
    LLAMA,
    MODELS,
)
from tests.hostile import assert_both_occur, seeds

pytestmark = pytest.mark.megatron

# Of another kind, whatever the argument.
_JUNK: list[Any] = ["", "x", -1, 0, 2.5, True, [], [4], {}, {"a": 1}, float("nan"), float("inf")]
_SIZES = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "ffn_hidden_size",
    "max_position_embeddings": "max_sequence_length",
    "vocab_size": "vocab_size",
}
# One entry per layer, where they are lists.
_PATTERNS = ("moe_layer_freq", "window_attn_skip_freq", "no_rope_freq")
_TRAINING: list[tuple[str, Any]] = [
    ("lr", 1e-3),
    ("fp8", "hybrid"),
    ("wandb_project", "mine"),
    ("tensor_model_parallel_size", 64),
    ("recompute_granularity", "full"),
    ("rl_of_tomorrow", [1, 2]),
    ("attention_dropout", 0.5),
    ("moe_z_loss_coeff", 0.1),
    ("cuda_graph_impl", "local"),
    ("data_path", ["a", 0.5]),
    ("init_method_std", 0.1),
]


def start(rng: random.Random) -> tuple[Namespace, HfModel]:
    """Megatron-LM's own arguments of a model, or ours."""
    if rng.random() < 0.5:
        args = Namespace(**DEFAULTS | LLAMA | rng.choice([{}, EXPERTS, dict(qk_layernorm=True)]))
        return args, hf_model_from_args(args, "base")
    model = rng.choice(list(MODELS.values()))
    return make_megatron_args(model, ParallelSizes(tp=rng.choice([1, 2]))), model


def mutate(rng: random.Random, args: Namespace, model: HfModel) -> tuple[str, HfModel | None]:
    """One change: the name that a refusal gives, and the model that is said (None: refused)."""
    kind = rng.choice(["changing", "junk", "training", "size", "off", "unknown"])
    if kind == "changing":
        cases = CHANGING + (CHANGING_EXPERTS if model.num_experts else [])
        name, value = rng.choice(cases)
        if name in ("position_embedding_type",):
            args.use_rotary_position_embeddings = False
        setattr(args, name, value)
        return name, None
    if kind == "junk":
        name = rng.choice([*_SIZES, "num_attention_heads", "params_dtype", "rotary_base"])
        value = rng.choice(_JUNK)
        if name == "rotary_base" and value == 2.5:
            setattr(args, name, value)
            return name, replace(model, rotary_base=2.5)
        setattr(args, name, value)
        return name, None
    if kind == "size":
        name, value = rng.choice(list(_SIZES)), rng.choice([16, 64, 1000])
        setattr(args, name, value)
        patterns = (getattr(args, pattern, None) for pattern in _PATTERNS)
        if name == "num_layers" and any(isinstance(pattern, list | str) for pattern in patterns):
            return name, None
        return name, replace(model, **{_SIZES[name]: value})
    if kind == "training":
        name, value = rng.choice(_TRAINING)
    elif kind == "off":
        name, value = f"of_tomorrow_{rng.randrange(9)}", rng.choice([None, False, "", [], {}, ()])
    else:
        name, value = (
            f"of_tomorrow_{rng.randrange(9)}",
            rng.choice([1, "on", True, [0], torch.int8]),
        )
        setattr(args, name, value)
        return name, None
    setattr(args, name, value)
    return name, model


def outcome(seed: int) -> bool:
    """Whether the input of a seed was accepted; asserts that it was right either way."""
    rng = random.Random(seed)
    args, model = start(rng)
    base, wrong, wanted = model, [], model
    for _ in range(rng.choice([1, 1, 2, 3])):
        name, said = mutate(rng, args, wanted)
        # A later change may undo an earlier one.
        wrong = [other for other in wrong if other != name]
        if said is None:
            wrong.append(name)
        else:
            wanted = said
    try:
        got = hf_model_from_args(args, "DIR/common.pt")
    except (ValueError, NotImplementedError) as error:
        assert str(error).startswith("DIR/common.pt: ") and "hf_config" in str(error)
        assert any(name in str(error) for name in wrong), (wrong, str(error))
        return False
    assert not wrong, f"accepted: {wrong}"
    assert got == wanted
    check_args(args, got, "DIR/common.pt")
    # Neither the longest sequence nor the vocabulary changes the function, and no layer is dense
    # where all have experts.
    free = dict(max_sequence_length=0, vocab_size=0)
    free |= dict(ffn_hidden_size=0) if got.num_experts and got.is_homogeneous else {}
    if replace(got, **free) != replace(base, **free):
        with pytest.raises(ValueError, match="DIR/common.pt: its args contradict"):
            check_args(args, base, "DIR/common.pt")
    return True


@pytest.mark.parametrize("seed", seeds())
def test_hostile_args(seed: int) -> None:
    outcome(seed)


def test_both_outcomes_occur() -> None:
    assert_both_occur([outcome(seed) for seed in range(50)])
