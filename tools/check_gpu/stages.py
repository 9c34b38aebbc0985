"""The stages of the check in the order of their worth, and how one is run within its time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any
from xml.etree import ElementTree

from tools.check_gpu.needs import program

ROOT = Path(__file__).parents[2]
# Seconds that a stage gets to write what it has after its time is up.
GRACE = 10
_STATES = "tests/mcore/test_state_kernels.py"


@dataclass(frozen=True)
class Stage:
    """One command and what it leaves.

    Attributes:
        name: in the table, and for ``--only``.
        needs: names of what must be here.
        command: that is run in the repository; ``{out}`` is a folder for its files.
        quick: more arguments under ``--quick``; None leaves the stage out there.
        seconds: after which it is ended.
    """

    name: str
    needs: tuple[str, ...]
    command: tuple[str, ...]
    quick: tuple[str, ...] | None
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """What became of a stage.

    Attributes:
        status: "ok", "failed", "out of time" or "left out".
        detail: why, or what was found, in a line.
        rows: of its benchmark.
        tests: one dictionary a test: name, outcome, backend, error, message.
        ceilings: of the card, by name.
    """

    name: str
    status: str
    seconds: float
    detail: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    tests: list[dict[str, Any]] = field(default_factory=list)
    ceilings: dict[str, float] = field(default_factory=dict)


def make_stages(found: Iterable[str]) -> tuple[Stage, ...]:
    """The stages as what was ``found`` lets them run."""
    python, found = sys.executable, set(found)
    tests = (python, "-m", "pytest", "-q", "-rfE", "-o", "addopts=", "-p", "no:cacheprovider")
    report = "--junitxml={out}/junit.xml"
    side_by_side = ("-n", "6") if "xdist" in found else ()
    # Every tensor an allocation of its own: within a shared one nothing is out of bounds.
    sanitizer = (
        *("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "PYTORCH_ALLOC_CONF="),
        *(program("compute-sanitizer") or "compute-sanitizer", "--tool", "memcheck"),
    )

    def bench(
        name: str, seconds: float, *more: str, quick: tuple[str, ...] = (), package: str = ""
    ) -> Stage:
        command = (python, "tools/bench/run.py", name, "--json", "{out}/rows.json", *more)
        least = ("--quick", "--rounds", "1", "--ranks", "1")
        needs = ("torch", "gpu", "megatron-core", "rich", *[package] * bool(package))
        return Stage(name, needs, command, (*least, *quick), seconds)

    return (
        Stage(
            "ceilings",
            ("torch", "gpu"),
            (python, "-m", "tools.check_gpu.ceilings", "{out}"),
            None,
            60,
        ),
        Stage(
            "tests",
            ("torch", "gpu", "numpy", "pytest", "hypothesis"),
            (*tests, report, *side_by_side, "-m", "gpu", *_gpu_tests()),
            ("-m", "not gpu", "-k", "small_rows"),
            180,
        ),
        Stage(
            "sanitizer",
            ("torch", "gpu", "numpy", "pytest", "hypothesis", "compute-sanitizer"),
            (*sanitizer, "--error-exitcode=86", *tests, report, "-m", "gpu", "-k", "small_rows")
            + ("tests/attention/test_gpu.py",),
            None,
            90,
        ),
        bench("attention", 60, "--baselines", "written", quick=("--shapes", "P32 R8 G4")),
        bench("step", 100, quick=("--shapes", "P32 R8 G4")),
        bench("layer", 50, quick=("--shapes", "P32 R8 G4 ragged")),
        bench("logprob", 50, quick=("--shapes", "P32 R8 G4 ragged")),
        # Its kernels choose among many at their first launch, so they have a time of their own.
        Stage(
            "states",
            ("torch", "gpu", "numpy", "pytest", "hypothesis", "megatron-core"),
            (*tests, report, "-m", "gpu", _STATES),
            ("-m", "not gpu"),
            90,
        ),
        bench(
            "linear",
            60,
            *("--shapes", "P2048 R512 G8,tree"),
            quick=("--shapes", "P32 R8 G4 ragged"),
            package="flash-linear-attention",
        ),
        Stage(
            "recipe",
            ("torch", "gpu", "megatron-core", "omegaconf"),
            (
                *(python, "-m", "megatron_pg.train", "examples/recorded.yaml"),
                *("run.out={out}/run", "model.transformer_impl=local"),
            ),
            ("run.num_steps=1",),
            90,
        ),
        bench("resident", 60),
        Stage(
            "flex",
            ("torch", "gpu", "megatron-core", "rich", "triton", "compiler"),
            (
                *(python, "tools/bench/run.py", "attention", "--json", "{out}/rows.json"),
                *("--baselines", "flex", "--shapes", "P2048 R512 G8"),
            ),
            None,
            90,
        ),
    )


def _gpu_tests() -> list[str]:
    """Test modules that name the marker: collecting all others would take packages and time."""
    folder = ROOT / "tests"
    found = [file for file in folder.rglob("test_*.py") if "mark.gpu" in file.read_text()]
    return [path for file in sorted(found) if (path := str(file.relative_to(ROOT))) != _STATES]


def run_stage(stage: Stage, is_quick: bool, seconds: float, out: Path, log: IO[str]) -> Outcome:
    """Run a stage for at most ``seconds``; what it had written by then counts.

    Args:
        stage: whose needs are met.
        is_quick: with its quick arguments.
        seconds: that are left, at most.
        out: an empty folder for its files.
        log: gets everything that it prints.
    """
    command = [part.replace("{out}", str(out)) for part in stage.command]
    command += (stage.quick or ()) if is_quick else ()
    log.write(f"\n== {stage.name}: {' '.join(command)}\n")
    log.flush()
    started = time.monotonic()
    # A CPU takes what it takes; on a GPU one stage must not take another's time.
    code = run_for(command, seconds if is_quick else min(seconds, stage.seconds), log)
    passed = time.monotonic() - started
    tests = read_tests(out / "junit.xml")
    rows = _read_json(out / "rows.json", [])
    ceilings = _read_json(out / "ceilings.json", {})
    status = "ok" if code == 0 else "out of time" if code is None else "failed"
    return Outcome(stage.name, status, passed, _detail(code, tests, rows), rows, tests, ceilings)


def run_for(command: Sequence[str], seconds: float, log: IO[str]) -> int | None:
    """Exit code, None where the time was up: Ctrl-C first, so that files are written, then kill."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=log, stderr=log, env=_environment(), start_new_session=True
    )
    code: int | None = None
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    finally:
        with suppress(ProcessLookupError):  # what it has started, too
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return code


def read_tests(file: Path) -> list[dict[str, Any]]:
    """What pytest's report says of every test: name, outcome, message and recorded properties."""
    if not file.is_file():
        return []
    found = []
    for case in ElementTree.parse(file).iter("testcase"):
        outcome, message = "passed", ""
        for kind in ("failure", "error", "skipped"):
            for said in case.iter(kind):
                outcome, message = kind, said.get("message", "")
        properties = {p.get("name", ""): p.get("value", "") for p in case.iter("property")}
        name = f"{case.get('classname')}::{case.get('name')}"
        found.append({"name": name, "outcome": outcome, "message": message, **properties})
    return found


def _read_json(file: Path, nothing: Any) -> Any:
    return json.loads(file.read_text()) if file.is_file() else nothing


def _detail(code: int | None, tests: list[dict[str, Any]], rows: list[dict[str, Any]]) -> str:
    outcomes = [test["outcome"] for test in tests]
    counted = [f"{outcomes.count(o)} {o}" for o in dict.fromkeys(outcomes)]
    counted += [f"{len(rows)} comparison(s)"] * bool(rows)
    if code:
        counted.append(f"exit code {code}: see the log")
    return ", ".join(counted)


def _environment() -> dict[str, str]:
    return os.environ | {
        "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "ignore",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    }
