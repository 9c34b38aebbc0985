"""What ``plan_sharing`` says of rollouts in several rows, against counting by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_pg.data import Group, Sample, write_rollouts
from tests.data.forests import forest_groups
from tests.data.routed import distinct_prefixes, with_routes
from tests.data.samples import make_large_groups
from tests.tools.test_plan_sharing import HF
from tools.plan_sharing import main


def report(
    folder: Path, groups: list[Group], *more: str, model: dict[str, Any] = HF
) -> dict[str, Any]:
    (folder / "config.json").write_text(json.dumps(model))
    write_rollouts(groups, folder / "r.jsonl")
    arguments = [str(folder / "r.jsonl"), "--model", str(folder), "--json", str(folder / "out")]
    assert main([*arguments, *more]) == 0
    found: dict[str, Any] = json.loads((folder / "out").read_text())
    return found


def starts(samples: list[Sample]) -> set[tuple[int, ...]]:
    """Every start of every row: as many as there are tokens to encode."""
    rows = [sample.tokens.tolist() for sample in samples]
    return {tuple(row[: n + 1]) for row in rows for n in range(len(row))}


@pytest.mark.parametrize("seed", range(5))
def test_what_is_shared_within_rollouts_and_across_them(seed: int, tmp_path: Path) -> None:
    groups = forest_groups(seed)
    rollouts = [
        [s for s, own in zip(g.samples, g.rollouts.tolist()) if own == number]
        for g in groups
        for number in g.rollouts.unique().tolist()
    ]
    logical = [sum(len(s.tokens) for s in rows) for rows in rollouts]
    own = [len(starts(rows)) for rows in rollouts]
    unique = sum(len(starts(list(g.samples))) for g in groups)
    got = report(tmp_path, groups, "--min-shared", "1")["rollouts"]
    assert got["count"] == len(rollouts)
    assert got["several_rows"] == sum(len(rows) > 1 for rows in rollouts) > 0
    assert got["rows"]["max"] == max(map(len, rollouts)) and got["rows"]["min"] >= 1
    assert got["logical_tokens"] == sum(logical) and got["unique_tokens"] == unique
    assert got["shared_within"] == sum(logical) - sum(own) > 0
    assert got["shared_across"] == sum(own) - unique > 0
    ratios = [a / b for a, b in zip(logical, own)]
    assert got["growth"]["mean"] == pytest.approx(sum(ratios) / len(ratios))
    assert got["growth"]["max"] == pytest.approx(max(ratios)) and max(ratios) > 1


def test_turns_written_out_grow_with_their_square(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    context, rows = [1] * 10, []
    for turn in range(20):
        rows.append({"prompt_ids": list(context), "response_ids": [turn + 2] * 5, "reward": 1.0})
        context += [turn + 2] * 10
    (tmp_path / "config.json").write_text(json.dumps(HF))
    file = tmp_path / "r.jsonl"
    file.write_text("".join(json.dumps(r | {"group_id": 0, "rollout_id": 0}) + "\n" for r in rows))
    arguments = [str(file), "--model", str(tmp_path), "--json", str(tmp_path / "out")]
    assert main(arguments) == 0
    got = json.loads((tmp_path / "out").read_text())["rollouts"]
    assert got["logical_tokens"] == sum(15 + 10 * turn for turn in range(20)) == 2200
    assert got["unique_tokens"] == 15 + 19 * 10 == 205
    assert got["growth"]["max"] == pytest.approx(2200 / 205)
    told = " ".join(capsys.readouterr().out.split())
    assert "1995 tokens, 91% of those written out" in told and "at most 10.73" in told


def test_routes_cost_what_they_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = make_large_groups()
    groups = with_routes(bare, (2, 2), divergence=0.5, reports_last=True)
    found = {
        mode: report(tmp_path, groups, "--min-shared", "1", "--router-replay", mode)
        for mode in ("disabled", "R3")
    }
    wanted = sum(distinct_prefixes(group.samples) for group in groups)
    assert found["R3"]["unique_tokens"] == wanted
    split = wanted - found["disabled"]["unique_tokens"]
    assert found["R3"]["split_tokens"] == found["disabled"]["split_tokens"] == split > 20
    told = " ".join(capsys.readouterr().out.split())
    assert f"{split} (included)" in told and f"{split} (with --router-replay R3)" in told
    assert report(tmp_path, bare)["split_tokens"] == 0
    arguments = [str(tmp_path / "r.jsonl"), "--model", str(tmp_path), "--router-replay", "R3"]
    assert main(arguments) == 2
    assert "carry no routed_experts" in capsys.readouterr().err


def test_routes_of_layers_without_experts_cost_nothing(tmp_path: Path) -> None:
    experts = HF | dict(
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=6, mlp_only_layers=[0]
    )
    groups = with_routes(make_large_groups(), (2, 2), divergence=0.5, reports_last=True)
    read = [
        replace(g, samples=tuple(replace(s, routed_experts=routes_of_second(s)) for s in g.samples))
        for g in groups
    ]
    arguments = ("--min-shared", "1", "--router-replay", "R3")
    whole, alone = (report(tmp_path, each, *arguments, model=experts) for each in (groups, read))
    assert whole["unique_tokens"] == alone["unique_tokens"] > 100
    assert whole["unique_tokens"] == sum(distinct_prefixes(group.samples) for group in read)


def routes_of_second(sample: Sample) -> torch.Tensor:
    assert sample.routed_experts is not None
    return sample.routed_experts[:, 1:]


def test_of_rollouts_in_one_row_nothing_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    groups = make_large_groups()
    got = report(tmp_path, groups)["rollouts"]
    assert got["count"] == sum(len(g.samples) for g in groups) and got["several_rows"] == 0
    assert got["shared_within"] == 0 and got["growth"]["max"] == 1
    prompts = sum((len(g.samples) - 1) * len(g.samples[0].prompt_ids) for g in groups)
    assert got["shared_across"] == prompts > 0
    assert "of several rows" not in capsys.readouterr().out
