"""The simulated step: pipelines by hand, populations by what they are drawn from, rows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("megatron.core")
from tools.bench.pipeline import WaveTimes, pipeline_seconds  # noqa: E402
from tools.bench.populations import MAX_LEN, POPULATIONS  # noqa: E402
from tools.bench.run import main  # noqa: E402
from tools.bench.scale import STAGES  # noqa: E402


def wave(forward: list[float], backward: list[float], prefix: tuple[float, ...] = ()) -> WaveTimes:
    """Of one rank."""
    columns = (np.array(x, dtype=float).reshape(-1, 1) for x in (prefix, forward, backward, prefix))
    return WaveTimes(*columns)


def seconds(num_stages: int, *waves: WaveTimes) -> float:
    (slowest,) = pipeline_seconds(waves, num_stages)
    return float(slowest)


@pytest.mark.parametrize("num_stages", [1, 2, 4, 8])
@pytest.mark.parametrize("num_rows", [1, 3, 8, 11])
def test_equal_rows_idle_while_the_pipeline_fills_and_drains(
    num_stages: int, num_rows: int
) -> None:
    got = seconds(num_stages, wave([1.0] * num_rows, [2.0] * num_rows))
    assert got == pytest.approx(3 * (num_rows + num_stages - 1) / num_stages)


def test_unequal_rows_by_hand() -> None:
    """Two stages, rows of 4 and 2 both ways, so that each stage takes half.

    First stage: 4 until 2, 2 until 3. Second: 4 from 2 to 4 and back to 6, 2 to 7 and back to 8;
    the first one runs 4 back from 6 to 8, 2 from 8 to 9.
    """
    assert seconds(2, wave([4, 2], [4, 2])) == 9
    # The short row first: 2 from 1 to 2 and back to 3, 4 from 3 (it came at 3) to 5 and back to 7,
    # then to 9 on the first stage.
    assert seconds(2, wave([2, 4], [2, 4])) == 9
    # A long row between short ones keeps the first stage waiting for what the second has not sent.
    mixed, alike = (
        seconds(2, wave([1, 9, 1, 9], [1, 9, 1, 9])),
        seconds(2, wave([1, 1, 9, 9], [1, 1, 9, 9])),
    )
    assert mixed > alike > 20


def test_prefix_rows_pass_before_and_behind_the_rows_of_their_wave() -> None:
    # Forward 2 on each stage, the first one's row begins at 2; then as without, then 2 back.
    assert seconds(2, wave([2], [4], (4,))) == 2 + 2 + 1 + 2 + 2 + 2
    both = wave([2], [4], (4,))
    assert seconds(1, both, both) == 2 * (4 + 2 + 4 + 4) == float(2 * both.work[0])
    # The first stage ends a wave and begins the next.
    assert seconds(2, both, both) == 2 * seconds(2, both)


def test_ranks_are_simulated_side_by_side() -> None:
    random = np.random.default_rng(0)
    forward, backward = random.random((2, 9, 3))
    nothing = np.zeros((0, 3))
    together = pipeline_seconds([WaveTimes(nothing, forward, backward, nothing)], 4)
    alone = [seconds(4, wave(forward[:, i].tolist(), backward[:, i].tolist())) for i in range(3)]
    assert together.tolist() == pytest.approx(alone)


def test_populations_are_what_they_say() -> None:
    reasoning, documents, agents = (p.shapes(400) for p in POPULATIONS)
    for shapes, median in ((reasoning, 4096), (documents, 1024)):
        lens = np.concatenate([shape.tree.segment_lens[1:] for shape in shapes])
        assert np.median(lens) == pytest.approx(median, rel=0.15)
        assert np.quantile(np.log(lens), 0.84) == pytest.approx(np.log(median) + 0.99, rel=0.02)
        assert lens.max() <= MAX_LEN and all(shape.tree.depth == 1 for shape in shapes)
        logs = np.log([shape.tree.segment_lens[1:] for shape in shapes])
        # Half of the spread is common to a group; what is cut at the end is not.
        assert logs.mean(1).var() / logs.var() == pytest.approx(0.53, abs=0.06)
    depths = [shape.tree.depth for shape in agents]
    assert np.median(depths) >= 5 and max(depths) <= 13
    assert max(int(shape.tree.sample_lens.max()) for shape in agents) <= MAX_LEN + 4096
    assert any((shape.tree.segment_parents < 0).sum() == 2 for shape in agents), "helpers"
    again = POPULATIONS[2].shapes(3)
    assert [s.tree.segment_lens.tolist() for s in again] == [
        s.tree.segment_lens.tolist() for s in agents[:3]
    ]


@pytest.mark.megatron
def test_rows_of_the_simulation(tmp_path: Path) -> None:
    files = tmp_path / "rows.json", tmp_path / "page.png"
    assert main(["scale", "--quick", "--json", str(files[0]), "--plot", str(files[1])]) == 0
    rows = json.loads(files[0].read_text())
    assert files[1].read_bytes().startswith(b"\x89PNG")
    assert len(rows) == len(POPULATIONS) * 2 * (3 + len(STAGES) - 1)
    for row in rows:
        assert row["share"] == pytest.approx(row["ratio"] / row["bound"])
        if row["baseline"] in ("mean rank", "nothing cut"):
            assert 0 < row["ratio"] <= row["bound"] + 1e-9 <= 1 + 1e-9
        elif row["baseline"] == "no idle stage":
            # Short rows at both ends leave less idle than equal ones.
            assert 0 < row["ratio"] < 1 and row["share"] < 1.1
    cut = [r["shape"] for r in rows if r["baseline"] == "nothing cut"]
    assert all(shape["reuse_kept"] <= shape["reuse"] for shape in cut)
    assert any(shape["reuse_kept"] < shape["reuse"] for shape in cut)
