"""Benchmarks: they run, keep their contract, and report nothing when compared paths differ."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_pg import PrefixTree, pack_trees, prefix_grouped_attention
from megatron_pg.attention import AttentionKind
from tests.utils import ROOT
from tools.bench import attention, attention_kinds, timing
from tools.bench.processes import median_row, rows_of_processes
from tools.bench.registry import BenchmarkMismatch, BenchmarkRow, Options
from tools.bench.render import make_panels
from tools.bench.shapes import Shape, binary_tree, ragged_star, standard_shapes, star, two_level

FIELDS = {"benchmark", "shape", "baseline", "ratio", "bound", "share", "machine"}
MEGATRON_FREE = ("attention", "pack", "layout")
# The tools' own modules need Megatron-Core as soon as all benchmarks are registered.
pytest.importorskip("megatron.core")
from megatron_pg.mcore.layers import core_attention  # noqa: E402
from tools.bench.run import main  # noqa: E402


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(name: str, folder: Path, *more: str) -> list[dict]:
    file = folder / f"{name}.json"
    assert main([name, "--quick", "--threads", "1", "--json", str(file), *more]) == 0
    return json.loads(file.read_text())


@pytest.mark.parametrize("name", MEGATRON_FREE)
def test_rows_keep_the_contract(name: str, tmp_path: Path) -> None:
    check_rows(name, run(name, tmp_path))


@pytest.mark.megatron
@pytest.mark.skipif(torch.cuda.is_available(), reason="quick shapes are for the CPU stand-ins")
@pytest.mark.parametrize("name", ["layer", "linear", "logprob", "memory"])
def test_model_rows_keep_the_contract(name: str, tmp_path: Path) -> None:
    check_rows(name, run(name, tmp_path))


@pytest.mark.megatron
@pytest.mark.skipif(torch.cuda.is_available(), reason="quick shapes are for the CPU stand-ins")
def test_step_runs_on_one_rank_and_on_two(tmp_path: Path) -> None:
    rows = run("step", tmp_path, "--threads", "2")
    check_rows("step", rows)
    for row in rows:
        assert row["threads"] == (2 if row["shape"]["tp"] * row["shape"]["pp"] == 1 else 1)
    assert {(r["shape"]["tp"], r["shape"]["pp"]) for r in rows} == {(1, 1), (2, 1), (1, 2)}
    (lone,) = (r for r in rows if r["shape"].get("num_generations") == 1)
    assert lone["bound"] == 1.0


@pytest.mark.megatron
@pytest.mark.skipif(torch.cuda.is_available(), reason="quick shapes are for the CPU stand-ins")
def test_step_runs_on_ranks_that_divide_its_rows(tmp_path: Path, capsys) -> None:
    (row,) = run("step", tmp_path, "--cp", "2")
    assert (row["shape"]["cp"], row["shape"]["tp"], row["shape"]["pp"]) == (2, 1, 1)
    assert row["max_error"] <= 1e-3 and row["bound"] > 2 and row["threads"] == 1
    with pytest.raises(SystemExit):
        main(["layer", "--quick", "--cp", "2"])
    assert "--cp is of step, not of layer" in capsys.readouterr().err


@pytest.mark.megatron
@pytest.mark.skipif(torch.cuda.is_available(), reason="quick shapes are for the CPU stand-ins")
def test_ordinary_rows_run_on_one_rank_and_on_two(tmp_path: Path) -> None:
    rows = run("transparent", tmp_path)
    check_rows("transparent", rows)
    assert {(r["shape"]["tp"], r["shape"]["pp"]) for r in rows} == {(1, 1), (2, 1), (1, 2)}
    nothing = [r for r in rows if "nothing shared" in r["shape"]["name"]]
    assert len(nothing) == 3 and all(r["bound"] == 1.0 for r in nothing)
    assert all(r["bound"] > 1.3 for r in rows if r not in nothing)


def check_rows(name: str, rows: list[dict]) -> None:
    assert len(rows) > 2
    for row in rows:
        assert row.keys() >= FIELDS
        assert row["benchmark"] == name and row["ratio"] > 0
        assert row["share"] == pytest.approx(row["ratio"] / row["bound"])
        assert {"hardware", "versions", "commit"} <= row["machine"].keys()
        is_other_layer = row["baseline"].startswith(("no window", "no sink", "grouped heads"))
        if name not in ("pack", "layout") and not is_other_layer:
            assert row["max_error"] <= 1e-3, "results were compared"


def test_bounds_of_layers_are_their_multiplications() -> None:
    """By hand: a prompt of 3 and responses of 1 and 2 tokens, a window of 1."""
    shape = Shape(PrefixTree.from_group(3, [1, 2]), {"name": "tiny"})
    windowed = attention_kinds.Layer(kind=AttentionKind(window=1, value_dim=16), head_dim=32)
    packed, written_out = 1 + 2 + 2 + 2 + 2 + 2, (1 + 2 + 2 + 2) + (1 + 2 + 2 + 2 + 2)
    # Forward: q k and p v. Backward: q k, dout v, then dq and dk of head_dim, dv of value_dim.
    per_pair = 4 * ((32 + 16) + (32 + 16 + 32 + 32 + 16))
    assert windowed.multiplications(shape.packed) == per_pair * packed
    assert windowed.multiplications(shape.written_out) == per_pair * written_out


def test_the_plot_sweeps_lengths(tmp_path: Path) -> None:
    file = tmp_path / "figure.png"
    rows = run("attention", tmp_path, "--plot", str(file))
    swept = {row["shape"].get("sweep") for row in rows}
    assert swept == {None, "prefix_len", "suffix_len", "num_generations", "depth"}
    assert file.read_bytes().startswith(b"\x89PNG")


def test_residency_keeps_the_peak_flat(tmp_path: Path) -> None:
    file = tmp_path / "figure.png"
    rows = run("resident_memory", tmp_path, "--plot", str(file))
    # The first group fills a part of one row only.
    _, some, twice = rows
    assert twice["shape"]["num_generations"] == 2 * some["shape"]["num_generations"]
    assert twice["ours_peak_bytes"] < 1.1 * some["ours_peak_bytes"]
    assert twice["baseline_peak_bytes"] > 1.5 * some["baseline_peak_bytes"]
    assert file.read_bytes().startswith(b"\x89PNG")


def test_rows_of_several_processes_are_medians(tmp_path: Path) -> None:
    rows = run("attention", tmp_path, "--processes", "2", "--shapes", "ragged,window")
    check_rows("attention", rows)
    assert {row["processes"] for row in rows} == {2}

    def row(ratio: float, ours_ms: float, **more) -> BenchmarkRow:
        fixed = dict(benchmark="layer", shape={"name": "s"}, baseline="written out", bound=2.0)
        return BenchmarkRow(**fixed, ratio=ratio, ours_ms=ours_ms, baseline_ms=9.0, **more)

    median = median_row([row(1.0, 5.0, max_error=1e-7), row(3.0, 2.0), row(1.5, 4.0, load=0.5)])
    assert (median.ratio, median.ratio_spread, median.share) == (1.5, (1.25, 2.25), 0.75)
    assert (median.ours_ms, median.max_error, median.load) == (4.0, 1e-7, 0.5)
    with pytest.raises(ValueError, match="one comparison"):
        median_row([row(1.0, 5.0), replace(row(1.0, 5.0), bound=3.0)])


def test_a_failing_process_reports_nothing(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError, match="status 3"):
        rows_of_processes([sys.executable, "-c", "raise SystemExit(3)"], 2)
    with pytest.raises(SystemExit):
        main(["attention", "--quick", "--processes", "2", "--plot", str(tmp_path / "figure.png")])
    with pytest.raises(SystemExit):
        main(["resident", "--quick", "--plot", str(tmp_path / "figure.png")])


@pytest.mark.parametrize("option", ["--processes", "--rounds", "--threads"])
def test_counts_below_one_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["attention", "--quick", option, "0"])
    assert f"{option}: takes 1 or more, got 0" in capsys.readouterr().err


def _differs(options: Options) -> list[BenchmarkRow]:
    raise BenchmarkMismatch(f"process {os.getpid()}, {torch.get_num_threads()} thread(s)")


@pytest.mark.megatron
def test_a_comparison_has_a_process_of_its_own_that_says_what_differs() -> None:
    from tools.bench.ranks import on_ranks

    with pytest.raises(BenchmarkMismatch, match=r"process \d+, 3 thread\(s\)$") as found:
        torch.set_num_threads(3)
        on_ranks(1, _differs, Options())
    assert str(os.getpid()) not in str(found.value)
    with pytest.raises(BenchmarkMismatch, match=f"process {os.getpid()}"):
        on_ranks(1, _differs, Options(quick=True))


@pytest.mark.megatron
def test_what_a_step_holds_is_what_was_measured() -> None:
    """The committed peaks of activations, of steps whose head keeps next to nothing."""
    from tools.bench.gpt import Dims
    from tools.bench.room import needed_bytes

    file = ROOT / "tools/bench/results/cpu_epyc-2core_2026-11-22.json"
    rows = [row for row in json.loads(file.read_text()) if row["benchmark"] == "memory"]
    compared = 0
    for row in rows:
        dims = Dims(chunk_tokens=row["shape"]["chunk_tokens"])
        sizes = {n: row["shape"][n] for n in ("layers", "hidden", "ffn", "heads", "vocab")}
        assert sizes.items() <= dims.describe().items()
        for tokens, peak in (
            (row["shape"]["logical_tokens"], row["baseline_peak_bytes"]),
            (row["shape"]["unique_tokens"], row["ours_peak_bytes"]),
        ):
            more = needed_bytes(dims, tokens, torch.float32) - needed_bytes(dims, 0, torch.float32)
            assert more / 1.75 == pytest.approx(peak, rel=0.06)
            compared += 1
    assert compared > 10
    # A pipeline's first stage holds the rows of both, its second stage one.
    none, one, two = (
        needed_bytes(Dims(pp=pp), n, torch.float32) for pp, n in ((2, 0), (1, 99), (2, 99))
    )
    assert (two - none) / (one - needed_bytes(Dims(), 0, torch.float32)) == pytest.approx(1.5)


@pytest.mark.megatron
def test_a_comparison_that_does_not_fit_is_left_out(monkeypatch, capsys) -> None:
    from tools.bench import room

    monkeypatch.setattr(room, "free_bytes", lambda options: 3 << 30)
    assert main(["step", "--ranks", "1", "--shapes", "P4096 R512 G8"]) == 0
    said = capsys.readouterr().err
    assert "step P4096 R512 G8: needs about 13." in said and "3.0 GiB are free: left out" in said
    assert room.has_room("tiny", room.Dims(num_layers=1), 10, Options())


def test_time_that_no_path_avoids_is_beside_the_bound() -> None:
    times = timing.Times({"ours": [10.0], "written out": [30.0], "optimizer": [2.0]}, "wall")
    assert times.beside(4.0, "optimizer") == pytest.approx((4.0 * 8 + 2) / 10)
    slow = timing.Times({"ours": [1.0], "optimizer": [2.0]}, "wall")
    assert slow.beside(4.0, "optimizer") == 1.0


@pytest.mark.megatron
@pytest.mark.parametrize("mode", ["retain", "recompute"])
def test_bound_with_idle_stages_is_the_planners(mode: str) -> None:
    """Where every token costs the same and none is predicted; by hand where one is."""
    from megatron_pg.data import CostModel, ResidencyConfig, step_cost
    from tools.bench import resident

    case = resident.Case(16, 2, 16, 2, 24)
    groups, cost = (
        case.groups(64),
        CostModel(per_token=1.0, per_attention_pair=0.0, per_loss_token=0.0),
    )
    for choice in ("always", "never"):
        dims = SimpleNamespace(pp=2, cost_model=cost)
        plans = resident._plan(case, groups, choice, mode, dims)
        work = resident.phases(plans, mode, dims)
        config = ResidencyConfig(mode=mode, max_resident_tokens=99, num_stages=2)
        assert sum(phase.time(2) for phase in work) == pytest.approx(step_cost(plans, config, cost))
        assert any(len(phase.layers) > 1 for phase in work)
    # Rows of 4 and 2 on two stages, heads of 3 on the last, which begins 2 later: 2 + 5 + 4.
    assert resident.Phase([4.0, 2.0], [3.0, 3.0]).time(2) == 2 + (2 + 3) + (1 + 3)
    assert resident.Phase([4.0, 2.0], [3.0, 3.0]).time(1) == 12
    assert resident.Phase([], []).time(2) == 0


def test_panels_draw_time_and_memory_with_their_bounds() -> None:
    def row(prefix_len: int, baseline: str, ratio: float, peaks: tuple[int, int] | None) -> dict:
        shape = dict(prefix_len=prefix_len, suffix_len=8, num_generations=4, sweep="prefix_len")
        tokens = dict(unique_tokens=32 + prefix_len, logical_tokens=4 * (8 + prefix_len))
        fields = dict(benchmark="layer", baseline=baseline, ratio=ratio, bound=2 * ratio)
        ours, theirs = peaks or (None, None)
        peak = dict(ours_peak_bytes=ours, baseline_peak_bytes=theirs)
        return {**fields, **peak, "shape": {**shape, **tokens}, "ours_ms": 1.0}

    rows = [
        row(64, "written out", 3.0, (10, 25)),
        row(32, "written out", 2.0, (10, 20)),
        row(32, "peer", 1.0, (10, 30)),
        row(64, "peer", 1.5, None),
    ]
    not_swept = {**rows[0], "shape": {"name": "alone"}}
    panels = make_panels([*rows, not_swept])
    assert panels.keys() == {("layer", q, "prefix_len") for q in ("time", "memory")}
    (memory,) = panels["layer", "memory", "prefix_len"]
    assert (memory.x, memory.ratios) == ([32, 64], [2.0, 2.5])
    assert memory.bounds == [160 / 64, 288 / 96]
    written_out, peer = panels["layer", "time", "prefix_len"]
    assert (peer.label, written_out.label) == ("peer, R8 G4", "written out, R8 G4")
    assert (peer.ratios, written_out.bounds) == ([1.0, 1.5], [4.0, 6.0])
    split = {**rows[0], "shape": {**rows[0]["shape"], "tp": 2}}
    _, _, of_two_ranks = make_panels([*rows, split])["layer", "time", "prefix_len"]
    assert (of_two_ranks.label, of_two_ranks.x) == ("written out, R8 G4 tp=2", [64])


def test_bound_of_the_peer_counts_the_pairs_of_its_calls() -> None:
    ragged = Shape(PrefixTree.from_group(3, [2, 1]), {})
    # 3 x 3 in the prefix, 2 suffixes padded to 2 tokens that meet 3 + 2 keys.
    assert attention.prefix_grouper_pairs(ragged, causal_prefix=False) == 9 + 2 * 2 * 5
    assert attention.prefix_grouper_pairs(ragged, causal_prefix=True) == 6 + 2 * 2 * 5
    assert ragged.tree.attention_pairs == 6 + (2 * 3 + 3) + (3 + 1)


@pytest.mark.megatron
def test_bound_of_the_stock_spec_counts_padding_and_hidden_scores() -> None:
    from tools.bench.gpt import Dims
    from tools.bench.layer import _stock_flops

    ragged, dims = Shape(PrefixTree.from_group(3, [2, 1]), {}), Dims(num_layers=1)
    cost = dims.cost_model
    # 2 samples padded to 5 tokens. Scores are kept, so their backward is 2 forwards, not 2.5.
    want = 3 * cost.per_token * 2 * 5 + 3 * cost.per_attention_pair * 2 * 5 * 5
    assert _stock_flops(ragged, dims) == pytest.approx(want)


def test_flex_baseline_sees_what_a_token_sees() -> None:
    layout = two_level(16, 8, 4, 2, 2).packed
    qkv = torch.randn(3, layout.total_tokens, 2, 16, dtype=torch.float64)
    got = attention.flex(layout, torch.device("cpu"))(*qkv)
    want = prefix_grouped_attention(*qkv, layout, backend="reference")
    torch.testing.assert_close(got, want)
    causal = pack_trees([PrefixTree.from_group(layout.total_tokens - 1, [1])])
    assert (want - prefix_grouped_attention(*qkv, causal, backend="reference")).abs().max() > 0.1


def test_a_wrong_result_stops_without_a_speed_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = attention.prefix_grouped_attention

    def wrong_when_packed(q, k, v, layout):
        return right(q, k, v, layout) * (1.001 if layout.num_trees == 1 else 1.0)

    monkeypatch.setattr(attention, "prefix_grouped_attention", wrong_when_packed)
    file = tmp_path / "rows.json"
    assert main(["attention", "--quick", "--threads", "1", "--json", str(file)]) == 1
    printed = capsys.readouterr()
    assert "out differs by" in printed.err and not printed.out
    assert not file.exists()


@pytest.mark.megatron
@pytest.mark.skipif(torch.cuda.is_available(), reason="quick shapes are for the CPU stand-ins")
@pytest.mark.parametrize(
    "name", ["layer", "logprob", "step", "memory", "resident", "resident_memory", "transparent"]
)
def test_a_wrong_model_stops_without_a_speed_up(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right, is_wrong = core_attention.prefix_grouped_attention, []

    def wrong_when_packed(q, k, v, layout, *more, **named):
        out = right(q, k, v, layout, *more, **named)
        is_ours = layout.resident_spans if "resident" in name else layout.num_trees == 1
        is_wrong.append(bool(is_ours))
        return out * (1.1 if is_wrong[-1] else 1.0)

    monkeypatch.setattr(core_attention, "prefix_grouped_attention", wrong_when_packed)
    assert main([name, "--quick", "--threads", "1", "--ranks", "1"]) == 1
    printed = capsys.readouterr()
    assert f"{name}: " in printed.err and "no speed-up is reported" in printed.err
    assert not printed.out and True in is_wrong and False in is_wrong


def test_check_equal_refuses_nan_and_shapes() -> None:
    one, nan = torch.ones(3), torch.tensor([1.0, float("nan"), 1.0])
    assert timing.check_equal([("same", one, one)], 0.0) == 0.0
    for got in (nan, torch.ones(4), one + 1e-3):
        with pytest.raises(BenchmarkMismatch, match="x"):
            timing.check_equal([("x", got, one)], 1e-4)


def test_rounds_are_interleaved() -> None:
    order: list[str] = []
    paths = {name: lambda name=name: order.append(name) for name in ("ours", "a", "b")}
    times = timing.time_interleaved(paths, 2)
    assert order == ["ours", "a", "b", "b", "a", "ours"]
    assert times.rounds == 2


def test_ratios_are_taken_within_a_round() -> None:
    times = timing.Times({"ours": [1.0, 2.0, 10.0], "base": [8.0, 3.0, 4.0]}, "wall")
    fields = times.against("base")
    assert (fields["ours_ms"], fields["baseline_ms"], fields["ratio"]) == (2.0, 4.0, 1.5)
    assert fields["ratio_spread"] == pytest.approx((0.95, 4.75))


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the CPU allocator")
def test_peak_counts_what_lives_at_once() -> None:
    size = 1 << 18

    def allocate() -> None:
        first = torch.zeros(size, dtype=torch.float32)
        second = first + 1
        del first
        third = second + 1
        del second, third

    assert timing.peak_bytes(allocate) == pytest.approx(2 * 4 * size, rel=0.01)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other libraries are left alone")
def test_freed_memory_is_kept() -> None:
    """A tensor of 256 MiB that was freed leaves the process only without the setting."""
    script = """if True:
        import os, sys, torch
        from tools.bench.machine import keep_freed_memory
        if sys.argv[1] == "keep":
            keep_freed_memory()
        torch.ones(64, 1 << 20)
        with open("/proc/self/statm") as file:
            print(int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    """
    resident_bytes = {}
    for name in ("keep", "return"):
        done = subprocess.run(
            [sys.executable, "-c", script, name],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        resident_bytes[name] = int(done.stdout)
    assert resident_bytes["keep"] - resident_bytes["return"] > 128 << 20


def test_shapes_are_what_their_names_say() -> None:
    shape = star(32, 8, 4)
    assert shape.token_ratio == 4 * 40 / 64
    pairs = 32 * 33 / 2 + 4 * (8 * 32 + 8 * 9 / 2)
    assert shape.pair_ratio == 4 * (40 * 41 / 2) / pairs
    ragged = ragged_star(1024, 128, 8).tree
    assert ragged.unique_tokens == 2048 and len(np.unique(ragged.segment_lens)) == 9
    assert two_level(16, 8, 4, 2, 2).tree.depth == 2
    assert binary_tree(4, 3).tree.num_samples == 8
    assert all(
        s.written_out.total_tokens == s.tree.logical_tokens
        for s in standard_shapes(Options(quick=True, sweep=True))
    )


def test_rows_hold_as_many_samples_as_fit() -> None:
    shape = ragged_star(32, 8, 4)
    lens = shape.tree.sample_lens.tolist()
    for limit in (1, 80, 10**6):
        rows = shape.written_out_rows(limit)
        tokens = [row.total_tokens for row in rows]
        assert sum(tokens) == sum(lens) and sum(row.num_trees for row in rows) == len(lens)
        assert all(row.num_trees == 1 or row.total_tokens <= limit for row in rows)
        firsts = np.cumsum([0] + [row.num_trees for row in rows])[1:-1]
        assert all(n + lens[i] > limit for n, i in zip(tokens, firsts))
        assert len(rows) == {1: 4, 80: 2, 10**6: 1}[limit]
    (whole,) = shape.written_out_rows(None)
    assert whole.total_tokens == shape.written_out.total_tokens


@pytest.mark.megatron
@pytest.mark.skipif(torch.cuda.is_available(), reason="quick shapes are for the CPU stand-ins")
def test_rows_of_a_step_add_up_to_one() -> None:
    """Loss and gradients of written-out samples, in one row and in one row for each."""
    from tools.bench.gpt import make_dims, make_microbatches, megatron
    from tools.bench.training import Trainer

    options = Options(quick=True)
    dims = make_dims(options)
    with megatron(dims):
        trainer = Trainer(dims, torch.float32)
        one, each = (
            make_microbatches(ragged_star(32, 8, 4), dims, options.device, max_tokens=limit)
            for limit in (None, 1)
        )
        assert (len(one["written out"]), len(each["written out"])) == (1, 4)
        paths = {
            name: lambda works=works: trainer.forward_backward(works["written out"])
            for name, works in (("ours", one), ("each", each))
        }
        assert 0 < trainer.check_equal(paths, "each") < 1e-4


def test_the_command_runs_from_anywhere(tmp_path: Path) -> None:
    script, file = str(ROOT / "tools/bench/run.py"), tmp_path / "rows.json"
    done = subprocess.run(
        [sys.executable, script, "layout", "--quick", "--threads", "1", "--json", str(file)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(file.read_text())) == 4


@pytest.mark.parametrize("file", sorted((ROOT / "tools/bench/results").glob("*.json")))
def test_committed_results_name_what_they_were_measured_on(file: Path) -> None:
    rows = json.loads(file.read_text())
    assert rows and all(row.keys() >= FIELDS for row in rows)
    assert all(row["machine"]["commit"] != "unknown" for row in rows)
    assert file.with_suffix(".md").is_file()
