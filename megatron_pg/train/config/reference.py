"""``python -m megatron_pg.train.config.reference``: every field of a configuration, as Markdown."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ... import attention, loss, rollout
from ...parallel import MEGATRON_NAMES, ParallelSizes
from .file import describe_type
from .ranges import range_of
from .sections import ParallelConfig, PromptsConfig, ServerConfig, TaskConfig, TrainConfig

# Sections whose fields are arguments of a class that describes them.
_ARGUMENTS_OF = {
    PromptsConfig: rollout.FilePrompts,
    TaskConfig: rollout.ReasoningGymTask,
    ServerConfig: rollout.OpenAIServerSource,
}
# A description that leaves names to choose from to a registry.
_REGISTRY = re.compile(r"``(?:\w+\.)?([A-Z_]{2,})``")
_YAML_WORDS = {"None": "null", "True": "true", "False": "false"}
_YAML_WORD = re.compile(r"\b(?:None|True|False)\b")
_INTRODUCTION = """\
# Every field of a configuration

A YAML file has these sections. What it leaves out has its default, and `section.key=value` on the
command line goes before the file; of a mapping it sets the fields that it names, and `{}` removes
all. Numbers are finite. Unknown keys and wrong types are refused, all in one message, and then
values out of range, likewise.
"""


def config_reference() -> str:
    """Markdown: a table of every section, with type, default, range and meaning of its fields."""
    return "\n".join([_INTRODUCTION, *(_table(*section) for section in sections())])


def sections(cls: type = TrainConfig, path: str = "") -> Iterator[tuple[str, type]]:
    """Every section by its path; one within another follows it."""
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            section = typing.cast(type, hint)
            yield f"{path}{name}", section
            yield from sections(section, f"{path}{name}.")


def descriptions(section: type) -> dict[str, str]:
    """What docstrings say of a section's fields, by name."""
    found: dict[str, str] = {}
    if section in _ARGUMENTS_OF:
        found |= _described(_ARGUMENTS_OF[section])
    if section is ParallelConfig:
        sizes = _described(ParallelSizes)
        found |= {name: sizes[field] for field, name in MEGATRON_NAMES.items()}
    for cls in reversed(section.__mro__):
        found |= _described(cls)
    return found


def _described(cls: type) -> dict[str, str]:
    """Names and texts under ``Attributes:`` or ``Args:`` of a docstring."""
    text = inspect.cleandoc(cls.__doc__ or "")
    block = re.search(r"^(?:Attributes|Args):\n((?: .*\n?|\n)+)", text, flags=re.MULTILINE)
    entries = re.split(r"^ {4}(?=\w)", block[1] if block else "", flags=re.MULTILINE)
    pairs = (" ".join(entry.split()).split(": ", 1) for entry in entries if entry.strip())
    return {name: meaning for names, meaning in pairs for name in names.split(", ")}


@dataclass(frozen=True, kw_only=True)
class FieldEntry:
    """What is said of a field, in words of YAML.

    Attributes:
        name, type, default: as a file has them.
        choices: range of a number or names to choose from; empty where there are none.
        meaning: from the docstring.
    """

    name: str
    type: str
    default: str
    choices: str
    meaning: str


def field_entries(path: str, section: type) -> Iterator[FieldEntry]:
    """The fields of a section in their order, sections within it left out."""
    hints, meanings = typing.get_type_hints(section), descriptions(section)
    for field in dataclasses.fields(section):
        if not dataclasses.is_dataclass(hints[field.name]):
            meaning = meanings.get(field.name, "")
            yield FieldEntry(
                name=field.name,
                type=describe_type(hints[field.name]).replace("'", '"'),
                default=_default(field),
                choices=range_of(f"{path}.{field.name}") or _choices(meaning),
                meaning=_YAML_WORD.sub(lambda word: _YAML_WORDS[word[0]], meaning),
            )


def about(section: type) -> str:
    """What a section's docstring says before its fields."""
    text = inspect.cleandoc(section.__doc__ or "").split("\n\nAttributes:")[0]
    return text.split("\n\nRaises:")[0]


def _table(path: str, section: type) -> str:
    told = about(section).replace("``", "`")
    lines = [f"## {path}", "", told, "", "| field | type | default | range | |", "|---" * 5 + "|"]
    for entry in field_entries(path, section):
        names = ", ".join(f"`{name}`" for name in entry.choices.split(", ") if name)
        cells = [
            f"`{entry.name}`",
            entry.type,
            f"`{entry.default}`",
            range_of(f"{path}.{entry.name}") or names,
            entry.meaning.replace("``", "`"),
        ]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return json.dumps(field.default_factory())
    return json.dumps(field.default)


def _choices(meaning: str) -> str:
    """The keys of the registry that a description names."""
    for name in _REGISTRY.findall(meaning):
        for package in (loss, rollout, attention):
            if names := getattr(package, name, ()):
                return ", ".join(json.dumps(one).replace('"', "") for one in names)
    return ""


if __name__ == "__main__":
    print(config_reference(), end="")
