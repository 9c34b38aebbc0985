"""Whatever a model samples, what is shown of it is text."""

from __future__ import annotations

import io
import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("megatron.core")

from megatron_pg.train.metrics.generations import (  # noqa: E402
    Generation,
    Generations,
    printable,
    write_generations,
)
from megatron_pg.train.metrics.sinks import Console, WeightsAndBiases, _markdown  # noqa: E402
from tests.hostile import seeds  # noqa: E402

PIECES = [
    *("\x1b[31mred", "\x1b]0;title\x07", "\x1b[2J", "\r", "\n", "\t", "\x00", "\x7f", "\x9b31m"),
    *("[bold red]x[/]", "[/nothing]", ":smile:", "[link=file:///etc/passwd]y[/link]"),
    *("\u202egnp.exe", "\u2028", "\ufeff", "\ud800", "\U000e0041", "漢字", "é", "😀", "plain "),
    *("```", "    ", "<script>", "</td>", "\\x1b", "' OR 1", "{0}", "%s"),
]


def hostile(seed: int) -> str:
    chance = random.Random(seed)
    return "".join(chance.choices(PIECES, k=chance.randint(0, 30))) * chance.choice([1, 1, 200])


def of_text(text: str) -> Generations:
    one = Generation(
        group_id=text,
        prompt=text,
        response=text,
        reward=0.5,
        status="completed",
        num_tokens=3,
        data_source=text,
        reward_metrics={text: 1.0},
    )
    return Generations("eval", 7, [one], [one])


@pytest.mark.parametrize("seed", seeds(cost=5))
@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_nothing_that_was_sampled_reaches_the_console_as_a_command(
    seed: int, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console as RichConsole

    written, text = io.BytesIO(), hostile(seed)
    console = Console(3)
    file = io.TextIOWrapper(written, encoding=encoding)
    console.console = RichConsole(file=file, force_terminal=True, color_system="truecolor")
    console.show(of_text(text))
    file.flush()
    lines = written.getvalue().decode(encoding).split("\n")
    assert len(lines) == 4 and lines[-1] == "", "a head, the prompt and the response"
    assert all(char.isprintable() for line in lines for char in line)
    assert all(len(line) < 10 * 300 + 100 for line in lines)
    kept = printable(text, 300).encode(encoding, "backslashreplace").decode(encoding)
    assert lines[2] == f"  response: {kept}"


def test_what_can_be_printed_stays_as_it_is() -> None:
    assert printable("2 + 2 = [4] :smile: é漢字😀", 100) == "2 + 2 = [4] :smile: é漢字😀"
    assert printable("a\nb\x1b[0m", 100) == "a\\nb\\x1b[0m"
    assert printable("a\nb\r", 100, keep_lines=True) == "a\nb\\r"
    assert printable("x" * 1500, 300) == "x" * 300 + " ... and 1,200 more characters"


@pytest.mark.parametrize("seed", seeds(cost=5))
def test_files_hold_every_character(seed: int, tmp_path: Path) -> None:
    text = hostile(seed)
    for _ in range(2):  # a step that is repeated
        write_generations(tmp_path / "generations", of_text(text))
    (line,) = (tmp_path / "generations" / "eval_7.jsonl").read_text().splitlines()
    found = json.loads(line)
    assert (found["prompt"], found["response"], found["reward_metrics"]) == (text, text, {text: 1})


@pytest.mark.parametrize("seed", seeds(cost=5))
def test_pages_of_tensorboard_hold_blocks_that_nothing_ends(seed: int) -> None:
    (one,) = of_text(hostile(seed)).shown
    head, *lines = _markdown(one).split("\n")
    assert head == "### reward 0.5, completed"
    assert {line for line in lines if not line.startswith("    ")} <= {"", "prompt", "response"}
    assert all(line.isprintable() for line in lines)
    _markdown(one).encode()


def test_a_table_goes_to_weights_and_biases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[Any] = []
    stand_in = SimpleNamespace(
        init=lambda **settings: SimpleNamespace(log=lambda what, step: logged.append((what, step))),
        Table=lambda columns, data: [dict(zip(columns, row)) for row in data],
    )
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    sink = WeightsAndBiases(tmp_path, "project", {})
    sink.show(of_text("a\nb\ud800"))
    ((what, step),) = logged
    assert step == 7 and list(what) == ["generations/eval"]
    (row,) = what["generations/eval"]
    assert row["response"] == "a\nb\\ud800" and row["reward"] == 0.5
