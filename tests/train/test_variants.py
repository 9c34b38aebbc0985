"""The published variants that loss/README.md spells are runs, each its own step."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_pg.train import load_config
from tests.train import tiny
from tests.utils import ROOT

TEXT = (ROOT / "megatron_pg/loss/README.md").read_text()
VARIANTS: dict[str, dict[str, Any]] = yaml.safe_load(
    re.findall(r"^```yaml\n(.*?)^```", TEXT, flags=re.DOTALL | re.MULTILINE)[0]
)


def trained(folder: Path, algorithm: dict[str, Any]) -> dict[str, float]:
    """Metrics of a step whose second update has another policy than that of its old logprobs."""
    folder.mkdir()
    sections = tiny.run_sections(folder, tiny.make_groups(5, has_rollout_logprobs=True))
    sections["rollout"]["max_response_tokens"] = 20480  # DAPO's
    sections["algorithm"] = algorithm | {"ppo_epochs": 2}
    config = load_config(tiny.write_config(folder / "run.yaml", sections))
    with tiny.opened(config) as trainer:
        metrics: dict[str, float] = trainer.train_step()
        return metrics


@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_takes_it_and_it_is_no_default(tmp_path: Path, name: str) -> None:
    own, default = (
        trained(tmp_path / str(number), algorithm)
        for number, algorithm in enumerate((VARIANTS[name], {}))
    )
    assert own["actor/grad_norm"] > 0
    assert abs(own["actor/grad_norm"] / default["actor/grad_norm"] - 1) > 1e-4
