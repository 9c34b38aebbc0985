"""Tools start at once: what they compute with is imported when it is needed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.utils import ROOT

TOOLS = sorted(
    str(path.relative_to(ROOT / "tools"))
    for path in (ROOT / "tools").rglob("*.py")
    if "parse_args" in path.read_text() and "__main__" in path.read_text()
)
_RUN = """
import runpy, sys
sys.argv = [sys.argv[1], "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    heavy = {"torch", "megatron", "numpy", "transformers", "safetensors", "rich"}
    print("imported:", sorted(heavy & sys.modules.keys()))
"""


def test_tools_are_found() -> None:
    assert {"hf_to_megatron.py", "plan_sharing.py", "bench/run.py"} <= set(TOOLS)


@pytest.mark.parametrize("tool", TOOLS)
def test_help(tool: str) -> None:
    path = ROOT / "tools" / tool
    # In front of the path is the folder of a script, as python has it.
    code = f"import sys; sys.path.insert(0, {str(path.parent)!r})\n{_RUN}"
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr
    assert "imported: []" in done.stdout, done.stdout[-200:]
