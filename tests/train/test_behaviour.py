"""What a run reports and how it treats odd rollouts; see ``behaviour``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("megatron.core")

from tests.ranks import Pool  # noqa: E402
from tests.train import tiny  # noqa: E402
from tests.train.behaviour import CHECKS  # noqa: E402


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_short_runs_report_and_behave_as_documented(
    ranks: Pool, check: Callable[[Path], None], tmp_path: Path
) -> None:
    ranks.run(1, check, tmp_path / "runs")


def test_malformed_rollouts_end_before_training_with_one_error(
    tmp_path: Path, commands: Path
) -> None:
    sections = tiny.run_sections(tmp_path)
    file = tmp_path / "rollouts.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[1]["reward"] = "good"
    rows[3]["response_ids"] = ["x"]
    del rows[5]["prompt_ids"]
    rows[7]["response_ids"][0] = tiny.VOCAB
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = str(tiny.write_config(tmp_path / "config.yaml", sections))
    done = tiny.launch([path], commands=commands)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr
    for place, field in (
        (2, "reward"),
        (4, "response_ids"),
        (6, "prompt_ids"),
        (8, "response_ids"),
    ):
        assert f"{file}, line {place}: field '{field}'" in done.stderr
    assert not (tmp_path / "out").exists()
    parallel = "parallel.pipeline_model_parallel_size=2"
    together = tiny.launch([path, parallel], num_ranks=2, commands=commands)
    assert together.returncode == 1 and "exitcode  : 2" in together.stderr
    # The launcher's own report follows; ours is there once.
    assert together.stderr.count("error: 4 problem") == 1
    assert "rank 1: " not in together.stderr


def test_the_command_line(tmp_path: Path, commands: Path) -> None:
    path = str(tiny.write_config(tmp_path / "config.yaml", tiny.run_sections(tmp_path)))
    told = tiny.launch(
        [path, "--dry-run", "--world-size", "6", "run.num_steps=4"], commands=commands
    )
    assert told.returncode == 0, told.stderr
    assert told.stdout.startswith("6 ranks: tp 1 x pp 1 (vpp 1) x dp 6")
    wrong = tiny.launch([path, "run.num_step=4"], commands=commands)
    assert wrong.returncode == 2 and "did you mean 'num_steps'" in wrong.stderr
    assert wrong.stderr.count("\n") == 2
    trained = tiny.launch([path, "run.num_steps=1"])
    assert trained.returncode == 0 and (tmp_path / "out" / "summary.json").is_file()
    assert "What sharing saved" in trained.stdout
    assert re.search(r"layers\W+local\b", trained.stdout)
