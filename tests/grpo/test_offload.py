"""A reference model in host memory: where its weights are, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")

from megatron_pg.grpo import Offloaded  # noqa: E402
from megatron_pg.train import load_config  # noqa: E402
from tests.ranks import Pool  # noqa: E402
from tests.train import tiny  # noqa: E402
from tests.train.runs import Ended, assert_same, run  # noqa: E402


class Model(torch.nn.Module):
    """A tied weight, a bias and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.Linear(3, 3)
        self.other = torch.nn.Linear(3, 3, bias=False)
        self.other.weight = self.one.weight
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(self.one(x)) * self.scale


def places(model: torch.nn.Module) -> list[int]:
    return [t.data_ptr() for t in [*model.parameters(), *model.buffers()]]


def test_weights_are_copies_inside_the_block_alone() -> None:
    model = Model().requires_grad_(False)
    x = torch.randn(2, 3)
    want, state = model(x), {k: v.clone() for k, v in model.state_dict().items()}
    offloaded = Offloaded([model], torch.device("cpu"))
    at_home = places(model)
    for _ in range(2):
        with offloaded.on_device():
            assert len(at_home) == 3 and not set(places(model)) & set(at_home)
            assert model.one.weight is model.other.weight
            assert torch.equal(model(x), want)
        assert places(model) == at_home
    with pytest.raises(RuntimeError, match="in the block"), offloaded.on_device():
        raise RuntimeError("in the block")
    assert places(model) == at_home
    assert all(torch.equal(model.state_dict()[k], state[k]) for k in state)


def test_a_model_that_is_trained_is_refused() -> None:
    with pytest.raises(ValueError, match="requires_grad_"):
        Offloaded([Model()], torch.device("cpu"))


def config_of(folder: Path, **overrides: Any) -> Any:
    """Two epochs of seven groups, one of them without spread and one aborted in part."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny.save_model(folder / "reference", seed=5)
    sections = tiny.run_sections(folder, aborted_in_part(tiny.make_groups(8)))
    sections["rollout"]["shuffle"] = False
    sections["algorithm"] = {
        "ref_hf": str(folder / "reference"),
        "use_kl_in_reward": True,
        "policy": {"kl_loss_coef": 0.1},
    }
    sections["run"] |= {"groups_per_step": 4, "num_steps": 4, "self_check_interval": None}
    return load_config(tiny.write_config(folder / "config.yaml", sections, **overrides))


def aborted_in_part(groups: list[Any]) -> list[Any]:
    first, second, *others = groups
    one, *rest = first.samples
    gone = tuple(replace(s, status="aborted") for s in second.samples)
    return [
        replace(first, samples=(replace(one, status="aborted"), *rest)),
        replace(second, samples=gone),
        *others,
    ]


@pytest.fixture(scope="module")
def plain(
    ranks: Pool, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Ended]]:
    """A run on a layout whose reference model is asked at every step."""
    found: dict[str, tuple[Path, Ended]] = {}

    def on(layout: str) -> tuple[Path, Ended]:
        if layout not in found:
            folder = tmp_path_factory.mktemp(layout)
            found[layout] = folder, run(ranks, config_of(folder), layout, folder / "plain")
        return found[layout]

    return on


@pytest.mark.parametrize("setting", ["ref_offload", "precompute_ref_logprobs"])
@pytest.mark.parametrize("layout", ["one", "dp2", "pp2"])
def test_a_run_is_the_same_to_the_last_bit(
    ranks: Pool, plain: Any, layout: str, setting: str
) -> None:
    folder, (weights, steps) = plain(layout)
    assert all(m["actor/kl"] > 1e-3 and m["reward/kl_penalty"] != 0 for m in steps)
    config = config_of(folder, **{f"algorithm__{setting}": True})
    out = folder / setting
    assert_same(run(ranks, config, layout, out), (weights, steps))
    told = out.with_suffix(".log").read_text()
    assert ("reference logprobs of 8 groups computed in" in told) == setting.startswith("pre")


def test_precomputed_logprobs_leave_position_and_model(ranks: Pool, tmp_path: Path) -> None:
    """A run goes on with or without them, and the reference model is gone."""
    config = config_of(tmp_path, rollout__shuffle=True)
    computed = config_of(tmp_path, rollout__shuffle=True, algorithm__precompute_ref_logprobs=True)
    straight = run(ranks, computed, "one", tmp_path / "straight")
    out = tmp_path / "out"
    run(ranks, computed, "one", out, num_steps=3, save_interval=3)
    assert_same(run(ranks, computed, "one", out, save_interval=3), straight)
    # Groups of other rows than in the first pass: equal but for rounding.
    other = run(ranks, config, "one", tmp_path / "plain")
    for got, want in zip(straight[1], other[1], strict=True):
        assert abs(got["actor/kl"] - want["actor/kl"]) < 1e-6
    assert ranks.run(1, reference_after_start, computed) == [(True, 7)]


def reference_after_start(config: Any) -> tuple[bool, int]:
    """Whether the model is given up; recorded groups whose trained samples carry its logprobs."""
    with tiny.opened(config) as trainer:
        groups = trainer.stream.stream.groups
        carried = [
            all(s.ref_logprobs is not None for s in g.samples if s.status != "aborted")
            and any(s.status != "aborted" for s in g.samples)
            for g in groups
        ]
        return trainer.grpo.reference is None, sum(carried)
