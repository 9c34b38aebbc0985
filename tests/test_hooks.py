"""The hooks of a commit: their commands are there, and they say what the tests say."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.test_imports import MAY_IMPORT, MEGATRON
from tests.utils import ROOT

FILE = ROOT / ".pre-commit-config.yaml"
REPOSITORIES = yaml.safe_load(FILE.read_text())["repos"]
LOCAL: dict[str, dict[str, Any]] = {
    hook["id"]: hook for repo in REPOSITORIES if repo["repo"] == "local" for hook in repo["hooks"]
}


def test_the_configuration_is_one() -> None:
    command = [sys.executable, "-m", "pre_commit", "validate-config", str(FILE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"ruff", "ruff-format", "mypy", "megatron-free"} <= LOCAL.keys()


@pytest.mark.parametrize("name", LOCAL)
def test_a_local_hook_finds_its_command(name: str) -> None:
    hook = LOCAL[name]
    if hook["language"] == "pygrep":
        re.compile(hook["entry"])
        return
    assert hook["language"] == "system", "another language installs an environment"
    program, *arguments = hook["entry"].split()
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    found = shutil.which(program, path=path)
    assert found is not None, f"{program} is not in the dev extra"
    done = subprocess.run([found, *arguments, "--help"], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("repo", [r for r in REPOSITORIES if r["repo"] != "local"], ids=str)
def test_a_foreign_hook_is_pinned(repo: dict[str, Any]) -> None:
    assert repo["repo"].startswith("https://github.com/pre-commit/")
    assert re.fullmatch(r"v\d+\.\d+\.\d+", repo["rev"])


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_megatron_is_forbidden_where_the_arrows_forbid_it(package: str) -> None:
    files = LOCAL["megatron-free"]["files"]
    for module in ("__init__.py", "some/room.py"):
        is_forbidden = re.search(files, f"megatron_pg/{package}/{module}") is not None
        assert is_forbidden == (package not in MEGATRON)
    assert re.search(files, "megatron_pg/__init__.py")


@pytest.mark.parametrize(
    ("line", "is_caught"),
    [
        ("import megatron", True),
        ("from megatron import core", True),
        ("    from megatron.core import parallel_state", True),
        ("import megatron.core as core", True),
        ("import megatron_pg", False),
        ("from megatron_pg.mcore import cpu", False),
        ("# import megatron is for mcore alone", False),
    ],
)
def test_an_import_of_megatron_is_caught(line: str, is_caught: bool) -> None:
    assert (re.search(LOCAL["megatron-free"]["entry"], line) is not None) == is_caught
