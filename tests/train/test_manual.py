"""What the command says of a configuration: every field, and a file to begin with."""

from __future__ import annotations

import dataclasses
import re
import typing
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

pytest.importorskip("megatron.core")

from megatron_pg.train import TrainConfig, load_config  # noqa: E402
from megatron_pg.train.config import config_example, config_help  # noqa: E402
from megatron_pg.train.config.reference import descriptions, field_entries, sections  # noqa: E402
from tests.train import tiny  # noqa: E402

FIELDS = [
    pytest.param(path, section, entry, id=f"{path}.{entry.name}")
    for path, section in sections()
    for entry in field_entries(path, section)
]
HELP = " ".join(config_help().split())
EXAMPLE = config_example()


@pytest.mark.parametrize(("path", "section", "entry"), FIELDS)
def test_a_field_stands_in_the_help_with_its_default_and_meaning(
    path: str, section: type, entry: typing.Any
) -> None:
    head = f" {path}.{entry.name} ({entry.type}, default {entry.default}"
    (after,) = [HELP[m.end() :] for m in re.finditer(re.escape(" ".join(head.split())), HELP)]
    meaning = descriptions(section)[entry.name].replace("``", "").split()
    # Words of Python are words of YAML here.
    assert set(meaning[:4]) - {"None", "True", "False"} <= set(after.split()[: len(meaning) + 20])
    assert after.startswith((")", f", {entry.choices})"))


def test_the_example_is_every_field_at_its_default(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(EXAMPLE)
    config = load_config(file, ["model.vocab_size=50", "rollout.files=[a.jsonl]"])
    default = TrainConfig()
    assert config == replace(
        default,
        model=replace(default.model, vocab_size=50),
        rollout=replace(default.rollout, files=["a.jsonl"]),
    )
    keys = names(TrainConfig)
    assert set(flat(yaml.safe_load(EXAMPLE))) == keys and len(keys) > 90
    # A comment before each.
    lines = EXAMPLE.splitlines()
    bare = [line for before, line in zip(lines, lines[1:]) if re.match(r" +\w+:", line)
            and not before.strip().startswith("#")]  # fmt: skip
    assert bare == [] and max(map(len, lines)) <= 100


def names(section: type, prefix: str = "") -> set[str]:
    found = set()
    for name, hint in typing.get_type_hints(section).items():
        inner = typing.cast(type, hint)
        is_section = dataclasses.is_dataclass(hint)
        found |= names(inner, f"{prefix}{name}.") if is_section else {f"{prefix}{name}"}
    return found


def flat(content: dict[str, typing.Any], prefix: str = "") -> list[str]:
    found = []
    for name, value in content.items():
        is_section = isinstance(value, dict) and value
        found += flat(value, f"{prefix}{name}.") if is_section else [f"{prefix}{name}"]
    return found


def test_the_command_prints_them() -> None:
    helped = tiny.launch(["--help"])
    assert helped.returncode == 0 and " ".join(helped.stdout.split()).endswith(HELP)
    assert "--example" in helped.stdout and "--dry-run" in helped.stdout
    told = tiny.launch(["--example"])
    assert (told.returncode, told.stdout) == (0, EXAMPLE)
