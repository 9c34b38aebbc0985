"""What the command-line tools share: progress bars, dtypes, one-line errors.

Tools import the package once their arguments are read: ``--help`` waits for nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# How a tool spells what the library's errors advise.
_FLAGS = {
    "out_dir=DIR": "--out DIR",
    "hf_config=DIR": "--hf-config DIR",
    "trust_pickle=True": "--trust-pickle",
    "weights_only=True": "--weights-only",
    "dtype=DTYPE": "--dtype DTYPE",
}


def dtype(name: str) -> torch.dtype:
    """``float32``, ``bfloat16``, ``float16`` (or fp32, bf16, fp16) for argparse."""
    from megatron_pg.checkpoint import parse_dtype

    try:
        found = parse_dtype(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    assert found is not None
    return found


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A ``progress(done, total)`` that draws a bar on a terminal's standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (what, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def report_errors() -> Iterator[None]:
    """Exit with 2 and one clear line for a mistake of the user; other errors keep their trace."""
    try:
        yield
    except (ValueError, NotImplementedError) as error:
        print(f"error: {with_flags(error)}", file=sys.stderr)
        raise SystemExit(2) from None


def printable(value: object) -> str:
    """A value on one line; what would steer a terminal, or cannot be written to it, is escaped.

    Names and settings in a checkpoint may hold any character.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(value))


def with_flags(message: object) -> str:
    """A library's message, printable, with the tools' flags in place of its parameters."""
    return in_flags(printable(message))


def in_flags(text: str) -> str:
    """The same text with the tools' flags in place of a library's parameters."""
    from megatron_pg.parallel import MEGATRON_NAMES

    sizes = {name: size for size, name in MEGATRON_NAMES.items()}
    for parameter, flag in (_FLAGS | sizes).items():
        text = text.replace(parameter, flag)
    return text
