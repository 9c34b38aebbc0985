"""The reference of a configuration: complete, as it is stored, and true of what is refused."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import typing
from typing import Any

import pytest

pytest.importorskip("megatron.core")

from megatron_pg.train import TrainConfig  # noqa: E402
from megatron_pg.train.config.ranges import out_of_range, range_of  # noqa: E402
from megatron_pg.train.config.reference import descriptions, sections  # noqa: E402
from tests.utils import ROOT  # noqa: E402

COMMAND = "megatron_pg.train.config.reference"
FIELDS = [
    (path, section, field.name)
    for path, section in sections()
    for field in dataclasses.fields(section)
    if not dataclasses.is_dataclass(typing.get_type_hints(section)[field.name])
]
RANGED = [f"{path}.{name}" for path, _, name in FIELDS if range_of(f"{path}.{name}")]
STORED = (ROOT / "megatron_pg/train/CONFIG.md").read_text()


def test_the_stored_file_is_what_the_command_prints() -> None:
    """In a process of its own: other tests register names that belong to nobody."""
    command = [sys.executable, "-W", "ignore", "-m", COMMAND]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == STORED, f"python -m {COMMAND} > megatron_pg/train/CONFIG.md"


def test_every_field_is_there_once() -> None:
    assert len(FIELDS) > 80
    assert len(re.findall(r"^\| `", STORED, flags=re.MULTILINE)) == len(FIELDS)


@pytest.mark.parametrize(
    ("section", "name"), [pytest.param(s, n, id=f"{p}.{n}") for p, s, n in FIELDS]
)
def test_a_field_is_described(section: type, name: str) -> None:
    assert len(descriptions(section).get(name, "").split()) > 1


def with_value(config: Any, path: str, value: float) -> Any:
    name, _, rest = path.partition(".")
    if rest:
        value = with_value(getattr(config, name), rest, value)
    return dataclasses.replace(config, **{name: value})


@pytest.mark.parametrize("path", RANGED)
def test_a_value_just_outside_its_range_is_refused(path: str) -> None:
    for rule in range_of(path).split(", ") if "[" not in range_of(path) else [range_of(path)]:
        number = float(re.findall(r"[\d.]+", rule)[-1])
        outside = {"at least": number - 1, "above": number, "below": number}
        value = outside.get(rule.rpartition(" ")[0], number + 1)
        assert any(
            problem.startswith(f"{path}=")
            for problem in out_of_range(with_value(TrainConfig(), path, value))
        ), f"{path}={value}: {rule}"
