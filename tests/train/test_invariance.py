"""One loss and one gradient, however groups are packed, ordered, split and spread over ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_pg.data import Group, ResidencyConfig, group_shape, plan_waves
from tests.data.samples import make_large_groups
from tests.train import dense, tiny
from tests.train.invariance_worker import RESIDENT_VARIANTS, variant_names
from tests.utils import run_ranks

LAYOUTS = {
    "packing": {
        1: ["one"],
        2: ["pp2", "dp2", "pp2_vpp2", "tp2_sp", "dp2_overlap"],
        4: ["pp4", "pp2_dp2", "tp2_sp_dp2"],
    },
    "resident": {
        1: ["one"],
        2: ["pp2", "dp2_overlap"],
        4: ["pp2_vpp2_dp2_overlap"],
    },
}
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


@pytest.mark.parametrize("suite", ["packing", "resident"])
def test_loss_and_gradients_do_not_depend_on_the_packing_or_the_layout(
    suite: str, tmp_path: Path
) -> None:
    prepare(tmp_path, GROUPS[suite]())
    for world_size, names in LAYOUTS[suite].items():
        output = run_ranks(
            "tests.train.invariance_worker", world_size, str(tmp_path), suite, *names, timeout=600
        )
        proven = {
            " ".join(line.split(":")[0].split()[1:])
            for line in output.splitlines()
            if line.startswith("proven")
        }
        assert proven == {f"{name} {v}" for name in names for v in variant_names(suite, name)}


def test_the_large_groups_take_from_one_row_to_seven() -> None:
    shapes = [group_shape(group) for group in make_large_groups()]
    variant = RESIDENT_VARIANTS["retained"]
    residency = ResidencyConfig(choice="always", max_resident_tokens=variant.max_resident_tokens)
    rows = [
        len(plan_waves(shapes, variant.max_tokens, residency, members=[i])[0].rows)
        for i in range(len(shapes))
    ]
    assert rows == [1, 2, 3, 7, 2]
