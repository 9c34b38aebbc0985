"""The check of a GPU: what it says without one, and how a stage fares within its time."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.utils import ROOT
from tools.bench.summarize import main as summarize
from tools.check_gpu.__main__ import main, run
from tools.check_gpu.needs import Need, find_needs
from tools.check_gpu.report import make_json, make_page
from tools.check_gpu.stages import Outcome, Stage, make_stages, read_tests, run_stage

# In two: a module that has it is taken for one with tests of a GPU.
MARK = "mark." + "gpu"
ROW = dict(
    benchmark="step",
    shape={"name": "P2 R1 G2"},
    baseline="written out",
    ratio=1.5,
    bound=2.0,
    share=0.75,
    reachable=None,
    ours_ms=2.0,
    baseline_ms=3.0,
    ours_flops=4e12,
    ours_peak_bytes=2**30,
    baseline_peak_bytes=None,
    max_error=1e-3,
    machine=dict(commit="abc", date="today", python="3", attention_backend="flash", versions={}),
)


def python(code: str, quick: tuple[str, ...] | None = (), needs: tuple[str, ...] = ()) -> Stage:
    return Stage("one", needs, (sys.executable, "-c", code, "{out}"), quick, 60)


def outcome_of(code: str, tmp_path: Path, seconds: float = 60) -> Outcome:
    return run_stage(python(code), False, seconds, tmp_path, open(tmp_path / "log", "a"))


def test_what_a_stage_wrote_is_kept(tmp_path: Path) -> None:
    code = f"import sys; open(sys.argv[1] + '/rows.json', 'w').write({json.dumps([ROW])!r})"
    outcome = outcome_of(code, tmp_path)
    assert (outcome.status, outcome.rows, outcome.detail) == ("ok", [ROW], "1 comparison(s)")
    failed = outcome_of("print('why'); raise SystemExit(3)", tmp_path)
    assert (failed.status, failed.detail) == ("failed", "1 comparison(s), exit code 3: see the log")
    assert "why" in (tmp_path / "log").read_text()


def test_a_stage_that_hangs_is_ended_with_what_it_started(tmp_path: Path) -> None:
    """By Ctrl-C, on which it writes; its child ignores that and is killed."""
    code = """if True:
        import pathlib, subprocess, sys, time
        loop = "import signal as s, time; s.signal(2, s.SIG_IGN); print(flush=True); time.sleep(99)"
        child = subprocess.Popen([sys.executable, "-c", loop], stdout=subprocess.PIPE)
        child.stdout.readline()
        pathlib.Path(sys.argv[1], "child").write_text(str(child.pid))
        try:
            time.sleep(99)
        except KeyboardInterrupt:
            pathlib.Path(sys.argv[1], "ceilings.json").write_text('{"x": 1.0}')
    """
    outcome = outcome_of(code, tmp_path, seconds=5)
    assert (outcome.status, outcome.ceilings) == ("out of time", {"x": 1.0})
    state = Path("/proc") / (tmp_path / "child").read_text() / "stat"
    for _ in range(100):
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError("the child runs on")


@pytest.mark.parametrize(
    ("stage", "seconds", "is_quick", "detail"),
    [
        (python("", needs=("gpu", "rich")), 60, False, "needs gpu"),
        (python("", quick=None), 60, True, "not under --quick"),
        (python(""), 3, False, "no time is left"),
    ],
)
def test_stages_that_are_left_out_say_why(stage, seconds, is_quick, detail, capsys) -> None:
    outcome = run(stage, {"rich"}, is_quick, seconds, io.StringIO())
    assert (outcome.status, outcome.detail) == ("left out", detail)
    assert f"left out, 0 s, {detail}" in capsys.readouterr().out


def test_reports_of_tests_are_read(tmp_path: Path) -> None:
    module = tmp_path / "test_it.py"
    module.write_text(
        "import pytest\n"
        "def test_right(record_property):\n"
        "    record_property('backend', 'flash')\n"
        "    record_property('error', 0.004)\n"
        "def test_wrong(): assert 1 == 2, 'no'\n"
        "def test_not(): pytest.skip('missing')\n"
    )
    report = tmp_path / "junit.xml"
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", str(module)]
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    tests = read_tests(report)
    assert [test["outcome"] for test in tests] == ["passed", "failure", "skipped"]
    right, wrong, skipped = tests
    assert (right["backend"], float(right["error"])) == ("flash", 0.004)
    assert "1 == 2" in wrong["message"] and skipped["message"] == "missing"
    page = make_page([], [Outcome("tests", "failed", 1.0, "", tests=tests)], 1.0)
    assert "| flash | 1 | 0.0040 |" in page and "test_wrong: AssertionError" in page
    assert "skipped: missing" in page and "test_right" not in page


def test_the_page_and_the_file_hold_what_was_found() -> None:
    needs = [Need("gpu", "H100, 580", "all"), Need("triton", None, "Triton kernels")]
    outcomes = [Outcome("step", "ok", 2.0, "1 comparison(s)", [ROW], ceilings={"copy": 3000.0})]
    page, found = make_page(needs, outcomes, 9.0), make_json(needs, outcomes)
    assert page.startswith("# H100\n") and "* triton: Triton kernels" in page
    row = "| step | P2 R1 G2 | written out | 1.500 | 2.000 | 0.750 |  | 2.000 | 3.000 | 2000.0 |"
    assert row + " 1.00 |  | 1.0e-03 |" in page
    assert "* copy: 3000.0" in page and "* commit: abc" in page
    assert found["rows"] == [ROW] and found["ceilings"] == {"copy": 3000.0}
    assert json.loads(json.dumps(found))["needs"][1]["found"] is None


def test_results_become_a_page_beside_the_others(tmp_path: Path) -> None:
    folder = ROOT / "tools/bench/results"
    for committed in folder.glob("h*00_*.json"):
        rows = json.loads(committed.read_text())
        found, out = tmp_path / "check_gpu.json", tmp_path / committed.name
        found.write_text(json.dumps({"rows": rows, "stages": []}))
        assert summarize([str(out), str(found)]) == 0
        assert json.loads(out.read_text()) == rows
        page = out.with_suffix(".md").read_text()
        assert page == committed.with_suffix(".md").read_text() and "H200" in page


def test_stages_name_what_is_looked_for_and_what_is_there() -> None:
    stages, known = make_stages({"xdist"}), {need.name for need in find_needs()}
    for stage in stages:
        assert set(stage.needs) <= known
        files = [
            part for part in stage.command if part.startswith(("tests/", "tools/", "examples/"))
        ]
        assert all((ROOT / file).is_file() for file in files)
    (tests,) = (stage for stage in stages if stage.name == "tests")
    assert {"tests/attention/test_gpu.py", "-n"} <= set(tests.command)
    # Every test of a GPU is of one stage.
    commands = [part for stage in stages if stage.name != "sanitizer" for part in stage.command]
    marked = [f for f in (ROOT / "tests").rglob("test_*.py") if MARK in f.read_text()]
    assert len(marked) == 6
    assert all(commands.count(str(file.relative_to(ROOT))) == 1 for file in marked)
    assert "-n" not in next(s.command for s in make_stages(()) if s.name == "tests")


def test_nothing_is_checked_without_a_gpu(monkeypatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setattr("tools.check_gpu.needs._gpu", lambda: None)
    monkeypatch.setattr("tools.check_gpu.__main__.find_needs", lambda: [Need("gpu", None, "all")])
    assert main([str(tmp_path), "--only", "ceilings,tests"]) == 2
    assert "missing: left out is all" in capsys.readouterr().out
    found = json.loads((tmp_path / "check_gpu.json").read_text())
    assert [stage["status"] for stage in found["stages"]] == ["left out", "left out"]
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--only", "speed"])
    assert "no stage 'speed': name some of ceilings, tests" in capsys.readouterr().err


@pytest.mark.megatron
def test_the_command_runs_quickly_on_any_machine(tmp_path: Path) -> None:
    pytest.importorskip("megatron.core")
    done = subprocess.run(
        ["bash", str(ROOT / "tools/check_gpu.sh"), str(tmp_path / "out"), "--quick"]
        + ["--only", "logprob,sanitizer", "--seconds", "3600"],
        cwd=tmp_path,
        env={"PYTHON": sys.executable, "PATH": "/usr/bin:/bin", "COMMIT": "told"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out/check_gpu.json").read_text())
    assert [stage["status"] for stage in found["stages"]] == ["left out", "ok"]
    (row,) = found["rows"]
    assert (row["benchmark"], row["machine"]["commit"]) == ("logprob", "told")
    assert (tmp_path / "out/check_gpu.md").read_text() in done.stdout
