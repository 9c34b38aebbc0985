"""Every field of a configuration on a terminal, and as a file to begin with."""

from __future__ import annotations

import dataclasses
import textwrap
import typing
from collections.abc import Iterator

from .reference import about, field_entries, sections
from .sections import TrainConfig

_EXAMPLE = """\
# Every field of a run, at its default. Change what you need and leave out the rest: a run needs
# model.hf (or model.vocab_size and model.transformer) and rollout.files (or rollout.source).
"""


def config_help(width: int = 100) -> str:
    """A paragraph a field: name, type, default, range and meaning."""
    return "\n".join(line for path, section in sections() for line in _help(path, section, width))


def config_example() -> str:
    """A commented YAML file that ``load_config`` reads as the defaults."""
    return _EXAMPLE + "\n".join(_yaml(TrainConfig, "", 0)) + "\n"


def _help(path: str, section: type, width: int) -> Iterator[str]:
    yield ""
    yield from _wrapped(f"{path}: {_plain(about(section))}", width, "")
    for entry in field_entries(path, section):
        facts = [entry.type, f"default {entry.default}", entry.choices]
        yield f"  {path}.{entry.name} ({', '.join(filter(None, facts))})"
        yield from _wrapped(_plain(entry.meaning), width, " " * 6)


def _yaml(section: type, path: str, depth: int) -> Iterator[str]:
    """The fields of a section, then the sections within it."""
    indent = "  " * depth
    for entry in field_entries(path, section):
        told = f"{_plain(entry.meaning)} {f'[{entry.choices}]' if entry.choices else ''}"
        yield from _wrapped(told, 100, f"{indent}# ")
        yield f"{indent}{entry.name}: {entry.default}"
    for name, hint in typing.get_type_hints(section).items():
        if dataclasses.is_dataclass(hint):
            inner = typing.cast(type, hint)
            yield ""
            yield from _wrapped(_plain(about(inner)), 100, f"{indent}# ")
            yield f"{indent}{name}:"
            yield from _yaml(inner, f"{path}.{name}" if path else name, depth + 1)


def _plain(text: str) -> str:
    return " ".join(text.replace("``", "").split())


def _wrapped(text: str, width: int, indent: str) -> list[str]:
    return textwrap.wrap(
        text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )
