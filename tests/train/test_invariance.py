"""One loss and one gradient, however groups are packed, ordered, split and spread over ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from megatron_pg.data import Group, ResidencyConfig, group_shape, plan_waves
from tests.data.samples import make_large_groups
from tests.ranks import Pool
from tests.train import dense, tiny
from tests.train.invariance import (
    RESIDENT_VARIANTS,
    SUITES,
    compare,
    variant_names,
    write_reference,
)
from tests.train.layouts import NUM_RANKS

BOUND = 1e-10
LAYOUTS = {
    "packing": [
        *("one", "pp2", "dp2", "pp2_vpp2", "tp2_sp", "dp2_overlap"),
        *("pp4", "pp2_dp2", "tp2_sp_dp2"),
    ],
    "resident": ["one", "pp2", "dp2_overlap", "pp2_vpp2_dp2_overlap"],
}
CASES = [
    pytest.param(suite, layout, variant, id=f"{suite}-{layout}-{variant}")
    for suite, names in LAYOUTS.items()
    for layout in names
    for variant in variant_names(suite, layout)
]
GROUPS = {"packing": tiny.make_groups, "resident": make_large_groups}


def prepare(folder: Path, groups: list[Group]) -> None:
    """Model, rollouts with every kind of logprobs around the model's own, and configurations."""
    model = tiny.save_model(folder / "model").double()
    with torch.no_grad():
        logprobs = iter(
            dense.sample_logprobs(lambda t: model(t[None]).logits[0], groups, tiny.VOCAB)
        )
    generator = torch.Generator().manual_seed(1)

    def around(values: torch.Tensor, scale: float) -> torch.Tensor:
        noise = torch.randn(len(values), generator=generator, dtype=torch.float64)
        return (values.double() + scale * noise).clamp(max=0)

    recorded = []
    for group in groups:
        samples = []
        for sample in group.samples:
            own = next(logprobs)
            samples.append(
                replace(
                    sample,
                    old_logprobs=around(own, 0.4),
                    ref_logprobs=around(own, 0.4),
                    rollout_logprobs=around(own, 0.3),
                )
            )
        recorded.append(Group(group.group_id, tuple(samples)))
    sections = tiny.run_sections(folder, recorded)
    sections["model"]["transformer"] = {"params_dtype": "float64"}
    tiny.write_config(folder / "config.yaml", sections)
    for name, case in dense.LOSSES.items():
        sections["algorithm"] = case.algorithm()
        tiny.write_config(folder / f"{name}.yaml", sections)


@pytest.fixture(scope="module")
def folder_of(ranks: Pool, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a suite, with the reference of its groups."""

    @cache
    def make(suite: str) -> Path:
        folder = tmp_path_factory.mktemp(suite)
        prepare(folder, GROUPS[suite]())
        ranks.run(1, write_reference, folder)
        return folder

    return make


@pytest.mark.parametrize(("suite", "layout", "name"), CASES)
def test_loss_and_gradients_do_not_depend_on_the_packing_or_the_layout(
    ranks: Pool, folder_of: Callable[[str], Path], suite: str, layout: str, name: str
) -> None:
    variant = SUITES[suite][name]
    for found in ranks.run(NUM_RANKS[layout], compare, folder_of(suite), layout, variant):
        assert found.keys() == dense.LOSSES.keys()
        for loss, case in found.items():
            assert case.rows > 1 or name == "one_row"
            assert (case.resident_groups > 2) == (variant.residency != "never")
            assert (case.waves > 1) == variant.has_waves
            assert case.loss_error <= BOUND, f"{loss}: {case.loss_error:.1e}"
            assert len(case.errors) == 39
            beyond = {n: error for n, error in case.errors.items() if not error <= BOUND}
            assert not beyond, f"{loss}: {beyond}"
            assert case.first_tokens > 50


def test_the_large_groups_take_from_one_row_to_seven() -> None:
    shapes = [group_shape(group) for group in make_large_groups()]
    variant = RESIDENT_VARIANTS["retained"]
    residency = ResidencyConfig(choice="always", max_resident_tokens=variant.max_resident_tokens)
    rows = [
        len(plan_waves(shapes, variant.max_tokens, residency, members=[i])[0].rows)
        for i in range(len(shapes))
    ]
    assert rows == [1, 2, 3, 7, 2]
