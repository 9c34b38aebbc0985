"""verl's ``_balance_batch`` over whole groups, and how verl finds the plug-in."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest

pytest.importorskip("verl", reason="verl is installed in its own lane")

from omegaconf import OmegaConf  # noqa: E402
from transfer_queue import KVBatchMeta  # noqa: E402
from verl.trainer.ppo.v1 import PPOTrainerSync, get_trainer_cls  # noqa: E402
from verl.utils.config import omega_conf_to_dataclass  # noqa: E402

from megatron_pg.adapters.verl import PrefixGroupedTrainerSync  # noqa: E402
from megatron_pg.adapters.verl.placement import deal, place_samples  # noqa: E402
from megatron_pg.adapters.verl.refusals import engine_problems  # noqa: E402
from megatron_pg.adapters.verl.settings import read_settings  # noqa: E402
from tests.utils import ROOT  # noqa: E402

pytestmark = pytest.mark.verl

MODES = ("sync", "colocate_async", "separate_async")


def make_batch(sizes: list[int], turns: int = 1, seed: int = 0) -> KVBatchMeta:
    """Samples as verl's rollout names and tags them, in the order in which they ended."""
    rng = np.random.default_rng(seed)
    keys, tags = [], []
    for prompt, size in enumerate(sizes):
        prompt_len = int(rng.integers(20, 400))
        for sample in range(size):
            session, turn = divmod(sample, turns)
            response_len = int(rng.integers(10, 200))
            keys.append(f"prompt-{prompt}_x_{session}_{turn}")
            lens = dict(prompt_len=prompt_len + 100 * turn, response_len=response_len)
            tags.append(lens | dict(seq_len=sum(lens.values())))
    order = rng.permutation(len(keys))
    return KVBatchMeta(
        keys=[keys[i] for i in order], tags=[tags[i] for i in order], partition_id="train"
    )


def make_trainer(cls: Any, dp_size: int, mini_batch_size: int, n: int) -> Any:
    trainer = object.__new__(cls)
    trainer.config = OmegaConf.create(
        dict(
            trainer=dict(critic_warmup=0),
            actor_rollout_ref=dict(
                actor=dict(ppo_mini_batch_size=mini_batch_size), rollout=dict(n=n)
            ),
        )
    )
    trainer.use_critic, trainer.global_steps = False, 1
    trainer.tokenizer = SimpleNamespace(eos_token_id=0)
    trainer.actor_rollout_wg = SimpleNamespace(_dispatch_info=dict(actor=list(range(dp_size))))
    return trainer


def ranks_of(batch: KVBatchMeta, dp_size: int) -> list[list[str]]:
    size = len(batch) // dp_size
    return [batch.keys[r * size : (r + 1) * size] for r in range(dp_size)]


def uid(key: str) -> str:
    return key.rsplit("_", 2)[0]


@pytest.mark.parametrize("dp_size", [2, 4, 8])
def test_groups_stay_on_a_rank_and_in_a_mini_batch(dp_size: int) -> None:
    given = make_batch([8] * 32)
    keys, metrics = list(given.keys), {}
    trainer = make_trainer(PrefixGroupedTrainerSync, dp_size, mini_batch_size=16, n=8)
    batch = trainer._balance_batch(given, metrics)
    assert sorted(batch.keys) == sorted(keys) and batch.keys != keys
    steps: dict[str, set[tuple[int, int]]] = {}
    for rank, own in enumerate(ranks_of(batch, dp_size)):
        per_step = 16 * 8 // dp_size
        for place, key in enumerate(own):
            steps.setdefault(uid(key), set()).add((rank, place // per_step))
    assert len(steps) == 32 and all(len(places) == 1 for places in steps.values())
    first = list(dict.fromkeys(uid(key) for key in keys))[:16]
    assert {name for name, places in steps.items() if {step for _, step in places} == {0}} == {
        *first
    }, "mini-batches are in the order of the rollout"
    assert metrics["prefix_grouped/ranks_per_prompt"] == 1.0
    assert metrics["global_seqlen/balanced_max"] < 1.35 * metrics["global_seqlen/mean"]


def test_verls_own_divides_them() -> None:
    batch = make_trainer(PPOTrainerSync, 8, 32, 8)._balance_batch(make_batch([8] * 32), {})
    copies = sum(len({uid(key) for key in own}) for own in ranks_of(batch, 8))
    assert copies > 4 * 32, "what is compared differs"


@pytest.mark.parametrize("seed", range(20))
def test_ragged_groups_are_divided_only_for_equal_numbers(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 9, size=int(rng.integers(9, 30))).tolist()
    sizes.append(-sum(sizes) % 8 + 8)
    batch = make_batch(sizes, turns=2, seed=seed)
    ranks = place_samples(batch.keys, batch.tags, num_ranks=4, mini_batch_size=len(batch))
    assert {len(rank) for rank in ranks} == {len(batch) // 4}
    assert sorted(i for rank in ranks for i in rank) == list(range(len(batch)))
    copies = sum(len({uid(batch.keys[i]) for i in rank}) for rank in ranks)
    assert copies <= len(sizes) + 3
    for rank in ranks:
        names = [uid(batch.keys[i]) for i in rank]
        assert len([1 for a, b in zip(names, names[1:]) if a != b]) == len(set(names)) - 1


def test_costs_are_even_where_lengths_are_not() -> None:
    costs = [float(c) for c in np.random.default_rng(0).lognormal(3, 1, size=64)]
    parts = deal([[2 * i, 2 * i + 1] for i in range(64)], costs, 8)
    loads = [sum(costs[group[0] // 2] for group in part) for part in parts]
    assert all(len(part) == 8 for part in parts)
    assert max(loads) < 1.25 * max(sum(costs) / 8, max(costs))


def test_a_group_larger_than_a_rank_is_divided_least() -> None:
    parts = deal([list(range(12)), [12], [13], [14], [15]], [9.0, 1.0, 1.0, 1.0, 1.0], 4)
    assert sorted(len([i for group in part for i in group]) for part in parts) == [4] * 4
    assert sum(any(i < 12 for group in part for i in group) for part in parts) == 3


def test_padding_fills_what_is_left() -> None:
    batch = make_batch([4, 4, 3, 3])
    keys = [*batch.keys, "padx_0_0", "padx_1_0"]
    tags = [*batch.tags, *[dict(prompt_len=1, response_len=1, is_padding=True)] * 2]
    ranks = place_samples(keys, tags, num_ranks=4, mini_batch_size=16)
    assert all(len({uid(keys[i]) for i in rank if i < 14}) == 1 for rank in ranks)


@pytest.fixture
def _chosen() -> Iterator[None]:
    with mock.patch.dict(os.environ, VERL_ENGINE_VENDOR="prefix_grouped"):
        yield


def trainer_config(mode: str, shuffle: bool = False) -> Any:
    return OmegaConf.create(
        dict(
            trainer=dict(v1=dict(trainer_mode=mode)),
            actor_rollout_ref=dict(actor=dict(shuffle=shuffle)),
        )
    )


@pytest.mark.parametrize("mode", MODES)
def test_verl_reads_the_settings_of_its_own_mode(mode: str, _chosen: None) -> None:
    cls: Any = get_trainer_cls(f"prefix_grouped_{mode}")
    assert issubclass(cls, get_trainer_cls(mode))
    config = trainer_config(f"prefix_grouped_{mode}")
    with mock.patch.object(get_trainer_cls(mode), "__init__", return_value=None) as given:
        cls(config)
    given.assert_called_once_with(config)
    assert config.trainer.v1.trainer_mode == mode


def test_a_trainer_without_the_engine_is_refused() -> None:
    with (
        mock.patch.dict(os.environ, VERL_ENGINE_VENDOR="nvidia"),
        pytest.raises(ValueError, match="VERL_ENGINE_VENDOR=nvidia; set it to prefix_grouped"),
    ):
        PrefixGroupedTrainerSync(trainer_config("prefix_grouped_sync"))


def test_shuffled_mini_batches_are_refused(_chosen: None) -> None:
    with pytest.raises(ValueError, match="shuffle=True"):
        PrefixGroupedTrainerSync(trainer_config("prefix_grouped_sync", shuffle=True))


CODE = """
import verl
from verl.workers.engine import EngineRegistry
from verl.trainer.ppo.v1 import get_trainer_cls
for model_type in ("language_model", "value_model"):
    print(EngineRegistry.get_engine_cls(model_type, "megatron").__name__)
print(get_trainer_cls("prefix_grouped_sync").__name__)
"""


CHOSEN = dict(
    VERL_USE_EXTERNAL_MODULES="megatron_pg.adapters.verl",
    VERL_ENGINE_VENDOR="prefix_grouped",
    PYTHONPATH=str(ROOT),
)
MODEL: dict[str, Any] = dict(hf_config=None, mtp=SimpleNamespace(enable=False), lora={})


def test_two_variables_make_verl_choose_it() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        # This machine may have no device; with one, verl finds it.
        env=os.environ | CHOSEN | dict(VERL_ENGINE_DEVICE="cuda"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == [
        "PrefixGroupedMegatronEngine",
        "MegatronEngineWithValueHead",
        "PrefixGroupedTrainerSync",
    ], done.stderr


OPTIONS = [
    "model_engine=megatron",
    "trainer.v1.trainer_mode=prefix_grouped_sync",
    "+actor_rollout_ref.actor.megatron.override_mcore_model_config.prefix_group.min_shared=32",
]


def test_verls_command_takes_the_options() -> None:
    command = [sys.executable, "-m", "verl.trainer.main_ppo", "--cfg", "job", *OPTIONS]
    done = subprocess.run(
        command, env=os.environ | CHOSEN, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    config = OmegaConf.create(done.stdout[done.stdout.index("actor_rollout_ref:") :])
    get_trainer_cls(config.trainer.v1.trainer_mode)
    assert config.trainer.use_v1, "the trainer that modes are of is verl's default"
    engine = omega_conf_to_dataclass(config.actor_rollout_ref.actor.megatron)
    assert read_settings(engine).min_shared == 32
    assert not list(engine_problems(SimpleNamespace(**MODEL), engine))
